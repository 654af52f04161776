"""Per-example losses whose gradients are scored: the paper's stability loss, and a supervised one
for comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

# maps the features (b, d) of images and of their views to losses (b,)
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class CrossEntropy:
    """The supervised loss −log softmax(f(x_i))_y of an encoder whose features are class scores; it
    ignores the view.

    It needs labels: `on(labels)` is the Loss for a batch.
    """

    def on(self, labels: Int64[Tensor, " b"]) -> Loss:
        """The loss of images with these labels."""
        return lambda scores, _: F.cross_entropy(scores, labels.to(scores.device), reduction="none")


def stability_loss(
    features: Float[Tensor, "b d"], perturbed: Float[Tensor, "b d"]
) -> Float[Tensor, " b"]:
    """ℓ_i = 1 − cos(f(x_i), f(x̂_i)), one per example (arXiv 2412.17170, §3).

    Computed as ½‖u − v‖² of the unit vectors: the same number, without cancellation near cos = 1.
    """
    return (F.normalize(features, dim=1) - F.normalize(perturbed, dim=1)).square().sum(1) / 2
