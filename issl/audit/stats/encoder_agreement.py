"""How well the scores of different encoders agree, corrected for the noise of each score.

Intervals are over encoders and images.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # its parts are imported when they are first used
from jaxtyping import Float

from issl.audit.stats.resampling import pearson, resampled_correlations
from issl.audit.stats.statistics import Estimate, half_width
from issl.errors import IsslError

Groups = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Agreements:
    """The agreement of k encoders with each other, from two measurements of each.

    Spearman's ρ between two encoders, corrected for attenuation by measurement error
    (Spearman 1904, Am. J. Psychol. 15, 72–101):

        ρ_ij = ½ (ρ(x_i0, x_j1) + ρ(x_i1, x_j0)) / √(ρ(x_i0, x_i1) ρ(x_j0, x_j1))

    1 means equal up to measurement error; by chance the value can exceed 1. It is NaN where two
    measurements of the same encoder do not agree. Measurement 0 of two encoders may share its error
    (both under the same noise), and so may measurement 1. These pairs are never compared.

    Attributes:
        value: (k, k), symmetric.
        resampled: the same in resamples of the images; ranks are not recomputed.
        images: the number of images.
    """

    value: Float[np.ndarray, "k k"]
    resampled: Float[np.ndarray, "r k k"]
    images: int

    @classmethod
    def of(cls, scores: Sequence[np.ndarray]) -> Agreements:
        """Of k encoders, each with two measurements of the same n ≥ 4 images, (2, n)."""
        measured = [np.asarray(v, float) for v in scores]
        k = len(measured)
        ranks = np.concatenate([scipy.stats.rankdata(v, axis=1) for v in measured])
        pairs = list(itertools.product(range(0, 2 * k, 2), range(1, 2 * k, 2)))  # 0 with 1
        whole = np.array([[pearson(ranks[i], ranks[j], -1) for i, j in pairs]])
        drawn = resampled_correlations(ranks, pairs, ranked=False)
        (value,), resampled = (_divided(r.reshape(-1, k, k)) for r in (whole, drawn))
        return cls(value, resampled, ranks.shape[1])

    def between(self, own: Sequence[int], others: Groups, less: Groups = ()) -> Estimate:
        """The mean agreement of encoders with those of `others`, minus that with those of `less`.

            θ ± t_{0.975, df} √(Σ_g V_g + e²),   V_g = (k_g − 1)/k_g Σ_i (θ_(−i) − θ̄_(−·))²

        Pairs share encoders, so the jackknife leaves out encoders. V_g is its variance for a group
        of k_g encoders, e is the standard error over images, and the degrees of freedom are
        Welch's. A group of one says nothing about other trainings and adds nothing. Neither does a
        group of two that are compared only with each other.

        Args:
            own: positions of encoders; none is compared with itself.
            others: groups of positions; the mean is over groups.
            less: groups whose mean agreement is subtracted.

        Raises:
            IsslError: where a group leaves no pair to compare.
        """
        weights = self._weights(own, others, less)
        if weights is None:
            raise IsslError(
                f"agreement of encoders {own} with {others}, {less}: a group has no pair"
            )
        value = _weighted(self.value, weights).item()
        over_images = float(np.std(_weighted(self.resampled, weights), ddof=1))
        if not np.isfinite(value + over_images):
            return Estimate(value, -np.inf, np.inf, self.images)
        variances = [(over_images**2, np.inf)]
        for group in dict.fromkeys(tuple(g) for g in (own, *others, *less)):
            left = [self._weights(own, others, less, without=i) for i in group]
            without = [_weighted(self.value, w) for w in left if w is not None]
            if 1 < len(group) == len(without):
                spread = (len(group) - 1) * float(np.var(without))
                variances.append((spread, len(group) - 1))
        half = half_width(variances)
        return Estimate(value, value - half, value + half, self.images)

    def _weights(
        self, own: Sequence[int], others: Groups, less: Groups, without: int | None = None
    ) -> Float[np.ndarray, "k k"] | None:
        """Each pair's weight in θ, leaving out encoder `without`; None if a group has no pair."""
        found = np.zeros_like(self.value)
        for groups, sign in ((others, 1.0), (less, -1.0)):
            for group in groups:
                pairs = [(i, j) for i in own for j in group if i != j and without not in (i, j)]
                if not pairs:
                    return None
                for pair in pairs:
                    found[pair] += sign / len(groups) / len(pairs)
        return found


def _weighted(agreement: np.ndarray, weights: Float[np.ndarray, "k k"]) -> np.ndarray:
    """Σ_ij w_ij ρ_ij over the last two axes; pairs that do not count may be NaN."""
    return np.asarray(agreement[..., weights != 0] @ weights[weights != 0])


def _divided(crossed: Float[np.ndarray, "r k k"]) -> Float[np.ndarray, "r k k"]:
    """ρ_ij of crossed_ij = ρ(x_i0, x_j1)."""
    reliable = np.diagonal(crossed, axis1=1, axis2=2)
    known = np.sqrt(np.where(reliable > 0, reliable, np.nan))
    return (crossed + crossed.swapaxes(1, 2)) / 2 / (known[:, :, None] * known[:, None, :])
