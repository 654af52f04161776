"""Sums over the images' rows of one layer, and the damped inverse curvature made from them.

For training images i and j of layer l, g_iᵀ (H_l + λ_l)⁻¹ g_j with H_l = mean_i g_i g_iᵀ, or only
its diagonal, and λ_l = damping · mean of that diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Whitening:
    """A layer's inverse curvature as a map.

    g_iᵀ (H + λ)⁻¹ g_j = whiten(g_i) · whiten(g_j), where g_j is a training image's row.
    """

    damping: float  # λ
    whiten: Callable[[Float[Tensor, "b r"]], Float[Tensor, "b m"]]


NOTHING = Whitening(
    0.0, lambda g: torch.zeros_like(g, dtype=torch.float64)
)  # no gradient: no score
NO_CURVATURE = Whitening(0.0, lambda g: g.double())


@runtime_checkable
class Accumulator(Protocol):
    """A sum over rows, from which a layer's inverse curvature is made.

    To be kept in a file, it must follow from `total`, (r,) or (r, r), and `count` alone.
    """

    total: Tensor | None
    count: int

    def add(self, g: Float[Tensor, "b r"]) -> None:
        """Add some rows."""
        ...

    def whitening(self, damping: float) -> Whitening:
        """The damped inverse, once all rows were added."""
        ...


class DenseSum:
    """H = mean g gᵀ.

    Args:
        gram: Keep the rows themselves, and invert by their Gram matrix. This is cheaper where there
            are fewer rows than columns. What is whitened must then be multiplied by these rows.
    """

    def __init__(self, gram: bool = False):
        self.total: Tensor | None = None
        self.count, self.gram = 0, gram
        self.rows: list[Tensor] = []

    def add(self, g: Float[Tensor, "b r"]) -> None:
        g = g.double()
        self.count += len(g)
        if self.gram:
            self.rows.append(g)
        else:
            self.total = g.T @ g if self.total is None else self.total.addmm_(g.T, g)

    def whitening(self, damping: float) -> Whitening:
        if self.gram:
            return self._by_gram(torch.cat(self.rows), damping)
        assert self.total is not None  # rows were added
        h = self.total / self.count
        lam = damping * float(h.diagonal().mean())
        if lam == 0:
            return NOTHING
        h.diagonal().add_(lam)
        factor = torch.linalg.cholesky(h)
        return Whitening(
            lam, lambda g: torch.linalg.solve_triangular(factor, g.double().T, upper=False).T
        )

    def _by_gram(self, g: Tensor, damping: float) -> Whitening:
        """With K = GGᵀ = UΣUᵀ the right singular vectors are V = GᵀUΣ^-½, and H = V (Σ/n) Vᵀ. A
        row's part outside V's span is orthogonal to every training image's, so it is dropped."""
        k = g @ g.T
        lam = damping * float(k.diagonal().mean()) / g.shape[1]
        sigma, u = torch.linalg.eigh(k)
        kept = sigma > sigma[-1] * 1e-14
        if lam == 0 or not bool(kept.any()):
            return NOTHING
        sigma, u = sigma[kept], u[:, kept]
        to_v = g.T @ (u * (sigma * (sigma / self.count + lam)).rsqrt())
        return Whitening(lam, lambda rows: rows.double() @ to_v)


class DiagonalSum:
    """D = mean g²."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, g: Float[Tensor, "b r"]) -> None:
        squares = g.double().square().sum(0)
        self.count += len(g)
        self.total = squares if self.total is None else self.total + squares

    def whitening(self, damping: float) -> Whitening:
        assert self.total is not None  # rows were added
        d = self.total / self.count
        lam = damping * float(d.mean())
        if lam == 0:
            return NOTHING
        scale = (d + lam).rsqrt()
        return Whitening(lam, lambda g: g.double() * scale)
