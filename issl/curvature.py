"""Curvatures: what is kept of each layer's gradient, and how the kept rows are weighed.

Each layer is a block of its own (H is block-diagonal), with rows g_i, one per image:

    H_l = mean_i g_i g_iᵀ        λ_l = damping · mean diagonal of H_l        score_i = Σ_l g_iᵀ (H_l + λ_l I)⁻¹ g_i

    LoGra     g_i = vec(P_out (Σ_t d_t a_tᵀ) P_inᵀ), P random with orthonormal rows   (arXiv 2405.13954, §3)
    Exact     g_i = the whole gradient; the reference, for small networks
    Identity  H = I, no damping: score_i = ‖g_i‖² (as in TracIn, Pruthi et al. 2020, arXiv 2002.08484)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from issl.errors import IsslError
from issl.gradients import Layer, Projected, Sketch, SquaredNorm, weight_shape

Rows = Callable[[], Iterable[Float[Tensor, "b r"]]]  # a layer's rows, batch by batch, as often as asked


@dataclass(frozen=True)
class Block:
    """A layer's share of the scores, the squared norms of its rows, and the damping of its curvature."""

    scores: Float[Tensor, " n"]
    squares: Float[Tensor, " n"]
    damping: float


@dataclass(frozen=True)
class Identity:
    """No curvature: the squared gradient norm."""

    def sketch(self, layer: Layer, position: int) -> Sketch:
        return SquaredNorm()

    def norm_scale(self, layer: Layer) -> float:
        return 1.0

    def weigh(self, rows: Rows) -> Block:
        squares = torch.cat([r[:, 0].double() for r in rows()])
        return Block(squares, squares, 0.0)


@dataclass(frozen=True)
class Exact:
    """The whole gradient of each layer with its dense damped curvature. Memory grows as n × weights."""

    damping: float = 0.1

    def __post_init__(self) -> None:
        _check_damping("Exact", self.damping)

    def sketch(self, layer: Layer, position: int) -> Sketch:
        return Projected()

    def norm_scale(self, layer: Layer) -> float:
        return 1.0

    def weigh(self, rows: Rows) -> Block:
        return damped_scores(rows, self.damping)


@dataclass(frozen=True)
class LoGra:
    """Gradients projected on both sides to `rank` dimensions each (or the layer's own, where it has fewer).

    seed is that of the projections alone: noise seeds are compared under the same projections.
    """

    rank: int = 16
    damping: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        _check_damping("LoGra", self.damping)
        if self.rank < 1:
            raise IsslError(f"LoGra(rank={self.rank}): the rank must be 1 or more")

    def sketch(self, layer: Layer, position: int) -> Sketch:
        c_out, d_in = weight_shape(layer)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + position)
        p_in = orthonormal_rows(self.rank, d_in, generator).to(layer.weight)
        return Projected(p_in, orthonormal_rows(self.rank, c_out, generator).to(layer.weight))

    def norm_scale(self, layer: Layer) -> float:
        """E‖P_out M P_inᵀ‖² = ‖M‖² · k_out k_in / (c_out d_in), so this factor makes the norm unbiased."""
        c_out, d_in = weight_shape(layer)
        return c_out * d_in / (min(self.rank, c_out) * min(self.rank, d_in))

    def weigh(self, rows: Rows) -> Block:
        return damped_scores(rows, self.damping)


Curvature = Identity | Exact | LoGra


def orthonormal_rows(rank: int, dim: int, generator: torch.Generator) -> Float[Tensor, "k d"]:
    """min(rank, dim) orthonormal rows, uniformly random (QR of a Gaussian matrix, signs fixed by R)."""
    gaussian = torch.randn(dim, min(rank, dim), generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).T.contiguous()


def damped_scores(rows: Rows, damping: float) -> Block:
    """g_iᵀ (H + λI)⁻¹ g_i for all rows of one layer, in double precision.

    Where there are fewer rows than columns the same numbers come from the Gram matrix K = GGᵀ (the
    push-through identity): diag of n K (K + nλI)⁻¹.
    """
    n, width = 0, 0
    for batch in rows():
        n, width = n + len(batch), batch.shape[1]
    if width > n:
        g = torch.cat([b.double() for b in rows()])
        k = g @ g.T
        damp = damping * float(k.diagonal().mean()) / width  # mean diagonal of H = trace(K) / (n · width)
        if damp == 0:
            return _degenerate(k.diagonal(), damping)
        # K(K + nλ)⁻¹ = I − nλ(K + nλ)⁻¹ cancels; solving for K's columns does not
        solved = torch.linalg.solve(k + n * damp * torch.eye(n, dtype=k.dtype, device=k.device), k)
        return Block(n * solved.diagonal(), k.diagonal(), damp)
    h: Tensor | None = None
    for batch in rows():
        g = batch.double()
        h = g.T @ g if h is None else h + g.T @ g
    if h is None:
        raise IsslError("no images to score")
    h = h / n
    damp = damping * float(h.diagonal().mean())
    squares = torch.cat([b.double().square().sum(1) for b in rows()])
    if damp == 0:
        return _degenerate(squares, damping)
    factor = torch.linalg.cholesky(h + damp * torch.eye(width, dtype=h.dtype, device=h.device))
    parts = [torch.linalg.solve_triangular(factor, b.double().T, upper=False).square().sum(0) for b in rows()]
    return Block(torch.cat(parts), squares, damp)


def _degenerate(squares: Tensor, damping: float) -> Block:
    """λ = 0: a layer on which no image has any gradient adds nothing; without damping H has no inverse."""
    if bool(squares.any()):
        raise IsslError(f"damping={damping}: the curvature cannot be inverted without damping; use 0.1")
    return Block(squares, squares, 0.0)


def _check_damping(name: str, damping: float) -> None:
    if not damping > 0:
        raise IsslError(f"{name}(damping={damping}): must be > 0, a fraction of the curvature's mean diagonal")
