"""What is kept of a whole network's gradient, weight by weight, and its curvature:
`issl.influence.curvature`, for gradients of batches. A batch's gradient is no sum over independent
examples, so it is projected after it was made."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from issl.errors import IsslError
from issl.influence.curvature import Curvature, NoSum, Projected, Statistic
from issl.influence.layers import Layer


class GradientSketch:
    """Calling it on gradients (b, …) of each weight gives rows (b, k): kernels as the curvature
    keeps them, vectors (BatchNorm's weights, biases) whole, side by side.

    sums    one empty sum for each weight, from which its curvature is made; None where there is no
            curvature
    """

    def __init__(self, backbone: nn.Module, curvature: Curvature, n: int):
        layers = [m for m in backbone.modules() if isinstance(m, Layer)]
        if curvature.moment_images(torch.arange(2)) is not None:
            raise IsslError(
                f"training_influence: {curvature} needs second moments of single images, which gradients of batches do "
                "not have; choose Identity, RandomProjection, LoGra (random), Diagonal or Exact"
            )
        found = {id(layer.weight): curvature.sketch(layer, k) for k, layer in enumerate(layers)}
        self.curvature, self.sketches = (
            curvature,
            [found.get(id(w), Projected()) for w in backbone.parameters()],
        )
        widths = []
        for sketch, weight in zip(self.sketches, backbone.parameters(), strict=True):
            assert isinstance(sketch, Projected)  # norms are asked for by name
            out, inside = len(weight), weight[0].numel()
            out, inside = (
                d if p is None else len(p) for d, p in ((out, sketch.p_out), (inside, sketch.p_in))
            )
            widths.append(out * inside)
        self.widths = widths
        sums = [curvature.statistic(width, n, foreign=True) for width in widths]
        self.sums: list[Statistic] | None = (
            None if all(isinstance(s, NoSum) for s in sums) else sums
        )

    def __call__(self, gradients: list[Tensor]) -> Float[Tensor, "b k"]:
        rows = []
        for gradient, sketch in zip(gradients, self.sketches, strict=True):
            assert isinstance(sketch, Projected)
            g = gradient.flatten(2) if gradient.ndim > 2 else gradient.unsqueeze(-1)
            g = g if sketch.p_out is None else sketch.p_out.to(g) @ g
            g = g if sketch.p_in is None else g @ sketch.p_in.to(g).T
            rows.append(g.flatten(1))
        return torch.cat(rows, 1)

    def whitening(
        self, rows: Float[Tensor, "n k"]
    ) -> Callable[[Float[Tensor, "b k"]], Float[Tensor, "b m"]]:
        """A map under which products are gᵀ H⁻¹ g′, H = mean_i τ_i τ_iᵀ of these rows, a block for
        each weight."""
        assert self.sums is not None  # there is a curvature
        maps = []
        for part, total in zip(rows.split(self.widths, 1), self.sums, strict=True):
            total.add(part)
            maps.append(total.whitening(self.curvature.damping, self.curvature.absolute).whiten)

        def whiten(g: Float[Tensor, "b k"]) -> Float[Tensor, "b m"]:
            return torch.cat(
                [to(part) for to, part in zip(maps, g.split(self.widths, 1), strict=True)], 1
            )

        return whiten
