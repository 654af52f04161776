"""RESULTS.md from the numbers in measured/: what was measured, where, and how to read it."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

HEAD = """# Benchmarks

Written by `python benchmarks/influence.py` and `python benchmarks/pretraining.py`; do not edit. All methods of a table
ran in one process, taking turns batch by batch, so the ratios compare methods that met the same machine.
Seconds are this machine's. For influence, the ratio is the time over that of a plain forward and backward pass of the
same loss on the same images. The whole time is from the encoder to the scores; the median batch, for methods of one
pass, is the same without what comes before and after, and without the odd batch that the machine was busy elsewhere.
Forward and backward with respect to the data is what no method of this kind can save.

At width 64, an earlier version computed wide 3 x 3 convolutions by Winograd's algorithm: LoGra rank 16 took 0.62 times
a plain pass on one thread (512 images; 0.66 without). That kernel was removed: it only gained on one fp32 thread.
Convolutions no longer absorb the BatchNorm after them either: measured alone, that saved 1 to 2% of a LoGra rank 16
pass at widths 64 and 16, 3% at width 8, and 4% in bf16. LogIX at its default rank of 64 took 3.43 times a plain pass
then. From run to run the ratio of LoGra rank 16 varies: 0.68 and 0.70 on one thread, 0.73 twice on two.

LogIX and dattri have a LoGra, too. LogIX's caps its rank at a convolution's input channels, ignores dilation and
groups, and takes the second view as another call of each layer. dattri's LoGra and EK-FAC (0.3.0) hook Linear layers
alone, so a ResNet leaves them nothing to score; its TRAK is compared.
"""


def write_report(results: Path, out: Path) -> None:
    """Write RESULTS.md from the parts that have been measured."""
    found = {p.stem: json.loads(p.read_text()) for p in sorted(results.glob("*.json"))}
    parts, writers = (
        [HEAD],
        {
            "wide": _timings,
            "wide-2": _timings,
            "narrow": _timings,
            "agreement": _agreement,
            "memory": _memory,
            "pretraining": _pretraining,
            "training": _training,
            "gpu": _gpu,
        },
    )
    for name, write in writers.items():
        if name in found:
            parts.append(write(found[name]))
    out.write_text("\n".join(parts))


def machine(peers: str, threads: int = 1) -> dict[str, str]:
    """Where and with what it was measured."""
    told = (
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    )
    many = "one thread" if threads == 1 else f"{threads} threads"
    return {
        "machine": f"{next(told, '?')} ({platform.machine()}), {many}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "peers": peers,
        "date": time.strftime("%Y-%m-%d"),
    }


def _where(part: Mapping[str, Any]) -> str:
    peers = f"; {part['peers']}" if part["peers"] else ""
    return f"_{part['date']}, {part['machine']}, torch {part['torch']}, Python {part['python']}{peers}._\n"


def _timings(part: Mapping[str, Any]) -> str:
    lines = [
        f"## ResNet-18, width {part['width']}, {part['images']} images of {part['data']}\n",
        "| method | whole time ÷ plain | median batch ÷ plain | seconds |",
        "|---|---:|---:|---:|",
    ]
    for row in part["rows"]:
        failed = row["error"] is not None
        batch = "" if row["batch_ratio"] is None else f"{row['batch_ratio']:.2f}"
        cells = (
            (f"cannot: {row['error']}", "")
            if failed
            else (f"{row['ratio']:.2f} | {batch}", f"{row['seconds']:.0f}")
        )
        part_of = "" if row["scale"] == 1 else f" (scaled from 1/{row['scale']:g} of the images)"
        lines.append(f"| {row['method']}{part_of} | {cells[0]} | {cells[1]} |")
    if "shares" in part:
        rest = 1 - sum(part["shares"].values())
        told = [f"{name} {share:.0%}" for name, share in part["shares"].items()]
        lines.append(
            f"\nWhere LoGra rank 16 spends its time: {', '.join(told)}, the encoder's passes and all else {rest:.0%}."
        )
    return "\n".join([*lines, "", _where(part)])


def _agreement(part: Mapping[str, Any]) -> str:
    lines = [
        f"## Agreement on a trained encoder\n\nSimCLR, ResNet-18 width {part['width']}, trained by the "
        f"{part['profile']} profile; {part['images']} images of {part['data']}.\n",
        "| scores | and | Spearman |",
        "|---|---|---:|",
    ]
    lines += [f"| {row['a']} | {row['b']} | {row['spearman']:.4f} |" for row in part["rows"]]
    lines += [f"\n{name} could not be run: {error}" for name, error in part["errors"].items()]
    return "\n".join([*lines, "", _where(part)])


def _memory(part: Mapping[str, Any]) -> str:
    lines = [
        f"## Memory and time against the number of images\n\nResNet-18 width {part['width']}, LoGra rank 16, each row "
        "a process of its own. The growth is what the pass added to the process's peak.\n",
        "| gradients are | images | seconds | peak MB | growth MB |",
        "|---|---:|---:|---:|---:|",
    ]
    for r in part["rows"]:
        growth = r["peak_mb"] - r["before_mb"]
        lines.append(
            f"| {r['memory']} | {r['images']:,} | {r['s']:.0f} | {r['peak_mb']:.0f} | {growth:.0f} |"
        )
    return "\n".join([*lines, "", _where(part)])


def _pretraining(part: Mapping[str, Any]) -> str:
    lines = [
        f"## SimCLR pretraining, ResNet-18 width {part['width']}, batches of {part['batch_size']} images\n",
        f"One step on {part['data']}: two views of each image, forward, backward, update; {part['steps']} steps each, "
        "in turns on one thread. The ratio is that of median steps.\n",
        "| loop | views/s | × plain |",
        "|---|---:|---:|",
    ]
    lines += [
        f"| {r['loop']} | {r['views_per_second']:.0f} | {r['ratio']:.2f} |" for r in part["rows"]
    ]
    return "\n".join([*lines, "", _where(part)])


def _training(part: Mapping[str, Any]) -> str:
    lines = [
        f"## Training-aware influence on {part['queries']} queries, {part['rows'][0]['data']}\n",
        "The ratio is to one forward and backward pass over the same two views of the same images. An image's marginal "
        "effect leaves it out of its batch, so the ratio is the batch size, and the time grows with n.\n",
        "| effect | width | batch | images | seconds | × plain | minutes for 2,000 images |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in part["rows"]:
        minutes = r["seconds"] / r["images"] * 2000 / 60
        cells = (
            r["share"],
            r["width"],
            r["batch_size"],
            r["images"],
            f"{r['seconds']:.1f}",
            f"{r['ratio']:.1f}",
        )
        lines.append(f"| {' | '.join(str(c) for c in cells)} | {minutes:.1f} |")
    return "\n".join([*lines, "", _where(part)])


def _gpu(part: Mapping[str, Any]) -> str:
    """The parts of gpu.py that have been measured; each says where."""
    writers = {
        "equality": _equality,
        "small": _small,
        "pretraining": _epochs,
        "influence": _pass,
        "evaluation": _evaluation,
    }
    parts = [
        text
        for name, write in writers.items()
        if name in part
        for text in (write(part[name]), _where(part[name]))
    ]
    return "\n".join(["## On a GPU\n", *parts])


def _equality(part: Mapping[str, Any]) -> str:
    seconds = part["seconds"]
    return (
        f"Scores of {part['images']:,} CIFAR-10 images, a trained encoder of width {part['width']}, beside the CPU's: "
        f"relative difference {part['median_relative_difference']:.0e} in the median, "
        f"{part['largest_relative_difference']:.1e} at most, Spearman {part['spearman']:.7f}; "
        f"{'the same' if part['same_each_time'] else 'NOT the same'} each time. "
        f"{seconds['cpu']:.1f} s on the CPU, {seconds['cuda again']:.1f} s here.\n"
    )


def _small(part: Mapping[str, Any]) -> str:
    lines = [
        f"Trainings as in the profile `overnight` (width 16, compiled, batches of 256), {part['at_once']} at once on "
        "one GPU, a process each:\n",
        "| method | images/s, views of half the side | images/s, full views | seconds of compilation |",
        "|---|---:|---:|---:|",
    ]
    for r in part["rows"]:
        half, full = r["images_per_second"][1:6], r["images_per_second"][-1]
        waiting = sum(256 * 40 / s for s in r["images_per_second"] if s < 1000)
        shown = f"{full:,}" if r["images_per_second"][6] < 1000 else "(none)"
        lines.append(f"| {r['method']} | {median(half):,} | {shown} | {waiting:.0f} |")
    return "\n".join([*lines, ""])


def _epochs(part: Mapping[str, Any]) -> str:
    lines = [
        "Pretraining at width 64 (bf16, NHWC, batches of 256), an epoch of CIFAR-10:\n",
        "| method | compiled | images/s | seconds an epoch | peak GB |",
        "|---|---|---:|---:|---:|",
    ]
    for r in part["rows"]:
        cells = (
            f"{r['images_per_second']:,.0f}",
            f"{r['epoch_seconds']:.1f}",
            f"{r['peak_gb']:.1f}",
        )
        lines.append(f"| {r['method']} | {r['compiled']} | {' | '.join(cells)} |")
    for method, spent in part["parts"].items():
        told = ", ".join(f"{name} {ms:.1f} ms" for name, ms in spent.items())
        lines.append(f"\nA step of {method}, uncompiled, each part waited for: {told}.")
    return "\n".join([*lines, ""])


def _pass(part: Mapping[str, Any]) -> str:
    plain = part["seconds"]["plain forward + backward"]
    told = [f"{name} {s:.1f} s ({s / plain:.2f} × plain)" for name, s in part["seconds"].items()]
    return (
        f"Scores of {part['images']:,} images at width {part['width']}: {', '.join(told)}; "
        f"peak {part['peak_gb']:.1f} GB.\n"
    )


def _evaluation(part: Mapping[str, Any]) -> str:
    told = [f"{name} {s:.1f} s" for name, s in part["seconds"].items()]
    return f"Evaluation of all of CIFAR-10 at width 64: {', '.join(told)}.\n"
