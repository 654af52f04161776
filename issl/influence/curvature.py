"""Curvatures: in which basis a layer's gradient is kept, and how the kept rows are weighed.

Each layer is a block of its own (H is block-diagonal), with rows g_i, one per image, in the kept basis:

    dense     H = mean_i g_i g_iᵀ    score_i = g_iᵀ (H + λI)⁻¹ g_i      Exact (the whole gradient), LoGra (projected)
    diagonal  D = mean_i g_i²        score_i = Σ_k g_ik² / (D_k + λ)     Diagonal (of the weights), EKFAC (eigenbasis)
    none                             score_i = ‖g_i‖²                    Identity

    LoGra     P_out (Σ_t d_t a_tᵀ) P_inᵀ, P random with orthonormal rows, or PCA: the leading eigenvectors of the
              second moments of d and a                                            (arXiv 2405.13954, §3)
    EKFAC     Q_outᵀ (Σ_t d_t a_tᵀ) Q_in, Q all the eigenvectors of those moments    (arXiv 1806.03884)

One damping rule for all: λ = damping · mean of H's diagonal (or of D), per layer; the mean of the diagonal is
that of the eigenvalues. With absolute=True, λ = damping.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse.linalg
import torch
from jaxtyping import Float
from torch import Tensor

from issl.errors import IsslError
from issl.influence.layers import Layer, weight_shape
from issl.influence.per_example import Moments, Norm, Projected, Sketch


@dataclass(frozen=True)
class Weighing:
    """A layer's inverse curvature as a map: g_iᵀ (H + λ)⁻¹ g_j = whiten(g_i) · whiten(g_j), g_j a training image."""

    damping: float  # λ, the effective value
    whiten: Callable[[Float[Tensor, "b r"]], Float[Tensor, "b m"]]


# --- what is summed over the images, and the weighing made of it -----------------------------------------


class DenseSum:
    """H = mean g gᵀ. Where there are fewer images than columns, their rows themselves (the Gram form), unless
    other gradients than those that made H will be weighed."""

    def __init__(self, width: int, n: int, foreign: bool = False):
        self.width, self.n, self.gram = width, n, width > n and not foreign
        self.total: Tensor | None = None
        self.rows: list[Tensor] = []

    def add(self, g: Float[Tensor, "b r"]) -> None:
        g = g.double()
        if self.gram:
            self.rows.append(g)
        else:
            self.total = g.T @ g if self.total is None else self.total.addmm_(g.T, g)

    def weigh(self, damping: float, absolute: bool) -> Weighing:
        if self.gram:
            return self._gram(torch.cat(self.rows), damping, absolute)
        assert self.total is not None  # n > 0 images were added
        h = self.total / self.n
        damp = effective_damping(damping, absolute, float(h.diagonal().mean()))
        if damp == 0:
            return _NOTHING
        h.diagonal().add_(damp)
        factor = torch.linalg.cholesky(h)
        return Weighing(damp, lambda g: torch.linalg.solve_triangular(factor, g.double().T, upper=False).T)

    def _gram(self, g: Tensor, damping: float, absolute: bool) -> Weighing:
        """With K = GGᵀ = UΣUᵀ the right singular vectors are V = GᵀUΣ^-½, and H = V (Σ/n) Vᵀ. A row's part
        outside V's span meets no training image's, so it is left out."""
        k = g @ g.T
        damp = effective_damping(damping, absolute, float(k.diagonal().mean()) / self.width)
        sigma, u = torch.linalg.eigh(k)
        kept = sigma > sigma[-1] * 1e-14
        if damp == 0 or not bool(kept.any()):
            return _NOTHING
        sigma, u = sigma[kept], u[:, kept]
        to_v = g.T @ (u * (sigma * (sigma / self.n + damp)).rsqrt())
        return Weighing(damp, lambda rows: rows.double() @ to_v)


class DiagonalSum:
    """D = mean g²."""

    def __init__(self, n: int):
        self.n = n
        self.total: Tensor | None = None
        self.rows: list[Tensor] = []

    def add(self, g: Float[Tensor, "b r"]) -> None:
        squares = g.double().square().sum(0)
        self.total = squares if self.total is None else self.total + squares

    def weigh(self, damping: float, absolute: bool) -> Weighing:
        assert self.total is not None  # n > 0 images were added
        d = self.total / self.n
        damp = effective_damping(damping, absolute, float(d.mean()))
        if damp == 0:
            return _NOTHING
        scale = (d + damp).rsqrt()
        return Weighing(damp, lambda g: g.double() * scale)


class NoSum:
    """No curvature."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.rows: list[Tensor] = []

    def add(self, g: Float[Tensor, "b r"]) -> None:
        """Nothing to sum."""

    def weigh(self, damping: float, absolute: bool) -> Weighing:
        return Weighing(0.0, lambda g: g.double())


Statistic = DenseSum | DiagonalSum | NoSum


def effective_damping(damping: float, absolute: bool, mean_diagonal: float) -> float:
    """λ of one layer; 0 only where no image has any gradient there."""
    if mean_diagonal == 0:
        return 0.0
    return damping if absolute else damping * mean_diagonal


# a layer on which no image has any gradient adds nothing
_NOTHING = Weighing(0.0, lambda g: torch.zeros_like(g, dtype=torch.float64))


# --- the curvatures ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """No curvature: the squared gradient norm (as in TracIn, Pruthi et al. 2020, arXiv 2002.08484)."""

    fit = None
    damping = 0.0
    absolute = True

    def sketch(self, layer: Layer, position: int, moments: Moments | None = None, norms_only: bool = False) -> Sketch:
        return Norm() if norms_only else Projected()

    def statistic(self, width: int, n: int, foreign: bool = False) -> Statistic:
        return NoSum()

    def norm_scale(self, layer: Layer) -> float | None:
        return 1.0


@dataclass(frozen=True)
class Exact:
    """The whole gradient of each layer with its dense damped curvature: the reference, for small networks.

    Memory grows as weights², or as n × weights where that is less.
    """

    damping: float = 0.1
    absolute: bool = False
    fit = None

    def __post_init__(self) -> None:
        _check_damping("Exact", self.damping)

    def sketch(self, layer: Layer, position: int, moments: Moments | None = None, norms_only: bool = False) -> Sketch:
        return Projected()

    def statistic(self, width: int, n: int, foreign: bool = False) -> Statistic:
        return DenseSum(width, n, foreign)

    def norm_scale(self, layer: Layer) -> float | None:
        return 1.0


@dataclass(frozen=True)
class Diagonal:
    """The diagonal of the curvature: one number a weight."""

    damping: float = 0.1
    absolute: bool = False
    fit = None

    def __post_init__(self) -> None:
        _check_damping("Diagonal", self.damping)

    def sketch(self, layer: Layer, position: int, moments: Moments | None = None, norms_only: bool = False) -> Sketch:
        return Projected()

    def statistic(self, width: int, n: int, foreign: bool = False) -> Statistic:
        return DiagonalSum(n)

    def norm_scale(self, layer: Layer) -> float | None:
        return 1.0


@dataclass(frozen=True)
class EKFAC:
    """The diagonal in the eigenbasis of the layer's second moments, which are taken over `fit` images (None: all).

    Only weights are scored, so a layer's bias has no place in its moments.
    """

    damping: float = 0.1
    absolute: bool = False
    fit: int | None = None

    def __post_init__(self) -> None:
        _check_damping("EKFAC", self.damping)
        _check_fit("EKFAC", self.fit)

    def sketch(self, layer: Layer, position: int, moments: Moments | None = None, norms_only: bool = False) -> Sketch:
        assert moments is not None
        return Projected(_eigenrows(moments.inputs).to(layer.weight), _eigenrows(moments.outputs).to(layer.weight))

    def statistic(self, width: int, n: int, foreign: bool = False) -> Statistic:
        return DiagonalSum(n)

    def norm_scale(self, layer: Layer) -> float | None:
        return 1.0


@dataclass(frozen=True)
class LoGra:
    """Gradients projected on both sides, with the dense damped curvature of what is left (the paper's choice).

    rank        dimensions kept per side (or the layer's own, where it has fewer); a fraction in (0, 1] of them
    projection  "random" orthonormal rows, or "pca": leading eigenvectors of the layer's own second moments,
                taken over `fit` images (those whose index draws the smallest number under `seed`)
    seed        that of the projections alone: noise seeds are compared under the same projections
    """

    rank: int | float = 16
    damping: float = 0.1
    seed: int = 0
    projection: Literal["random", "pca"] = "random"
    fit: int | None = 512
    absolute: bool = False

    def __post_init__(self) -> None:
        _check_damping("LoGra", self.damping)
        _check_fit("LoGra", self.fit)
        if self.projection not in ("random", "pca"):
            raise IsslError(f"LoGra(projection={self.projection!r}): choose 'random' or 'pca'")
        whole = isinstance(self.rank, int) and self.rank >= 1
        if not whole and not (isinstance(self.rank, float) and 0 < self.rank <= 1):
            raise IsslError(f"LoGra(rank={self.rank!r}): a whole number of 1 or more, or a fraction in (0, 1]")

    def ranks(self, layer: Layer) -> tuple[int, int]:
        """(k_out, k_in) of this layer."""
        out, inside = weight_shape(layer)
        if isinstance(self.rank, float):
            return math.ceil(self.rank * out), math.ceil(self.rank * inside)
        return min(self.rank, out), min(self.rank, inside)

    def sketch(self, layer: Layer, position: int, moments: Moments | None = None, norms_only: bool = False) -> Sketch:
        (k_out, k_in), (c_out, d_in) = self.ranks(layer), weight_shape(layer)
        if self.projection == "pca":
            assert moments is not None
            p_in, p_out = leading_rows(moments.inputs, k_in), leading_rows(moments.outputs, k_out)
        else:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + position)
            p_in, p_out = orthonormal_rows(k_in, d_in, generator), orthonormal_rows(k_out, c_out, generator)
        return Projected(p_in.to(layer.weight), p_out.to(layer.weight))

    def statistic(self, width: int, n: int, foreign: bool = False) -> Statistic:
        return DenseSum(width, n, foreign)

    def norm_scale(self, layer: Layer) -> float | None:
        """E‖P_out M P_inᵀ‖² = ‖M‖² · k_out k_in / (c_out d_in) for random P, so this factor makes the norm
        unbiased; None for PCA, which keeps more than its share."""
        (k_out, k_in), (c_out, d_in) = self.ranks(layer), weight_shape(layer)
        if self.projection == "pca" and (k_out, k_in) != (c_out, d_in):
            return None
        return c_out * d_in / (k_out * k_in)


Curvature = Identity | Exact | Diagonal | EKFAC | LoGra


def needs_moments(curvature: Curvature) -> bool:
    """Is its basis taken from the layers' second moments, which cost a pass of their own?"""
    return isinstance(curvature, EKFAC) or (isinstance(curvature, LoGra) and curvature.projection == "pca")


def orthonormal_rows(rank: int, dim: int, generator: torch.Generator) -> Float[Tensor, "k d"]:
    """min(rank, dim) orthonormal rows, uniformly random (QR of a Gaussian matrix, signs fixed by R)."""
    gaussian = torch.randn(dim, min(rank, dim), generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).T.contiguous()


def leading_rows(moment: Float[Tensor, "d d"], k: int) -> Float[Tensor, "k d"]:
    """The k leading eigenvectors as rows (Lanczos, by scipy, where they are few of many)."""
    d = len(moment)
    if 8 * k > d or d < 256:
        return torch.linalg.eigh(moment).eigenvectors[:, -k:].T.contiguous()
    start = np.ones(d) / math.sqrt(d)  # fixed, so that the same moments give the same rows
    vectors = scipy.sparse.linalg.eigsh(moment.cpu().numpy(), k, v0=start)[1]
    return torch.from_numpy(np.ascontiguousarray(vectors.T))


def _eigenrows(moment: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    return torch.linalg.eigh(moment).eigenvectors.T.contiguous()


def _check_damping(name: str, damping: float) -> None:
    if not damping > 0:
        raise IsslError(f"{name}(damping={damping}): must be > 0, a fraction of the curvature's mean diagonal")


def _check_fit(name: str, fit: int | None) -> None:
    if fit is not None and fit < 1:
        raise IsslError(f"{name}(fit={fit}): a number of images, 1 or more, or None for all")
