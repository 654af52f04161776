"""What is asked of a query: differentiable numbers, whose gradients training-aware influence looks
along."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from issl.data.images import Images
from issl.influence.losses import stability_loss
from issl.influence.perturbation import GaussianNoise, Perturb, Perturbation, keyed_draws

Measure = Callable[
    [nn.Module], Float[Tensor, " q"]
]  # of a backbone in eval mode: one differentiable number per query
TOGETHER = 8  # queries in one forward pass: each one's gradient goes back through all of them


def stability_measures(
    query: Images,
    perturbation: Perturbation | Perturb = GaussianNoise(0.05, 0.2),
    seed: int = 0,
    draws: int = 1,
) -> list[Measure]:
    """The stability loss of each query, mean over the draws (draw k of seed s is that of seed s +
    k·2³²); one measure for every few queries. With the views of the training as perturbation it is
    the alignment of the SSL losses."""
    perturbs = keyed_draws(perturbation, seed, draws)

    def of(positions: slice) -> Measure:
        x, index = query.pixels[positions].float() / 255, query.index[positions]
        views = [perturb(x, index) for perturb in perturbs]

        def measure(backbone: nn.Module) -> Float[Tensor, " q"]:
            features = backbone(_like(backbone, x))
            return torch.stack(
                [stability_loss(features, backbone(_like(backbone, v))) for v in views]
            ).mean(0)

        return measure

    return [of(slice(k, k + TOGETHER)) for k in range(0, len(query), TOGETHER)]


def probe_losses(query: Images, weight: Float[Tensor, "c d"], bias: Float[Tensor, " c"]) -> Measure:
    """The cross-entropy of each query's class under a linear probe on the features, which is held
    fixed."""
    x, labels = query.tensor().float() / 255, query.require_labels()

    def measure(backbone: nn.Module) -> Float[Tensor, " q"]:
        scores = nn.functional.linear(
            backbone(_like(backbone, x)), _like(backbone, weight), _like(backbone, bias)
        )
        return nn.functional.cross_entropy(scores, labels.to(scores.device), reduction="none")

    return measure


def margins(query: Images, weight: Float[Tensor, "c d"], bias: Float[Tensor, " c"]) -> Measure:
    """How far each query is on the wrong side of a fixed linear probe: the best other class's score
    less its own's."""
    x, labels = query.tensor().float() / 255, query.require_labels()

    def measure(backbone: nn.Module) -> Float[Tensor, " q"]:
        scores = nn.functional.linear(
            backbone(_like(backbone, x)), _like(backbone, weight), _like(backbone, bias)
        )
        own: Int64[Tensor, "q 1"] = labels.to(scores.device)[:, None]
        others = scores.scatter(1, own, -torch.inf).amax(1)
        return others - scores.gather(1, own).squeeze(1)

    return measure


def _like(backbone: nn.Module, x: Tensor) -> Tensor:
    """On the backbone's device, in its precision."""
    weight = next(backbone.parameters())
    return x.to(weight.device, weight.dtype)
