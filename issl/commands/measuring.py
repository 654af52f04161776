"""What the commands that measure share: which images, which encoder, what is measured, how it is
computed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch

from issl.audit.settings import KINDS, named_curvature
from issl.commands.arguments import finite
from issl.data import datasets
from issl.data.images import Images
from issl.errors import IsslError
from issl.files import atomic, writable
from issl.influence.computing import Computing
from issl.influence.fitted import load_fitted
from issl.influence.losses import stability_loss
from issl.influence.measurement import Measurement
from issl.influence.perturbation import GaussianNoise
from issl.pretraining.other_encoders import Opened, add_encoder_arguments
from issl.shards import Shards

MEASURED: dict[
    str, Any
] = {  # the options of a measurement, with what they are if they are not given
    "curvature": "logra",
    "rank": 16,
    "damping": 0.1,
    "noise_mean": 0.05,
    "noise_std": 0.2,
    "seed": 0,
    "draws": 1,
    "average": "gradients",
    "skip": "",
    "untrained": False,
}


def add_common_arguments(command: argparse.ArgumentParser) -> None:
    """Which images, which encoder, what is measured, and how it is computed."""
    add = command.add_argument
    add(
        "--data",
        required=True,
        metavar="SET",
        help="folder:PATH, hf:PATH_OR_NAME, cifar10, cifar100, fairface or scenes",
    )
    add(
        "--skip-broken",
        action="store_true",
        help="leave out images that cannot be decoded, or have no features; a table names them",
    )
    add("--workers", type=int, metavar="N", help="threads that decode images (default: the cores)")
    add_encoder_arguments(command)
    add("--split", default="train", help="train (default) or test")
    add(
        "--images",
        "--n",
        dest="n",
        type=int,
        metavar="N",
        help="how many (default: all); under torchrun use --images",
    )
    add("--size", type=int, metavar="PX", help="side of the images (default: the encoder's own)")
    add(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="folder of the data sets (default: $ISSL_DATA)",
    )
    add_measurement_arguments(command)
    add(
        "--batch-size",
        type=_batch,
        default=64,
        metavar="B",
        help="images at once (64), or auto: what fits into memory",
    )
    add("--device", default="auto", help="auto (default), cpu or cuda")
    add(
        "--precision", default="fp32", choices=["fp32", "bf16"], help="of the encoder's pass (fp32)"
    )
    add(
        "--timeout",
        type=finite,
        default=600.0,
        metavar="S",
        help="how long processes wait for each other (600 s)",
    )


def add_measurement_arguments(command: argparse.ArgumentParser) -> None:
    """The options that say what is measured, for `measurement`."""
    add = command.add_argument
    add("--curvature", choices=KINDS, help="default: logra")
    add("--rank", type=_rank, help="of logra, per side; with a point, a fraction of the layer (16)")
    add("--damping", type=float, help="fraction of the curvature's mean diagonal (0.1)")
    add("--noise-mean", type=float, help="of the perturbation (0.05)")
    add("--noise-std", type=float, help="of the perturbation (0.2)")
    add("--seed", type=int, help="of the perturbation (0)")
    add("--draws", type=int, help="perturbations per image (1)")
    add(
        "--average",
        choices=["gradients", "scores"],
        help="what is averaged over the perturbations (gradients)",
    )
    add(
        "--untrained",
        action="store_true",
        default=None,
        help="score an encoder as initialised, as a control",
    )
    add("--skip", metavar="A,B", help="layers or parameters to leave out of the score, by name")


def measurement(options: argparse.Namespace, opened: Opened) -> Measurement:
    """What these options ask to be measured."""
    given = {
        k: default if vars(options)[k] is None else vars(options)[k]
        for k, default in MEASURED.items()
    }
    return Measurement(
        GaussianNoise(given["noise_mean"], given["noise_std"]),
        named_curvature(given["curvature"], given["rank"], given["damping"]),
        given["seed"],
        given["draws"],
        given["average"],
        skip=opened.own_names(given["skip"].split(",")),
        untrained=given["untrained"],
    )


def measured(options: argparse.Namespace, opened: Opened) -> tuple[Measurement, Path | None]:
    """What is measured, by the options or by a curvature file, and that file."""
    kept = _kept(options)
    if kept is None:
        return measurement(options, opened), None
    what = load_fitted(kept, opened.encoder).probe.what
    if what.loss is not stability_loss:
        raise IsslError(
            f"--curvature-from {kept}: it is of another loss; score with issl.load_fitted, in Python"
        )
    return what, kept


def _kept(options: argparse.Namespace) -> Path | None:
    """The curvature file to score under, if one is given; IsslError for an option that it
    decides."""
    kept: Path | None = options.curvature_from
    if options.save_curvature is not None:
        writable(options.save_curvature, (".safetensors",), "--save-curvature")
    decided = [name for name in [*MEASURED, "save_curvature"] if getattr(options, name) is not None]
    if kept is not None and decided:
        raise IsslError(
            f"--{decided[0].replace('_', '-')} {getattr(options, decided[0])}: the file of --curvature-from {kept} "
            "decides this; leave one of the two out"
        )
    return kept


def load_images(options: argparse.Namespace, opened: Opened) -> Images:
    """The images that these options name, at the encoder's size where they can be resized."""
    size = (
        opened.size if options.size is None and datasets.is_resized(options.data) else options.size
    )
    return datasets.load(
        options.data,
        options.split,
        options.n,
        options.data_root,
        size=size,
        skip_broken=options.skip_broken,
        workers=options.workers,
    )


def computing_of(options: argparse.Namespace, shards: Shards, device: torch.device) -> Computing:
    """How these options ask to compute, on this process."""
    return Computing(
        device=shards.device if shards.world > 1 else device,
        batch_size=options.batch_size,
        precision=options.precision,
        shards=shards,
        progress=shards.rank == 0 and sys.stderr.isatty(),
    )


def write_broken(out: Path, images: Images) -> str:
    """The table of the images that were left out, OUT.broken.csv, if there are any; says so for the
    last line."""
    if not images.broken:
        return ""
    path = out.with_suffix(".broken.csv")
    with atomic(path) as part:
        pd.DataFrame(images.broken, columns=["image", "why"]).to_csv(part, index=False)
    return f"; {len(images.broken)} images were left out: {path}"


def _batch(text: str) -> int | Literal["auto"]:
    if text != "auto" and not text.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: need a whole number, 1 or more, or auto")
    return "auto" if text == "auto" else int(text)


def _rank(text: str) -> int | float:
    try:
        return float(text) if "." in text else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: need a whole number, or with a point a fraction"
        ) from error
