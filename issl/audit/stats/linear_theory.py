"""Linear encoders, where influence has a closed form (arXiv 2412.17170, §3, theory of linear
networks).

f(x) = W x with W (k, d), views x̂_i = x_i + δ_i, squared stability loss, kept near a start W₀ (else
W = 0 is best):

    ℓ_i = ½‖W δ_i‖²,   J(W) = (1/n) Σ_i ℓ_i + ½ a ‖W − W₀‖²,   A = (1/n) Σ_i δ_i δ_iᵀ + a I
    ∇ℓ_i = W δ_i δ_iᵀ,   ∇²J = I ⊗ A,   W* = a W₀ A⁻¹
    influence_i = ⟨∇ℓ_i, (∇²J)⁻¹ ∇ℓ_i⟩ = ‖W δ_i‖² · δ_iᵀ A⁻¹ δ_i = sensitivity · leverage
    influence(i → q) = ⟨∇ℓ_q, (∇²J)⁻¹ ∇ℓ_i⟩ = (W δ_q)ᵀ(W δ_i) · δ_qᵀ A⁻¹ δ_i
    W*₋S = W* + W* D_Sᵀ (n I − D_S A⁻¹ D_Sᵀ)⁻¹ D_S A⁻¹,  D_S the rows δ_i of S      (trained without
    S; Woodbury 1950)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from issl.errors import IsslError

Weight = Float[Tensor, "k d"]
Changes = Float[Tensor, "n d"]  # δ_i = x̂_i − x_i


def curvature(delta: Changes, anchor: float) -> Float[Tensor, "d d"]:
    """A = mean δδᵀ + anchor · I. Raises IsslError where anchor ≤ 0: A might have no inverse."""
    if not anchor > 0:
        raise IsslError(f"anchor={anchor}: must be > 0")
    return delta.T @ delta / len(delta) + anchor * torch.eye(delta.shape[1], dtype=delta.dtype)


def fit(start: Weight, delta: Changes, anchor: float) -> Weight:
    """W*, the minimum of J."""
    return torch.linalg.solve(curvature(delta, anchor), anchor * start.T).T


def leverage(delta: Changes, anchor: float) -> Float[Tensor, " n"]:
    """δ_iᵀ A⁻¹ δ_i, in [0, n)."""
    return (delta * torch.linalg.solve(curvature(delta, anchor), delta.T).T).sum(1)


def influence(weight: Weight, delta: Changes, anchor: float) -> Float[Tensor, " n"]:
    """‖W δ_i‖² · leverage_i."""
    return (delta @ weight.T).square().sum(1) * leverage(delta, anchor)


def cross_influence(
    weight: Weight, delta: Changes, query: Float[Tensor, "q d"], anchor: float
) -> Float[Tensor, "q n"]:
    """(W δ_q)ᵀ(W δ_i) · δ_qᵀ A⁻¹ δ_i; its diagonal, with the images as queries, is `influence`."""
    toward = torch.linalg.solve(curvature(delta, anchor), delta.T)  # A⁻¹ δ_i
    return (query @ weight.T @ weight @ delta.T) * (query @ toward)


def fit_without(weight: Weight, delta: Changes, anchor: float, rows: Sequence[int]) -> Weight:
    """W*₋S from W*: the result of training without these images, where each of the others still
    weighs 1/n in J."""
    d = delta[list(rows)]
    toward = torch.linalg.solve(curvature(delta, anchor), d.T).T  # D_S A⁻¹
    inner = len(delta) * torch.eye(len(d), dtype=d.dtype) - toward @ d.T
    return weight + weight @ d.T @ torch.linalg.solve(inner, toward)
