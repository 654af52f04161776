"""Curvatures: what is kept of each image's gradient in a layer, and the inverse curvature for it.

H is block-diagonal, with one block per layer. In each layer, image i has a row g_i: its gradient
there, in the basis that is kept:

    dense     H = mean_i g_i g_iᵀ   score_i = g_iᵀ (H + λI)⁻¹ g_i     LoGra, Exact
    diagonal  D = mean_i g_i²       score_i = Σ_k g_ik² / (D_k + λ)   EKFAC, Diagonal
    none                            score_i = ‖g_i‖²                  Identity, RandomProjection

LoGra keeps P_out (Σ_t d_t a_tᵀ) P_inᵀ, where the rows of each P are random and orthonormal, or the
leading eigenvectors of the second moments of d and a (arXiv 2405.13954, §3). EKFAC keeps
Q_outᵀ (Σ_t d_t a_tᵀ) Q_in, with all eigenvectors of those moments (arXiv 1806.03884).

All use the same damping rule: λ = damping · mean of the diagonal of H (or of D), for each layer.

To add a curvature, write a frozen dataclass that inherits from `Curvature` and defines what differs
from its defaults.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import scipy.sparse.linalg
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from issl import keyed_random
from issl.errors import IsslError, is_whole, number_or_nan
from issl.influence.layers import Layer, weight_shape
from issl.influence.per_example import Moments, Sketch

# whole-number settings, with their least and largest values; a generator's seed has 64 bits, some
# of which are needed for a layer's position in the encoder
WHOLE: dict[str, tuple[int, int | None]] = {"rank": (1, None), "fit": (1, None), "seed": (0, 2**40)}


# --- sums over rows, and the damped inverse made from them ---


@dataclass(frozen=True)
class Whitening:
    """A layer's inverse curvature as a map.

    g_iᵀ (H + λ)⁻¹ g_j = whiten(g_i) · whiten(g_j), where g_j is a training image's row.
    """

    damping: float  # λ
    whiten: Callable[[Float[Tensor, "b r"]], Float[Tensor, "b m"]]


NOTHING = Whitening(0.0, lambda g: torch.zeros_like(g).double())  # no gradient: no score
NO_CURVATURE = Whitening(0.0, lambda g: g.double())


class Accumulator(ABC):
    """A sum over rows, from which a layer's inverse curvature is made.

    It can be kept in a file only if `total`, (r,) or (r, r), and `count` determine the inverse.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    @abstractmethod
    def add(self, g: Float[Tensor, "b r"]) -> None:
        """Add some rows."""

    @abstractmethod
    def whitening(self, damping: float) -> Whitening:
        """The damped inverse, once all rows have been added."""

    def mean(self) -> Tensor:
        """The total, divided by the count."""
        assert self.total is not None  # rows were added
        return self.total / self.count


class DenseSum(Accumulator):
    """H = mean g gᵀ.

    Args:
        gram: Keep the rows themselves, and invert by their Gram matrix. This is cheaper with
            fewer rows than columns. `whiten` is then valid only in products with these rows.
    """

    def __init__(self, gram: bool = False):
        super().__init__()
        self.gram = gram
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
        h = self.mean()
        lam = damping * float(h.diagonal().mean())
        if lam == 0:
            return NOTHING
        h.diagonal().add_(lam)
        factor, solve = torch.linalg.cholesky(h), torch.linalg.solve_triangular
        return Whitening(lam, lambda g: solve(factor, g.double().T, upper=False).T)

    def _by_gram(self, g: Tensor, damping: float) -> Whitening:
        """With K = GGᵀ = UΣUᵀ, G's right singular vectors are V = GᵀUΣ^-½, and H = V (Σ/n) Vᵀ. The
        part of a row outside V's span is orthogonal to every training row, so it is dropped."""
        k = g @ g.T
        lam = damping * float(k.diagonal().mean()) / g.shape[1]
        sigma, u = torch.linalg.eigh(k)
        kept = sigma > sigma[-1] * 1e-14
        if lam == 0 or not bool(kept.any()):
            return NOTHING
        sigma, u = sigma[kept], u[:, kept]
        to_v = g.T @ (u * (sigma * (sigma / self.count + lam)).rsqrt())
        return Whitening(lam, lambda rows: rows.double() @ to_v)


class DiagonalSum(Accumulator):
    """D = mean g²."""

    def add(self, g: Float[Tensor, "b r"]) -> None:
        squares = g.double().square().sum(0)
        self.count += len(g)
        self.total = squares if self.total is None else self.total + squares

    def whitening(self, damping: float) -> Whitening:
        d = self.mean()
        lam = damping * float(d.mean())
        scale = (d + lam).rsqrt()
        return NOTHING if lam == 0 else Whitening(lam, lambda g: g.double() * scale)


# --- curvatures ---


class Curvature(ABC):
    """The choices that define a curvature; every method but `accumulator` has a default."""

    damping: float  # λ as a fraction of the mean diagonal of H, > 0

    def __post_init__(self) -> None:
        """Raises IsslError if one of the dataclass's settings is out of range."""
        kind, own = type(self).__name__, vars(self)
        if not 0 < number_or_nan(damping := own.get("damping", 1.0)) < math.inf:
            raise IsslError(
                f"{kind}(damping={damping!r}): must be a finite number > 0, a fraction of the "
                "curvature's mean diagonal"
            )
        for name, (least, most) in WHOLE.items():
            value = own.get(name, least)
            if not is_whole(value, least, most) and (name, value) != ("fit", None):
                raise IsslError(
                    f"{kind}({name}={value!r}): must be a whole number, {least} or more"
                    + ("" if most is None else " and at most 2⁴⁰")
                )

    @abstractmethod
    def accumulator(self, gram: bool = False) -> Accumulator | None:
        """An empty sum for one layer's rows; None for no curvature.

        Args:
            gram: True if there will be fewer rows than columns, and only products with these rows
                are needed.
        """

    def sketch(self, layer: Layer, position: int, moments: Moments | None = None) -> Sketch:
        """What is kept of each image's gradient in this layer: by default, all of it.

        Args:
            position: The layer's position among the scored layers. Together with a seed, it fixes a
                random projection.
            moments: The layer's second moments over the images chosen by `moment_images`.
        """
        return Sketch()

    def moment_images(self, index: Int64[Tensor, " n"]) -> Int64[Tensor, " m"] | None:
        """Positions of the images whose second moments `sketch` needs, which costs a pass over
        them; None if it needs none. `index` holds the indices of all training images."""
        return None

    def norm_scale(self, layer: Layer) -> float | None:
        """The factor that makes a row's squared norm an unbiased estimate of the gradient's; None
        if there is no such factor."""
        return 1.0


@dataclass(frozen=True)
class Identity(Curvature):
    """No curvature: the squared gradient norm (as in TracIn, Pruthi et al. 2020, arXiv
    2002.08484)."""

    damping = 0.0

    def accumulator(self, gram: bool = False) -> None:
        return None


@dataclass(frozen=True)
class RandomProjection(Curvature):
    """No curvature: gradients are projected as in LoGra, and scaled so that their products are
    right on average.

    Args:
        rank: Dimensions kept per side.
        seed: Seed of the projections.
    """

    rank: int = 64
    seed: int = 0
    damping = 0.0

    def accumulator(self, gram: bool = False) -> None:
        return None

    def sketch(self, layer: Layer, position: int, moments: Moments | None = None) -> Sketch:
        p_in, p_out = random_rows(layer, self.rank, self.seed, position)
        a, b = ((p.shape[1] / p.shape[0]) ** 0.5 for p in (p_in, p_out))
        return Sketch((a * p_in).to(layer.weight), (b * p_out).to(layer.weight))


@dataclass(frozen=True)
class Exact(Curvature):
    """The whole gradient of each layer with its dense damped curvature, for small networks: memory
    grows as weights², or as n × weights where that is less. Damping as in `LoGra`."""

    damping: float = 0.1

    def accumulator(self, gram: bool = False) -> DenseSum:
        return DenseSum(gram)


@dataclass(frozen=True)
class Diagonal(Curvature):
    """The diagonal of the curvature: one number per weight. Damping as in `LoGra`."""

    damping: float = 0.1

    def accumulator(self, gram: bool = False) -> DiagonalSum:
        return DiagonalSum()


@dataclass(frozen=True)
class EKFAC(Curvature):
    """The diagonal in the eigenbasis of the layer's second moments (arXiv 1806.03884).

    Only weights are scored, so a layer's bias does not enter its moments. Damping as in `LoGra`.

    Args:
        fit: How many images the moments are taken over; default: all.
    """

    damping: float = 0.1
    fit: int | None = None

    def accumulator(self, gram: bool = False) -> DiagonalSum:
        return DiagonalSum()

    def sketch(self, layer: Layer, position: int, moments: Moments | None = None) -> Sketch:
        assert moments is not None
        p_in, p_out = (leading_rows(m, len(m)) for m in (moments.inputs, moments.outputs))
        return Sketch(p_in.to(layer.weight), p_out.to(layer.weight))

    def moment_images(self, index: Int64[Tensor, " n"]) -> Int64[Tensor, " m"] | None:
        return draw_images(index, self.fit, 0)


@dataclass(frozen=True)
class LoGra(Curvature):
    """Gradients projected on both sides, with the dense damped curvature of the projections (the
    paper's choice; arXiv 2405.13954).

    Args:
        rank: Dimensions kept per side; all if the layer has fewer. It limits how visible copies
            are: k copies leave an image about 1 / (1 + k rank² / n) of its score, or more.
        damping: λ as a fraction of the mean diagonal of H.
        seed: Seed of the projections only, so that different noise seeds share one projection.
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
        super().__post_init__()
        if self.projection not in ("random", "pca"):
            raise IsslError(f"LoGra(projection={self.projection!r}): choose 'random' or 'pca'")

    def accumulator(self, gram: bool = False) -> DenseSum:
        return DenseSum(gram)

    def sketch(self, layer: Layer, position: int, moments: Moments | None = None) -> Sketch:
        if self.projection == "pca":
            assert moments is not None
            p_in, p_out = (leading_rows(m, self.rank) for m in (moments.inputs, moments.outputs))
        else:
            p_in, p_out = random_rows(layer, self.rank, self.seed, position)
        return Sketch(p_in.to(layer.weight), p_out.to(layer.weight))

    def moment_images(self, index: Int64[Tensor, " n"]) -> Int64[Tensor, " m"] | None:
        return draw_images(index, self.fit, self.seed) if self.projection == "pca" else None

    def norm_scale(self, layer: Layer) -> float | None:
        """E‖P_out M P_inᵀ‖² = ‖M‖² · k_out k_in / (c_out d_in) for random P, so this factor makes
        the norm unbiased; None for PCA below full rank, which keeps more than that share."""
        sides = weight_shape(layer)
        scale = math.prod(sides) / math.prod(min(self.rank, d) for d in sides)
        return None if self.projection == "pca" and scale != 1 else scale


KINDS: dict[str, Callable[..., Curvature]] = {
    "logra": LoGra,
    "logra-pca": partial(LoGra, projection="pca"),
    "ekfac": EKFAC,
    "diagonal": Diagonal,
    "identity": Identity,
    "random-projection": RandomProjection,
    "exact": Exact,
}


def named_curvature(kind: str, rank: int = 16, damping: float = 0.1) -> Curvature:
    """The curvature of that name, one of `KINDS`; settings that it does not have are ignored."""
    if kind not in KINDS:
        raise IsslError(f"curvature {kind!r}: choose {', '.join(KINDS)}")
    known = inspect.signature(KINDS[kind]).parameters
    settings = {"rank": rank, "damping": damping}
    return KINDS[kind](**{name: value for name, value in settings.items() if name in known})


# --- the bases that gradients are projected onto, and the images that they are made from ---


def draw_images(index: Int64[Tensor, " n"], count: int | None, seed: int) -> Int64[Tensor, " m"]:
    """Positions of `count` images (None: all), sorted by image index. The images whose index
    draws the smallest random numbers under `seed` are taken, so neither the order of the images nor
    the batch size matters."""
    order = index.argsort()
    if count is None or count >= len(index):
        return order
    # kept apart from the seeds of views, whose first random number sets the size of a crop
    drawn = keyed_random.uniform(seed + (1 << 61), index[order], (1,)).squeeze(1)
    return order[drawn.argsort(stable=True)[:count].sort()[0]]


def random_rows(layer: Layer, rank: int, seed: int, position: int) -> tuple[Tensor, Tensor]:
    """P_in and P_out, each with `rank` orthonormal rows, or one per dimension if that is fewer."""
    c_out, d_in = weight_shape(layer)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
    return orthonormal_rows(rank, d_in, generator), orthonormal_rows(rank, c_out, generator)


def orthonormal_rows(rank: int, dim: int, generator: torch.Generator) -> Float[Tensor, "k d"]:
    """min(rank, dim) orthonormal rows, uniformly random (QR of a Gaussian matrix, signs fixed by
    R)."""
    gaussian = torch.randn(dim, min(rank, dim), generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).T.contiguous()


def leading_rows(moment: Float[Tensor, "d d"], k: int) -> Float[Tensor, "k d"]:
    """The min(k, d) leading eigenvectors as rows, those of the largest eigenvalues last. If only a
    few of many are needed, scipy's Lanczos method computes them."""
    d = len(moment)
    k = min(k, d)
    if 8 * k > d or d < 256:
        return torch.linalg.eigh(moment).eigenvectors.T[-k:].contiguous()
    start = np.ones(d) / math.sqrt(d)  # fixed, so that the same moments give the same rows
    vectors = scipy.sparse.linalg.eigsh(moment.cpu().numpy(), k, v0=start)[1]
    return torch.from_numpy(np.ascontiguousarray(vectors.T))
