"""What an image does to a query through BatchNorm's buffers alone, with no weight trained.

A training on the images S leaves running means and variances near their mean over S. To first
order, a query's measure m_q then changes with an image's own share of them (its channels' means,
and its mean squares about the running mean) by

    I(i → q) = −Σ_l [ ∂m_q/∂μ_l · (μ_li − mean_j μ_lj) + ∂m_q/∂σ²_l · (σ²_li − mean_j σ²_lj) ],

positive: with image i in S, the query's measure is lower. A later layer's buffers also follow an
earlier layer's; that is left out.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from issl.data.images import Images
from issl.measures import Measure
from issl.pretraining.learner import Learner
from issl.training_aware import batches, measuring_copy, query_gradients, two_views


class ByBuffers(nn.Module):
    """BatchNorm in eval mode, with its running mean and variance as the only parameters."""

    def __init__(self, layer: _BatchNorm):
        super().__init__()
        assert layer.running_mean is not None and layer.running_var is not None
        self.mean = nn.Parameter(layer.running_mean.clone())
        self.variance = nn.Parameter(layer.running_var.clone())
        self.eps = layer.eps
        self.scale = None if layer.weight is None else layer.weight.detach()
        self.shift = None if layer.bias is None else layer.bias.detach()

    def forward(self, x: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
        to = (1, -1, *[1] * (x.ndim - 2))
        x = (x - self.mean.view(to)) * (self.variance.view(to) + self.eps).rsqrt()
        if self.scale is not None and self.shift is not None:
            x = x * self.scale.view(to) + self.shift.view(to)
        return x


def by_buffers(backbone: nn.Module) -> nn.Module:
    """A copy of the network in which BatchNorm's buffers are the only parameters."""
    copied = copy.deepcopy(backbone).requires_grad_(False)
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm):
                setattr(module, name, ByBuffers(child))
    return copied


def shares_of_images(
    model: Learner,
    train: Images,
    batch_size: int,
    seed: int = 0,
    size: tuple[int, int] | None = None,
) -> Float[Tensor, "n k"]:
    """Each image's share in every layer's buffers, mean over its two views.

    Means, then mean squares about the running mean, in the order of `by_buffers`' parameters; in
    batches as `training_influence` draws them.
    """
    model = measuring_copy(model)
    layers = [m for m in model.encoder.backbone.modules() if isinstance(m, _BatchNorm)]
    means = [layer.running_mean.clone() for layer in layers if layer.running_mean is not None]
    rows: Tensor | None = None
    for positions in batches(train, batch_size, seed, 0):
        seen: dict[int, Tensor] = {}
        handles = [
            layer.register_forward_pre_hook(partial(_note, seen, k))
            for k, layer in enumerate(layers)
        ]
        with torch.no_grad():
            model.encoder.backbone(torch.cat(two_views(model, train, positions, seed, 0, size)))
        for handle in handles:
            handle.remove()
        parts = []
        for k, mean in enumerate(means):
            x = seen[k].flatten(2) if seen[k].ndim > 2 else seen[k].unsqueeze(-1)
            parts += [x.mean(2), (x - mean[:, None]).square().mean(2)]
        found = torch.cat(parts, 1).view(2, len(positions), -1).mean(0)
        if rows is None:
            rows = found.new_empty(len(train), found.shape[1])
        rows[positions] = found
    assert rows is not None  # the set is not empty
    return rows


def _note(seen: dict[int, Tensor], k: int, _: nn.Module, given: tuple[Tensor, ...]) -> None:
    seen[k] = given[0]


def batchnorm_influence(
    learner: Learner,
    train: Images,
    measures: list[Measure],
    batch_size: int = 32,
    seed: int = 0,
    size: tuple[int, int] | None = None,
) -> Float[Tensor, "q n"]:
    """I(i → q) as above, in double precision.

    Args:
        learner: the trained encoder and what its method adds.
        train: the n images.
        measures: of the q queries, see `issl.measures`.
        batch_size: of the views, as in `issl.training_influence`; likewise seed and size.
    """
    held = by_buffers(learner.encoder.backbone)
    found = [torch.cat([g.flatten(1) for g in query_gradients(held, m)], 1) for m in measures]
    own = shares_of_images(learner, train, batch_size, seed, size)
    return -(torch.cat(found) @ (own - own.mean(0)).T).double().cpu()
