"""Influence scores: time, agreement and memory against the plain pass and other libraries, in one
command.

    python benchmarks/influence.py                 # everything that is installed; hours on a slow
    machine python benchmarks/influence.py --only wide     # one part: wide, narrow, agreement,
    memory OMP_NUM_THREADS=2 python benchmarks/influence.py --only wide    # on two threads, as
    people run it pip install --group peers                      # the other libraries

Each part leaves a table of numbers in benchmarks/measured/; RESULTS.md is written from them. Times
are taken in alternation (alternate.py), so ratios hold where seconds do not.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import peers
import programs
import torch
from alternate import Turn, alternate
from programs import Task
from report import machine, write_report
from scipy.stats import spearmanr

import issl
from issl.audit.profiles import read_profile
from issl.devices import keep_freed_memory
from issl.files import REPOSITORY
from issl.influence import per_example
from issl.pretraining.encoder import resnet18

HERE = Path(__file__).parent
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


def a_task(
    width: int, batch_size: int, encoder: torch.nn.Module | None, images: issl.Images
) -> Task:
    """Without an encoder: random weights with BatchNorm statistics (time does not depend on
    training)."""
    if encoder is None:
        torch.manual_seed(0)
        encoder = resnet18(width).train()
        with torch.no_grad():
            for _ in range(3):
                encoder(images.pixels[:64].float() / 255)
        encoder.eval()
    noise = issl.GaussianNoise(0.05, 0.2).keyed(0)
    noisy = noise(images.pixels.float() / 255, images.index)
    return Task(encoder, images, noisy, batch_size)


def timed(task: Task, names: Sequence[str]) -> dict[str, Turn]:
    found = {**programs.programs(task), **peers.programs(task)}
    return alternate({name: found[name] for name in names if name in found})


def table(task: Task, turns: Mapping[str, Turn]) -> list[dict[str, Any]]:
    for turn in turns.values():
        if turn.error is not None:
            print(turn.name, turn.error, file=sys.stderr)
    batches = len(task.batches())
    plain = turns[WIDE[0]]
    return [
        {
            "method": t.name,
            "seconds": t.seconds * t.scale,
            "ratio": t.seconds * t.scale / plain.seconds,
            "batch_ratio": median(t.laps[1:]) / median(plain.laps[1:])
            if len(t.laps) == batches + 1
            else None,
            "scale": t.scale,
            "error": None if t.error is None else t.error.strip().splitlines()[-1][:200],
        }
        for t in turns.values()
    ]


def wide(n: int) -> dict[str, Any]:
    """ResNet-18 of full width."""
    task = a_task(64, 16, None, some_images(n))
    turns = timed(task, WIDE)
    return {
        "width": 64,
        "images": n,
        "data": task.images.name,
        "rows": table(task, turns),
        "shares": shares(task),
    }


def shares(task: Task) -> dict[str, float]:
    """Shares of the time of LoGra rank 16 outside the forward and backward passes."""
    spent = {"read_inputs": 0.0, "_Tap.add": 0.0}
    places = {"read_inputs": per_example, "_Tap.add": per_example._Tap}
    kept = {name: getattr(place, name.split(".")[-1]) for name, place in places.items()}

    def counted(name: str) -> Any:
        def function(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            found = kept[name](*arguments, **options)
            spent[name] += time.perf_counter() - began
            return found

        return function

    n = min(4 * task.batch_size, len(task.images))
    few = Task(task.encoder, task.images.subset(range(n)), task.noisy[:n], task.batch_size)
    try:
        for name, place in places.items():
            setattr(place, name.split(".")[-1], counted(name))
        whole = alternate({"one": programs.programs(few)["LoGra rank 16"]})["one"].seconds
    finally:
        for name, place in places.items():
            setattr(place, name.split(".")[-1], kept[name])
    return {"P_in a": spent["read_inputs"] / whole, "P_out Σ d aᵀ": spent["_Tap.add"] / whole}


def narrow(n: int) -> dict[str, Any]:
    """Width 16, for methods that keep whole gradients or decompose whole layers."""
    task = a_task(16, 32, None, some_images(n))
    return {
        "width": 16,
        "images": n,
        "data": task.images.name,
        "rows": table(task, timed(task, NARROW)),
    }


def agreement(n: int, profile: str) -> dict[str, Any]:
    """Rank correlations on the encoder that a profile trains (made first where it is not cached),
    on its images."""
    notebook = "03_background_bias"
    plan = read_profile(
        profile, [notebook], out=str(REPOSITORY), data_root=os.environ.get("ISSL_DATA")
    )[notebook]
    encoder = plan.pretrain().encoder(plan.artifacts(progress=True))
    images = plan.data().load()
    task = a_task(0, 64, encoder, images.subset(range(min(n, len(images)))))
    turns = timed(task, sorted({name for pair in AGREEMENT for name in pair}))
    rows = []
    for a, b in AGREEMENT:
        if a in turns and b in turns and turns[a].error is None and turns[b].error is None:
            rows.append(
                {"a": a, "b": b, "spearman": float(spearmanr(turns[a].result, turns[b].result)[0])}
            )
    errors = {
        t.name: t.error.strip().splitlines()[-1][:200]
        for t in turns.values()
        if t.error is not None
    }
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
    task = a_task(8, 64, None, some_images(2048))
    index = torch.arange(n) % 2048
    images = issl.Images(
        task.images.pixels[index], None, pd.DataFrame({"index": range(n)}), task.images.name
    )
    warm_up = images.subset(range(min(64, n)))
    issl.self_influence(task.encoder, warm_up, computing=issl.Computing(batch_size=64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    issl.self_influence(task.encoder, images, computing=issl.Computing(batch_size=64, memory=way))
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
        "--profile", default="quick", help="whose encoder and images serve the agreement"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    keep_freed_memory()  # for all programs: fresh pages would be timed instead of arithmetic
    if options.one:
        print(json.dumps(one(options.one, options.images)))
        return
    results = HERE / "measured"
    results.mkdir(exist_ok=True)
    for name in options.only or PARTS:
        part, images = PARTS[name]
        print(f"{name} …", flush=True)
        more = {"profile": options.profile} if name == "agreement" else {}
        found = part(options.images or images, **more) | machine(peers.versions(), threads)
        several = f"-{threads}" if threads > 1 else ""
        (results / f"{name}{several}.json").write_text(json.dumps(found, indent=1) + "\n")
        write_report(results, HERE / "RESULTS.md")
        print(json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    main()
