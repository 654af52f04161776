"""The audit's statistics: planted effects, no effect, and other libraries' values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

import issl
from issl.audit.stats import statistics
from issl.audit.stats.resampling import resampled_correlations

RNG = np.random.default_rng(0)
A = RNG.standard_normal(400)
B = 0.8 * A + 0.6 * RNG.standard_normal(400)
FLAG = RNG.random(400) < 0.1


def test_correlation_is_scipys() -> None:
    for kind, reference in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        got = statistics.correlation(A, B, kind)  # type: ignore[arg-type]
        assert got.value == pytest.approx(reference(A, B).statistic, abs=1e-12)
        assert got.low < 0.8 < got.high and got.high - got.low < 0.15 and got.n == 400
    fisher = stats.pearsonr(A, B).confidence_interval()
    got = statistics.correlation(A, B)
    assert got.low == pytest.approx(fisher.low, abs=0.02) and got.high == pytest.approx(
        fisher.high, abs=0.02
    )
    assert statistics.correlation(A, A).low == pytest.approx(1)
    assert statistics.correlation(A, np.zeros(400)).value == 0
    assert statistics.correlation(A, B, seed=1) != statistics.correlation(A, B, seed=2)
    with pytest.raises(issl.IsslError, match="400 and 3 values"):
        statistics.correlation(A, A[:3])


def test_interval_covers_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(1), 0
    for k in range(60):
        x = rng.standard_normal((80, 2)) @ np.array([[1, 0.5], [0, np.sqrt(0.75)]])
        got = statistics.correlation(x[:, 0], x[:, 1], seed=k)
        hits += got.low <= 0.5 <= got.high
    assert 50 <= hits <= 60


def test_overlap() -> None:
    assert statistics.overlap(A, 3 * A + 1, 0.05).value == 1
    assert statistics.overlap(A, -A, 0.05).value == 0
    assert statistics.overlap(A, B, 0.05).n == 20


def test_average_precision_and_auc() -> None:
    assert statistics.average_precision(FLAG.astype(float), FLAG).value == 1
    shuffled = statistics.average_precision(A, FLAG)
    assert shuffled.value == pytest.approx(average_precision_score(FLAG, A))
    assert shuffled.low < FLAG.mean() + 0.05
    score = A + 2 * FLAG
    gain = statistics.auc_difference(score, A, FLAG)
    assert (
        gain.value == pytest.approx(roc_auc_score(FLAG, score) - roc_auc_score(FLAG, A))
        and gain.low > 0.2
    )
    same = statistics.auc_difference(A, A, FLAG)
    assert [same.value, same.low, same.high] == pytest.approx([0, 0, 0], abs=1e-12)
    with pytest.raises(issl.IsslError, match="true of none"):
        statistics.average_precision(A, np.zeros(400, bool))


def test_mean_is_students() -> None:
    values = np.array([0.1, 0.3, 0.2])
    got, want = statistics.mean(values), stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    assert (got.value, got.low, got.high) == pytest.approx((0.2, *want))
    one, equal = statistics.mean(np.array([0.5])), statistics.mean(np.array([0.5, 0.5]))
    assert one.low == -np.inf and one.high == np.inf and equal.low == equal.high == 0.5


def test_holm() -> None:
    np.testing.assert_allclose(statistics.holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])


def test_agreement_is_the_mean_correlation_of_all_pairs() -> None:
    scores = np.stack([A, B, A + RNG.standard_normal(400)])
    for kind, reference in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        want = np.mean(
            [reference(scores[i], scores[j]).statistic for i, j in ((0, 1), (0, 2), (1, 2))]
        )
        got = statistics.agreement(scores, kind)  # type: ignore[arg-type]
        assert got.value == pytest.approx(want) and got.low < want < got.high
    two = statistics.agreement(scores[:2])
    assert two.value == pytest.approx(statistics.correlation(A, B).value)
    with pytest.raises(issl.IsslError, match=r"shape \(1, 400\)"):
        statistics.agreement(scores[:1])


def test_clustered_auc_is_the_auc_and_counts_pairs_once() -> None:
    score = A + 0.7 * FLAG
    alone, plain = (
        statistics.clustered_auc(score, FLAG, np.arange(400)),
        statistics.auc(score, FLAG),
    )
    assert alone.value == pytest.approx(plain.value)
    assert (alone.low, alone.high) == (
        pytest.approx(plain.low, abs=0.015),
        pytest.approx(plain.high, abs=0.015),
    )
    # every flagged image twice: as independent images the interval shrinks, as pairs it does not
    twice = np.concatenate([np.arange(400), np.flatnonzero(FLAG)])
    pairs = statistics.clustered_auc(score[twice], FLAG[twice], twice)
    images = statistics.clustered_auc(score[twice], FLAG[twice], np.arange(len(twice)))
    width, less = pairs.high - pairs.low, images.high - images.low
    assert pairs.value == pytest.approx(alone.value) and width == pytest.approx(
        alone.high - alone.low, rel=0.02
    )
    assert less < 0.85 * width
    tied = statistics.clustered_auc(np.round(score), FLAG, np.arange(400))
    assert tied.value == pytest.approx(roc_auc_score(FLAG, np.round(score)))


def test_matching_weights_interpolate_and_stay_within_the_grid() -> None:
    w = statistics.matching_weights([0.1, 1.0, 10.0], 0.1**0.5)
    np.testing.assert_allclose(w, [0.5, 0.5, 0], atol=1e-12)
    np.testing.assert_allclose(
        statistics.matching_weights([10.0, 0.1, 1.0], 1e-6), [0, 1, 0]
    )  # any order; beyond: the end
    np.testing.assert_allclose(statistics.matching_weights([10.0, 0.1, 1.0], 1e6), [1, 0, 0])


def test_correlation_margin_is_a_difference_of_correlations() -> None:
    noisy = np.stack([A, A + 3 * RNG.standard_normal(400)])
    got = statistics.correlation_margin(np.stack([[A, B], noisy]), np.array([1.0, 0.0]), noisy)
    assert (
        got.value == pytest.approx(np.corrcoef(A, B)[0, 1] - np.corrcoef(noisy)[0, 1])
        and got.low > 0.3
    )
    same = statistics.correlation_margin(np.stack([noisy]), np.array([1.0]), noisy)
    assert [same.value, same.low, same.high] == pytest.approx([0, 0, 0], abs=1e-12)


def test_log_ratio() -> None:
    rng = np.random.default_rng(4)
    b = rng.exponential(size=500)
    got = statistics.log_ratio(3 * b * rng.uniform(0.5, 1.5, 500), b)
    assert got.low < np.log(3) < got.high and got.low > 0.9
    nothing = statistics.log_ratio(np.zeros(5), np.ones(5))
    assert nothing.value == -np.inf and (nothing.low, nothing.high) == (-np.inf, np.inf)


def test_rank_biserial_is_somers_d() -> None:
    score = A + FLAG
    effect, p = statistics.rank_biserial(score, FLAG)
    assert effect.value == pytest.approx(stats.somersd(FLAG.astype(int), score).statistic)
    assert p == pytest.approx(
        stats.mannwhitneyu(score[FLAG], score[~FLAG], method="asymptotic").pvalue
    )
    less, _ = statistics.rank_biserial(-score, FLAG)
    assert less.value == pytest.approx(-effect.value)


def test_precision_of_as_many_as_there_are() -> None:
    assert statistics.precision(FLAG.astype(float), FLAG).value == 1
    score = np.arange(10.0)
    assert statistics.precision(score, score >= 6).n == 4
    assert statistics.precision(-score, score >= 8).value == 0


def test_average_precision_with_ties_is_scikit_learns() -> None:
    score = np.round(A)
    got = statistics.average_precision(score, FLAG)
    assert (
        got.value == pytest.approx(average_precision_score(FLAG, score))
        and got.low <= got.value <= got.high
    )


def test_average_precisions_interval_is_that_of_the_images_or_clusters_drawn() -> None:
    score, cluster = np.round(A, 1), np.arange(400) // 4
    for groups in (np.arange(400), cluster):
        rng = np.random.default_rng(3)
        drawn = []
        for _ in range(statistics.RESAMPLES):
            chosen = rng.integers(0, groups.max() + 1, groups.max() + 1)
            rows = np.concatenate([np.flatnonzero(groups == g) for g in chosen])
            if FLAG[rows].any():
                drawn.append(average_precision_score(FLAG[rows], score[rows]))
        got = statistics.average_precision(score, FLAG, groups, seed=3)
        assert [got.low, got.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]))
    # ten copies of each image say no more than one
    once, copies = statistics.average_precision(A, FLAG), np.arange(400).repeat(10)
    tenfold = statistics.average_precision(A[copies], FLAG[copies], copies)
    assert tenfold.high - tenfold.low == pytest.approx(once.high - once.low, rel=0.15)
    assert (
        statistics.average_precision(A[copies], FLAG[copies]).high
        < 0.7 * tenfold.high + 0.3 * tenfold.value
    )


def test_correlation_difference_is_that_of_two_spearmans() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=200)
    a, b = truth + rng.normal(size=200), rng.normal(size=200)
    got = statistics.correlation_difference(a, b, truth)
    want = stats.spearmanr(a, truth).statistic - stats.spearmanr(b, truth).statistic
    assert got.value == pytest.approx(want) and 0 < got.low < got.value < got.high
    assert statistics.correlation_difference(a, np.exp(a), truth).high == pytest.approx(0)


def test_spearman_is_scipys_and_its_interval_covers() -> None:
    for other in (B, np.round(B)):
        got = statistics.spearman(A, other)
        assert got.value == pytest.approx(stats.spearmanr(A, other).statistic)
        boot = statistics.correlation(A, other, "spearman")
        assert got.low == pytest.approx(boot.low, abs=0.03) and got.high == pytest.approx(
            boot.high, abs=0.03
        )
    assert statistics.spearman(A, A).value == 1 and statistics.spearman(A, np.zeros(400)).value == 0
    with pytest.raises(issl.IsslError, match="400 and 3 values"):
        statistics.spearman(A, A[:3])
    rng, hits = np.random.default_rng(2), 0
    truth = 6 / np.pi * np.arcsin(0.5 / 2)  # Spearman's ρ of normal variables with r = 0.5
    for _ in range(200):
        x = rng.standard_normal((80, 2)) @ np.array([[1, 0.5], [0, np.sqrt(0.75)]])
        e = statistics.spearman(x[:, 0], x[:, 1])
        hits += e.low <= truth <= e.high
    assert 180 <= hits <= 199


@pytest.mark.parametrize("ranked", [False, True])
def test_correlations_by_counts_are_those_of_the_images_drawn(ranked: bool) -> None:
    rng = np.random.default_rng(0)
    columns = np.stack(
        [rng.normal(size=60), rng.integers(0, 5, 60).astype(float), np.ones(60)]
    )  # with ties; constant
    found = resampled_correlations(columns, [(0, 1), (1, 2)], ranked, 4, 20)
    drawn = np.random.default_rng(4)
    for row in found:
        x, y = columns[:2, drawn.integers(0, 60, 60)]
        peer = stats.spearmanr if ranked else stats.pearsonr
        assert row == pytest.approx([peer(x, y).statistic, 0], abs=1e-12)


@pytest.mark.parametrize(
    ("value", "low", "high", "written"),
    [
        (-0.1, -0.3, 0.1, "−0.10 [−0.30, 0.10]"),
        (0.9761, 0.97, 0.982, "0.976 [0.970, 0.982]"),  # two decimals would say [0.97, 0.98]
        (0.00001, 0.000001, 0.00003, "0.000010 [0.000001, 0.000030]"),
        (0.5, 0.5, 0.5, "0.50 [0.50, 0.50]"),
        (-0.002, -0.047, 0.043, "0.00 [−0.05, 0.04]"),
        (0.5, -np.inf, np.inf, "0.50 [−∞, ∞]"),
    ],
)
def test_an_interval_is_written_so_that_its_ends_differ(
    value: float, low: float, high: float, written: str
) -> None:
    assert str(statistics.Estimate(value, low, high, 9)) == written
