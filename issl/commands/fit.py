"""`issl fit`: the curvature of a set of images as a file, which `issl influence --curvature-from`
scores under."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from issl.commands.measuring import (
    add_common_arguments,
    computing_of,
    load_images,
    measurement,
    write_broken,
)
from issl.devices import pick_device
from issl.files import writable
from issl.influence.fitted import fit
from issl.influence.measurement import with_features
from issl.pretraining.other_encoders import encoder_asked_for
from issl.shards import from_torchrun


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `issl fit`."""
    add_common_arguments(command)
    command.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="the curvature, .safetensors"
    )


def main(options: argparse.Namespace) -> int:
    """Run the command; raises IsslError for bad input, before any long work."""
    writable(options.out, (".safetensors",))
    device, began = pick_device(options.device), time.monotonic()
    opened = encoder_asked_for(options)
    what, images = measurement(options, opened), load_images(options, opened)
    with from_torchrun(device, options.timeout) as shards:
        if options.skip_broken:
            images = with_features(
                opened.encoder, images, what, computing_of(options, shards, device)
            )
        fitted = fit(
            opened.encoder,
            images,
            what.perturbation,
            what.curvature,
            what.seed,
            draws=what.draws,
            average=what.average,
            skip=what.skip,
            untrained=what.untrained,
            computing=computing_of(options, shards, device),
        )
        if shards.rank == 0:
            fitted.save(options.out)
            size, many = (
                options.out.stat().st_size / 1e6,
                f" on {shards.world} processes" if shards.world > 1 else "",
            )
            left_out = write_broken(options.out, images)
            print(
                f"{options.out}: curvature of {fitted.n} images of {images.name}, {len(fitted.damping)} layers, "
                f"{size:.1f} MB{many}, in {time.monotonic() - began:.0f} s{left_out}",
                flush=True,
            )
    return 0
