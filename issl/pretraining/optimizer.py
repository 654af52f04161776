"""LARS, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from issl.pretraining.methods.base import Recipe


class LARS(Optimizer):
    """SGD with momentum whose step is scaled, parameter by parameter, to the size of the weights
    (You et al. 2017, arXiv 1708.03888, eq. 6):

        r = trust · ‖p‖ / (‖g‖ + wd · ‖p‖),   v ← momentum · v + r · (g + wd · p),   p ← p − lr · v

    Groups without weight decay (biases, normalisation) get r = 1, as in SimCLR and BYOL. With
    `clip`, r ← min(r / lr, 1): LARS may lower the learning rate but not raise it (as in NVIDIA
    Apex's LARC).
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]] | Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
        clip: bool = False,
    ):
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, settings | {"trust": trust, "clip": clip})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step along the parameters' gradients."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            steps = [p.grad for p in params]
            decay, lr = group["weight_decay"], group["lr"]
            if decay > 0:
                sizes, slopes = torch._foreach_norm(params), torch._foreach_norm(steps)
                size, slope = torch.stack(list(sizes)), torch.stack(list(slopes))
                ratio = group["trust"] * size / (slope + decay * size + 1e-8)
                if group["clip"]:
                    ratio = (ratio / lr).clamp(max=1)
                # a weight or gradient of 0 has no scale and takes a plain step
                moves = (size > 0) & (slope > 0)
                decays = torch._foreach_mul(params, list((decay * moves).unbind()))
                steps = list(torch._foreach_add(steps, decays))
                torch._foreach_mul_(steps, list(torch.where(moves, ratio, 1).unbind()))
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, steps)
            torch._foreach_add_(params, momenta, alpha=-lr)


def moved(
    recipe: Recipe, p: Tensor, g: Tensor, v: Tensor, lr: float
) -> tuple[Float[Tensor, "*d"], Float[Tensor, "*d"]]:
    """A parameter p and its momentum v after one step with the gradient g, as differentiable
    functions of all three. The recipe's optimizer is `LARS` or SGD with Nesterov momentum."""
    decay, momentum = recipe.weight_decay if p.ndim > 1 else 0.0, recipe.momentum
    if recipe.optimizer == "sgd":
        g = g + decay * p
        v = momentum * v + g
        return p - lr * (g + momentum * v), v
    if decay > 0:
        size, slope = p.norm(), g.norm()
        if size > 0 and slope > 0:
            ratio = recipe.trust * size / (slope + decay * size + 1e-8)
            if recipe.clip:  # at a learning rate of 0, as in a run's last step, all are clipped
                ratio = (ratio / lr).clamp(max=1) if lr > 0 else torch.ones_like(ratio)
            g = ratio * (g + decay * p)
    v = momentum * v + g
    return p - lr * v, v


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up that reaches `peak` at its last step, then half a cosine to 0 at the last step
    (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup - 1)))


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels, none for biases and normalisation (Chen et al. 2020,
    §2.2)."""
    named = [p for p in model.parameters() if p.requires_grad]
    decayed, rest = [p for p in named if p.ndim > 1], [p for p in named if p.ndim <= 1]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
