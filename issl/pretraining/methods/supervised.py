"""Supervised training, for comparison: cross-entropy of class scores."""

from __future__ import annotations

import torch.nn.functional as F

from issl.pretraining.methods.base import Batch, LearningMethod, Loss, Outputs


class Supervised(LearningMethod):
    """The projector gives one score per class, and the loss is −log softmax(scores)[label]."""

    name, label = "supervised", "supervised"
    labelled = True

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        assert batch.labels is not None  # the caller has them
        if batch.weights is None:
            return F.cross_entropy(outputs[0], batch.labels)
        return batch.mean(F.cross_entropy(outputs[0], batch.labels, reduction="none"))
