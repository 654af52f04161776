"""What is compared: the plain pass, the lower limit, and this library, all on the same images and
the same noise."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from alternate import Turn
from torch import Tensor, nn

from issl import EKFAC, Computing, Exact, Images, LoGra, self_influence
from issl.influence.curvature import Curvature
from issl.influence.frozen_encoder import frozen
from issl.influence.losses import stability_loss
from issl.pretraining.encoder import resnet18

# the first convolution of our ResNet: three input channels leave LogIX no more than rank 3 there
STEM = ("1",)
Program = Callable[[Turn], np.ndarray | None]


@dataclass(frozen=True)
class Task:
    """An encoder, images, and their noisy copies (n, 3, H, W), computed in advance."""

    encoder: nn.Module
    images: Images
    noisy: Tensor
    batch_size: int

    def pixels(self) -> Tensor:
        return self.images.pixels.float() / 255

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        parts = (whole.split(self.batch_size) for whole in (self.pixels(), self.noisy))
        return list(zip(*parts, strict=True))


def random_encoder(width: int, images: Images) -> nn.Module:
    """Random weights, BatchNorm with statistics of some images: time does not depend on
    training."""
    torch.manual_seed(0)
    encoder = resnet18(width).train()
    with torch.no_grad():
        for _ in range(3):
            encoder(images.pixels[:64].float() / 255)
    return encoder.eval()


def plain(task: Task, layout: torch.memory_format = torch.contiguous_format) -> Program:
    """Forward and backward pass of the summed loss with the gradients of all weights: the cost of a
    training step."""

    def program(turn: Turn) -> None:
        model = copy.deepcopy(task.encoder).to(memory_format=layout)
        for x, noisy in task.batches():
            turn.next()
            features = model(torch.cat([x, noisy]).contiguous(memory_format=layout))
            stability_loss(*features.split(len(x))).sum().backward()
            model.zero_grad()

    return program


def limit(task: Task) -> Program:
    """Forward pass, and backward pass to the first layer's output, without gradients of weights. No
    method can save these. Layout and BatchNorm are those of our copy."""

    def program(turn: Turn) -> None:
        model = frozen(task.encoder, torch.device("cpu"), torch.channels_last)
        first = next(m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
        first.register_forward_hook(lambda _, __, output: output.requires_grad_().clone())
        for x, noisy in task.batches():
            turn.next()
            features = model(torch.cat([x, noisy]).contiguous(memory_format=torch.channels_last))
            stability_loss(*features.split(len(x))).sum().backward()

    return program


def score(task: Task, curvature: Curvature, skip: Sequence[str] = (), **how: Any) -> Program:
    """`self_influence` as a user calls it, from pixels to scores; how: fields of `Computing`."""

    def program(turn: Turn) -> np.ndarray:
        place = {int(k): p for p, k in enumerate(task.images.index)}

        def noise(_: Tensor, index: Tensor) -> Tensor:
            turn.next()
            return task.noisy[[place[int(k)] for k in index]]

        computing = Computing(batch_size=task.batch_size, **how)
        table = self_influence(
            task.encoder, task.images, noise, curvature, skip=skip, computing=computing
        )
        return table["influence"].to_numpy()

    return program


def programs(task: Task) -> dict[str, Program]:
    """The programs by their names in the table."""
    return {
        "plain forward + backward": plain(task),
        "plain forward + backward, NHWC": plain(task, torch.channels_last),
        "forward + backward by data": limit(task),
        "LoGra rank 8": score(task, LoGra(8)),
        "LoGra rank 8, no stem": score(task, LoGra(8), skip=STEM),
        "LoGra rank 16": score(task, LoGra(16)),
        "LoGra rank 64": score(task, LoGra(64)),
        "LoGra rank 16, bf16": score(task, LoGra(16), precision="bf16"),
        "LoGra rank 16, PCA": score(task, LoGra(16, projection="pca", fit=128)),
        "EK-FAC": score(task, EKFAC(), memory="recomputed"),
        "Exact": score(task, Exact()),
    }
