"""BYOL: Grill et al. 2020, arXiv 2006.07733."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from issl.pretraining.methods.base import Batch, LearningMethod, Loss, Outputs, Recipe, State


class BYOL(LearningMethod):
    """Predicts the projections that a moving average of the encoder gives for the other view."""

    name, label = "byol", "BYOL"
    advice = ", or let the target follow more slowly (tau={tau:g})"

    def beside(self, encoder: Any, seed: int) -> dict[str, nn.Module]:
        """A predictor with the projector's form, and the target, which no gradient trains."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            predictor = encoder.head.build(encoder.head.out)
        return {"predictor": predictor, "target": copy.deepcopy(encoder).requires_grad_(False)}

    def outputs(self, learner: Any, views: Tensor, z: Tensor) -> Outputs:
        return learner.predictor(z), learner.target(views)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """‖p̄ − t̄‖² of unit vectors, in both directions (eq. 2). The target's own weights are not
        trained, so it needs no stop-gradient. Through its BatchNorm's batch statistics, it also
        depends on the images' weights."""
        (pa, pb), (ta, tb) = (rows.chunk(2) for rows in outputs)
        there, back = (
            batch.mean(2 - 2 * F.cosine_similarity(p, t, dim=1)) for p, t in ((pa, tb), (pb, ta))
        )
        return there + back

    def followed(self, recipe: Recipe, state: State, done: float) -> State:
        """target ← τ · target + (1 − τ) · encoder, with τ = 1 − (1 − τ₀)(cos(π · done) + 1)/2
        (§3.1)."""
        tau = 1 - (1 - recipe.tau) * (math.cos(math.pi * done) + 1) / 2
        names = [name for name in state if name.startswith("target.")]
        now = [state[name.replace("target", "encoder", 1)] for name in names]
        moved = torch._foreach_lerp([state[name] for name in names], now, 1 - tau)
        return dict(zip(names, moved, strict=True))
