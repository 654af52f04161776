"""What the notebooks measure: correlations, AUCs, enrichment and differences, with intervals.

Every number comes as an `Estimate` with a 95% confidence interval. A bootstrap draws images with
replacement and takes percentiles; it draws the same ones each time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy  # its parts are imported when they are first used
from jaxtyping import Float

from issl.audit.stats import resampling
from issl.audit.stats.resampling import pearson
from issl.errors import IsslError

LARGE = 5000  # images, from which on an AUC's interval is computed rather than bootstrapped
NARROW = 0.03  # width below which two decimals may not tell the ends of an interval apart
Kind = Literal["pearson", "spearman"]


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
        digits = 2 + math.ceil(math.log10(NARROW / width)) if 0 < width < NARROW else 2
        # adding 0 takes the sign from a rounded −0
        value, low, high = (
            f"{round(x, digits) + 0.0:.{digits}f}" for x in (self.value, self.low, self.high)
        )
        return f"{value} [{low}, {high}]".replace("inf", "∞").replace("-", "−")

    @classmethod
    def of(cls, row: Mapping[Any, Any]) -> Estimate:
        """The inverse of `as_dict`: None or NaN becomes an open end, or an unknown value."""
        unknown = {"value": np.nan, "low": -np.inf, "high": np.inf}
        found = {k: other if pd.isna(row[k]) else float(row[k]) for k, other in unknown.items()}
        return cls(**found, n=int(row["n"]))

    def scaled(self, factor: float) -> Estimate:
        """In other units."""
        return Estimate(factor * self.value, factor * self.low, factor * self.high, self.n)

    def as_dict(self) -> dict[str, float | None]:
        """For files: a number that is not finite becomes None."""
        return {
            k: (int(v) if k == "n" else float(v)) if np.isfinite(v) else None
            for k, v in asdict(self).items()
        }


def over_encoders(
    estimates: Sequence[Estimate],
    least: int | float = -np.inf,
    most: int | float = np.inf,
    *,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> Estimate:
    """The mean of what was measured under k encoders on the same images.

        mean ± t_{0.975, df} √(s² / k + e²),   df = (s² / k + e²)² / ((s² / k)² / (k − 1))

    s is the standard deviation between encoders. e is the standard error over images, which the
    encoders share: for each side, the mean half-width of the intervals / 1.96. The degrees of
    freedom are Welch's (1947, Biometrika 34). The interval covers 92 to 96 times in a hundred
    (tested). A bootstrap of three values never leaves their range and covers 75 times.

    Where k encoders agree to the last digit, s and e are 0 and say nothing. Then a share of up to
    1 − 0.025^(1/k) of all encoders may be anywhere from `least` to `most` (Clopper & Pearson 1934).

    Estimates of pairs share encoders. For them, s² / k is replaced by the jackknife's variance
    (k − 1)/k Σ_i (m_(−i) − m̄)², where m_(−i) is the mean over the pairs without encoder i.

    Args:
        estimates: one per encoder or pair; a single one keeps its interval, and an open interval
            stays open.
        least: the lowest value that the quantity can take (0 for an AUC); the interval ends there.
        most: the highest value that it can take.
        pairs: the two encoders of each estimate; needs all pairs of three or more encoders.
    """
    if len(estimates) == 1:
        return estimates[0]
    value, low, high = np.array([(e.value, e.low, e.high) for e in estimates]).T
    k, centre = len(value), float(value.mean())
    between = float(value.var(ddof=1)) / k
    if pairs is not None:
        encoders = sorted({encoder for pair in pairs for encoder in pair})
        k = len(encoders)
        without = [value[[i not in pair for pair in pairs]].mean() for i in encoders]
        between = (k - 1) * float(np.var(without))

    def half(side: np.ndarray) -> float:
        return half_width([(between, k - 1), (float(np.mean(side) / 1.96) ** 2, np.inf)])

    low_end, high_end = centre - half(value - low), centre + half(high - value)
    if low_end == high_end and np.isfinite([least, most]).all():
        other = 1 - 0.025 ** (1 / k)
        low_end, high_end = centre - other * (centre - least), centre + other * (most - centre)
    return Estimate(centre, max(float(least), low_end), min(float(most), high_end), estimates[0].n)


def half_width(variances: Sequence[tuple[float, int | float]]) -> float:
    """t_{0.975, df} √V for the sum V of independent variances, given with their degrees of freedom;
    df is Welch's."""
    total = sum(v for v, _ in variances)
    shares = sum(v**2 / df for v, df in variances if v)
    if not np.isfinite(total) or shares == 0:
        return 1.96 * math.sqrt(total)
    return float(scipy.stats.t.ppf(0.975, total**2 / shares)) * math.sqrt(total)


def top(score: Sequence[float] | np.ndarray, share: float) -> np.ndarray:
    """True for the ⌈share · n⌉ largest scores; 0 < share < 1."""
    score = np.asarray(score)
    if not 0 < share < 1:
        raise IsslError(f"share={share}: must lie between 0 and 1")
    chosen = np.zeros(len(score), bool)
    chosen[np.argsort(-score, kind="stable")[: int(np.ceil(share * len(score)))]] = True
    return chosen


def overlap(a: np.ndarray, b: np.ndarray, share: float) -> Estimate:
    """The part of a's top `share` that is also in b's (by chance `share`); Wilson's interval."""
    return proportion(top(b, share)[top(a, share)])


def proportion(hits: np.ndarray) -> Estimate:
    """A share with its Wilson interval."""
    result = scipy.stats.binomtest(int(np.sum(hits)), len(hits))
    interval = result.proportion_ci(method="wilson")
    return Estimate(float(np.mean(hits)), float(interval.low), float(interval.high), len(hits))


def proportion_difference(a: np.ndarray, b: np.ndarray) -> Estimate:
    """The share of hits in `a` minus that in `b`, with Newcombe's interval (1998, Statistics in
    Medicine 17, p. 873, method 10)."""
    first, second = proportion(a), proportion(b)
    value = first.value - second.value
    below = np.hypot(first.value - first.low, second.high - second.value)
    above = np.hypot(first.high - first.value, second.value - second.low)
    return Estimate(value, float(value - below), float(value + above), first.n + second.n)


def precision(score: np.ndarray, positive: np.ndarray) -> Estimate:
    """The share of positives among the k highest scores, for k positives; Wilson's interval."""
    positive = _flag(positive)
    order = np.argsort(-np.asarray(score, float), kind="stable")
    return proportion(positive[order[: positive.sum()]])


def enrichment(score: np.ndarray, flag: np.ndarray, share: float) -> Estimate:
    """How many times as frequent `flag` is in the top share as in the rest (1: no relation).

    Katz's log interval. It is open on the side where a group has no flagged image.
    """
    score, flag = np.asarray(score), _flag(flag)
    head = top(score, share)
    counts = flag[head].sum(), head.sum(), flag[~head].sum(), (~head).sum()
    risk = scipy.stats.contingency.relative_risk(*map(int, counts))
    low, high = risk.confidence_interval()
    low, high = low if np.isfinite(low) else 0.0, high if np.isfinite(high) else np.inf
    return Estimate(float(risk.relative_risk), float(low), float(high), len(score))


def auc(score: np.ndarray, flag: np.ndarray) -> Estimate:
    """P(a flagged image scores higher than an unflagged one), ties count half; 0.5: no relation.

    Bootstrap over both groups. From LARGE images on, the normal interval of DeLong et al. (1988,
    Biometrics 44), which agrees at that size and needs no resamples.
    """
    score, flag = np.asarray(score, float), _flag(flag)
    if len(score) >= LARGE:
        return clustered_auc(score, flag, np.arange(len(score)))

    def statistic(a: np.ndarray, b: np.ndarray, axis: int = -1) -> Any:
        u = scipy.stats.mannwhitneyu(a, b, method="asymptotic", axis=axis).statistic
        return u / (a.shape[axis] * b.shape[axis])

    return _bootstrap((score[flag], score[~flag]), statistic, paired=False)


def clustered_auc(score: np.ndarray, flag: np.ndarray, cluster: np.ndarray) -> Estimate:
    """As `auc`, for images that come in clusters (a duplicate and its original).

    V_i is the share of the other kind that image i is ranked correctly against; the AUC is its mean
    over either kind. Normal interval, from the variance of the clusters' sums of V_i − AUC, as in
    Obuchowski 1997, Biometrics 53. Its covariance term is left out: a cluster is of one kind here.
    """
    score, flag, cluster = np.asarray(score, float), _flag(flag), np.asarray(cluster)
    yes, no = score[flag], score[~flag]

    def share_below(these: np.ndarray, others: np.ndarray) -> np.ndarray:
        others = np.sort(others)
        below = np.searchsorted(others, these, "left") + np.searchsorted(others, these, "right")
        return below / 2 / len(others)

    right, wrong = share_below(yes, no), share_below(no, yes)
    value, variance = float(right.mean()), 0.0
    for placed, members in ((right, cluster[flag]), (1 - wrong, cluster[~flag])):
        sums = pd.Series(placed - value).groupby(members).sum()
        variance += float((sums**2).sum()) * len(sums) / max(1, len(sums) - 1) / len(placed) ** 2
    half = 1.96 * math.sqrt(variance)
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), len(score))


def rank_biserial(score: np.ndarray, flag: np.ndarray) -> tuple[Estimate, float]:
    """P(a flagged image scores higher than an unflagged one) − P(lower), and Mann-Whitney's p.

    0.147 is small, 0.33 medium, 0.474 large (Romano et al. 2006). DeLong's interval: a bootstrap
    would take minutes at tens of thousands of images. p is two-sided.
    """
    score, flag = np.asarray(score), _flag(flag)
    a = clustered_auc(score, flag, np.arange(len(score)))
    p = float(scipy.stats.mannwhitneyu(score[flag], score[~flag], method="asymptotic").pvalue)
    return Estimate(2 * a.value - 1, 2 * a.low - 1, 2 * a.high - 1, a.n), p


def average_precision(
    score: np.ndarray, positive: np.ndarray, cluster: np.ndarray | None = None
) -> Estimate:
    """Area under the precision-recall curve when a high score is to find the positive images.

    By chance it is their share. Equal scores are found together. Bootstrap over images, or over
    clusters of them; what was drawn twice counts twice, so nothing is sorted again.
    """
    score, positive = np.asarray(score, float), _flag(positive)
    order = np.argsort(-score, kind="stable")
    run, ends = resampling.runs(score[order])
    at = np.flatnonzero(positive[order])
    last = ends[run[at]]  # equal scores are found together
    known = np.searchsorted(at, last, "right") - 1
    labels = np.arange(len(score)) if cluster is None else cluster
    of = np.unique(labels, return_inverse=True)[1][order]

    def mean_precision(counts: np.ndarray) -> float:
        hits, places = np.cumsum(counts[at])[known], np.cumsum(counts)[last]
        if not hits[-1]:
            return np.nan  # a resample without any positive image is left out
        return float((counts[at] * hits / np.maximum(places, 1)).sum() / hits[-1])

    drawn = resampling.times_drawn(int(of.max()) + 1)
    draws = np.array([mean_precision(counts[of]) for counts in drawn])
    return percentiles(mean_precision(np.ones(len(score), int)), draws, len(score))


def correlation(a: np.ndarray, b: np.ndarray, kind: Kind = "pearson") -> Estimate:
    """Correlation of two scores of the same 3 or more images, in [−1, 1]; bootstrap."""
    return agreement(np.stack([a, b]), kind)


def agreement(scores: Float[np.ndarray, "s n"], kind: Kind = "pearson") -> Estimate:
    """The mean correlation over all pairs of s ≥ 2 scores of the same images; bootstrap."""
    scores = np.asarray(scores, float)
    pairs = list(itertools.combinations(range(len(scores)), 2))
    return _of_correlations(scores, pairs, lambda r: r.mean(1), kind == "spearman")


def spearman(a: np.ndarray, b: np.ndarray) -> Estimate:
    """Spearman's ρ with an interval by formula, for tens of thousands of images (4 or more).

    Normal for artanh ρ with variance (1 + ρ²/2) / (n − 3) (Bonett & Wright 2000, Psychometrika 65).
    """
    value = float(pearson(scipy.stats.rankdata(a), scipy.stats.rankdata(b), -1))
    return _by_fisher(value, (1 + value**2 / 2) / (len(a) - 3), len(a))


def partial_spearman(a: np.ndarray, b: np.ndarray, given: pd.DataFrame) -> Estimate:
    """Rank correlation of a and b that the given columns do not explain.

    The ranks of a and b are regressed on those of the columns, and the residuals are correlated.
    Fisher's interval, with one degree of freedom fewer per column.
    """
    n = len(a)
    ranked = np.column_stack([np.ones(n), *(scipy.stats.rankdata(given[c]) for c in given)])
    residuals = []
    for values in (a, b):
        r = scipy.stats.rankdata(values)
        residuals.append(r - ranked @ np.linalg.lstsq(ranked, r, rcond=None)[0])
    value = float(scipy.stats.pearsonr(*residuals).statistic)
    return _by_fisher(value, 1 / (n - given.shape[1] - 3), n)


def correlation_difference(a: np.ndarray, b: np.ndarray, truth: np.ndarray) -> Estimate:
    """Spearman's ρ of `a` with the truth minus that of `b`; paired bootstrap."""
    columns = np.stack([np.asarray(v, float) for v in (a, b, truth)])
    return _of_correlations(columns, [(0, 2), (1, 2)], lambda r: r[:, 0] - r[:, 1], ranked=True)


def margin(
    grid: Float[np.ndarray, "g 2 n"],
    strengths: Sequence[float],
    other: Float[np.ndarray, "2 n"],
    strength: float,
) -> Estimate:
    """r between two seeds, interpolated over a grid of settings to the strength of another setting
    (linearly in log strength), minus the r of that; bootstrap.

    Beyond the ends of the grid the nearest end is no match, so the interval is open.
    """
    logs = np.log(np.asarray(strengths, float))
    order, unit = np.argsort(logs), np.eye(len(logs))
    weights = np.array([np.interp(np.log(strength), logs[order], row[order]) for row in unit])
    columns = np.concatenate([*np.asarray(grid, float), np.asarray(other, float)])
    pairs = [(k, k + 1) for k in range(0, len(columns), 2)]
    found = _of_correlations(columns, pairs, lambda r: r[:, :-1] @ weights - r[:, -1])
    inside = min(strengths) <= strength <= max(strengths)
    return found if inside else Estimate(found.value, -np.inf, np.inf, found.n)


def mean(values: np.ndarray) -> Estimate:
    """The mean with Student's interval; infinite for a single value, a point for equal ones."""
    values = np.asarray(values, float)
    n, centre = len(values), float(values.mean())
    if n < 2:
        return Estimate(centre, -np.inf, np.inf, n)
    if np.ptp(values) == 0:
        return Estimate(float(values[0]), float(values[0]), float(values[0]), n)
    interval = scipy.stats.ttest_1samp(values, 0).confidence_interval()
    return Estimate(centre, float(interval.low), float(interval.high), n)


def mean_difference(a: np.ndarray, b: np.ndarray) -> Estimate:
    """The mean of `a` minus that of `b`, with Welch's interval; two or more values of each."""
    interval = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    difference = float(np.mean(a) - np.mean(b))
    return Estimate(difference, float(interval.low), float(interval.high), len(a) + len(b))


def slope(x: np.ndarray, y: np.ndarray) -> Estimate:
    """The slope of the least-squares line through three or more points, with Student's interval."""
    line = scipy.stats.linregress(x, y)
    half = float(scipy.stats.t.ppf(0.975, len(x) - 2) * line.stderr)
    return Estimate(float(line.slope), line.slope - half, line.slope + half, len(x))


def extrapolated(x: np.ndarray, y: np.ndarray, at: float) -> Estimate:
    """The least-squares line through four or more points, evaluated at `at`, with Student's
    prediction interval for a new observation there."""
    line, n = scipy.stats.linregress(x, y), len(x)
    left = float(np.sum((y - line.intercept - line.slope * x) ** 2)) / (n - 2)
    far = (at - float(np.mean(x))) ** 2 / float(np.sum((x - np.mean(x)) ** 2))
    half = float(scipy.stats.t.ppf(0.975, n - 2)) * math.sqrt(left * (1 + 1 / n + far))
    value = float(line.intercept + line.slope * at)
    return Estimate(value, value - half, value + half, n)


def log_ratio(a: np.ndarray, b: np.ndarray) -> Estimate:
    """log(mean a / mean b) of paired values ≥ 0 (0: no difference); bootstrap over pairs."""

    def statistic(x: np.ndarray, y: np.ndarray, axis: int = -1) -> Any:
        return np.log(x.mean(axis) / y.mean(axis))

    return _bootstrap((a, b), statistic)


def distance(estimate: Estimate, number: float) -> Estimate:
    """How far an estimate is from a number, either way."""
    ends = abs(estimate.low - number), abs(estimate.high - number)
    low = 0.0 if estimate.low <= number <= estimate.high else min(ends)
    return Estimate(abs(estimate.value - number), low, max(ends), estimate.n)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values adjusted for the number of tests (Holm 1979, Scand. J. Stat. 6)."""
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    left = len(p) - np.arange(len(p))  # tests that are not yet rejected
    adjusted[order] = np.minimum(1, np.maximum.accumulate(left * p[order]))
    return adjusted


def percentiles(value: float, draws: np.ndarray, n: int) -> Estimate:
    """An estimate with a percentile interval; resamples without a value are left out."""
    known = draws[np.isfinite(draws)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (-np.inf, np.inf)
    return Estimate(float(value), float(low), float(high), n)


def _of_correlations(
    columns: Float[np.ndarray, "m n"],
    pairs: Sequence[tuple[int, int]],
    combined: Callable[[np.ndarray], np.ndarray],
    ranked: bool = False,
) -> Estimate:
    """What `combined` makes of the correlations of pairs of columns, (r, pairs) to (r,)."""
    values = scipy.stats.rankdata(columns, axis=1) if ranked else columns
    whole = np.array([[pearson(values[i], values[j], -1) for i, j in pairs]])
    draws = combined(resampling.resampled_correlations(columns, pairs, ranked))
    return percentiles(combined(whole)[0], draws, columns.shape[1])


def _bootstrap(
    columns: Sequence[Any], statistic: Callable[..., Any], paired: bool = True
) -> Estimate:
    """A statistic of columns, over rows drawn with replacement (of each column, if not paired)."""
    columns = tuple(np.asarray(c, float) for c in columns)
    n = len(columns[0]) if paired else sum(map(len, columns))
    with np.errstate(divide="ignore", invalid="ignore"):  # for resamples without a value
        result = scipy.stats.bootstrap(
            columns,
            statistic,
            n_resamples=resampling.RESAMPLES,
            vectorized=True,
            paired=paired,
            method="percentile",
            batch=max(1, 4_000_000 // n),
            rng=np.random.default_rng(0),
        )
        value = statistic(*columns)
    return percentiles(value, result.bootstrap_distribution, n)


def _by_fisher(value: float, variance: float, n: int) -> Estimate:
    """A correlation whose artanh is normal with this variance."""
    centre, half = np.arctanh(np.clip(value, -1 + 1e-12, 1 - 1e-12)), 1.96 * math.sqrt(variance)
    return Estimate(value, float(np.tanh(centre - half)), float(np.tanh(centre + half)), n)


def _flag(flag: np.ndarray) -> np.ndarray:
    """A property as booleans; raises IsslError if no images have it or all do."""
    flag = np.asarray(flag, dtype=bool)
    if len(np.unique(flag)) < 2:
        which = "all" if flag.all() else "none"
        raise IsslError(f"the property is true of {which} of {len(flag)} images; take more images")
    return flag
