"""Curvatures: what is kept of each image's gradient in a layer, and the inverse curvature of it.

Each layer is a block of its own (H is block-diagonal), with rows g_i, one per image, in the basis
that is kept:

    dense     H = mean_i g_i g_iᵀ   score_i = g_iᵀ (H + λI)⁻¹ g_i     LoGra, Exact
    diagonal  D = mean_i g_i²       score_i = Σ_k g_ik² / (D_k + λ)   EKFAC, Diagonal
    none                            score_i = ‖g_i‖²                  Identity, RandomProjection

LoGra keeps P_out (Σ_t d_t a_tᵀ) P_inᵀ, with random orthonormal rows P or the leading eigenvectors
of the second moments of d and a (arXiv 2405.13954, §3). EKFAC keeps Q_outᵀ (Σ_t d_t a_tᵀ) Q_in,
with all eigenvectors of those moments (arXiv 1806.03884).

One damping rule for all: λ = damping · mean of the diagonal of H (or of D), for each layer.

To add a curvature, write a frozen dataclass that inherits from `Curvature` and defines what differs
from its defaults.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor

from issl import keyed_random
from issl.errors import IsslError, is_whole, number_or_nan
from issl.influence.accumulators import Accumulator, DenseSum, DiagonalSum
from issl.influence.layers import Layer, weight_shape
from issl.influence.projections import (
    Moments,
    Norm,
    Projected,
    Sketch,
    eigenrows,
    leading_rows,
    orthonormal_rows,
)

# of projections: a generator takes 64 bits, of which a layer's place in the encoder needs some
LARGEST_SEED = 1 << 40


@runtime_checkable
class Curvature(Protocol):
    """What a curvature decides; all but `accumulator` has a default."""

    damping: float  # λ as a fraction of the mean diagonal of H, > 0

    def accumulator(self, gram: bool = False) -> Accumulator | None:
        """An empty sum for one layer's rows; None for no curvature.

        Args:
            gram: There will be fewer rows than columns, and nothing but products with these rows
                is asked for.
        """
        ...

    def sketch(
        self, layer: Layer, position: int, moments: Moments | None = None, norms_only: bool = False
    ) -> Sketch:
        """What is kept of each image's gradient in this layer: by default the whole.

        Args:
            layer: The layer.
            position: Of the layer among those that are scored. With a seed it fixes a random
                projection.
            moments: Of the images chosen by `moment_images`.
            norms_only: Gradients of two images will never be multiplied.
        """
        return Projected()

    def moment_images(self, index: Int64[Tensor, " n"]) -> Int64[Tensor, " m"] | None:
        """Positions of the images whose second moments `sketch` needs, at the cost of a pass over
        them; None if it needs none. `index` is that of all training images."""
        return None

    def norm_scale(self, layer: Layer) -> float | None:
        """The factor that makes a row's squared norm an unbiased estimate of the gradient's; None
        if none does."""
        return 1.0


@dataclass(frozen=True)
class Identity(Curvature):
    """No curvature: the squared gradient norm (as in TracIn, Pruthi et al. 2020, arXiv
    2002.08484)."""

    damping = 0.0

    def accumulator(self, gram: bool = False) -> None:
        return None

    def sketch(
        self, layer: Layer, position: int, moments: Moments | None = None, norms_only: bool = False
    ) -> Sketch:
        return Norm() if norms_only else Projected()


@dataclass(frozen=True)
class RandomProjection(Curvature):
    """No curvature, on gradients projected as LoGra's and scaled so that their products are right
    on average.

    Args:
        rank: Dimensions kept per side.
        seed: Of the projections.
    """

    rank: int = 64
    seed: int = 0
    damping = 0.0

    def __post_init__(self) -> None:
        _check_whole(self, "rank", 1)
        _check_whole(self, "seed", 0, LARGEST_SEED)

    def accumulator(self, gram: bool = False) -> None:
        return None

    def sketch(
        self, layer: Layer, position: int, moments: Moments | None = None, norms_only: bool = False
    ) -> Sketch:
        p_in, p_out = _random_sides(layer, self.rank, self.seed, position)
        a, b = ((p.shape[1] / p.shape[0]) ** 0.5 for p in (p_in, p_out))
        return Projected((a * p_in).to(layer.weight), (b * p_out).to(layer.weight))


@dataclass(frozen=True)
class Exact(Curvature):
    """The whole gradient of each layer with its dense damped curvature, for small networks.

    Memory grows as weights², or as n × weights where that is less.

    Args:
        damping: λ as a fraction of the mean diagonal of H.
    """

    damping: float = 0.1

    def __post_init__(self) -> None:
        _check_damping(self)

    def accumulator(self, gram: bool = False) -> DenseSum:
        return DenseSum(gram)


@dataclass(frozen=True)
class Diagonal(Curvature):
    """The diagonal of the curvature: one number per weight.

    Args:
        damping: λ as a fraction of the diagonal's mean.
    """

    damping: float = 0.1

    def __post_init__(self) -> None:
        _check_damping(self)

    def accumulator(self, gram: bool = False) -> DiagonalSum:
        return DiagonalSum()


@dataclass(frozen=True)
class EKFAC(Curvature):
    """The diagonal in the eigenbasis of the layer's second moments (arXiv 1806.03884).

    Only weights are scored, so a layer's bias has no place in its moments.

    Args:
        damping: λ as a fraction of the diagonal's mean.
        fit: How many images the moments are taken over; default: all.
    """

    damping: float = 0.1
    fit: int | None = None

    def __post_init__(self) -> None:
        _check_damping(self)
        if self.fit is not None:
            _check_whole(self, "fit", 1)

    def accumulator(self, gram: bool = False) -> DiagonalSum:
        return DiagonalSum()

    def sketch(
        self, layer: Layer, position: int, moments: Moments | None = None, norms_only: bool = False
    ) -> Sketch:
        assert moments is not None
        p_in, p_out = eigenrows(moments.inputs), eigenrows(moments.outputs)
        return Projected(p_in.to(layer.weight), p_out.to(layer.weight))

    def moment_images(self, index: Int64[Tensor, " n"]) -> Int64[Tensor, " m"] | None:
        return draw_images(index, self.fit, 0)


@dataclass(frozen=True)
class LoGra(Curvature):
    """Gradients projected on both sides, with the dense damped curvature of the projections (the
    paper's choice; arXiv 2405.13954).

    Args:
        rank: Dimensions kept per side; all where the layer has fewer.
        damping: λ as a fraction of the mean diagonal of H.
        seed: Of the projections alone: different noise seeds are compared under the same ones.
        projection: "random" orthonormal rows, or "pca": the leading eigenvectors of the layer's own
            second moments.
        fit: How many images those moments are taken over, drawn by `seed` and their index; None:
            all.
    """

    rank: int = 16
    damping: float = 0.1
    seed: int = 0
    projection: Literal["random", "pca"] = "random"
    fit: int | None = 512

    def __post_init__(self) -> None:
        _check_damping(self)
        _check_whole(self, "rank", 1)
        _check_whole(self, "seed", 0, LARGEST_SEED)
        if self.fit is not None:
            _check_whole(self, "fit", 1)
        if self.projection not in ("random", "pca"):
            raise IsslError(f"LoGra(projection={self.projection!r}): choose 'random' or 'pca'")

    def accumulator(self, gram: bool = False) -> DenseSum:
        return DenseSum(gram)

    def sketch(
        self, layer: Layer, position: int, moments: Moments | None = None, norms_only: bool = False
    ) -> Sketch:
        if self.projection == "pca":
            assert moments is not None
            p_in, p_out = (leading_rows(m, self.rank) for m in (moments.inputs, moments.outputs))
        else:
            p_in, p_out = _random_sides(layer, self.rank, self.seed, position)
        return Projected(p_in.to(layer.weight), p_out.to(layer.weight))

    def moment_images(self, index: Int64[Tensor, " n"]) -> Int64[Tensor, " m"] | None:
        return draw_images(index, self.fit, self.seed) if self.projection == "pca" else None

    def norm_scale(self, layer: Layer) -> float | None:
        """E‖P_out M P_inᵀ‖² = ‖M‖² · k_out k_in / (c_out d_in) for random P, so this factor makes
        the norm unbiased; None for PCA, which keeps more than its share."""
        whole = kept = 1
        for d in weight_shape(layer):
            whole, kept = whole * d, kept * min(self.rank, d)
        return None if self.projection == "pca" and kept != whole else whole / kept


KINDS: dict[str, Callable[[int, float, int], Curvature]] = {  # from rank, damping and seed
    "logra": LoGra,
    "logra-pca": partial(LoGra, projection="pca"),
    "ekfac": lambda _, damping, __: EKFAC(damping),
    "diagonal": lambda _, damping, __: Diagonal(damping),
    "identity": lambda _, __, ___: Identity(),
    "random-projection": lambda rank, _, seed: RandomProjection(rank, seed),
    "exact": lambda _, damping, __: Exact(damping),
}


def named_curvature(kind: str, rank: int = 16, damping: float = 0.1, seed: int = 0) -> Curvature:
    """The curvature of that name, one of `KINDS`; settings that it does not have are not used.

    Raises:
        IsslError: For another name, or settings that are out of range.
    """
    if kind not in KINDS:
        raise IsslError(f"curvature {kind!r}: choose {', '.join(KINDS)}")
    return KINDS[kind](rank, damping, seed)


def draw_images(index: Int64[Tensor, " n"], count: int | None, seed: int) -> Int64[Tensor, " m"]:
    """Positions of `count` images (None: all) in the order of their index: those whose index draws
    the smallest numbers under `seed`, so neither the order of the images nor the batch size
    matters."""
    order = index.argsort()
    if count is None or count >= len(index):
        return order
    drawn = keyed_random.uniform(seed, index[order], (1,)).squeeze(1)
    return order[drawn.argsort(stable=True)[:count].sort()[0]]


def _random_sides(layer: Layer, rank: int, seed: int, position: int) -> tuple[Tensor, Tensor]:
    """P_in and P_out: `rank` orthonormal rows, or as many as there are dimensions."""
    c_out, d_in = weight_shape(layer)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
    return orthonormal_rows(rank, d_in, generator), orthonormal_rows(rank, c_out, generator)


def _check_damping(curvature: Curvature) -> None:
    if not 0 < number_or_nan(curvature.damping) < math.inf:
        raise IsslError(
            f"{type(curvature).__name__}(damping={curvature.damping!r}): must be a finite number "
            "> 0, a fraction of the curvature's mean diagonal"
        )


def _check_whole(curvature: Curvature, name: str, least: int, most: int | None = None) -> None:
    value: object = getattr(curvature, name)
    if not is_whole(value, least, most):
        raise IsslError(
            f"{type(curvature).__name__}({name}={value!r}): must be a whole number, {least} or more"
            + ("" if most is None else " and at most 2⁴⁰")
        )
