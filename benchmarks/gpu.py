"""What a GPU makes of it: scores beside the CPU's, seconds an epoch, seconds of an influence pass,
and their parts.

    ISSL_DATA=DIR python benchmarks/gpu.py                       # all parts, some three minutes
    ISSL_DATA=DIR python benchmarks/gpu.py --only pretraining
    ISSL_DATA=DIR python benchmarks/gpu.py --small simclr        # a short training of the profile
    `overnight`

Each part leaves its numbers in benchmarks/measured/gpu.json; RESULTS.md is written from it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import machine, write_report
from scipy.stats import spearmanr

import issl
from issl import evaluate
from issl.audit.stats import evaluate as hits
from issl.devices import full_precision
from issl.files import REPOSITORY
from issl.influence.losses import stability_loss
from issl.influence.passes import Computing
from issl.pretraining.encoder import load_encoder, resnet18
from issl.pretraining.learner import Learner
from issl.pretraining.loop import Execution, epoch_uniforms, pretrain
from issl.pretraining.optimizer import LARS, groups
from issl.pretraining.recipes import SSL, Method, recipe

HERE = Path(__file__).parent
CUDA = torch.device("cuda")
BATCH, CIFAR = 256, 50_000
TRAINED = "e5fc9138317555fc"  # SimCLR, seed 0, of the profile `overnight`


def timed(run: Callable[[], object]) -> float:
    """Seconds, the device's work included."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def equality(n: int = 2048) -> dict[str, Any]:
    """Scores of a trained encoder, on both."""
    encoder = load_encoder(REPOSITORY / "released" / "pretrain" / TRAINED / "encoder.safetensors")
    images, tables, seconds = issl.load("cifar10", n=n), {}, {}
    for device in ("cpu", "cuda", "cuda again"):
        computing = Computing(device=device.split()[0])
        seconds[device] = timed(
            lambda d=device, c=computing: tables.update(
                {d: issl.self_influence(encoder, images, computing=c)}
            )  # type: ignore[misc]
        )
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


def epoch(method: Method, compiled: Any, width: int = 64, batches: int = 40) -> dict[str, Any]:
    """Seconds of an epoch of CIFAR-10, from the last of a few short ones."""
    images = issl.load("cifar10", n=BATCH * batches)
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    _, history = pretrain(
        images,
        recipe(method, "published"),
        width=width,
        epochs=3,
        batch_size=BATCH,
        execution=Execution(CUDA, compiled=compiled, progress=False),
    )
    speed = float(history["images_per_second"].iloc[-1])
    return {
        "method": method,
        "width": width,
        "compiled": compiled,
        "images_per_second": speed,
        "epoch_seconds": CIFAR // BATCH * BATCH / speed,
        "first_epochs_seconds": time.perf_counter() - began,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def pretraining() -> dict[str, Any]:
    """Full width, bf16, NHWC."""
    rows = [epoch(method, "off") for method in SSL]
    return {"rows": [*rows, epoch("simclr", "on")], "parts": {m: parts(m) for m in SSL}}


def parts(method: Method, width: int = 64, steps: int = 20) -> dict[str, float]:
    """Milliseconds of the parts of a step in eager mode, each waited for."""
    how, images = recipe(method, "published"), issl.load("cifar10", n=BATCH)
    learner = Learner(how, width, None, 0).to(CUDA).to(memory_format=torch.channels_last).train()
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

    for step in range(steps + 5):
        for name, run in zip(spent, (views, forward, backward, update), strict=True):
            seconds = timed(run)
            spent[name] += seconds if step >= 5 else 0.0
    return {name: 1000 * total / steps for name, total in spent.items()}


def wide() -> torch.nn.Module:
    """Full width, BatchNorm with statistics; time does not depend on training."""
    torch.manual_seed(0)
    encoder = resnet18(64).train()
    with torch.no_grad():
        encoder(issl.load("cifar10", n=64).tensor().float() / 255)
    return encoder.eval()


def influence() -> dict[str, Any]:
    """All training images of CIFAR-10 at full width, beside a plain forward and backward pass of
    the same loss."""
    encoder, images = wide().to(CUDA), issl.load("cifar10")
    pixels, noise = images.tensor(), issl.GaussianNoise(0.05, 0.2).keyed(0)

    def plain() -> None:
        for rows in torch.arange(len(pixels)).split(BATCH):
            x = pixels[rows].to(CUDA).float() / 255
            stability_loss(encoder(x), encoder(noise(x, images.index[rows]))).sum().backward()
            encoder.zero_grad(set_to_none=True)

    def score(precision: Any) -> Callable[[], object]:
        return lambda: issl.self_influence(
            encoder, images, computing=Computing(device=CUDA, precision=precision)
        )

    few = images.subset(range(1024))
    issl.self_influence(
        encoder, few, computing=Computing(device=CUDA)
    )  # libraries are loaded at the first use
    torch.cuda.reset_peak_memory_stats()
    found = {"LoGra rank 16": timed(score("fp32"))}
    peak = torch.cuda.max_memory_allocated() / 1e9
    with full_precision():
        found["plain forward + backward"] = timed(plain)
    found["LoGra rank 16, bf16"] = timed(score("bf16"))
    return {"images": len(images), "width": 64, "seconds": found, "peak_gb": peak}


def evaluation() -> dict[str, Any]:
    """Features and kNN of all of CIFAR-10 at full width."""
    encoder, train, test = wide(), issl.load("cifar10"), issl.load("cifar10", split="test")
    rows: list[torch.Tensor] = []
    labels, truth = train.require_labels(), test.require_labels()
    seconds = {
        "features": timed(
            lambda: rows.extend(evaluate.embed(encoder, s, CUDA) for s in (train, test))
        ),
        "kNN": timed(lambda: hits.knn_hits(rows[0], labels, rows[1], truth, device=CUDA)),
    }
    return {"seconds": seconds}


def small(method: Method) -> dict[str, Any]:
    """A short training as in the profile `overnight`: recipe `long`, width 16; most of it on views
    of half the side."""
    images = issl.load("cifar10", n=BATCH * 40)
    began = time.perf_counter()
    _, history = pretrain(
        images,
        recipe(method, "long"),
        width=16,
        epochs=8,
        batch_size=BATCH,
        execution=Execution(CUDA, compiled="on", progress=False),
    )
    speed = history["images_per_second"].round().astype(int).tolist()
    return {
        "method": method,
        "images_per_second": speed,
        "whole_seconds": time.perf_counter() - began,
    }


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
    file = HERE / "measured" / "gpu.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    for name in options.only or PARTS:
        began = time.perf_counter()
        found[name] = PARTS[name]() | machine(torch.cuda.get_device_name())
        print(name, f"{time.perf_counter() - began:.0f} s", json.dumps(found[name]), flush=True)
        file.write_text(json.dumps(found, indent=1) + "\n")
    write_report(HERE / "measured", HERE / "RESULTS.md")


if __name__ == "__main__":
    main()
