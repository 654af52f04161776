"""`issl influence`: score your own images under your own encoder."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from issl import engine
from issl.commands import pictures
from issl.commands.options import (
    add_scoring_arguments,
    computing_of,
    load_images,
    measurement,
    write_broken,
)
from issl.data.images import Images, own_names
from issl.devices import pick_device
from issl.errors import IsslError
from issl.files import atomic, writable
from issl.influence.kept import load_fitted
from issl.influence.layers import find_layers
from issl.influence.parts import Scoring, score_in_parts
from issl.influence.scorer import with_features
from issl.influence.scores import score_measurement
from issl.pretraining.other_encoders import encoder_asked_for


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `issl influence`."""
    add = command.add_argument
    add_scoring_arguments(command)
    add(
        "--out",
        required=True,
        type=Path,
        metavar="FILE",
        help="scores, .csv or .parquet, beside it a picture, .png; or, for a large set, a folder "
        "that is filled in parts and continues after a kill",
    )
    engine.add_arguments(command)
    add(
        "--curvature-from",
        type=Path,
        metavar="FILE",
        help="score under a curvature that `issl fit` kept, with its settings",
    )
    add(
        "--memory",
        default="auto",
        choices=["auto", "ram", "mapped", "recomputed"],
        help="where gradients stay (auto)",
    )
    add("--store", type=Path, metavar="DIR", help="where mapped gradients stay meanwhile")


def main(options: argparse.Namespace) -> int:
    """Run the command; raises IsslError for bad input, before any long work."""
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
    device, began = pick_device(options.device), time.monotonic()
    opened = encoder_asked_for(options)
    what = measurement(options, opened)
    layers, _ = find_layers(opened.encoder, what.skip, what.untrained)
    images = load_images(options, opened)
    print(
        f"{len(images)} images of {images.name} at {images.pixels.shape[-1]} px, {opened.about}, "
        f"{len(layers)} layers, {what.curvature}, {device}",
        flush=True,
    )
    if options.skip_broken:
        images = with_features(opened.encoder, images, what, device)
    computing = computing_of(options, device)
    computing = replace(computing, memory=options.memory, store=options.store)
    if options.curvature_from is not None:
        fitted = load_fitted(options.curvature_from, opened.encoder, device=device)
        scores = fitted.score(images, computing=computing)
    else:
        scores = score_measurement(opened.encoder, images, what, computing)
    write_scores(out, scores, images)
    about = f"{Path(options.encoder).name}, {type(what.curvature).__name__}"
    pictures.contact_sheet(out.with_suffix(".png"), scores, images, about)
    print(
        f"{out} (.png): {len(scores)} scores in {time.monotonic() - began:.0f} s"
        f"{write_broken(out, images)}",
        flush=True,
    )
    return 0


def _in_parts(options: argparse.Namespace) -> int:
    """Fill a folder with scores, in parts; 1 if some could not be made."""
    if options.store is not None:
        raise IsslError(
            f"--store {options.store}: --out {options.out} is filled in parts, which keep no "
            "gradients; drop it"
        )
    began, where = time.monotonic(), engine.asked_for(options) or engine.Engine()
    given = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in vars(options).items())
    load = partial(_scoring, tuple(pair for pair in given if pair[0] != "run"))
    images = load().images
    tasks = score_in_parts(options.out, load)
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
    options, device = argparse.Namespace(**dict(given)), pick_device(dict(given)["device"])
    opened = encoder_asked_for(options)
    what, images = measurement(options, opened), load_images(options, opened)
    if options.skip_broken:
        images = with_features(opened.encoder, images, what, device)
    computing = computing_of(options, device)
    return Scoring(opened.encoder, images, what, computing, options.curvature_from)


def write_scores(out: Path, scores: pd.DataFrame, images: Images) -> None:
    """The scores with what is known about each image; the settings in the parquet's metadata, or
    in a .json beside a CSV."""
    beside = own_names(images.attributes, [str(name) for name in scores if name != "index"])
    table = scores.merge(beside, on="index", how="left", validate="one_to_one")
    table.attrs = scores.attrs
    with atomic(out) as part:
        if out.suffix == ".parquet":
            table.to_parquet(part, index=False)
        else:
            table.to_csv(part, index=False)
    if out.suffix == ".csv":
        with atomic(out.with_suffix(".json")) as part:
            part.write_text(json.dumps(scores.attrs, indent=1) + "\n")
