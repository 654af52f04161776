"""Barlow Twins: Zbontar et al. 2021, arXiv 2103.03230."""

from __future__ import annotations

import torch

from issl.pretraining.methods.base import Batch, LearningMethod, Loss, Outputs


class BarlowTwins(LearningMethod):
    """Makes each component of the projections agree between views, and match no other component."""

    name, label = "barlow_twins", "Barlow Twins"
    advice = ", or raise off_diagonal={off_diagonal:g}"

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """Σ_i (1 − C_ii)² + λ Σ_{i≠j} C_ij², C = z̄_aᵀ z̄_b / b, where z̄ is standardised over the
        batch (eq. 1); times the recipe's `scale`."""
        za, zb = (
            (z - batch.mean(z)) * (batch.variance(z) + 1e-5).rsqrt() for z in outputs[0].chunk(2)
        )
        identity = torch.eye(za.shape[1], device=za.device, dtype=za.dtype)
        squares = (batch.products(za, zb) - identity).square()
        diagonal, recipe = squares.diagonal().sum(), batch.recipe
        return recipe.scale * (diagonal + recipe.off_diagonal * (squares.sum() - diagonal))
