"""Curvatures: what is kept of each image's gradient in a layer, and the inverse curvature of the
kept rows.

Each layer is a block of its own (H is block-diagonal), with rows g_i, one per image, in the kept
basis:

    dense     H = mean_i g_i g_iᵀ    score_i = g_iᵀ (H + λI)⁻¹ g_i      Exact (the whole gradient),
              LoGra (projected)
    diagonal  D = mean_i g_i²        score_i = Σ_k g_ik² / (D_k + λ)     Diagonal (of the weights),
              EKFAC (eigenbasis)
    none                             score_i = ‖g_i‖²                    Identity, RandomProjection

    LoGra     P_out (Σ_t d_t a_tᵀ) P_inᵀ, P random with orthonormal rows, or PCA: the leading
              eigenvectors of the second moments of d and a
                                                                                                         (arXiv 2405.13954, §3)
    EKFAC     Q_outᵀ (Σ_t d_t a_tᵀ) Q_in, Q all the eigenvectors of those moments    (arXiv
              1806.03884)

One damping rule for all: λ = damping · mean of H's diagonal (or of D), per layer; the mean of the
diagonal is that of the eigenvalues. With absolute=True, λ = damping.

To add a curvature, write a frozen dataclass that inherits from `Curvature` and defines what differs
from its defaults.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import scipy.sparse.linalg
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from issl import keyed_random
from issl.errors import IsslError, is_whole, number_or_nan
from issl.influence.layers import Layer, weight_shape
from issl.shards import Summed

LARGEST_SEED = (
    1 << 40
)  # of projections: a generator takes 64 bits, of which a layer's place in the encoder needs some

# --- what is kept of a layer's gradient
# --------------------------------------------------------------------


@dataclass(frozen=True)
class Projected:
    """Keep P_out (Σ d aᵀ) P_inᵀ, flattened to k_out·k_in numbers per example; None stands for the
    identity."""

    p_in: Float[Tensor, "k_in d_in"] | None = None
    p_out: Float[Tensor, "k_out c_out"] | None = None


@dataclass(frozen=True)
class Norm:
    """Keep only ‖Σ d aᵀ‖, one number per example."""


Sketch = Projected | Norm


def kept_width(layer: Layer, sketch: Sketch) -> int:
    """How many numbers are kept of each example's gradient in this layer."""
    if isinstance(sketch, Norm):
        return 1
    out, inside = weight_shape(layer)
    return (out if sketch.p_out is None else len(sketch.p_out)) * (
        inside if sketch.p_in is None else len(sketch.p_in)
    )


@dataclass(frozen=True)
class Moments:
    """A layer's second moments, summed over positions (of both views) and images: Σ a aᵀ and Σ d
    dᵀ."""

    inputs: Float[Tensor, "d_in d_in"]
    outputs: Float[Tensor, "c_out c_out"]

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.inputs + other.inputs, self.outputs + other.outputs)


def no_moments(layer: Layer) -> Moments:
    """The sum over no image, in double precision."""
    return Moments(
        *(layer.weight.new_zeros(d, d, dtype=torch.float64) for d in reversed(weight_shape(layer)))
    )


# --- what is summed over the images, and the inverse made from it
# ------------------------------------------


@dataclass(frozen=True)
class Whitening:
    """A layer's inverse curvature as a map: g_iᵀ (H + λ)⁻¹ g_j = whiten(g_i) · whiten(g_j), g_j a
    training image."""

    damping: float  # λ, the effective value
    whiten: Callable[[Float[Tensor, "b r"]], Float[Tensor, "b m"]]


@runtime_checkable
class Statistic(Summed, Protocol):
    """A sum over the images' rows, from which a layer's curvature is made. Processes add up
    `total`, or else `rows`."""

    def add(self, g: Float[Tensor, "b r"]) -> None:
        """Add the rows of some images."""
        ...

    def whitening(self, damping: float, absolute: bool) -> Whitening:
        """The damped inverse, once all images were added."""
        ...


class DenseSum:
    """H = mean g gᵀ. With fewer images than columns, the rows themselves are kept (the Gram form),
    unless gradients other than those that H is made from will be whitened (`foreign`)."""

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

    def whitening(self, damping: float, absolute: bool) -> Whitening:
        if self.gram:
            return self._gram(torch.cat(self.rows), damping, absolute)
        assert self.total is not None  # images were added
        h = self.total / self.n
        damp = effective_damping(damping, absolute, float(h.diagonal().mean()))
        if damp == 0:
            return _NOTHING
        h.diagonal().add_(damp)
        factor = torch.linalg.cholesky(h)
        return Whitening(
            damp, lambda g: torch.linalg.solve_triangular(factor, g.double().T, upper=False).T
        )

    def _gram(self, g: Tensor, damping: float, absolute: bool) -> Whitening:
        """With K = GGᵀ = UΣUᵀ the right singular vectors are V = GᵀUΣ^-½, and H = V (Σ/n) Vᵀ. A
        row's part outside V's span is orthogonal to every training image's, so it is dropped."""
        k = g @ g.T
        damp = effective_damping(damping, absolute, float(k.diagonal().mean()) / self.width)
        sigma, u = torch.linalg.eigh(k)
        kept = sigma > sigma[-1] * 1e-14
        if damp == 0 or not bool(kept.any()):
            return _NOTHING
        sigma, u = sigma[kept], u[:, kept]
        to_v = g.T @ (u * (sigma * (sigma / self.n + damp)).rsqrt())
        return Whitening(damp, lambda rows: rows.double() @ to_v)


class DiagonalSum:
    """D = mean g²."""

    def __init__(self, n: int):
        self.n = n
        self.total: Tensor | None = None
        self.rows: list[Tensor] = []

    def add(self, g: Float[Tensor, "b r"]) -> None:
        squares = g.double().square().sum(0)
        self.total = squares if self.total is None else self.total + squares

    def whitening(self, damping: float, absolute: bool) -> Whitening:
        assert self.total is not None  # images were added
        d = self.total / self.n
        damp = effective_damping(damping, absolute, float(d.mean()))
        if damp == 0:
            return _NOTHING
        scale = (d + damp).rsqrt()
        return Whitening(damp, lambda g: g.double() * scale)


class NoSum:
    """No curvature."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.rows: list[Tensor] = []

    def add(self, g: Float[Tensor, "b r"]) -> None:
        """Nothing to sum."""

    def whitening(self, damping: float, absolute: bool) -> Whitening:
        return Whitening(0.0, lambda g: g.double())


def effective_damping(damping: float, absolute: bool, mean_diagonal: float) -> float:
    """λ of one layer; 0 only where no image has any gradient there."""
    if mean_diagonal == 0:
        return 0.0
    return damping if absolute else damping * mean_diagonal


# a layer in which no image has any gradient adds nothing
_NOTHING = Whitening(0.0, lambda g: torch.zeros_like(g, dtype=torch.float64))


# --- the curvatures
# ----------------------------------------------------------------------------------------


@runtime_checkable
class Curvature(Protocol):
    """The six things that a curvature decides; the last three have a default."""

    damping: float  # λ as a fraction of the mean diagonal of H, > 0
    absolute: bool  # whether `damping` is λ itself

    def statistic(self, width: int, n: int, foreign: bool = False) -> Statistic:
        """An empty sum for the rows, `width` numbers long, of n images.

        foreign     rows other than those that are added will be whitened
        """
        ...

    def sketch(
        self, layer: Layer, position: int, moments: Moments | None = None, norms_only: bool = False
    ) -> Sketch:
        """What is kept of each image's gradient in this layer: by default the whole.

        position    of the layer among those that are scored: with a seed it fixes a random
                    projection
        moments     of the images chosen by `moment_images`
        norms_only  gradients of two images will never be multiplied
        """
        return Projected()

    def moment_images(self, index: Int64[Tensor, " n"]) -> Int64[Tensor, " m"] | None:
        """Positions of the images whose second moments `sketch` needs, which costs a pass over
        them; None: needs none.

        index       of all training images
        """
        return None

    def norm_scale(self, layer: Layer) -> float | None:
        """A factor that makes a row's squared norm an unbiased estimate of the gradient's; None if
        none does."""
        return 1.0


@dataclass(frozen=True)
class Identity(Curvature):
    """No curvature: the squared gradient norm (as in TracIn, Pruthi et al. 2020, arXiv
    2002.08484)."""

    damping = 0.0
    absolute = True

    def statistic(self, width: int, n: int, foreign: bool = False) -> Statistic:
        return NoSum()

    def sketch(
        self, layer: Layer, position: int, moments: Moments | None = None, norms_only: bool = False
    ) -> Sketch:
        return Norm() if norms_only else Projected()


@dataclass(frozen=True)
class RandomProjection(Curvature):
    """No curvature, on gradients projected as LoGra's and scaled so that their products are right
    on average."""

    rank: int = 64
    seed: int = 0
    damping = 0.0
    absolute = True

    def __post_init__(self) -> None:
        rank: object = self.rank
        if not is_whole(rank, 1):
            raise IsslError(
                f"RandomProjection(rank={self.rank!r}): must be a whole number, 1 or more"
            )
        if not is_whole(self.seed, 0, LARGEST_SEED):
            raise IsslError(
                f"RandomProjection(seed={self.seed!r}): must be a whole number from 0 to 2⁴⁰"
            )

    def statistic(self, width: int, n: int, foreign: bool = False) -> Statistic:
        return NoSum()

    def sketch(
        self, layer: Layer, position: int, moments: Moments | None = None, norms_only: bool = False
    ) -> Sketch:
        p_in, p_out = _random_sides(layer, (self.rank, self.rank), self.seed, position)
        a, b = ((p.shape[1] / p.shape[0]) ** 0.5 for p in (p_in, p_out))
        return Projected((a * p_in).to(layer.weight), (b * p_out).to(layer.weight))


@dataclass(frozen=True)
class Exact(Curvature):
    """The whole gradient of each layer with its dense damped curvature, for small networks.

    Memory grows as weights², or as n × weights where that is less.
    """

    damping: float = 0.1
    absolute: bool = False

    def __post_init__(self) -> None:
        _check(self)

    def statistic(self, width: int, n: int, foreign: bool = False) -> Statistic:
        return DenseSum(width, n, foreign)


@dataclass(frozen=True)
class Diagonal(Curvature):
    """The diagonal of the curvature: one number per weight."""

    damping: float = 0.1
    absolute: bool = False

    def __post_init__(self) -> None:
        _check(self)

    def statistic(self, width: int, n: int, foreign: bool = False) -> Statistic:
        return DiagonalSum(n)


@dataclass(frozen=True)
class EKFAC(Curvature):
    """The diagonal in the eigenbasis of the layer's second moments, which are taken over `fit`
    images (None: all).

    Only weights are scored, so a layer's bias has no place in its moments.
    """

    damping: float = 0.1
    absolute: bool = False
    fit: int | None = None

    def __post_init__(self) -> None:
        _check(self, self.fit)

    def statistic(self, width: int, n: int, foreign: bool = False) -> Statistic:
        return DiagonalSum(n)

    def sketch(
        self, layer: Layer, position: int, moments: Moments | None = None, norms_only: bool = False
    ) -> Sketch:
        assert moments is not None
        return Projected(
            _eigenrows(moments.inputs).to(layer.weight),
            _eigenrows(moments.outputs).to(layer.weight),
        )

    def moment_images(self, index: Int64[Tensor, " n"]) -> Int64[Tensor, " m"] | None:
        return draw_images(index, self.fit, 0)


@dataclass(frozen=True)
class LoGra(Curvature):
    """Gradients projected on both sides, with the dense damped curvature of the projections (the
    paper's choice).

    rank        dimensions kept per side (all where the layer has fewer), or a fraction of them in
                (0, 1]
    projection  "random" orthonormal rows, or "pca": leading eigenvectors of the layer's own second
                moments, taken over `fit` images that `seed` draws by their index (None: all)
    seed        of the projections only: different noise seeds are compared under the same
                projections
    """

    rank: int | float = 16
    damping: float = 0.1
    seed: int = 0
    projection: Literal["random", "pca"] = "random"
    fit: int | None = 512
    absolute: bool = False

    def __post_init__(self) -> None:
        _check(self, self.fit, self.seed)
        if self.projection not in ("random", "pca"):
            raise IsslError(f"LoGra(projection={self.projection!r}): choose 'random' or 'pca'")
        whole = isinstance(self.rank, int) and number_or_nan(self.rank) >= 1
        if not whole and not (isinstance(self.rank, float) and 0 < self.rank <= 1):
            raise IsslError(
                f"LoGra(rank={self.rank!r}): a whole number of 1 or more, or a fraction in (0, 1]"
            )

    def ranks(self, layer: Layer) -> tuple[int, int]:
        """(k_out, k_in) of this layer."""
        out, inside = weight_shape(layer)
        if isinstance(self.rank, float):
            return math.ceil(self.rank * out), math.ceil(self.rank * inside)
        return min(self.rank, out), min(self.rank, inside)

    def statistic(self, width: int, n: int, foreign: bool = False) -> Statistic:
        return DenseSum(width, n, foreign)

    def sketch(
        self, layer: Layer, position: int, moments: Moments | None = None, norms_only: bool = False
    ) -> Sketch:
        k_out, k_in = self.ranks(layer)
        if self.projection == "pca":
            assert moments is not None
            p_in, p_out = leading_rows(moments.inputs, k_in), leading_rows(moments.outputs, k_out)
        else:
            p_in, p_out = _random_sides(layer, (k_out, k_in), self.seed, position)
        return Projected(p_in.to(layer.weight), p_out.to(layer.weight))

    def moment_images(self, index: Int64[Tensor, " n"]) -> Int64[Tensor, " m"] | None:
        return draw_images(index, self.fit, self.seed) if self.projection == "pca" else None

    def norm_scale(self, layer: Layer) -> float | None:
        """E‖P_out M P_inᵀ‖² = ‖M‖² · k_out k_in / (c_out d_in) for random P, so this factor makes
        the norm unbiased; None for PCA, which keeps more than its share."""
        (k_out, k_in), (c_out, d_in) = self.ranks(layer), weight_shape(layer)
        if self.projection == "pca" and (k_out, k_in) != (c_out, d_in):
            return None
        return c_out * d_in / (k_out * k_in)


def _random_sides(
    layer: Layer, ranks: tuple[int, int], seed: int, position: int
) -> tuple[Tensor, Tensor]:
    """P_in and P_out of LoGra: `ranks` (k_out, k_in) orthonormal rows, or as many as there are
    dimensions."""
    (k_out, k_in), (c_out, d_in) = ranks, weight_shape(layer)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
    return orthonormal_rows(k_in, d_in, generator), orthonormal_rows(k_out, c_out, generator)


def orthonormal_rows(rank: int, dim: int, generator: torch.Generator) -> Float[Tensor, "k d"]:
    """min(rank, dim) orthonormal rows, uniformly random (QR of a Gaussian matrix, signs fixed by
    R)."""
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


def draw_images(index: Int64[Tensor, " n"], count: int | None, seed: int) -> Int64[Tensor, " m"]:
    """Positions of `count` images (None: all) in the order of their index: those whose index draws
    the smallest numbers under `seed`, so neither the order of the images nor the batch size
    matters."""
    order = index.argsort()
    if count is None or count >= len(index):
        return order
    drawn = keyed_random.uniform(seed, index[order], (1,)).squeeze(1)
    return order[drawn.argsort(stable=True)[:count].sort()[0]]


def _check(curvature: Curvature, fit: object = None, seed: object = 0) -> None:
    name, damping = type(curvature).__name__, number_or_nan(curvature.damping)
    if not 0 < damping < math.inf:
        raise IsslError(
            f"{name}(damping={curvature.damping!r}): must be a finite number > 0, a fraction of the curvature's mean "
            "diagonal"
        )
    if fit is not None and not is_whole(fit, 1):
        raise IsslError(
            f"{name}(fit={fit!r}): must be a number of images, 1 or more, or None for all"
        )
    if not is_whole(seed, 0, LARGEST_SEED):
        raise IsslError(f"{name}(seed={seed!r}): must be a whole number from 0 to 2⁴⁰")
