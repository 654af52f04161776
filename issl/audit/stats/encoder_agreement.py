"""How well the scores of encoders agree once the noise of each score is taken out, with intervals
over encoders and images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

from issl.audit.stats.resampled_correlations import resampled_correlations
from issl.audit.stats.statistics import RESAMPLES, Estimate, pearson
from issl.errors import IsslError


@dataclass(frozen=True)
class Agreements:
    """The agreement of k encoders with each other: how well two quantities agree that were each
    measured twice, with independent errors. Spearman's ρ between them, divided by what the errors
    allow (Spearman 1904, Am. J. Psychol. 15, 72–101):

        ρ_ij = ½ (ρ(x_i0, x_j1) + ρ(x_i1, x_j0)) / √(ρ(x_i0, x_i1) ρ(x_j0, x_j1))

    1 = the same but for the errors; by chance it can exceed 1. Measurement 0 of two encoders may
    share its error (both under the same noise), and so may measurement 1: these are never compared.
    Undefined (NaN) where two measurements of the same do not agree.

    value      (k, k), symmetric
    resampled  (r, k, k): the same in resamples of the images; ranks are not taken anew
    images     how many
    """

    value: Float[np.ndarray, "k k"]
    resampled: Float[np.ndarray, "r k k"]
    images: int

    @classmethod
    def of(cls, scores: Sequence[np.ndarray], seed: int = 0) -> Agreements:
        """Of k encoders, each with two measurements of the same n ≥ 4 images, (2, n)."""
        measured = [np.asarray(v, float) for v in scores]
        if any(
            v.shape != measured[0].shape or v.ndim != 2 or len(v) != 2 or v.shape[1] < 4
            for v in measured
        ):
            raise IsslError(
                f"agreement of scores of shapes {[v.shape for v in measured]}: need (2, n) each, two measurements of "
                "the same 4 or more images"
            )
        ranks = np.concatenate([stats.rankdata(v, axis=1) for v in measured])
        pairs = list(
            itertools.product(range(0, len(ranks), 2), range(1, len(ranks), 2))
        )  # first with second
        whole = np.array([[pearson(ranks[i], ranks[j], -1) for i, j in pairs]])
        drawn = resampled_correlations(ranks, pairs, False, RESAMPLES, seed)
        (value,), resampled = (
            _divided(r.reshape(len(r), len(measured), -1)) for r in (whole, drawn)
        )
        return cls(value, resampled, ranks.shape[1])

    def between(
        self,
        own: Sequence[int],
        others: Sequence[Sequence[int]],
        less: Sequence[Sequence[int]] = (),
    ) -> Estimate:
        """The mean agreement of the encoders `own` with those of a group (none with itself), the
        mean over the groups `others`, less that over the groups `less`.

            θ ± t_{0.975, df} √(Σ_g V_g + e²),   V_g = (k_g − 1)/k_g Σ_i (θ_(−i) − θ̄_(−·))²

        Pairs share encoders, so the encoders are what is left out: V_g is the jackknife's variance
        of each group of k_g encoders, e the standard error over images, and the degrees of freedom
        are Welch's. A group of one, or one of two that are compared with each other alone, says
        nothing about other trainings and adds nothing.
        """
        value = self._mean(self.value[None], own, others, less).item()
        over_images = float(np.std(self._mean(self.resampled, own, others, less), ddof=1))
        if not np.isfinite(value + over_images):
            return Estimate(value, -np.inf, np.inf, self.images)
        variances, freedom = [over_images**2], [np.inf]
        for group in dict.fromkeys(tuple(g) for g in (own, *others, *less)):
            without = [self._without(i, own, others, less) for i in group]
            if len(group) > 1 and all(v is not None for v in without):
                variances.append((len(group) - 1) * float(np.var(np.array(without, float))))
                freedom.append(len(group) - 1)
        total = sum(variances)
        shares = sum(v**2 / df for v, df in zip(variances, freedom, strict=True))
        half = float(stats.t.ppf(0.975, total**2 / shares) if shares > 0 else 1.96) * np.sqrt(total)
        return Estimate(value, float(value - half), float(value + half), self.images)

    def _without(
        self,
        left_out: int,
        own: Sequence[int],
        others: Sequence[Sequence[int]],
        less: Sequence[Sequence[int]],
    ) -> float | None:
        """θ without one encoder; None where nothing is left to compare."""
        kept = [i for i in own if i != left_out]
        ours, theirs = (
            [[i for i in g if i != left_out] for g in groups] for groups in (others, less)
        )
        if not all(_pairs(kept, g) for g in (*ours, *theirs)):
            return None
        return float(self._mean(self.value[None], kept, ours, theirs).item())

    @staticmethod
    def _mean(
        matrix: Float[np.ndarray, "r k k"],
        own: Sequence[int],
        others: Sequence[Sequence[int]],
        less: Sequence[Sequence[int]],
    ) -> Float[np.ndarray, " r"]:
        def with_groups(groups: Sequence[Sequence[int]]) -> Float[np.ndarray, " r"]:
            found = []
            for group in groups:
                if not (pairs := _pairs(own, group)):
                    raise IsslError(
                        f"agreement of encoders {list(own)} with {list(group)}: there is no pair of two"
                    )
                i, j = np.array(pairs).T
                found.append(matrix[:, i, j].mean(-1))
            return np.mean(found, axis=0)

        return with_groups(others) - (with_groups(less) if less else 0.0)


def _pairs(own: Sequence[int], group: Sequence[int]) -> list[tuple[int, int]]:
    return [(i, j) for i in own for j in group if i != j]


def _divided(crossed: Float[np.ndarray, "r k k"]) -> Float[np.ndarray, "r k k"]:
    """ρ_ij of crossed_ij = ρ(x_i0, x_j1)."""
    reliable = np.diagonal(crossed, axis1=1, axis2=2)
    known = np.sqrt(np.where(reliable > 0, reliable, np.nan))
    return (crossed + crossed.swapaxes(1, 2)) / 2 / (known[:, :, None] * known[:, None, :])
