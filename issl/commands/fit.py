"""`issl fit`: save the curvature of a set of images to a file, to score others with
`issl influence --curvature-from`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from issl.commands.options import add_scoring_arguments, scoring_of, write_broken
from issl.files import writable
from issl.influence.kept import fit


def add_arguments(command: argparse.ArgumentParser) -> None:
    add_scoring_arguments(command)
    help_ = "the curvature, .safetensors"
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help=help_)


def main(options: argparse.Namespace) -> int:
    writable(options.out, (".safetensors",))
    began = time.monotonic()
    opened, asked = scoring_of(options)
    images = asked.images
    fitted = fit(opened.encoder, images, **vars(asked.what), computing=asked.computing)
    fitted.save(options.out)
    print(
        f"{options.out}: curvature of {fitted.n} images of {images.name}, "
        f"{len(fitted.scorer.layers)} layers, {options.out.stat().st_size / 1e6:.1f} MB, in "
        f"{time.monotonic() - began:.0f} s{write_broken(options.out, images)}",
        flush=True,
    )
    return 0
