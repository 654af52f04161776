"""Several processes train on one batch: rows are gathered, BatchNorm goes over all, gradients are
summed.

Every process holds an equal part of the batch and computes the same loss of the whole. It
backpropagates only through its own rows; the sum over processes is the gradient that one process
with the whole batch would have (tested).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from issl.shards import Shards


class _Sum(torch.autograd.Function):
    """s = Σ_r x_r on every process. Each uses s, so dL/dx_r = Σ over processes of their dL/ds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        return shards.sum(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.shards.sum(grad.clone()), None


class _Gather(torch.autograd.Function):
    """All rows, in order of rank. Every process computes the same loss of them, so its own rows of
    dL/dz are the whole derivative with respect to these rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards) -> Tensor:
        ctx.shards, ctx.rows = shards, len(x)
        every = [torch.empty_like(x) for _ in range(shards.world)]
        shards.call(lambda: dist.all_gather(every, x.detach().contiguous()))
        return torch.cat(every)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.shards.rank * ctx.rows :][: ctx.rows].clone(), None


def gather(x: Tensor, shards: Shards) -> Tensor:
    """The rows of all processes, in order of rank; all must bring the same number."""
    result: Tensor = x if shards.world == 1 else _Gather.apply(x, shards)
    return result


def full(x: Tensor) -> Tensor:
    """In fp32, or in its own type if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sum_gradients(model: nn.Module, shards: Shards) -> None:
    """Replace each gradient by its sum over all processes, in one message."""
    if shards.world == 1:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    total = shards.sum(torch.cat([g.flatten() for g in grads]))
    parts = [
        part.view_as(g)
        for part, g in zip(total.split([g.numel() for g in grads]), grads, strict=True)
    ]
    torch._foreach_copy_(grads, parts)


@contextmanager
def batchnorm_over_all(model: nn.Module, shards: Shards) -> Iterator[None]:
    """Inside, BatchNorm layers in training mode normalise by the statistics of all processes'
    batches.

    torch's own SyncBatchNorm runs only on GPUs; this one also runs on CPUs, where it is tested.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm)] if shards.world > 1 else []
    for layer in layers:
        layer.forward = partial(_normalise, layer, shards)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # back to the class's own


def _normalise(layer: _BatchNorm, shards: Shards, x: Tensor) -> Tensor:
    if not layer.training:
        return type(layer).forward(layer, x)
    dims, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
    values = full(x)
    count = values.numel() // values.shape[1] * shards.world
    mean = _Sum.apply(values.sum(dims), shards) / count
    centred = values - mean.view(shape)
    var = _Sum.apply(centred.square().sum(dims), shards) / count
    with torch.no_grad():
        assert (
            layer.running_mean is not None
            and layer.running_var is not None
            and layer.momentum is not None
        )
        layer.running_mean.lerp_(mean, layer.momentum)
        layer.running_var.lerp_(var * count / (count - 1), layer.momentum)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked += 1
    scale = (var + layer.eps).rsqrt() * layer.weight
    return (centred * scale.view(shape) + layer.bias.view(shape)).to(x.dtype)
