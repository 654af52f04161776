"""`issl influence`: score your own images under your own encoder."""

from __future__ import annotations

import argparse
import time
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from issl import engine
from issl.commands import pictures
from issl.commands.options import add_scoring_arguments, scoring_of, write_broken
from issl.commands.reference import open_reference, percentiles
from issl.errors import IsslError
from issl.files import atomic, writable, write_json
from issl.influence.layers import find_layers
from issl.influence.parts import Scoring, score_in_parts, with_attributes
from issl.influence.scores import self_influence


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add_scoring_arguments(command)
    add(
        "--out",
        required=True,
        type=Path,
        metavar="FILE",
        help="scores, .csv or .parquet, with a picture, .png, beside it; or, for a large set, a "
        "folder that is filled in parts and can continue after a kill",
    )
    engine.add_arguments(command)
    kept = "score with a curvature that `issl fit` saved, and with its settings"
    add("--curvature-from", type=Path, metavar="FILE", help=kept)
    beside = "add each score's percentile among the released scores of such an encoder"
    add("--reference", metavar="NAME", help=f"{beside}, such as cifar10-simclr-w16")
    memories = ["auto", "ram", "recomputed"]
    add("--memory", default="auto", choices=memories, help="where gradients are kept (auto)")


def main(options: argparse.Namespace) -> int:
    out: Path = options.out
    if out.suffix in ("", ".parquet") and find_spec("pyarrow") is None:
        raise IsslError(f"--out {out}: parquet needs pyarrow; pip install pyarrow, or write .csv")
    if not out.suffix:
        return _in_parts(options)
    if engine.asked_for(options) is not None:
        raise IsslError(
            f"--jobs, --cluster and --scheduler fill a folder in parts; --out {out} is one file"
        )
    writable(out, (".csv", ".parquet"))
    began = time.monotonic()
    opened, asked = scoring_of(options)
    images, what, computing = asked.images, asked.what, asked.computing
    reference = None
    if options.reference is not None:
        reference = open_reference(options.reference, opened.encoder, what)
    layers, _ = find_layers(opened.encoder, what.skip, what.untrained)
    print(
        f"{len(images)} images of {images.name} at {images.pixels.shape[-1]} px, {opened.about}, "
        f"{len(layers)} layers, {what.curvature}, {computing.device}",
        flush=True,
    )
    if asked.kept is not None:
        scores = asked.fitted(asked.kept).score(images, computing=computing)
    else:
        scores = self_influence(opened.encoder, images, **vars(what), computing=computing)
    table = with_attributes(scores, images)
    if reference is not None:
        table["reference_percentile"] = percentiles(table["influence"], reference)
        above = (table["reference_percentile"] > 95).mean()
        print(f"{above:.1%} of the images are above the 95th percentile of {options.reference}")
    with atomic(out) as part:
        if out.suffix == ".parquet":
            table.to_parquet(part, index=False)
        else:
            table.to_csv(part, index=False)
    if out.suffix == ".csv":  # the settings, which a parquet has in its metadata
        write_json(out.with_suffix(".json"), scores.attrs, indent=1)
    about = f"{Path(options.encoder).name}, {type(what.curvature).__name__}"
    pictures.contact_sheet(out.with_suffix(".png"), scores, images, about)
    print(
        f"{out} (.png): {len(scores)} scores in {time.monotonic() - began:.0f} s"
        f"{write_broken(out, images)}",
        flush=True,
    )
    return 0


def _in_parts(options: argparse.Namespace) -> int:
    """Fill a folder with scores, in parts; returns 1 if some parts could not be made."""
    if options.reference is not None:
        raise IsslError(f"--reference {options.reference}: --out {options.out} must be one file")
    began, where = time.monotonic(), engine.asked_for(options) or engine.Engine()
    given = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in vars(options).items())
    load = partial(_scoring, tuple(pair for pair in given if pair[0] != "run"))
    images, tasks = load().images, score_in_parts(options.out, load)
    print(f"{len(images)} images of {images.name}, {load().what.curvature}", flush=True)
    failed = 0
    for done, ended in enumerate(where.run(tasks), 1):
        word = f"FAILED: {ended.error}" if ended.error else f"{ended.seconds:.1f} s"
        print(f"{done:4} of {len(tasks)}  {ended.name}  {word}", flush=True)
        failed += bool(ended.error)
    print(
        f"{options.out}/scores/*.parquet: {len(tasks) - failed} of {len(tasks)} missing parts made "
        f"in {time.monotonic() - began:.0f} s{write_broken(options.out / 'scores', images)}"
    )
    return int(failed > 0)


@lru_cache(maxsize=1)
def _scoring(given: tuple[tuple[str, Any], ...]) -> Scoring:
    """What these options ask for; opened once in each process."""
    return scoring_of(argparse.Namespace(**dict(given)))[1]
