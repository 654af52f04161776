"""`issl influence`: score your own images under your own encoder, in one process or in several
(torchrun)."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd

from issl.commands import in_parts
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
from issl.influence.self_influence import self_influence
from issl.pretraining.other_encoders import encoder_asked_for
from issl.shards import from_torchrun


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
        "parts, by any number of processes, and continues after a kill",
    )
    add(
        "--cluster",
        default="local",
        choices=["local", "slurm"],
        help="local (default) or slurm, with a folder",
    )
    add("--jobs", type=int, default=4, metavar="N", help="how many jobs of an array on Slurm (4)")
    add(
        "--slurm",
        default=[],
        nargs="*",
        metavar="KEY=VALUE",
        help="sbatch's options: partition=gpu gpus_per_node=1 …",
    )
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
        return in_parts.main(options)
    if options.cluster != "local":
        raise IsslError(
            f"--cluster {options.cluster}: give a folder with --out, which the jobs fill; {out} is one file"
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
