"""VICReg: Bardes et al. 2022, arXiv 2105.04906."""

from __future__ import annotations

import torch.nn.functional as F

from issl.pretraining.methods.base import (
    Batch,
    LearningMethod,
    Loss,
    Outputs,
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

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        (za, zb), weights = outputs[0].chunk(2), batch.weights
        apart = mean((za - zb).square().mean(1), weights)
        hinges = [F.relu(1 - (variance(z, weights, 1) + 1e-4).sqrt()).mean() for z in (za, zb)]
        shared = covariance(za, weights) + covariance(zb, weights)
        return INVARIANCE * apart + VARIANCE * (hinges[0] + hinges[1]) / 2 + COVARIANCE * shared


def covariance(z: Rows, weights: Weights | None) -> Loss:
    """Σ_{i≠j} Cov_ij² / d (eq. 4)."""
    centred = z - mean(z, weights)
    squares = (products(centred, centred, weights) / (total(z, weights) - 1)).square()
    return (squares.sum() - squares.diagonal().sum()) / z.shape[1]
