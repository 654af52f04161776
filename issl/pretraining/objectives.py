"""The objectives: each a function of two views' projections (or of logits and labels), a few lines.

All are means over the batch; on several processes they get the whole, gathered batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

Rows = Float[Tensor, "b p"]


def simclr(za: Rows, zb: Rows, temperature: float) -> Float[Tensor, ""]:
    """NT-Xent: −log exp(s(z_i, z_j)/τ) / Σ_{k≠i} exp(s(z_i, z_k)/τ), s the cosine, j the other view
    of i, mean over all 2b views (Chen et al. 2020, arXiv 2002.05709, eq. 1)."""
    z = F.normalize(torch.cat([za, zb]), dim=1)
    logits = z @ z.T / temperature
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    other = torch.arange(len(z), device=z.device).roll(len(za))
    return F.cross_entropy(logits, other)


def byol(pa: Rows, pb: Rows, ta: Rows, tb: Rows) -> Float[Tensor, ""]:
    """‖p̄_a − t̄_b‖² + ‖p̄_b − t̄_a‖² of unit vectors: the predictions of one view, the
    moving-average target's projections of the other, which get no gradient (Grill et al. 2020,
    arXiv 2006.07733, eq. 2)."""
    return sum(
        (2 - 2 * F.cosine_similarity(p, t.detach(), dim=1)).mean() for p, t in ((pa, tb), (pb, ta))
    )  # type: ignore[return-value]


def barlow_twins(za: Rows, zb: Rows, off_diagonal: float, scale: float = 1.0) -> Float[Tensor, ""]:
    """Σ_i (1 − C_ii)² + λ Σ_{i≠j} C_ij², C = z̄_aᵀ z̄_b / b, z̄ standardised over the batch
    (Zbontar et al. 2021, arXiv 2103.03230, eq. 1); times `scale`."""
    za, zb = ((z - z.mean(0)) * (z.var(0, correction=0) + 1e-5).rsqrt() for z in (za, zb))
    squares = (
        za.T @ zb / len(za) - torch.eye(za.shape[1], device=za.device, dtype=za.dtype)
    ).square()
    diagonal = squares.diagonal().sum()
    return scale * (diagonal + off_diagonal * (squares.sum() - diagonal))


def supervised(logits: Float[Tensor, "b c"], labels: Int64[Tensor, " b"]) -> Float[Tensor, ""]:
    """−log softmax(logits)[label]."""
    return F.cross_entropy(logits, labels)
