"""The statistics that the notebooks use: correlations, AUCs, enrichment, differences and their
intervals.

Most are scipy's; every number comes as an Estimate with a 95% confidence interval.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from issl.audit.stats.resampled_correlations import resampled_correlations
from issl.errors import IsslError

RESAMPLES = 1000
LARGE = 5000  # images, from which on an AUC's interval is computed rather than bootstrapped
NARROW = 0.03  # the width of an interval from which on two decimals tell its ends apart


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% confidence interval and the count of images behind it."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        """Two decimals, or as many more as tell the ends of a narrow interval apart."""
        width = self.high - self.low
        digits = 2 if not 0 < width < NARROW else 2 + math.ceil(math.log10(NARROW / width))
        # adding 0 takes the sign from a rounded −0
        value, low, high = (
            f"{round(x, digits) + 0.0:.{digits}f}" for x in (self.value, self.low, self.high)
        )
        return f"{value} [{low}, {high}]".replace("inf", "∞").replace("-", "−")

    @classmethod
    def of(cls, row: Mapping[Any, Any]) -> Estimate:
        """From a table's row, as `as_dict` gives it: an open end, None or NaN there, is
        infinite."""
        low, high = (
            end if pd.isna(row[k]) else float(row[k])
            for k, end in (("low", -np.inf), ("high", np.inf))
        )
        return cls(
            float("nan" if pd.isna(row["value"]) else row["value"]), low, high, int(row["n"])
        )

    def scaled(self, factor: float) -> Estimate:
        """In other units."""
        return Estimate(factor * self.value, factor * self.low, factor * self.high, self.n)

    def as_dict(self) -> dict[str, float | None]:
        """For files: numbers that are not finite (a bound where one group has no event, say) become
        None."""
        return {
            k: (int(v) if k == "n" else float(v)) if np.isfinite(v) else None
            for k, v in asdict(self).items()
        }


def over_encoders(
    estimates: Sequence[Estimate], least: int | float = -np.inf, most: int | float = np.inf
) -> Estimate:
    """The mean of what was measured under k encoders on the same images, with an interval over
    both.

        mean ± t_{0.975, df} √(s² / k + e²),   df = (s² / k + e²)² / ((s² / k)² / (k − 1))

    s: the standard deviation between encoders; e: the standard error over images, which all
    encoders share because their images are the same, for each side from the half-width of the
    intervals (their mean / 1.96). The degrees of freedom are Welch's (1947, Biometrika 34): with
    three encoders that differ, t is 4.3. So it covers 92 to 96 times in a hundred (tested). A
    bootstrap of three values never leaves their range, and covers 75 times.

    An interval that is open stays open. One encoder alone keeps its interval over images, which
    says nothing about another training.

    least, most   what such a number can be at all (an AUC lies between 0 and 1): the interval ends
                  there
    """
    if not estimates:
        raise IsslError("over_encoders: no encoder was measured")
    if len(estimates) == 1:
        return estimates[0]
    value, low, high = (
        np.array([getattr(e, k) for e in estimates]) for k in ("value", "low", "high")
    )
    k, mean = len(value), float(value.mean())
    between = float(value.var(ddof=1)) / k

    def half(side: np.ndarray) -> float:
        within = float(np.mean(side) / 1.96) ** 2
        if not np.isfinite(within) or between == 0:
            return 1.96 * float(np.sqrt(within))
        df = (between + within) ** 2 / (between**2 / (k - 1))
        return float(stats.t.ppf(0.975, df) * np.sqrt(between + within))

    ends = max(float(least), mean - half(value - low)), min(float(most), mean + half(high - value))
    return Estimate(mean, *ends, estimates[0].n)


def top(score: Sequence[float] | np.ndarray, share: float) -> np.ndarray:
    """True for the ⌈share · n⌉ largest scores."""
    score = np.asarray(score)
    if not 0 < share < 1:
        raise IsslError(f"share={share}: must lie between 0 and 1")
    chosen = np.zeros(len(score), bool)
    chosen[np.argsort(-score, kind="stable")[: int(np.ceil(share * len(score)))]] = True
    return chosen


def enrichment(score: np.ndarray, flag: np.ndarray, share: float) -> Estimate:
    """How many times as frequent `flag` is in the top share than in the rest (relative risk; 1 = no
    relation).

    The interval is Katz's log interval (scipy.stats.contingency.relative_risk); if one of the two
    groups has no flagged image, it is open on that side: [0, …] or […, ∞].
    """
    score, flag = np.asarray(score), _flag(flag)
    head = top(score, share)
    risk = stats.contingency.relative_risk(
        int(flag[head].sum()), int(head.sum()), int(flag[~head].sum()), int((~head).sum())
    )
    interval = risk.confidence_interval()
    low, high = (
        end if np.isfinite(end) else other
        for end, other in ((interval.low, 0.0), (interval.high, np.inf))
    )
    return Estimate(float(risk.relative_risk), float(low), float(high), len(score))


def auc(score: np.ndarray, flag: np.ndarray, seed: int = 0) -> Estimate:
    """P(score of a flagged image > score of another one), ties count half; 0.5 = no relation.

    The Mann-Whitney statistic over the number of pairs; percentile bootstrap over both groups, or
    in a large set the normal interval of DeLong et al. (1988, Biometrics 44), which is the same
    there and takes no resamples.
    """
    score, flag = np.asarray(score, dtype=float), _flag(flag)
    if len(score) >= LARGE:
        return clustered_auc(score, flag, np.arange(len(score)))
    yes, no = score[flag], score[~flag]

    def statistic(a: np.ndarray, b: np.ndarray, axis: int = -1) -> Any:
        return stats.mannwhitneyu(a, b, method="asymptotic", axis=axis).statistic / (
            a.shape[axis] * b.shape[axis]
        )

    interval = stats.bootstrap(
        (yes, no),
        statistic,
        n_resamples=RESAMPLES,
        vectorized=True,
        method="percentile",
        batch=max(1, 4_000_000 // len(score)),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(
        float(statistic(yes, no)), float(interval.low), float(interval.high), len(score)
    )


def clustered_auc(score: np.ndarray, flag: np.ndarray, cluster: np.ndarray) -> Estimate:
    """As `auc`, for images that come in clusters (a duplicate and its original) and so are not
    independent.

    V_i is the share of the other kind that image i is ranked correctly against; the AUC is its mean
    over either kind. Normal interval with the variance between the clusters' sums of V_i − AUC
    (Obuchowski 1997, Biometrics 53, without its covariance term: a cluster is of one kind here).
    """
    score, flag, cluster = np.asarray(score, dtype=float), _flag(flag), np.asarray(cluster)
    yes, no = score[flag], score[~flag]
    below = np.searchsorted(np.sort(no), yes, side="left") + np.searchsorted(
        np.sort(no), yes, side="right"
    )
    above = np.searchsorted(np.sort(yes), no, side="left") + np.searchsorted(
        np.sort(yes), no, side="right"
    )
    value, variance = float(below.mean() / 2 / len(no)), 0.0
    for placed, members in (
        (below / 2 / len(no), cluster[flag]),
        (1 - above / 2 / len(yes), cluster[~flag]),
    ):
        sums = pd.Series(placed - value).groupby(members).sum()
        variance += float((sums**2).sum()) * len(sums) / max(1, len(sums) - 1) / len(placed) ** 2
    half = 1.96 * np.sqrt(variance)
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), len(score))


def partial_spearman(a: np.ndarray, b: np.ndarray, given: pd.DataFrame) -> Estimate:
    """Rank correlation of a and b that the given columns do not explain, in [−1, 1].

    All are ranked, the ranks of a and b are regressed on those of the columns, and the residuals
    are correlated; Fisher's interval, with one degree of freedom less per column.
    """
    n = len(a)
    ranked = np.column_stack([np.ones(n), *(stats.rankdata(given[c]) for c in given)])
    residuals = []
    for values in (a, b):
        r = stats.rankdata(values)
        residuals.append(r - ranked @ np.linalg.lstsq(ranked, r, rcond=None)[0])
    value = float(stats.pearsonr(*residuals).statistic)
    half = 1.96 / np.sqrt(n - given.shape[1] - 3)
    centre = np.arctanh(np.clip(value, -1 + 1e-12, 1 - 1e-12))
    return Estimate(value, float(np.tanh(centre - half)), float(np.tanh(centre + half)), n)


def correlation(
    a: np.ndarray, b: np.ndarray, kind: Literal["pearson", "spearman"] = "pearson", seed: int = 0
) -> Estimate:
    """Correlation of two scores of the same images, in [−1, 1]; bootstrap interval over images
    (percentile)."""
    if len(a) != len(b) or len(a) < 3:
        raise IsslError(
            f"correlation of {len(a)} and {len(b)} values: need the same number, 3 or more"
        )
    return agreement(np.stack([np.asarray(a, float), np.asarray(b, float)]), kind, seed)


def spearman(a: np.ndarray, b: np.ndarray) -> Estimate:
    """Spearman's ρ, as `correlation` gives it, with an interval by formula: normal for artanh ρ
    with the variance (1 + ρ²/2) / (n − 3) (Bonett & Wright 2000, Psychometrika 65). For tens of
    thousands of images."""
    if len(a) != len(b) or len(a) < 4:
        raise IsslError(
            f"spearman of {len(a)} and {len(b)} values: need the same number, 4 or more"
        )
    value = float(pearson(stats.rankdata(a), stats.rankdata(b), -1))
    centre = np.arctanh(np.clip(value, -1 + 1e-12, 1 - 1e-12))
    half = 1.96 * np.sqrt((1 + value**2 / 2) / (len(a) - 3))
    return Estimate(value, float(np.tanh(centre - half)), float(np.tanh(centre + half)), len(a))


def agreement(
    scores: Float[np.ndarray, "s n"],
    kind: Literal["pearson", "spearman"] = "pearson",
    seed: int = 0,
) -> Estimate:
    """The correlation of any two of s scores of the same images, mean over all pairs, in [−1, 1];
    bootstrap interval over images (percentile), the same images for all pairs."""
    scores = np.asarray(scores, float)
    if scores.ndim != 2 or len(scores) < 2 or scores.shape[1] < 3:
        raise IsslError(
            f"agreement of scores of shape {scores.shape}: need two or more of the same 3 or more images"
        )
    pairs = list(itertools.combinations(range(len(scores)), 2))
    return _of_correlations(scores, pairs, lambda r: r.mean(1), seed, kind == "spearman")


def matching_weights(strengths: Sequence[float], target: float) -> np.ndarray:
    """Weights of a grid's entries that interpolate to `target`, linearly in log strength; beyond
    the ends of the grid, the nearest end has all the weight. strengths > 0, in any order."""
    logs = np.log(np.asarray(strengths, float))
    order = np.argsort(logs)
    return np.array(
        [np.interp(np.log(target), logs[order], unit[order]) for unit in np.eye(len(logs))]
    )


def correlation_margin(
    grid: Float[np.ndarray, "g 2 n"],
    weights: np.ndarray,
    other: Float[np.ndarray, "2 n"],
    seed: int = 0,
) -> Estimate:
    """Pearson's r between two seeds, weighted over a grid of settings, minus that of another
    setting; paired bootstrap interval over images (percentile)."""
    columns = np.concatenate([*np.asarray(grid, float), np.asarray(other, float)])
    pairs = [(k, k + 1) for k in range(0, len(columns), 2)]
    return _of_correlations(columns, pairs, lambda r: r[:, :-1] @ weights - r[:, -1], seed)


def correlation_difference(
    a: np.ndarray, b: np.ndarray, truth: np.ndarray, seed: int = 0
) -> Estimate:
    """Spearman's ρ of `a` with the truth minus that of `b`; paired bootstrap interval over images
    (percentile)."""

    columns = np.stack([np.asarray(v, float) for v in (a, b, truth)])
    return _of_correlations(
        columns, [(0, 2), (1, 2)], lambda r: r[:, 0] - r[:, 1], seed, ranked=True
    )


def log_ratio(a: np.ndarray, b: np.ndarray, seed: int = 0) -> Estimate:
    """log(mean a / mean b) of paired values ≥ 0; 0 = no difference. Bootstrap interval over pairs
    (percentile)."""

    def statistic(x: np.ndarray, y: np.ndarray, axis: int = -1) -> Any:
        with np.errstate(
            divide="ignore", invalid="ignore"
        ):  # a mean of 0 gives an infinite ratio, which the interval leaves out
            return np.log(x.mean(axis) / y.mean(axis))

    return _bootstrap((np.asarray(a, float), np.asarray(b, float)), statistic, seed)


def rank_biserial(score: np.ndarray, flag: np.ndarray) -> tuple[Estimate, float]:
    """How much higher flagged images score than the others, in [−1, 1]: P(higher) − P(lower); 0.147
    is small, 0.33 medium, 0.474 large (Romano et al. 2006). Also the p-value of the two-sided
    Mann-Whitney test. Interval of `clustered_auc` with each image its own cluster (DeLong's); a
    bootstrap would take minutes at tens of thousands."""
    a, flag = clustered_auc(score, flag, np.arange(len(score))), _flag(flag)
    p = float(
        stats.mannwhitneyu(
            np.asarray(score)[flag], np.asarray(score)[~flag], method="asymptotic"
        ).pvalue
    )
    return Estimate(2 * a.value - 1, 2 * a.low - 1, 2 * a.high - 1, a.n), p


def overlap(a: np.ndarray, b: np.ndarray, share: float) -> Estimate:
    """The part of a's top `share` that is also in b's; by chance it would be `share`. Wilson
    interval."""
    return proportion(top(b, share)[top(a, share)])


def average_precision(
    score: np.ndarray, positive: np.ndarray, cluster: np.ndarray | None = None, seed: int = 0
) -> Estimate:
    """Area under the precision-recall curve when a high score is to find the positive images; by
    chance, their share. Equal scores are found together. Bootstrap interval (percentile) over
    images, or over clusters of them (a duplicate and its original): what was drawn twice counts
    twice, so nothing is sorted again."""
    score, positive = np.asarray(score, float), _flag(positive)
    order = np.argsort(-score, kind="stable")
    found, ranked = positive[order], score[order]
    last = np.append(ranked[1:] != ranked[:-1], True)
    ends = np.flatnonzero(last)[
        np.cumsum(last) - last
    ]  # the last place among equal scores, for every place
    of = np.unique(np.arange(len(score)) if cluster is None else cluster, return_inverse=True)[1][
        order
    ]

    def mean_precision(counts: np.ndarray) -> float:
        hits, places = np.cumsum(found * counts), np.cumsum(counts)
        at = np.flatnonzero(
            found & (counts > 0)
        )  # a resample without any positive image is left out
        return (
            float((counts[at] * hits[ends[at]] / places[ends[at]]).sum() / hits[-1])
            if len(at)
            else np.nan
        )

    rng, clusters = np.random.default_rng(seed), int(of.max()) + 1
    drawn = (
        np.bincount(rng.integers(0, clusters, clusters), minlength=clusters)[of]
        for _ in range(RESAMPLES)
    )
    draws = np.array([mean_precision(counts) for counts in drawn])
    return _percentiles(mean_precision(np.ones(len(score), np.int64)), draws, len(score))


def precision(score: np.ndarray, positive: np.ndarray) -> Estimate:
    """The share of positive images among the P highest scores, P the number of positive images; by
    chance, their share among all. Wilson interval."""
    positive = _flag(positive)
    order = np.argsort(-np.asarray(score, float), kind="stable")
    return proportion(positive[order[: positive.sum()]])


def auc_difference(
    score: np.ndarray, other: np.ndarray, positive: np.ndarray, seed: int = 0
) -> Estimate:
    """AUC of a score minus that of another on the same images; paired bootstrap interval over
    images."""
    positive = _flag(positive)

    def statistic(y: np.ndarray, s: np.ndarray, t: np.ndarray, axis: int = -1) -> Any:
        rise = stats.rankdata(s, axis=axis) - stats.rankdata(t, axis=axis)
        with np.errstate(invalid="ignore"):  # a resample of only one kind is left out
            return (y * rise).sum(axis) / (y.sum(axis) * (1 - y).sum(axis))

    columns = (positive.astype(float), np.asarray(score, float), np.asarray(other, float))
    return _bootstrap(columns, statistic, seed)


def mean(values: np.ndarray) -> Estimate:
    """The mean with Student's interval (of differences between paired runs, say); infinite for a
    single value."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return Estimate(float(values.mean()), -np.inf, np.inf, len(values))
    if np.ptp(values) == 0:
        return Estimate(float(values[0]), float(values[0]), float(values[0]), len(values))
    interval = stats.ttest_1samp(values, 0).confidence_interval()
    return Estimate(float(values.mean()), float(interval.low), float(interval.high), len(values))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values adjusted for the number of tests (Holm 1979)."""
    from statsmodels.stats.multitest import multipletests  # slow to import

    return np.asarray(multipletests(list(p_values), method="holm")[1])


def pearson(x: np.ndarray, y: np.ndarray, axis: int) -> Any:
    """Pearson's r along an axis; 0 where one of the two does not vary."""
    x, y = x - x.mean(axis, keepdims=True), y - y.mean(axis, keepdims=True)
    size = np.sqrt((x**2).sum(axis) * (y**2).sum(axis))
    return (x * y).sum(axis) / np.where(size > 0, size, np.inf)


def _of_correlations(
    columns: Float[np.ndarray, "m n"],
    pairs: Sequence[tuple[int, int]],
    combined: Callable[[np.ndarray], np.ndarray],
    seed: int,
    ranked: bool = False,
) -> Estimate:
    """What `combined` makes of the correlations of pairs of columns, (r, pairs) to (r,), with its
    percentile interval over images drawn with replacement."""
    values = stats.rankdata(columns, axis=1) if ranked else columns
    whole = np.array([[pearson(values[i], values[j], -1) for i, j in pairs]])
    with np.errstate(invalid="ignore"):  # resamples without a value are left out
        value = float(combined(whole)[0])
        draws = combined(resampled_correlations(columns, pairs, ranked, RESAMPLES, seed))
    return _percentiles(value, draws, columns.shape[1])


def _bootstrap(
    columns: tuple[np.ndarray, ...], statistic: Callable[..., Any], seed: int
) -> Estimate:
    """A statistic of paired columns, with its percentile interval over rows drawn with
    replacement."""
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):  # for resamples without a value
        warnings.simplefilter(
            "ignore", stats.DegenerateDataWarning
        )  # all resamples are equal: the interval is a point
        result = stats.bootstrap(
            columns,
            statistic,
            n_resamples=RESAMPLES,
            vectorized=True,
            paired=True,
            method="percentile",
            batch=max(1, 4_000_000 // len(columns[0])),
            rng=np.random.default_rng(seed),
        )
    return _percentiles(float(statistic(*columns)), result.bootstrap_distribution, len(columns[0]))


def _percentiles(value: float, draws: np.ndarray, n: int) -> Estimate:
    known = draws[np.isfinite(draws)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (-np.inf, np.inf)
    return Estimate(value, float(low), float(high), n)


def proportion(hits: np.ndarray) -> Estimate:
    """A share with its Wilson interval."""
    result = stats.binomtest(int(np.sum(hits)), len(hits))
    interval = result.proportion_ci(method="wilson")
    return Estimate(float(np.mean(hits)), float(interval.low), float(interval.high), len(hits))


def _flag(flag: np.ndarray) -> np.ndarray:
    flag = np.asarray(flag, dtype=bool)
    if flag.all() or not flag.any():
        raise IsslError(
            f"the property is {'true of all' if flag.all() else 'true of none'} of the {len(flag)} images, so "
            "nothing can be compared; take more images"
        )
    return flag
