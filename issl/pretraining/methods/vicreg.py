"""VICReg: Bardes et al. 2022, arXiv 2105.04906."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor

from issl.pretraining.methods.base import (
    LearningMethod,
    Loss,
    Recipe,
    Rows,
    Weights,
    mean,
    products,
    total,
    variance,
)

INVARIANCE, VARIANCE, COVARIANCE = 25.0, 25.0, 1.0  # the terms' factors (§4.2)


class VICReg(LearningMethod):
    """Invariance between views; variance, and no covariance, of the components of each."""

    name, label = "vicreg", "VICReg"

    def loss(
        self,
        outputs: tuple[Tensor, ...],
        recipe: Recipe,
        labels: Int64[Tensor, " b"] | None = None,
        weights: Weights | None = None,
    ) -> Loss:
        za, zb = outputs[0].chunk(2)
        apart = mean((za - zb).square().mean(1), weights)
        hinges = [F.relu(1 - (variance(z, weights, 1) + 1e-4).sqrt()).mean() for z in (za, zb)]
        shared = covariance(za, weights) + covariance(zb, weights)
        return INVARIANCE * apart + VARIANCE * (hinges[0] + hinges[1]) / 2 + COVARIANCE * shared


def covariance(z: Rows, weights: Weights | None) -> Loss:
    """Σ_{i≠j} Cov_ij² / d (eq. 4)."""
    centred = z - mean(z, weights)
    squares = (products(centred, centred, weights) / (total(z, weights) - 1)).square()
    return (squares.sum() - squares.diagonal().sum()) / z.shape[1]
