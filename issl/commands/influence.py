"""`issl influence`: score your own images under your own encoder, in one process or in several
(torchrun)."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pandas as pd

from issl import engine
from issl.commands.measuring import (
    add_common_arguments,
    computing_of,
    load_images,
    measured,
    write_broken,
)
from issl.data.images import own_names
from issl.devices import pick_device
from issl.errors import IsslError
from issl.files import atomic, writable
from issl.influence.fitted import fit_and_score, load_fitted
from issl.influence.layers import find_layers
from issl.influence.measurement import with_features
from issl.influence.parts import Scoring, score_in_parts
from issl.influence.self_influence import self_influence
from issl.pretraining.other_encoders import encoder_asked_for
from issl.shards import ONE, from_torchrun


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `issl influence`."""
    add = command.add_argument
    add_common_arguments(command)
    add(
        "--out",
        required=True,
        type=Path,
        metavar="FILE",
        help="scores, .parquet or .csv, beside it a picture, .png; or a folder, for a large set: it is filled in "
        "parts (--jobs, --cluster, --scheduler), and continues after a kill",
    )
    engine.add_arguments(command)
    add(
        "--save-curvature",
        type=Path,
        metavar="FILE",
        help="keep the curvature of these images, .safetensors",
    )
    add(
        "--curvature-from",
        type=Path,
        metavar="FILE",
        help="score under a curvature that was kept, with its settings: one pass, no gradients stored",
    )
    add(
        "--memory",
        default="auto",
        choices=["auto", "ram", "mapped", "recomputed"],
        help="of gradients (auto)",
    )
    add(
        "--memory-gb",
        type=float,
        help="gigabytes for the gradients (default: half of the free memory)",
    )
    add(
        "--store",
        type=Path,
        metavar="DIR",
        help="keep gradients here; the same command continues after an interruption",
    )


def main(options: argparse.Namespace) -> int:
    """Run the command; raises IsslError for bad input, before any long work."""
    out: Path = options.out
    if not out.suffix:
        return _in_parts(options)
    if engine.asked_for(options) is not None:
        raise IsslError(
            f"--jobs, --cluster and --scheduler fill a folder in parts; --out {out} is one file"
        )
    writable(out, (".parquet", ".csv"))
    device, began = pick_device(options.device), time.monotonic()
    opened = encoder_asked_for(options)
    what, kept = measured(options, opened)
    layers, _ = find_layers(opened.encoder, what.skip, what.untrained)
    images = load_images(options, opened)
    with from_torchrun(device, options.timeout) as shards:
        first = shards.rank == 0
        if first:
            side, many = (
                images.pixels.shape[-1],
                f" on {shards.world} processes" if shards.world > 1 else "",
            )
            print(
                f"{len(images)} images of {images.name} at {side} px, {opened.about}, {len(layers)} layers, "
                f"{what.curvature}, {device}{many}",
                flush=True,
            )
        if options.skip_broken:
            images = with_features(
                opened.encoder, images, what, computing_of(options, shards, device)
            )
        computing = replace(
            computing_of(options, shards, device),
            memory=options.memory,
            memory_gb=options.memory_gb,
            store=options.store,
        )
        if kept is not None:
            scores = load_fitted(kept, opened.encoder, device=computing.device).score(
                images, computing=computing
            )
        elif options.save_curvature is not None:
            fitted, scores = fit_and_score(opened.encoder, images, what, computing)
            if first:
                fitted.save(options.save_curvature)
        else:
            scores = self_influence(
                opened.encoder,
                images,
                what.perturbation,
                what.curvature,
                what.seed,
                draws=what.draws,
                average=what.average,
                skip=what.skip,
                untrained=what.untrained,
                computing=computing,
            )
        if first:
            _write(out, scores, images.attributes)
            from issl.audit import figures  # slow to import

            figures.style(screen=False)
            about = f"{Path(options.encoder).name}, {type(what.curvature).__name__}"
            figures.write(figures.scored(scores, images, about), out.with_suffix(".png"))
            left_out = write_broken(out, images)
            print(
                f"{out} (.png): {len(scores)} scores in {time.monotonic() - began:.0f} s{left_out}",
                flush=True,
            )
    return 0


def _in_parts(options: argparse.Namespace) -> int:
    """Fill a folder with scores, in parts; 1 if some could not be made."""
    if options.store is not None or options.save_curvature is not None:
        raise IsslError(
            f"--out {options.out} is a folder, where curvature.safetensors is kept, and no "
            "gradients: drop --store and --save-curvature"
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
    left_out = write_broken(options.out / "scores", images)
    print(
        f"{options.out}/scores/*.parquet: {len(tasks) - failed} of {len(tasks)} missing parts made "
        f"in {time.monotonic() - began:.0f} s{left_out}"
    )
    return int(failed > 0)


@lru_cache(maxsize=1)
def _scoring(given: tuple[tuple[str, Any], ...]) -> Scoring:
    """What these options ask for; opened once in each process."""
    options = argparse.Namespace(**dict(given))
    opened = encoder_asked_for(options)
    what, kept = measured(options, opened)
    images = load_images(options, opened)
    computing = computing_of(options, ONE, pick_device(options.device))
    return Scoring(opened.encoder, images, what, computing, kept)


def _write(out: Path, scores: pd.DataFrame, attributes: pd.DataFrame) -> None:
    """The scores with what is known about each image; the settings in the parquet's metadata, or
    next to a CSV."""
    beside = own_names(attributes, [str(column) for column in scores if column != "index"])
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
