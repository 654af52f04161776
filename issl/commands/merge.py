"""`issl merge`: add curvatures of different images, which `issl fit` wrote, into one file."""

from __future__ import annotations

import argparse
from functools import reduce
from pathlib import Path

from issl.files import writable
from issl.influence.kept_curvature import KeptCurvature, read


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `issl merge`."""
    add = command.add_argument
    add(
        "curvatures",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="curvature files of one encoder and one setting",
    )
    add(
        "--out",
        required=True,
        type=Path,
        metavar="FILE",
        help="the curvature of all their images, .safetensors",
    )


def main(options: argparse.Namespace) -> int:
    """Run the command; raises IsslError for files that do not belong together."""
    writable(options.out, (".safetensors",))
    merged = reduce(KeptCurvature.add, map(read, options.curvatures))
    merged.save(options.out)
    print(f"{options.out}: curvature of {merged.n} images, in {len(merged.parts)} parts")
    return 0
