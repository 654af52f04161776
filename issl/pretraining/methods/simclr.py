"""SimCLR: Chen et al. 2020, arXiv 2002.05709."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from issl.pretraining.methods.base import Batch, LearningMethod, Loss, Outputs


class SimCLR(LearningMethod):
    """Finds the other view of each image among all views of the batch."""

    name, label = "simclr", "SimCLR"

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """−log exp(s(z_i, z_j)/τ) / Σ_{k≠i} w_k exp(s(z_i, z_k)/τ), where s is the cosine and j the
        other view of i; weighted mean over 2b views (arXiv 2002.05709, eq. 1: all weights 1)."""
        z, temperature = F.normalize(outputs[0], dim=1), batch.recipe.temperature
        logits = z @ z.T / temperature
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        other = torch.arange(len(z), device=z.device).roll(len(z) // 2)
        if batch.weights is None:
            return F.cross_entropy(logits.masked_fill(itself, -torch.inf), other)
        w = batch.weights.to(z.dtype).repeat(2)
        # no logarithm of a weight, which may be 0; cosines are at most 1, so nothing overflows
        terms = (w * ((logits - 1 / temperature).exp())).masked_fill(itself, 0).sum(1)
        positive = logits.gather(1, other[:, None]).squeeze(1)
        return w @ (terms.log() + 1 / temperature - positive) / w.sum()
