"""Barlow Twins: Zbontar et al. 2021, arXiv 2103.03230."""

from __future__ import annotations

import torch

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


class BarlowTwins(LearningMethod):
    """Makes each component of the projections agree between views, and with no other component."""

    name, label = "barlow_twins", "Barlow Twins"
    advice = ", or raise off_diagonal={off_diagonal:g}"

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        (za, zb), recipe = outputs[0].chunk(2), batch.recipe
        return redundancy(za, zb, recipe.off_diagonal, recipe.scale, batch.weights)


def redundancy(
    za: Rows, zb: Rows, off_diagonal: float, scale: float = 1.0, weights: Weights | None = None
) -> Loss:
    """Σ_i (1 − C_ii)² + λ Σ_{i≠j} C_ij², C = z̄_aᵀ z̄_b / b, z̄ standardised over the batch (eq.
    1); times `scale`."""
    za, zb = ((z - mean(z, weights)) * (variance(z, weights) + 1e-5).rsqrt() for z in (za, zb))
    correlations = products(za, zb, weights) / total(za, weights)
    identity = torch.eye(za.shape[1], device=za.device, dtype=za.dtype)
    squares = (correlations - identity).square()
    diagonal = squares.diagonal().sum()
    return scale * (diagonal + off_diagonal * (squares.sum() - diagonal))
