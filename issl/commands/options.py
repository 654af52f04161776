"""Options that the scoring commands share: which images, which encoder, what to measure, how."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from issl.data import datasets
from issl.data.images import Images
from issl.devices import pick_device
from issl.errors import IsslError
from issl.files import atomic
from issl.influence.curvature import KINDS, named_curvature
from issl.influence.kept import load_fitted
from issl.influence.layers import find_layers
from issl.influence.losses import stability_loss
from issl.influence.parts import Scoring
from issl.influence.perturbation import GaussianNoise
from issl.influence.scorer import Computing, Measurement
from issl.pretraining.other_encoders import Opened, add_encoder_arguments, encoder_asked_for

MEASURED: dict[str, Any] = {  # the options of a measurement, with their defaults
    "curvature": "logra",
    "rank": 16,
    "damping": 0.1,
    "noise_mean": 0.05,
    "noise_std": 0.2,
    "seed": 0,
    "draws": 1,
    "skip": "",
    "untrained": False,
}


def add_image_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options for which images, which encoder and where to compute."""
    add = command.add_argument
    add("--data", required=True, metavar="SET", help="folder:PATH, cifar10, scenes, …")
    add_encoder_arguments(command)
    add("--images", "--n", dest="n", type=int, metavar="N", help="how many (default: all)")
    add("--size", type=int, metavar="PX", help="side of the images (default: the encoder's own)")
    add("--data-root", type=Path, metavar="DIR", help="folder of the data sets ($ISSL_DATA)")
    add("--device", default="auto", help="auto (default), cpu or cuda")


def add_scoring_arguments(command: argparse.ArgumentParser) -> None:
    """Add the image options and those for what to measure and how to compute it."""
    add = command.add_argument
    add_image_arguments(command)
    add("--split", default="train", help="train (default) or test")
    add(
        "--skip-broken",
        action="store_true",
        help="leave out images that cannot be decoded; a table names them",
    )
    add("--workers", type=int, metavar="N", help="decoding threads (default: one per core)")
    add("--curvature", choices=KINDS, help="default: logra")
    add("--rank", type=int, help="of logra, per side (16)")
    add("--damping", type=float, help="fraction of the curvature's mean diagonal (0.1)")
    add("--noise-mean", type=float, help="of the perturbation (0.05)")
    add("--noise-std", type=float, help="of the perturbation (0.2)")
    add("--seed", type=int, help="of the perturbation (0)")
    add("--draws", type=int, help="perturbations per image, gradients averaged (1)")
    add("--skip", metavar="A,B", help="layers or parameters to leave out of the score, by name")
    add("--untrained", action="store_true", default=None, help="score an encoder as initialised")
    add("--batch-size", type=int, default=64, metavar="B", help="images at once (64)")
    add("--precision", default="fp32", choices=["fp32", "bf16"], help="of the forward pass (fp32)")


def scoring_of(options: argparse.Namespace) -> tuple[Opened, Scoring]:
    """What these options ask for, after every check that needs no image."""
    device, opened = pick_device(options.device), encoder_asked_for(options)
    kept: Path | None = getattr(options, "curvature_from", None)
    what = measurement(options, opened, kept)
    find_layers(opened.encoder, what.skip, what.untrained)
    images = load_images(options, opened)
    computing = Computing(
        device=device,
        batch_size=options.batch_size,
        precision=options.precision,
        memory=getattr(options, "memory", "auto"),
        progress=sys.stderr.isatty(),
    )
    return opened, Scoring(opened.encoder, images, what, computing, kept)


def load_images(options: argparse.Namespace, opened: Opened) -> Images:
    """The images that these options name, at the encoder's size where they can be resized."""
    size = options.size
    if size is None and datasets.is_resized(options.data):
        size = opened.size
    return datasets.load(
        options.data,
        options.split,
        options.n,
        options.data_root,
        size=size,
        skip_broken=options.skip_broken,
        workers=options.workers,
    )


def measurement(options: argparse.Namespace, opened: Opened, kept: Path | None) -> Measurement:
    """The measurement that these options ask for, or that of the curvature file `kept`."""
    given = {name: vars(options)[name] for name in MEASURED if vars(options)[name] is not None}
    if kept is not None:
        for name, value in given.items():
            raise IsslError(
                f"--{name.replace('_', '-')} {value}: the file of --curvature-from {kept} decides "
                "this; leave one of the two out"
            )
        what = load_fitted(kept, opened.encoder).scorer.what
        if what.loss is not stability_loss:
            raise IsslError(
                f"--curvature-from {kept}: it was fitted with another loss; score with "
                "issl.load_fitted, in Python"
            )
        return what
    o = argparse.Namespace(**(MEASURED | given))
    return Measurement(
        GaussianNoise(o.noise_mean, o.noise_std),
        named_curvature(o.curvature, o.rank, o.damping),
        o.seed,
        o.draws,
        skip=opened.own_names(o.skip.split(",")),
        untrained=o.untrained,
    )


def write_broken(out: Path, images: Images) -> str:
    """Write the table of the images that were left out, OUT.broken.csv, if there are any; returns
    what the last line says about it."""
    if not images.broken:
        return ""
    path = out.with_suffix(".broken.csv")
    with atomic(path) as part:
        pd.DataFrame(images.broken, columns=["image", "why"]).to_csv(part, index=False)
    return f"; {len(images.broken)} images were left out: {path}"
