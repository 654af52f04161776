"""Supervised training, to compare with: cross-entropy of class scores."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor

from issl.pretraining.methods.base import LearningMethod, Loss, Recipe, Weights, mean


class Supervised(LearningMethod):
    """The projector gives one score a class, and the loss is −log softmax(scores)[label]."""

    name, label = "supervised", "supervised"
    labelled = True

    def loss(
        self,
        outputs: tuple[Tensor, ...],
        recipe: Recipe,
        labels: Int64[Tensor, " b"] | None = None,
        weights: Weights | None = None,
    ) -> Loss:
        assert labels is not None  # the caller has them
        if weights is None:
            return F.cross_entropy(outputs[0], labels)
        return mean(F.cross_entropy(outputs[0], labels, reduction="none"), weights)
