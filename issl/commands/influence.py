"""`issl influence`: score one's own images under one's own encoder, on one process or on several (torchrun)."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

from issl.data import datasets
from issl.data.images import Images
from issl.devices import pick_device
from issl.experiments.settings import KINDS, named_curvature
from issl.files import atomic, writable
from issl.influence.computing import Computing
from issl.influence.layers import scored_layers
from issl.influence.perturbation import GaussianNoise
from issl.influence.self_influence import self_influence
from issl.pretraining.other_encoders import add_encoder_arguments, open_encoder
from issl.shards import from_torchrun

SHOWN, LEAST = 16, 10  # images in a gallery; fewer than that have no correlation worth a number


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `issl influence`."""
    add = command.add_argument
    add("--data", required=True, metavar="SET", help="folder:PATH, cifar10, cifar100, fairface or scenes")
    add_encoder_arguments(command)
    add("--out", required=True, type=Path, metavar="FILE", help="scores, .parquet or .csv; beside it a picture, .png")
    add("--split", default="train", help="train (default) or test")
    add("--images", "--n", dest="n", type=int, metavar="N", help="so many (default: all); under torchrun --images")
    add("--size", type=int, metavar="PX", help="side of the images (default: the encoder's own)")
    add("--data-root", type=Path, metavar="DIR", help="folder of the data sets (default: $ISSL_DATA)")
    add("--curvature", default="logra", choices=KINDS, help="default: logra")
    add("--rank", type=_rank, default=16, help="of logra, per side; with a point, a fraction of the layer (16)")
    add("--damping", type=float, default=0.1, help="fraction of the curvature's mean diagonal (0.1)")
    add("--noise-mean", type=float, default=0.05, help="of the perturbation (0.05)")
    add("--noise-std", type=float, default=0.2, help="of the perturbation (0.2)")
    add("--seed", type=int, default=0, help="of the perturbation (0)")
    add("--draws", type=int, default=1, help="perturbations an image (1)")
    add(
        "--average", default="gradients", choices=["gradients", "scores"], help="what is averaged over them (gradients)"
    )
    add("--batch-size", type=int, default=64, help="images at once (64)")
    add("--device", default="auto", help="auto (default), cpu or cuda")
    add("--precision", default="fp32", choices=["fp32", "bf16"], help="of the encoder's pass (fp32)")
    add("--memory", default="auto", choices=["auto", "ram", "mapped", "recomputed"], help="of gradients (auto)")
    add("--memory-gb", type=float, help="gigabytes that gradients may take (default: half of the free memory)")
    add("--skip", default="", metavar="A,B", help="layers or parameters to leave out of the score, by name")
    add("--store", type=Path, metavar="DIR", help="keep gradients here; the same command goes on after a kill")
    add("--timeout", type=float, default=600.0, metavar="S", help="how long processes wait for each other (600 s)")


def score(options: argparse.Namespace) -> int:
    """Run the command; raises IsslError for bad input, before any long work."""
    out: Path = options.out
    writable(out, (".parquet", ".csv"))
    device, began = pick_device(options.device), time.monotonic()
    curvature = named_curvature(options.curvature, options.rank, options.damping)
    noise = GaussianNoise(options.noise_mean, options.noise_std)
    opened = open_encoder(options.encoder, options.weights, options.mean, options.std)
    skip = opened.own_names(options.skip.split(","))
    layers = scored_layers(opened.encoder, skip)
    size = options.size
    if size is None and (options.data.startswith("folder:") or options.data == "fairface"):
        size = opened.size
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
            _draw(out.with_suffix(".png"), scores, images, f"{Path(options.encoder).name}, {options.curvature}")
            print(f"{out} (.png): {len(scores)} scores in {time.monotonic() - began:.0f} s", flush=True)
    return 0


def _write(out: Path, scores: pd.DataFrame, attributes: pd.DataFrame) -> None:
    """Scores beside what is known of each image; the settings in the parquet's metadata, or beside a CSV."""
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


def _draw(out: Path, scores: pd.DataFrame, images: Images, about: str) -> None:
    """The images of the highest and of the lowest influence, and influence against the plain stability loss."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    from issl.analysis import statistics
    from issl.reporting import figures

    figures.style(screen=False)
    influence, loss = scores["influence"].to_numpy(), scores["stability_loss"].to_numpy()
    order, k = influence.argsort(kind="stable")[::-1], min(SHOWN, (len(images) + 1) // 2)
    fig = plt.figure(figsize=(figures.PAGE, 3.4))
    left, right = fig.subfigures(1, 2, width_ratios=[1.9, 1])  # type: ignore[misc]
    known = images.attributes["path"] if "path" in images.attributes else images.attributes["index"].astype(str)
    for part, rows, name in zip(
        left.subfigures(2, 1), (order[:k], order[::-1][:k]), ("highest", "lowest"), strict=True
    ):
        ends = [np.format_float_positional(influence[i], 3, fractional=False, trim="-") for i in (rows[0], rows[-1])]
        part.suptitle(f"{name} influence: {' to '.join(ends)}", x=0.01, ha="left", fontsize=8)
        for place, ax in enumerate(part.subplots(2, SHOWN // 2, squeeze=False).flat):
            ax.set_axis_off()
            if place < k:
                ax.imshow(images.pixels[rows[place]].permute(1, 2, 0).numpy(), interpolation="nearest")
                text = Path(known.iloc[rows[place]]).name
                ax.set_title(text if len(text) < 13 else "…" + text[-11:], fontsize=5, pad=1.5)
    ax = right.subplots()
    ax.scatter(loss, influence, s=4, lw=0, alpha=0.6)
    ax.set(xlabel="stability loss (0 to 2)", ylabel="influence (no unit)")
    if loss.min() > 0 and influence.min() > 0:  # influence grows like a power of the loss
        ax.set(xscale="log", yscale="log")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
    rho = f"\nρ = {statistics.correlation(loss, influence, 'spearman')} (of ranks)" if len(images) >= LEAST else ""
    ax.set_title(f"against the stability loss, one point an image{rho}", loc="left", fontsize=7)
    fig.suptitle(f"Influence of {len(images):,} images of {images.name} ({about})", fontsize=8)
    with atomic(out) as part:
        fig.savefig(part, format="png")
    plt.close(fig)


def _rank(text: str) -> int | float:
    return float(text) if "." in text else int(text)
