"""Linear encoders, where influence has a closed form (arXiv 2412.17170, §3, its theory of linear networks).

f(x) = W x with W (k, d), views x̂_i = x_i + δ_i, squared stability loss, held near a start W₀ (W = 0 is no answer):

    ℓ_i = ½‖W δ_i‖²,   J(W) = (1/n) Σ_i ℓ_i + ½ a ‖W − W₀‖²,   A = (1/n) Σ_i δ_i δ_iᵀ + a I
    ∇ℓ_i = W δ_i δ_iᵀ,   ∇²J = I ⊗ A,   W* = a W₀ A⁻¹
    influence_i = ⟨∇ℓ_i, (∇²J)⁻¹ ∇ℓ_i⟩ = ‖W δ_i‖² · δ_iᵀ A⁻¹ δ_i = sensitivity · leverage
    W*₋ᵢ = W* + W* δ_i δ_iᵀ A⁻¹ / (n − leverage_i)      (Sherman and Morrison 1950: trained without image i)
"""

from __future__ import annotations

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


def fit_without(weight: Weight, delta: Changes, anchor: float, i: int) -> Weight:
    """W*₋ᵢ from W*: what training without image i gives, the other images' weight in J being 1/n still."""
    toward = torch.linalg.solve(curvature(delta, anchor), delta[i])  # A⁻¹ δ_i
    return weight + torch.outer(weight @ delta[i], toward) / (len(delta) - delta[i] @ toward)
