"""VICReg: Bardes et al. 2022, arXiv 2105.04906."""

from __future__ import annotations

import torch.nn.functional as F

from issl.pretraining.methods.base import Batch, LearningMethod, Loss, Outputs, Rows

INVARIANCE, VARIANCE, COVARIANCE = 25.0, 25.0, 1.0  # the terms' factors (§4.2)


class VICReg(LearningMethod):
    """Invariance between views; variance, but no covariance, of the components in each view."""

    name, label = "vicreg", "VICReg"

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """The three terms; the covariance term is Σ_{i≠j} Cov_ij² / d for each view (eq. 4)."""
        za, zb = outputs[0].chunk(2)
        apart = batch.mean((za - zb).square().mean(1))
        hinges = [F.relu(1 - (batch.variance(z, 1) + 1e-4).sqrt()).mean() for z in (za, zb)]

        def shared(z: Rows) -> Loss:
            centred = z - batch.mean(z)
            squares = batch.products(centred, centred, 1).square()
            return (squares.sum() - squares.diagonal().sum()) / z.shape[1]

        covariance = shared(za) + shared(zb)
        return INVARIANCE * apart + VARIANCE * (hinges[0] + hinges[1]) / 2 + COVARIANCE * covariance
