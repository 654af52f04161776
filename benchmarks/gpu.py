"""On a GPU: scores compared with the CPU's, seconds per epoch, seconds of an influence pass, and
their parts.

    ISSL_DATA=DIR python benchmarks/gpu.py                       # all parts, about three minutes
    ISSL_DATA=DIR python benchmarks/gpu.py --only pretraining
    ISSL_DATA=DIR python benchmarks/gpu.py --small simclr        # a training as in `overnight`

Each part leaves its numbers in benchmarks/measured/gpu.json; RESULTS.md is written from it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from programs import random_encoder
from report import keep, machine
from scipy.stats import spearmanr

import issl
from issl import measures
from issl.audit.stats import evaluate as hits
from issl.devices import full_precision
from issl.files import REPOSITORY
from issl.influence.losses import stability_loss
from issl.influence.scorer import Computing
from issl.pretraining.encoder import load_encoder
from issl.pretraining.learner import Learner
from issl.pretraining.loop import Execution, epoch_uniforms, pretrain
from issl.pretraining.methods.base import Recipe
from issl.pretraining.optimizer import LARS, groups
from issl.pretraining.recipes import SSL, Method, recipe

CUDA = torch.device("cuda")
BATCH, CIFAR = 256, 50_000
TRAINED = "e5fc9138317555fc"  # SimCLR, seed 0, of the profile `overnight`


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and its seconds, the device's work included."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    found = run()
    torch.cuda.synchronize()
    return found, time.perf_counter() - began


def equality(n: int = 2048) -> dict[str, Any]:
    """Scores of a trained encoder, on the CPU and twice on the GPU."""
    encoder = load_encoder(REPOSITORY / "released" / "pretrain" / TRAINED / "encoder.safetensors")
    images, tables, seconds = issl.load("cifar10", n=n), {}, {}
    for run in ("cpu", "cuda", "cuda again"):
        computing = Computing(device=run.split()[0])
        score = partial(issl.self_influence, encoder, images, computing=computing)
        tables[run], seconds[run] = timed(score)
    cpu, gpu, again = (t["influence"].to_numpy() for t in tables.values())
    relative = np.abs(gpu / cpu - 1)
    return {
        "images": n,
        "width": 16,
        "largest_relative_difference": float(relative.max()),
        "median_relative_difference": float(np.median(relative)),
        "spearman": float(spearmanr(cpu, gpu)[0]),
        "same_each_time": bool((gpu == again).all()),
        "seconds": seconds,
    }


def speeds(how: Recipe, width: int, epochs: int, compiled: Any) -> tuple[pd.Series, float]:
    """Images a second in each of some short epochs, and the seconds of all of them."""
    images = issl.load("cifar10", n=40 * BATCH)
    execution = Execution(CUDA, compiled=compiled, progress=False)
    began = time.perf_counter()
    _, history = pretrain(
        images, how, width=width, epochs=epochs, batch_size=BATCH, execution=execution
    )
    return history["images_per_second"], time.perf_counter() - began


def epoch(method: Method, compiled: Any) -> dict[str, Any]:
    """Seconds of an epoch of CIFAR-10, from the last of a few short ones."""
    torch.cuda.reset_peak_memory_stats()
    each, seconds = speeds(recipe(method, "published"), 64, 3, compiled)
    speed = float(each.iloc[-1])
    return {
        "method": method,
        "width": 64,
        "compiled": compiled,
        "images_per_second": speed,
        "epoch_seconds": CIFAR // BATCH * BATCH / speed,
        "first_epochs_seconds": seconds,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def pretraining() -> dict[str, Any]:
    """Full width, bf16, NHWC."""
    rows = [epoch(method, "off") for method in SSL]
    return {"rows": [*rows, epoch("simclr", "on")], "parts": {m: parts(m) for m in SSL}}


def parts(method: Method) -> dict[str, float]:
    """Milliseconds of each part of a step in eager mode, synchronised after each part."""
    how, images = recipe(method, "published"), issl.load("cifar10", n=BATCH)
    learner = Learner(how, 64, None, 0).to(CUDA).to(memory_format=torch.channels_last).train()
    kind = LARS if how.optimizer == "lars" else torch.optim.SGD
    optimizer = kind(groups(learner, how.weight_decay), lr=0.01, momentum=0.9)
    x, u = images.tensor().to(CUDA).float() / 255, epoch_uniforms(BATCH, 0, 0).to(CUDA)
    spent = dict.fromkeys(("views", "forward and loss", "backward", "optimiser and target"), 0.0)
    state: dict[str, Any] = {}

    def views() -> None:
        state["views"] = how.view_a(x, u[:, 0]), how.view_b(x, u[:, 1])

    def forward() -> None:
        state["loss"] = learner(*state["views"], None, "auto")[0]

    def backward() -> None:
        optimizer.zero_grad(set_to_none=True)
        state["loss"].backward()

    def update() -> None:
        optimizer.step()
        learner.follow(0.5)

    for step in range(25):
        for name, run in zip(spent, (views, forward, backward, update), strict=True):
            seconds = timed(run)[1]
            spent[name] += seconds if step >= 5 else 0.0
    return {name: 1000 * total / 20 for name, total in spent.items()}


def influence() -> dict[str, Any]:
    """Influence of all training images of CIFAR-10 at full width, compared with a plain forward and
    backward pass of the same loss."""
    images = issl.load("cifar10")
    encoder = random_encoder(64, images).to(CUDA)
    pixels, noise = images.tensor(), issl.GaussianNoise(0.05, 0.2).keyed(0)

    def plain() -> None:
        for rows in torch.arange(len(pixels)).split(BATCH):
            x = pixels[rows].to(CUDA).float() / 255
            stability_loss(encoder(x), encoder(noise(x, images.index[rows]))).sum().backward()
            encoder.zero_grad(set_to_none=True)

    def score(precision: Any, which: issl.Images = images) -> object:
        computing = Computing(device=CUDA, precision=precision)
        return issl.self_influence(encoder, which, computing=computing)

    score("fp32", images.subset(range(1024)))  # libraries are loaded at the first use
    torch.cuda.reset_peak_memory_stats()
    found = {"LoGra rank 16": timed(lambda: score("fp32"))[1]}
    peak = torch.cuda.max_memory_allocated() / 1e9
    with full_precision():
        found["plain forward + backward"] = timed(plain)[1]
    found["LoGra rank 16, bf16"] = timed(lambda: score("bf16"))[1]
    return {"images": len(images), "width": 64, "seconds": found, "peak_gb": peak}


def evaluation() -> dict[str, Any]:
    """Features and kNN of all of CIFAR-10 at full width."""
    train, test = issl.load("cifar10"), issl.load("cifar10", split="test")
    encoder = random_encoder(64, train)
    (x, y), embedding = timed(lambda: [measures.embed(encoder, s, CUDA) for s in (train, test)])
    labels, truth = train.require_labels(), test.require_labels()
    _, knn = timed(lambda: hits.knn_hits(x, labels, y, truth, device=CUDA))
    return {"seconds": {"features": embedding, "kNN": knn}}


def small(method: Method) -> dict[str, Any]:
    """A short training as in the profile `overnight`: recipe `long`, width 16. Most of it uses
    views of half the side."""
    each, seconds = speeds(recipe(method, "long"), 16, 8, "on")
    told = each.round().astype(int).tolist()
    return {"method": method, "images_per_second": told, "whole_seconds": seconds}


PARTS = {
    "equality": equality,
    "pretraining": pretraining,
    "influence": influence,
    "evaluation": evaluation,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--small", choices=(*SSL, "supervised"))
    options = parser.parse_args()
    if options.small:
        print(json.dumps(small(options.small)))
        return
    file = Path(__file__).parent / "measured" / "gpu.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    for name in options.only or PARTS:
        began = time.perf_counter()
        found[name] = PARTS[name]() | machine(torch.cuda.get_device_name())
        print(name, f"{time.perf_counter() - began:.0f} s", json.dumps(found[name]), flush=True)
        keep("gpu", found)


if __name__ == "__main__":
    main()
