"""Influence scores: time, agreement and memory against the plain pass and other libraries, in one
command.

    python benchmarks/influence.py                 # all that is installed; hours on a slow machine
    python benchmarks/influence.py --only wide     # a part: wide, narrow, agreement, memory
    OMP_NUM_THREADS=2 python benchmarks/influence.py --only wide    # on two threads
    pip install --group peers                      # the other libraries

Each part leaves a table of numbers in benchmarks/measured/; RESULTS.md is written from them.
Programs are timed in alternation (alternate.py), so ratios are reliable where seconds are not.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts its threads
os.environ["MKL_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any
from unittest import mock

import pandas as pd
import peers
import programs
import torch
from alternate import Turn, alternate
from programs import Task, random_encoder
from report import keep, machine
from scipy.stats import spearmanr

import issl
from issl.audit.profiles import read_profile
from issl.devices import keep_freed_memory
from issl.files import REPOSITORY
from issl.influence import per_example

WIDE = (
    "plain forward + backward",
    "plain forward + backward, NHWC",
    "forward + backward by data",
    "LoGra rank 8",
    "LoGra rank 16",
    "LoGra rank 64",
    "LogIX rank 8",
    "LogIX rank 16",
    "LogIX rank 64",
)
NARROW = (
    "plain forward + backward",
    "LoGra rank 16",
    "LoGra rank 16, PCA",
    "LoGra rank 16, bf16",
    "EK-FAC",
    "LogIX rank 16",
    "kronfluence EK-FAC",
    "TRAK",
    "dattri TRAK",
)
AGREEMENT = (
    ("LoGra rank 16", "LoGra rank 64"),
    ("LoGra rank 16", "Exact"),
    ("LoGra rank 64", "Exact"),
    ("EK-FAC", "Exact"),
    ("LoGra rank 16, PCA", "Exact"),
    ("LoGra rank 16", "LoGra rank 16, bf16"),
    ("EK-FAC", "kronfluence EK-FAC"),
    ("LoGra rank 8, no stem", "LogIX rank 8, no stem, our projections"),
    ("LoGra rank 16", "TRAK"),
)


def some_images(n: int) -> issl.Images:
    """CIFAR-10 if $ISSL_DATA is set, else scenes."""
    return issl.load("cifar10" if os.environ.get("ISSL_DATA") else "scenes", n=n)


def a_task(encoder: torch.nn.Module, images: issl.Images, batch_size: int) -> Task:
    noise = issl.GaussianNoise(0.05, 0.2).keyed(0)
    noisy = noise(images.pixels.float() / 255, images.index)
    return Task(encoder, images, noisy, batch_size)


def timed(task: Task, names: Sequence[str]) -> dict[str, Turn]:
    found = {**programs.programs(task), **peers.programs(task)}
    return alternate({name: found[name] for name in names if name in found})


def ratios(task: Task, names: Sequence[str]) -> dict[str, Any]:
    """The times of these methods over that of the plain pass."""
    turns = timed(task, names)
    for turn in turns.values():
        if turn.error is not None:
            print(turn.name, turn.error, file=sys.stderr)
    batches = len(task.batches())
    plain = turns[WIDE[0]]
    rows = [
        {
            "method": t.name,
            "seconds": t.seconds * t.scale,
            "ratio": t.seconds * t.scale / plain.seconds,
            "batch_ratio": median(t.laps[1:]) / median(plain.laps[1:])
            if len(t.laps) == batches + 1
            else None,
            "scale": t.scale,
            "error": t.failure,
        }
        for t in turns.values()
    ]
    return {"images": len(task.images), "data": task.images.name, "rows": rows}


def wide(n: int) -> dict[str, Any]:
    """ResNet-18 of full width."""
    images = some_images(n)
    task = a_task(random_encoder(64, images), images, 16)
    return {"width": 64, **ratios(task, WIDE), "shares": shares(task)}


def shares(task: Task) -> dict[str, float]:
    """Shares of the time of LoGra rank 16 outside the forward and backward passes."""
    spent = {"P_in a": 0.0, "P_out Σ d aᵀ": 0.0}

    def counted(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            found = function(*arguments, **options)
            spent[what] += time.perf_counter() - began
            return found

        return timed

    read, add = per_example.read_inputs, per_example._Tap.add
    n = min(4 * task.batch_size, len(task.images))
    few = Task(task.encoder, task.images.subset(range(n)), task.noisy[:n], task.batch_size)
    with (
        mock.patch.object(per_example, "read_inputs", counted("P_in a", read)),
        mock.patch.object(per_example._Tap, "add", counted("P_out Σ d aᵀ", add)),
    ):
        whole = alternate({"one": programs.programs(few)["LoGra rank 16"]})["one"].seconds
    return {what: seconds / whole for what, seconds in spent.items()}


def narrow(n: int) -> dict[str, Any]:
    """Width 16, for methods that keep whole gradients or decompose whole layers."""
    images = some_images(n)
    return {"width": 16, **ratios(a_task(random_encoder(16, images), images, 32), NARROW)}


def agreement(n: int, profile: str) -> dict[str, Any]:
    """Rank correlations of scores, for a profile's encoder and images. The encoder is trained first
    if it is not cached."""
    notebook = "03_background_bias"
    plan = read_profile(
        profile, [notebook], out=str(REPOSITORY), data_root=os.environ.get("ISSL_DATA")
    )[notebook]
    encoder = plan.pretrain().encoder(plan.artifacts(progress=True))
    images = plan.data().load()
    task = a_task(encoder, images.subset(range(min(n, len(images)))), 64)
    turns = timed(task, sorted({name for pair in AGREEMENT for name in pair}))
    errors = {name: turn.failure for name, turn in turns.items() if turn.error is not None}
    rows = [
        {"a": a, "b": b, "spearman": float(spearmanr(turns[a].result, turns[b].result)[0])}
        for a, b in AGREEMENT
        if {a, b} <= turns.keys() - errors.keys()
    ]
    return {
        "width": plan.width,
        "profile": profile,
        "images": len(task.images),
        "data": task.images.name,
        "rows": rows,
        "errors": errors,
    }


def memory(n: int) -> dict[str, Any]:
    """Peak memory and time at n/4, n and 4n images, each in a process of its own; width 8, rank
    16."""
    rows = []
    for way in ("ram", "recomputed"):
        for many in (n // 4, n, 4 * n):
            command = [sys.executable, __file__, "--one", way, "--images", str(many)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append({"memory": way, "images": many, **json.loads(done.stdout.splitlines()[-1])})
    return {"width": 8, "rows": rows}


def one(way: str, n: int) -> dict[str, float]:
    """The child process of `memory`. 2,048 images are repeated, so the images themselves add little
    memory."""
    some = some_images(2048)
    encoder, index = random_encoder(8, some), torch.arange(n) % 2048
    images = issl.Images(some.pixels[index], None, pd.DataFrame({"index": range(n)}), some.name)
    warm_up = images.subset(range(min(64, n)))
    issl.self_influence(encoder, warm_up, computing=issl.Computing(batch_size=64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    issl.self_influence(encoder, images, computing=issl.Computing(batch_size=64, memory=way))
    seconds = time.perf_counter() - began
    return {
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "before_mb": before / 1024,
        "s": seconds,
    }


PARTS = {
    "wide": (wide, 512),
    "narrow": (narrow, 128),
    "agreement": (agreement, 512),
    "memory": (memory, 4096),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--images", type=int, help="how many (default: 512, 128, 512, 4096)")
    parser.add_argument(
        "--profile", default="quick", help="profile whose encoder and images `agreement` uses"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    keep_freed_memory()  # for all programs: fresh pages would be timed instead of arithmetic
    if options.one:
        print(json.dumps(one(options.one, options.images)))
        return
    for name in options.only or PARTS:
        part, images = PARTS[name]
        print(f"{name} …", flush=True)
        more = {"profile": options.profile} if name == "agreement" else {}
        found = part(options.images or images, **more) | machine(peers.versions(), threads)
        several = f"-{threads}" if threads > 1 else ""
        keep(f"{name}{several}", found)
        print(json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    main()
