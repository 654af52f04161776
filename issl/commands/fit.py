"""`issl fit`: the curvature of a set of images as a file, which `issl influence --curvature-from`
scores under."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from issl.commands.options import (
    add_scoring_arguments,
    computing_of,
    load_images,
    measurement,
    write_broken,
)
from issl.devices import pick_device
from issl.files import writable
from issl.influence.kept import fit_measurement
from issl.influence.scorer import with_features
from issl.pretraining.other_encoders import encoder_asked_for


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `issl fit`."""
    add_scoring_arguments(command)
    command.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="the curvature, .safetensors"
    )


def main(options: argparse.Namespace) -> int:
    """Run the command; raises IsslError for bad input, before any long work."""
    writable(options.out, (".safetensors",))
    device, began = pick_device(options.device), time.monotonic()
    opened = encoder_asked_for(options)
    what, images = measurement(options, opened), load_images(options, opened)
    if options.skip_broken:
        images = with_features(opened.encoder, images, what, device)
    fitted = fit_measurement(opened.encoder, images, what, computing_of(options, device))
    fitted.save(options.out)
    print(
        f"{options.out}: curvature of {fitted.n} images of {images.name}, "
        f"{len(fitted.scorer.layers)} layers, {options.out.stat().st_size / 1e6:.1f} MB, in "
        f"{time.monotonic() - began:.0f} s{write_broken(options.out, images)}",
        flush=True,
    )
    return 0
