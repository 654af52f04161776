"""`issl influence`: score your own images under your own encoder, in one process or in several (torchrun)."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import pandas as pd

from issl.data import datasets
from issl.devices import pick_device
from issl.experiments.settings import KINDS, named_curvature
from issl.files import atomic, writable
from issl.influence.computing import Computing
from issl.influence.layers import scored_layers
from issl.influence.perturbation import GaussianNoise
from issl.influence.self_influence import self_influence
from issl.pretraining.other_encoders import add_encoder_arguments, open_encoder
from issl.shards import from_torchrun


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `issl influence`."""
    add = command.add_argument
    add("--data", required=True, metavar="SET", help="folder:PATH, cifar10, cifar100, fairface or scenes")
    add_encoder_arguments(command)
    add("--out", required=True, type=Path, metavar="FILE", help="scores, .parquet or .csv; beside it a picture, .png")
    add("--split", default="train", help="train (default) or test")
    add("--images", "--n", dest="n", type=int, metavar="N", help="how many (default: all); under torchrun use --images")
    add("--size", type=int, metavar="PX", help="side of the images (default: the encoder's own)")
    add("--data-root", type=Path, metavar="DIR", help="folder of the data sets (default: $ISSL_DATA)")
    add("--curvature", default="logra", choices=KINDS, help="default: logra")
    add("--rank", type=_rank, default=16, help="of logra, per side; with a point, a fraction of the layer (16)")
    add("--damping", type=float, default=0.1, help="fraction of the curvature's mean diagonal (0.1)")
    add("--noise-mean", type=float, default=0.05, help="of the perturbation (0.05)")
    add("--noise-std", type=float, default=0.2, help="of the perturbation (0.2)")
    add("--seed", type=int, default=0, help="of the perturbation (0)")
    add("--draws", type=int, default=1, help="perturbations per image (1)")
    add(
        "--average",
        default="gradients",
        choices=["gradients", "scores"],
        help="what is averaged over the perturbations (gradients)",
    )
    add("--batch-size", type=int, default=64, help="images at once (64)")
    add("--device", default="auto", help="auto (default), cpu or cuda")
    add("--precision", default="fp32", choices=["fp32", "bf16"], help="of the encoder's pass (fp32)")
    add("--memory", default="auto", choices=["auto", "ram", "mapped", "recomputed"], help="of gradients (auto)")
    add("--memory-gb", type=float, help="gigabytes for the gradients (default: half of the free memory)")
    add("--skip", default="", metavar="A,B", help="layers or parameters to leave out of the score, by name")
    add(
        "--store",
        type=Path,
        metavar="DIR",
        help="keep gradients here; the same command continues after an interruption",
    )
    add("--timeout", type=float, default=600.0, metavar="S", help="how long processes wait for each other (600 s)")


def main(options: argparse.Namespace) -> int:
    """Run the command; raises IsslError for bad input, before any long work."""
    out: Path = options.out
    writable(out, (".parquet", ".csv"))
    device, began = pick_device(options.device), time.monotonic()
    curvature = named_curvature(options.curvature, options.rank, options.damping)
    noise = GaussianNoise(options.noise_mean, options.noise_std)
    opened = open_encoder(options.encoder, options.weights, options.mean, options.std)
    skip = opened.own_names(options.skip.split(","))
    layers = scored_layers(opened.encoder, skip)
    size = opened.size if options.size is None and datasets.is_resized(options.data) else options.size
    images = datasets.load(options.data, options.split, options.n, options.data_root, size=size)
    with from_torchrun(device, options.timeout) as shards:
        first = shards.rank == 0
        if first:
            side, many = images.pixels.shape[-1], f" on {shards.world} processes" if shards.world > 1 else ""
            print(
                f"{len(images)} images of {images.name} at {side} px, {opened.about}, {len(layers)} layers, "
                f"{curvature}, {device}{many}",
                flush=True,
            )
        scores = self_influence(
            opened.encoder, images, noise, curvature, options.seed, draws=options.draws, average=options.average,
            skip=skip,
            computing=Computing(
                device=shards.device if shards.world > 1 else device, batch_size=options.batch_size,
                precision=options.precision, memory=options.memory, memory_gb=options.memory_gb,
                store=options.store, shards=shards, progress=first and sys.stderr.isatty(),
            ),
        )  # fmt: skip
        if first:
            _write(out, scores, images.attributes)
            from issl.reporting import figures  # slow to import

            figures.style(screen=False)
            about = f"{Path(options.encoder).name}, {options.curvature}"
            figures.write(figures.scored(scores, images, about), out.with_suffix(".png"))
            print(f"{out} (.png): {len(scores)} scores in {time.monotonic() - began:.0f} s", flush=True)
    return 0


def _write(out: Path, scores: pd.DataFrame, attributes: pd.DataFrame) -> None:
    """The scores with what is known about each image; the settings in the parquet's metadata, or next to a CSV."""
    table = scores.merge(attributes, on="index", how="left", validate="one_to_one")
    table.attrs = scores.attrs
    with atomic(out) as part:
        if out.suffix == ".parquet":
            table.to_parquet(part, index=False)
        else:
            table.to_csv(part, index=False)
    if out.suffix == ".csv":
        with atomic(out.with_suffix(".json")) as part:
            part.write_text(json.dumps(scores.attrs, indent=1) + "\n")


def _rank(text: str) -> int | float:
    return float(text) if "." in text else int(text)
