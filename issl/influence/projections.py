"""What is kept of a layer's gradient Σ_t d_t a_tᵀ (its sketch), and the bases it is projected
on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.sparse.linalg
import torch
from jaxtyping import Float
from torch import Tensor

from issl.influence.layers import Layer, weight_shape


@dataclass(frozen=True)
class Projected:
    """Keep P_out (Σ d aᵀ) P_inᵀ, flattened to k_out·k_in numbers per image; None stands for the
    identity."""

    p_in: Float[Tensor, "k_in d_in"] | None = None
    p_out: Float[Tensor, "k_out c_out"] | None = None


@dataclass(frozen=True)
class Norm:
    """Keep only ‖Σ d aᵀ‖, one number per image."""


Sketch = Projected | Norm


def kept_width(layer: Layer, sketch: Sketch) -> int:
    """How many numbers are kept of each image's gradient in this layer."""
    if isinstance(sketch, Norm):
        return 1
    out, inside = weight_shape(layer)
    return (out if sketch.p_out is None else len(sketch.p_out)) * (
        inside if sketch.p_in is None else len(sketch.p_in)
    )


@dataclass(frozen=True)
class Moments:
    """A layer's second moments Σ a aᵀ and Σ d dᵀ, in double precision, summed over positions (of
    both views) and images."""

    inputs: Float[Tensor, "d_in d_in"]
    outputs: Float[Tensor, "c_out c_out"]

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.inputs + other.inputs, self.outputs + other.outputs)


def no_moments(layer: Layer) -> Moments:
    """The sum over no image."""
    c_out, d_in = weight_shape(layer)
    inputs, outputs = (layer.weight.new_zeros(d, d, dtype=torch.float64) for d in (d_in, c_out))
    return Moments(inputs, outputs)


def orthonormal_rows(rank: int, dim: int, generator: torch.Generator) -> Float[Tensor, "k d"]:
    """min(rank, dim) orthonormal rows, uniformly random (QR of a Gaussian matrix, signs fixed by
    R)."""
    gaussian = torch.randn(dim, min(rank, dim), generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).T.contiguous()


def eigenrows(moment: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The eigenvectors as rows, those of the largest eigenvalues last."""
    return torch.linalg.eigh(moment).eigenvectors.T.contiguous()


def leading_rows(moment: Float[Tensor, "d d"], k: int) -> Float[Tensor, "k d"]:
    """The min(k, d) leading eigenvectors as rows (Lanczos, by scipy, where they are few of
    many)."""
    d = len(moment)
    k = min(k, d)
    if 8 * k > d or d < 256:
        return eigenrows(moment)[-k:]
    start = np.ones(d) / math.sqrt(d)  # fixed, so that the same moments give the same rows
    vectors = scipy.sparse.linalg.eigsh(moment.cpu().numpy(), k, v0=start)[1]
    return torch.from_numpy(np.ascontiguousarray(vectors.T))
