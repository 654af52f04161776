"""SimCLR pretraining: views per second of our step, of its plain form, and of lightly's loop with
its PIL transforms.

    python benchmarks/pretraining.py [--width 16] [--batch-size 128] [--steps 12]

All use the same network, objective, optimiser and images, and take turns step by step on one thread
(alternate.py).
"""

from __future__ import annotations

import os

# before torch starts its threads
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import argparse
import json
from argparse import Namespace
from functools import partial
from importlib.metadata import version
from itertools import chain, islice, repeat
from statistics import median
from typing import Any

import torch
from alternate import Turn, alternate
from influence import some_images
from PIL import Image
from report import keep, machine
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import issl
from issl.data.views import VIEW_UNIFORMS
from issl.devices import keep_freed_memory
from issl.pretraining.learner import Learner
from issl.pretraining.methods import METHODS
from issl.pretraining.methods.base import Batch
from issl.pretraining.optimizer import groups
from issl.pretraining.recipes import recipe

HOW = recipe("simclr", "short")


def new(width: int) -> tuple[Learner, torch.optim.Optimizer]:
    learner = Learner(HOW, width, None, 0).train()
    rate = {"lr": 0.01, "momentum": 0.9, "nesterov": True, "foreach": True}
    return learner, torch.optim.SGD(groups(learner, HOW.weight_decay), **rate)


def ours(images: issl.Images, asked: Namespace, precision: str, turn: Turn) -> None:
    """The step of `pretraining.loop.pretrain`: views as tensor operations, NHWC, bf16 where the CPU
    computes it."""
    learner, optimizer = new(asked.width)
    learner = learner.for_training()
    for x, u in batches(images, asked, turn):
        loss, _ = learner(HOW.view_a(x, u[:, 0]), HOW.view_b(x, u[:, 1]), None, precision)
        update(loss, optimizer)


def plain(images: issl.Images, asked: Namespace, turn: Turn) -> None:
    """The same step in torch's defaults: fp32, NCHW."""
    learner, optimizer = new(asked.width)
    for x, u in batches(images, asked, turn):
        both = torch.cat([HOW.view_a(x, u[:, 0]), HOW.view_b(x, u[:, 1])])
        loss = METHODS["simclr"].loss((learner.encoder(both),), Batch(HOW))
        update(loss, optimizer)


def lightlys(images: issl.Images, asked: Namespace, turn: Turn) -> None:
    """lightly's SimCLR example: its transform of PIL images in a DataLoader, and its loss. It
    encodes the views one by one."""
    from lightly.loss import NTXentLoss
    from lightly.transforms import SimCLRTransform

    view = HOW.view_a
    transform = SimCLRTransform(
        input_size=32,
        cj_prob=view.jitter,
        cj_strength=1.0,
        cj_bright=view.brightness,
        cj_contrast=view.contrast,
        cj_sat=view.saturation,
        cj_hue=view.hue,
        min_scale=view.min_area,
        random_gray_scale=view.grayscale,
        gaussian_blur=0.0,
        hf_prob=view.flip,
    )

    class Pictures(Dataset[list[Tensor]]):
        def __init__(self) -> None:
            self.pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in images.pixels]

        def __len__(self) -> int:
            return len(self.pictures)

        def __getitem__(self, k: int) -> list[Tensor]:
            return list(transform(self.pictures[k]))

    learner, optimizer = new(asked.width)
    criterion = NTXentLoss(HOW.temperature)
    loader = DataLoader(Pictures(), asked.batch_size, shuffle=True, drop_last=True)
    epochs = chain.from_iterable(repeat(loader))
    for a, b in islice(epochs, asked.steps):
        update(criterion(learner.encoder(a), learner.encoder(b)), optimizer)
        turn.next()


def batches(images: issl.Images, asked: Namespace, turn: Turn) -> Any:
    """Batches with the uniform numbers of their views; hands over after each."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(asked.steps):
        rows = torch.randint(len(images), (asked.batch_size,), generator=generator)
        uniforms = torch.rand(asked.batch_size, 2, VIEW_UNIFORMS, generator=generator)
        yield images.pixels[rows].float() / 255, uniforms
        turn.next()


def update(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    images = some_images(2048)
    turns = alternate(
        {
            "plain fp32, NCHW": partial(plain, images, options),
            "ours, fp32, NHWC": partial(ours, images, options, "fp32"),
            "ours": partial(ours, images, options, "auto"),
            "lightly's loop, PIL transforms": partial(lightlys, images, options),
        }
    )
    for turn in turns.values():
        if turn.error is not None:
            raise SystemExit(f"{turn.name}: {turn.error}")
    # the first laps include building the network and the libraries' kernels
    laps = {name: median(turn.laps[2 : options.steps]) for name, turn in turns.items()}
    base = laps["plain fp32, NCHW"]
    rows = [
        {"loop": name, "views_per_second": 2 * options.batch_size / lap, "ratio": base / lap}
        for name, lap in laps.items()
    ]
    found = {**vars(options), "data": images.name, "rows": rows}
    found |= machine(f"lightly {version('lightly')}")
    keep("pretraining", found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
