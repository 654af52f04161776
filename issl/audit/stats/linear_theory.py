"""Linear encoders, where influence has a closed form (arXiv 2412.17170, §3, theory of linear
networks).

f(x) = W x with W (k, d), views x̂_i = x_i + δ_i, and squared stability loss. W is kept near a start
W₀, as W = 0 would be best otherwise:

    ℓ_i = ½‖W δ_i‖²,   J(W) = (1/n) Σ_i ℓ_i + ½ a ‖W − W₀‖²,   A = (1/n) Σ_i δ_i δ_iᵀ + a I
    ∇ℓ_i = W δ_i δ_iᵀ,   ∇²J = I ⊗ A,   W* = a W₀ A⁻¹
    influence_i = ⟨∇ℓ_i, (∇²J)⁻¹ ∇ℓ_i⟩ = ‖W δ_i‖² · δ_iᵀ A⁻¹ δ_i = sensitivity · leverage
    influence(i → q) = ⟨∇ℓ_q, (∇²J)⁻¹ ∇ℓ_i⟩ = (W δ_q)ᵀ(W δ_i) · δ_qᵀ A⁻¹ δ_i
    W*₋S = W* + W* D_Sᵀ (n I − D_S A⁻¹ D_Sᵀ)⁻¹ D_S A⁻¹,  D_S the rows δ_i of S      (trained without
    S; Woodbury 1950)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator, cg
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
    """W*₋S from W*: the result of training without these images, while each of the others keeps
    its weight of 1/n in J."""
    d = delta[list(rows)]
    toward = torch.linalg.solve(curvature(delta, anchor), d.T).T  # D_S A⁻¹
    inner = len(delta) * torch.eye(len(d), dtype=d.dtype) - toward @ d.T
    return weight + weight @ d.T @ torch.linalg.solve(inner, toward)


def retrained(start: Weight, delta: Changes, anchor: float, rows: Sequence[int]) -> Weight:
    """W*₋S without the closed form: minimises J without these images, starting from W₀. It uses
    conjugate gradients with Hessian products from automatic differentiation."""
    kept = delta[[i for i in range(len(delta)) if i not in set(rows)]]

    def objective(w: Tensor) -> Tensor:
        own = (kept @ w.view_as(start).T).square().sum() / 2 / len(delta)
        return own + anchor / 2 * (w.view_as(start) - start).square().sum()

    at = start.flatten().requires_grad_()
    (slope,) = torch.autograd.grad(objective(at), at, create_graph=True)

    def hessian_times(p: np.ndarray) -> np.ndarray:
        along = torch.from_numpy(p).flatten()
        return torch.autograd.grad(slope @ along, at, retain_graph=True)[0].numpy()

    hessian = LinearOperator((len(at), len(at)), dtype=float, matvec=hessian_times)
    step, failed = cg(hessian, -slope.detach().numpy(), rtol=1e-13, maxiter=2000)
    if failed:
        raise IsslError(f"conjugate gradients without {len(rows)} images: no minimum found")
    return start + torch.from_numpy(step).view_as(start)


def cross_influences(weight: Weight, delta: Changes, anchor: float) -> dict[str, Tensor]:
    """Influence of every image on every other (n, n) under three curvatures: the true Hessian; the
    empirical Fisher with a damping of 0.1 × its mean diagonal, which a deep encoder must use; and
    none."""
    gradients = torch.einsum("nk,nd->nkd", delta @ weight.T, delta).flatten(1)
    fisher = gradients.T @ gradients / len(delta)
    damped = fisher + 0.1 * fisher.diagonal().mean() * torch.eye(len(fisher), dtype=fisher.dtype)
    return {
        "the true Hessian": cross_influence(weight, delta, delta, anchor),
        "empirical Fisher": gradients @ torch.linalg.solve(damped, gradients.T),
        "none (identity)": gradients @ gradients.T,
    }
