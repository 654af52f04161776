"""BatchNorm: batch statistics of weighted images, and running statistics apart from the weights.

Training on other images changes the running statistics, and so the features, even if no weight is
trained. No gradient of the weights sees this. So what a weight-based score predicts is measured
with the statistics held: copied from another encoder, or estimated anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from issl.data.images import Images
from issl.data.views import VIEW_UNIFORMS, View
from issl.errors import IsslError
from issl.keyed_random import uniform

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
ESTIMATED = 1 << 33  # the seed of the views for estimates: no training draws these


def full(x: Tensor) -> Tensor:
    """x in fp32, or in its own dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def weighted_batches(model: nn.Module, weights: Float[Tensor, " b"] | None) -> Iterator[None]:
    """Inside, BatchNorm layers in training mode take batch statistics of weighted images.

    Args:
        model: Its layers get batches of len(weights) images, or of two views of each, first all
            first views, then all second ones.
        weights: One for each image; None changes nothing. An image of weight 0 counts as absent. If
            they require a gradient, the running statistics stay differentiable functions of them.
    """
    if weights is None:
        yield
        return
    with _replaced_forward(model, partial(_weighted, weights)):
        yield


@contextmanager
def differentiable_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm layers in eval mode are also differentiable in their running statistics,
    for which torch's own layers have no gradient."""
    with _replaced_forward(model, _by_running_statistics):
        yield


@contextmanager
def _replaced_forward(
    model: nn.Module, forward: Callable[[_BatchNorm, Tensor], Tensor]
) -> Iterator[None]:
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    for layer in layers:
        layer.forward = partial(forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # back to the class's own


def _by_running_statistics(layer: _BatchNorm, x: Tensor) -> Tensor:
    assert layer.running_mean is not None and layer.running_var is not None
    return _scaled(layer, x - _of_channels(layer.running_mean, x), layer.running_var)


def _scaled(layer: _BatchNorm, centred: Tensor, var: Tensor) -> Tensor:
    scale = (var + layer.eps).rsqrt() * layer.weight
    return centred * _of_channels(scale, centred) + _of_channels(layer.bias, centred)


def _of_channels(values: Tensor, x: Tensor) -> Tensor:
    """One value per channel, in a shape that broadcasts with x."""
    return values.view(1, -1, *[1] * (x.ndim - 2))


def _weighted(weights: Tensor, layer: _BatchNorm, x: Tensor) -> Tensor:
    if not layer.training:
        return type(layer).forward(layer, x)
    values = full(x)
    w = weights.to(values.dtype).repeat(len(x) // len(weights))
    count = w.sum() * values[0, 0].numel()

    def average(v: Tensor) -> Tensor:
        return torch.tensordot(w, v.flatten(2).sum(2) if v.ndim > 2 else v, 1) / count

    mean = average(values)
    centred = values - _of_channels(mean, values)
    var = average(centred.square())
    momentum, seen = layer.momentum, layer.num_batches_tracked
    assert momentum is not None and seen is not None  # true of all networks of this library
    # new tensors replace the old, so nothing that autograd's graph holds is overwritten
    for name, found in (("running_mean", mean), ("running_var", var * count / (count - 1))):
        now = found if weights.requires_grad else found.detach()
        setattr(layer, name, torch.lerp(getattr(layer, name), now, momentum))
    layer.num_batches_tracked = seen + 1
    return _scaled(layer, centred, var).to(x.dtype)


def copy_statistics(source: nn.Module, target: nn.Module) -> nn.Module:
    """Give `target` the running statistics of `source`, of the same architecture; returns it."""
    theirs, own = (
        {name: value for name, value in net.state_dict().items() if name.endswith(STATISTICS)}
        for net in (source, target)
    )
    if theirs.keys() != own.keys():
        differing = ", ".join(sorted(theirs.keys() ^ own.keys())[:4])
        raise IsslError(f"statistics: the encoders differ in their BatchNorm layers ({differing})")
    target.load_state_dict(theirs, strict=False)
    return target


def estimate_statistics(
    backbone: nn.Module,
    images: Images,
    view: View,
    size: tuple[int, int] | None = None,
    batch_size: int = 256,
) -> nn.Module:
    """Set the running statistics to those of one fixed view of each image, averaged over batches in
    the order of the images' indices. Returns the network in eval mode."""
    order = images.index.argsort()

    def views() -> Iterator[Tensor]:
        for rows in order.split(batch_size):
            u = uniform(ESTIMATED, images.index[rows], (VIEW_UNIFORMS,))
            yield view(images.pixels[rows].float() / 255, u, size)

    update_bn(views(), backbone)
    return backbone.eval()
