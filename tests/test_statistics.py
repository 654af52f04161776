"""The audit's statistics: planted effects, no effect, other libraries' values, and coverage;
correlations with retraining."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as statsmodels
import torch
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

import issl
from issl.audit.stats import datamodeling, explained_variance, linear_theory, statistics
from issl.audit.stats.encoder_agreement import Agreements
from issl.audit.stats.group_differences import group_differences, largest, magnitude
from issl.audit.stats.pixel_features import pixel_features, texture
from issl.audit.stats.resampling import RESAMPLES
from issl.audit.stats.statistics import Estimate

RNG = np.random.default_rng(0)
A = RNG.standard_normal(400)
B = 0.8 * A + 0.6 * RNG.standard_normal(400)
FLAG = RNG.random(400) < 0.1


def ends(e: Estimate) -> tuple[float, float]:
    return e.low, e.high


def width(e: Estimate) -> float:
    return e.high - e.low


def holds_zero(e: Estimate) -> bool:
    return e.low <= 0 <= e.high


# --- correlations


@pytest.mark.parametrize(
    ("kind", "peer"), [("pearson", stats.pearsonr), ("spearman", stats.spearmanr)]
)
def test_correlations_are_scipys(kind: statistics.Kind, peer) -> None:
    scores = np.stack([A, B, A + RNG.standard_normal(400)])
    pairs = [peer(scores[i], scores[j]).statistic for i, j in ((0, 1), (0, 2), (1, 2))]
    each = statistics.agreement(scores, kind)
    assert each.value == pytest.approx(np.mean(pairs)) and each.low < each.value < each.high
    assert statistics.correlation(A, B, kind) == statistics.agreement(scores[:2], kind)
    assert statistics.correlation(A, np.zeros(400), kind).value == 0


def test_intervals_by_formula_and_by_resamples_agree() -> None:
    fisher = stats.pearsonr(A, B).confidence_interval()
    assert ends(statistics.correlation(A, B)) == pytest.approx(tuple(fisher), abs=0.02)
    for other in (B, np.round(B)):
        got, boot = statistics.spearman(A, other), statistics.correlation(A, other, "spearman")
        assert got.value == pytest.approx(stats.spearmanr(A, other).statistic)
        assert ends(got) == pytest.approx(ends(boot), abs=0.03)
    assert statistics.spearman(A, A).value == 1


def test_differences_of_correlations() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=200)
    a, b = truth + rng.normal(size=200), rng.normal(size=200)
    less = statistics.correlation_difference(a, b, truth)
    rho_a, rho_b = (stats.spearmanr(v, truth).statistic for v in (a, b))
    assert less.value == pytest.approx(rho_a - rho_b) and 0 < less.low < less.value < less.high
    assert statistics.correlation_difference(a, np.exp(a), truth).high == pytest.approx(0)


def test_a_margin_is_interpolated_and_open_beyond_the_grid() -> None:
    grid, other = np.stack([[A, B], [A, B + A]]), np.stack([A, RNG.standard_normal(400)])
    r = [np.corrcoef(*pair)[0, 1] for pair in (*grid, other)]
    for strength, value in ((0.1, r[0]), (0.1**0.5, (r[0] + r[1]) / 2), (1.0, r[1])):
        got = statistics.margin(grid, [0.1, 1.0], other, strength)
        assert got.value == pytest.approx(value - r[2]) and 0.3 < got.low < got.value < got.high
    beyond = statistics.margin(grid, [0.1, 1.0], other, 1.1)
    assert beyond.value == pytest.approx(got.value) and ends(beyond) == (-np.inf, np.inf)


def test_a_distance_is_nothing_within_the_interval() -> None:
    for number, *wanted in ((0.0, 0.5, 0.4, 0.7), (0.6, 0.1, 0.0, 0.2), (1.0, 0.5, 0.3, 0.6)):
        got = statistics.distance(Estimate(0.5, 0.4, 0.7, 9), number)
        assert [got.value, *ends(got)] == pytest.approx(wanted)


def test_partial_correlation_removes_a_common_cause() -> None:
    rng = np.random.default_rng(2)
    cause = rng.normal(size=3000)
    a, b = cause + rng.normal(size=3000), cause + rng.normal(size=3000)
    e = statistics.partial_spearman(a, b, pd.DataFrame({"cause": cause}))
    assert abs(e.value) < 0.06 < 0.4 < np.corrcoef(a, b)[0, 1]
    nothing = statistics.partial_spearman(a, b, pd.DataFrame(index=range(3000)))
    fisher = stats.pearsonr(stats.rankdata(a), stats.rankdata(b))
    assert nothing.value == pytest.approx(fisher.statistic)
    assert ends(nothing) == pytest.approx(tuple(fisher.confidence_interval()), abs=1e-5)


# --- rankings


def test_a_shuffled_score_finds_nothing_and_a_planted_one_all() -> None:
    """And ranks alone matter."""
    rng = np.random.default_rng(0)
    flag, order = rng.random(2000) < 0.2, rng.permutation(2000)
    noise, planted = rng.random(2000), flag + 0.01 * rng.random(2000)
    for share in (0.01, 0.05):
        e = statistics.enrichment(noise, flag, share)
        assert e.low < 1 < e.high
        assert statistics.enrichment(noise[order] ** 3, flag[order], share) == e
        e = statistics.enrichment(planted, flag, share)
        rest = flag[~statistics.top(planted, share)].mean()
        assert e.value == pytest.approx(1 / rest) and e.low > 3
    e = statistics.auc(noise, flag)
    assert e.low < 0.5 < e.high and width(e) < 0.1 and statistics.auc(planted, flag).value == 1
    assert statistics.precision(planted, flag).value == 1
    assert statistics.overlap(planted, 3 * planted + 1, 0.05).value == 1
    assert statistics.overlap(planted, -planted, 0.05).value == 0
    without = statistics.enrichment(np.arange(100.0), np.arange(100) < 50, 0.05)
    assert (without.value, *ends(without)) == (0, 0, np.inf)


def test_aucs_are_scikit_learns_and_pairs_count_once() -> None:
    score = A + 0.7 * FLAG
    alone = statistics.clustered_auc(score, FLAG, np.arange(400))
    plain = statistics.auc(score, FLAG)
    assert alone.value == pytest.approx(roc_auc_score(FLAG, score)) == plain.value
    assert ends(alone) == pytest.approx(ends(plain), abs=0.015)
    # every flagged image twice: as independent images the interval shrinks, as pairs it does not
    twice = np.concatenate([np.arange(400), np.flatnonzero(FLAG)])
    pairs = statistics.clustered_auc(score[twice], FLAG[twice], twice)
    images = statistics.clustered_auc(score[twice], FLAG[twice], np.arange(len(twice)))
    assert width(pairs) == pytest.approx(width(alone), rel=0.02)
    assert width(images) < 0.85 * width(pairs)
    tied = statistics.clustered_auc(np.round(score), FLAG, np.arange(400))
    assert tied.value == pytest.approx(roc_auc_score(FLAG, np.round(score)))
    effect, p = statistics.rank_biserial(score, FLAG)
    assert effect.value == pytest.approx(stats.somersd(FLAG.astype(int), score).statistic)
    assert p == pytest.approx(stats.mannwhitneyu(score[FLAG], score[~FLAG]).pvalue)


def test_average_precision_is_scikit_learns_over_the_clusters_drawn() -> None:
    score, groups = np.round(A, 1), np.arange(400) // 4
    rng, drawn = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        chosen = np.bincount(rng.integers(0, 100, 100), minlength=100)[groups]
        rows = np.repeat(np.arange(400), chosen)
        if FLAG[rows].any():
            drawn.append(average_precision_score(FLAG[rows], score[rows]))
    got = statistics.average_precision(score, FLAG, groups)
    assert got.value == pytest.approx(average_precision_score(FLAG, score))
    assert ends(got) == pytest.approx(np.quantile(drawn, [0.025, 0.975]))


# --- means, tests, several encoders


def test_means_shares_and_tests() -> None:
    values = np.array([0.1, 0.3, 0.2])
    got, want = statistics.mean(values), stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    assert (got.value, *ends(got)) == pytest.approx((0.2, *want))
    assert ends(statistics.mean(np.array([0.5]))) == (-np.inf, np.inf)
    assert ends(statistics.mean(np.array([0.5, 0.5]))) == (0.5, 0.5)
    # Newcombe's example (1998, table II, a, method 10): 56 of 70 and 48 of 80
    found = statistics.proportion_difference(np.arange(70) < 56, np.arange(80) < 48)
    assert (found.value, *ends(found)) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    # R's p.adjust(p, "holm")
    p = [0.01, 0.04, 0.03, 0.9, 0.011]
    np.testing.assert_allclose(statistics.holm(p), [0.05, 0.09, 0.09, 0.9, 0.05])
    rng = np.random.default_rng(4)
    b = rng.exponential(size=500)
    ratio = statistics.log_ratio(3 * b * rng.uniform(0.5, 1.5, 500), b)
    assert 0.9 < ratio.low < np.log(3) < ratio.high
    assert ends(statistics.log_ratio(np.zeros(5), np.ones(5))) == (-np.inf, np.inf)


def test_a_line_leads_where_statsmodels_says() -> None:
    x = np.array([0.2, 0.3, 0.5, 0.6, 0.7])
    y = 2 * x + np.array([0.01, -0.02, 0.03, 0.0, -0.01])
    got = statistics.extrapolated(x, y, 0.9)
    fitted = statsmodels.OLS(y, statsmodels.add_constant(x)).fit()
    want = fitted.get_prediction([[1, 0.9]]).summary_frame(0.05)
    assert got.value == pytest.approx(want["mean"][0])
    assert ends(got) == pytest.approx((want["obs_ci_lower"][0], want["obs_ci_upper"][0]))


def test_over_encoders_holds_both_sources_of_error() -> None:
    one = Estimate(0.5, 0.4, 0.6, 50)
    assert statistics.over_encoders([one]) == one
    same = statistics.over_encoders([one] * 4)  # nothing between encoders: the images' error
    assert same.value == 0.5 and width(same) == pytest.approx(0.2, rel=0.05)
    exact = [Estimate(v, v, v, 50) for v in (0.0, 1.0, 5.0)]  # nothing within: Student's
    student = stats.ttest_1samp([0.0, 1.0, 5.0], 0).confidence_interval()
    assert ends(statistics.over_encoders(exact)) == pytest.approx(tuple(student))
    assert ends(statistics.over_encoders(exact, 0, 5)) == (0, 5)
    alike = statistics.over_encoders([Estimate(1.0, 1.0, 1.0, 50)] * 3, 1, 5)  # 0 of 3 differ
    at_most = stats.binomtest(0, 3).proportion_ci(0.95, method="exact").high
    assert ends(alike) == (1, pytest.approx(1 + 4 * at_most))
    opened = statistics.over_encoders([one, Estimate(0.5, -np.inf, 0.6, 50)])
    assert opened.low == -np.inf and opened.high < 0.7
    # pairs share encoders: the mean of a_i + a_j over all pairs is 2 ā, whose variance is 4 s² / k
    a, pairs = np.array([0.1, -0.2, 0.4]), [(0, 1), (0, 2), (1, 2)]
    each = [Estimate(v, v, v, 50) for v in (a[i] + a[j] for i, j in pairs)]
    got = statistics.over_encoders(each, pairs=pairs)
    half = stats.t.ppf(0.975, 2) * np.sqrt(4 * a.var(ddof=1) / 3)
    assert [got.value, got.high - got.value] == pytest.approx([2 * a.mean(), half])


@pytest.mark.parametrize("between", [0.0, 1.0, 10.0])
def test_an_interval_over_three_encoders_covers_as_often_as_it_says(between: float) -> None:
    """Whichever is larger: the error over images, which they share, or that between trainings."""
    rng, runs = np.random.default_rng(5), 1000
    shared, own = rng.normal(0, 1, (runs, 1)), rng.normal(0, 1, (runs, 3))
    covered = 0
    for values in shared + between * own:
        each = [Estimate(v, v - 1.96, v + 1.96, 50) for v in values]
        covered += holds_zero(statistics.over_encoders(each))
    assert 0.91 <= covered / runs <= 0.98


def test_each_group_against_the_rest_over_encoders() -> None:
    rng, n = np.random.default_rng(0), 600
    sizes = rng.choice(["3-9", "10-19", "rare"], n, p=[0.6, 0.37, 0.03])
    groups = pd.DataFrame({"size": sizes, "side": rng.choice(["left", "right"], n)})
    flag = (groups["size"] == "10-19").to_numpy()
    ranks = rng.uniform(size=(3, n)) + 0.3 * flag
    table = group_differences(ranks, groups, 50, pd.DataFrame({"why": ranks.mean(0)}))
    assert list(table["group"]) == ["3-9", "10-19", "left", "right"]  # in order, no rare one
    row = largest(table)
    us = [stats.mannwhitneyu(r[flag], r[~flag]).statistic for r in ranks]
    effect = 2 * np.mean(us) / flag.sum() / (~flag).sum() - 1
    assert row["group"] == "10-19" and row["value"] == pytest.approx(effect)
    total = stats.rankdata(ranks, axis=1).sum(0)
    assert row["p"] == pytest.approx(stats.mannwhitneyu(total[flag], total[~flag]).pvalue)
    np.testing.assert_allclose(table["adjusted_p"], statistics.holm(table["p"].tolist()))
    left, right = table["value"][2:]  # two groups: what one gains the other loses
    assert left == pytest.approx(-right)
    assert abs(row["left"]) < 0.1 < row["value"]  # explained by what was given
    assert magnitude(Estimate(-0.3, -0.4, -0.1, 9)) == Estimate(0.3, 0.1, 0.4, 9)


# --- agreement of encoders


def twice(rng: np.random.Generator, truth: np.ndarray, size: float = 1.0) -> np.ndarray:
    """Two measurements (2, n) of a quantity."""
    return truth + size * rng.standard_normal((2, len(truth)))


def test_agreement_finds_what_the_errors_hide() -> None:
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((2, 4000))
    y = 0.6 * x + 0.8 * y  # r = 0.6 between the quantities themselves
    first, second = twice(rng, x), twice(rng, y, 1.5)
    got = Agreements.of([first, second]).between([0], [[1]])
    truth = 6 / np.pi * np.arcsin(0.6 / 2)
    assert stats.spearmanr(first[0], second[1]).statistic < 0.3
    assert got.low < truth < got.high and got.value == pytest.approx(truth, abs=0.06)
    exact = Agreements.of([np.stack([x, x]), np.stack([y, y])]).between([0], [[1]])
    assert exact.value == pytest.approx(stats.spearmanr(x, y).statistic)
    for pair in ([np.exp(first), second], [second, first], [first[::-1], second[::-1]]):
        assert Agreements.of(pair).between([0], [[1]]).value == pytest.approx(got.value)
    # an error that two encoders share is no agreement
    x, y, *noise = rng.standard_normal((4, 4000))
    seen = [v + np.stack(noise) for v in (x, y)]
    assert stats.spearmanr(seen[0][0], seen[1][0]).statistic > 0.4
    got = Agreements.of(seen).between([0], [[1]])
    assert got.low < 0 < got.high


def test_differences_of_agreements_are_paired_and_open_where_nothing_is_reliable() -> None:
    rng = np.random.default_rng(7)
    x, y, z = rng.standard_normal((3, 1500))
    a, b, c = (twice(rng, v, 0.5) for v in (x, x + 0.3 * y, z))
    found = Agreements.of([a, b, c, np.stack([x, -x])])  # the last contradicts itself
    want = found.value[0, 1] - found.value[0, 2]
    got = found.between([0], [[1]], [[2]])
    assert got.value == pytest.approx(want) and got.low > 0.7
    same = found.between([0], [[1]], [[1]])
    assert (same.value, *ends(same)) == pytest.approx((0, 0, 0), abs=1e-12)
    assert found.between([0], [[1, 2]], [[2]]).value == pytest.approx(want / 2)
    unreliable = found.between([3], [[0]])
    assert np.isnan(unreliable.value) and ends(unreliable) == (-np.inf, np.inf)


def test_the_jackknife_is_that_of_the_encoders() -> None:
    """Where an agreement is the sum of what two bring, θ = μ + 2 ā has the variance 4 s² / k."""
    bring = np.array([0.1, -0.2, 0.05, 0.15])
    exact = bring[:, None] + bring[None]
    found = Agreements(exact, np.broadcast_to(exact, (10, 4, 4)), 100)
    got = found.between([0, 1, 2, 3], [[0, 1, 2, 3]])
    half = stats.t.ppf(0.975, 3) * np.sqrt(4 * bring.var(ddof=1) / 4)
    assert [got.value, got.high - got.value] == pytest.approx([2 * bring.mean(), half])
    one = found.between([0], [[1]])  # one pair says nothing about other trainings
    assert one.low == one.value == one.high


def test_intervals_of_agreements_cover() -> None:
    """Three encoders of a method, six of others, two supervised; all sources of error vary."""
    rng, k, own, hits = np.random.default_rng(3), 11, 0.1, 0
    for _ in range(200):
        bring, pairs = rng.normal(0, own, k), rng.normal(0, 0.03, (k, k))
        truth = bring[:, None] + bring[None] + (pairs + pairs.T) / np.sqrt(2)
        errors = rng.normal(0, 0.02, (200, k, k))
        errors = (errors + errors.swapaxes(1, 2)) / np.sqrt(2)
        seen = truth + errors[0]
        found = Agreements(seen, seen + errors[1:], 1000)
        hits += holds_zero(found.between([0, 1, 2], [[3, 4, 5], [6, 7, 8]], [[9, 10]]))
    assert hits >= 0.92 * 200  # with two supervised ones rather too wide than too narrow


def test_pixel_features_by_hand() -> None:
    pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    pixels[0, :, 2:6, 2:6] = 255  # a black frame around a white square
    pixels[1] = torch.arange(8) * 30
    got = pixel_features(issl.Images(pixels, None, pd.DataFrame({"index": [5, 6]}), "two"))
    assert got["index"].tolist() == [5, 6] and got["uniform"].tolist() == [True, False]
    assert got["brightness"][0] == pytest.approx(0.25, abs=1e-5) and got["border_std"][0] == 0
    assert got["contrast"][0] == pytest.approx(np.sqrt(0.25 * 0.75), abs=1e-5)


# --- linear encoders: retraining here, derivatives in notebook 09


DRAWS = torch.randn(33, 5, generator=torch.Generator().manual_seed(0)).double()
START, DELTA = DRAWS[:3], DRAWS[3:]  # W₀ and δ


@pytest.mark.parametrize("out", [[], list(range(0, 30, 2))])
def test_without_points_is_training_without_them(out: list[int]) -> None:
    """To 1e-6 of what it changes."""
    weight = linear_theory.fit(START, DELTA, 0.1)
    retrained = linear_theory.retrained(START, DELTA, 0.1, out)
    error = linear_theory.fit_without(weight, DELTA, 0.1, out) - retrained
    assert float(error.norm()) <= 1e-6 * float((retrained - weight).norm()) + 1e-9


def test_influence_is_the_slope_of_the_loss_as_an_image_is_taken_out_of_the_mean() -> None:
    """d ℓ_q(W*(ε)) / dε at 0, where image i counts 1 − nε times, by central differences."""
    weight, i, eps = linear_theory.fit(START, DELTA, 0.1), 5, 1e-6
    cross = linear_theory.cross_influence(weight, DELTA, DELTA, 0.1)
    own = linear_theory.influence(weight, DELTA, 0.1)
    torch.testing.assert_close(cross.diagonal(), own, rtol=1e-12, atol=0)
    losses = []
    for sign in (1, -1):
        counts = torch.ones(30, dtype=torch.float64)
        counts[i] -= sign * 30 * eps
        # an image that counts c times is the image scaled by √c
        w = linear_theory.fit(START, DELTA * counts.sqrt()[:, None], 0.1)
        losses.append((DELTA @ w.T).square().sum(1) / 2)
    slope = (losses[0] - losses[1]) / (2 * eps)
    torch.testing.assert_close(slope, cross[:, i], rtol=1e-6, atol=1e-8)


DRAWN = np.random.default_rng(0)
TRUTH = DRAWN.normal(size=(20, 40))  # 20 queries, 40 subsets


def test_lds_is_the_mean_of_spearmans_by_query() -> None:
    predicted = TRUTH + DRAWN.normal(size=TRUTH.shape)
    want = np.mean([stats.spearmanr(p, y).statistic for p, y in zip(predicted, TRUTH, strict=True)])
    got = datamodeling.lds(predicted, TRUTH)
    assert got.value == pytest.approx(want) and got.low < got.value < got.high and got.n == 20
    assert datamodeling.lds(np.zeros_like(TRUTH), TRUTH).value == 0  # it predicts nothing
    noise = datamodeling.lds(DRAWN.normal(size=TRUTH.shape), TRUTH)
    assert noise.low < 0 < noise.high
    better = datamodeling.lds_difference(predicted, DRAWN.normal(size=TRUTH.shape), TRUTH)
    assert better.low > 0
    assert datamodeling.lds_difference(predicted, predicted, TRUTH).high == 0


def test_the_ceiling_is_what_the_truth_itself_reaches() -> None:
    """Repetitions are truth and noise: their mean goes with the truth up to the ceiling."""
    truth = np.random.default_rng(1).normal(size=(80, 150))
    runs = truth + 2 * np.random.default_rng(2).normal(size=(3, 80, 150))
    cap = datamodeling.ceiling(datamodeling.repeatability(runs), 3)
    assert datamodeling.lds(truth, runs.mean(0)).value == pytest.approx(cap.value, abs=0.02)


def test_one_image_left_out_is_measured_against_the_others() -> None:
    rng = np.random.default_rng(4)
    before, factor = rng.uniform(0.1, 1, 9), np.full(9, 1.1)
    factor[3] = 2.2  # all losses drift, one rises on top of that
    assert datamodeling.own_rise(before, before * factor, 3) == pytest.approx(np.log(2))
    angle = np.full(9, 0.01)
    angle[3] = 0.1
    at_first = np.stack([np.ones(9), np.zeros(9)], 1)
    turned = np.stack([np.cos(angle), np.sin(angle)], 1)
    got = datamodeling.own_move(torch.from_numpy(at_first), torch.from_numpy(turned), 3)
    assert got == pytest.approx(np.log((1 - np.cos(0.1)) / (1 - np.cos(0.01))))


def test_rankings_compare_the_first_score_with_its_rivals() -> None:
    rng = np.random.default_rng(6)
    truth = rng.normal(size=200)
    measured = truth + rng.normal(size=(3, 200))
    scores = {"ours": truth, "noise": rng.normal(size=200)}
    got = datamodeling.rankings(scores, measured)
    want = stats.spearmanr(truth, measured.mean(0)).statistic
    assert got["spearman"].value == pytest.approx(want) and got["less_noise"].low > 0
    assert got["spearman"].value == pytest.approx(got["ceiling"].value, abs=0.05)


def test_a_tidy_table_of_trainings_becomes_runs_in_the_order_of_its_queries() -> None:
    runs = DRAWN.uniform(0.1, 1, size=(2, 3, 4))  # seeds, queries, subsets
    rows = [(s, k, runs[s, q, k]) for s in range(2) for k in range(4) for q in range(3)]
    table = pd.DataFrame(rows, columns=["seed", "subset", "stability_loss"])
    want = np.log(runs) - np.log(runs).mean(1, keepdims=True)
    np.testing.assert_allclose(datamodeling.retrained_losses(table), want)
    kept = datamodeling.kept([[0, 2], [1]], 3)
    assert kept.tolist() == [[False, True, False], [True, False, True]]
    scores = np.array([[1.0, 2.0, 4.0]])  # of one query; what has influence on it lowers its loss
    assert datamodeling.predicted_losses(scores, kept).tolist() == [[-2.0, -5.0]]


def test_what_statistics_explain_is_least_squares() -> None:
    images, rng = issl.load("scenes", n=400), np.random.default_rng(0)
    pixels = pd.concat([pixel_features(images), texture(images)], axis=1)
    forward = {"feature_norm": range(400), "knn_distance": range(400)}
    whole = explained_variance.table(pixels, pd.DataFrame(forward), np.arange(400))
    table = whole[list(explained_variance.PIXELS)]
    assert (table["background flatness"] == -pixels["border_std"]).all()
    normal = explained_variance.normal_scores
    score = np.exp(normal(table["contrast"].to_numpy()) + 0.5 * rng.normal(size=400))
    got = explained_variance.explained(score, table)
    x, y = normal(table.to_numpy()), normal(score)

    def adjusted(columns: list[int]) -> float:
        design = np.column_stack([np.ones(400), x[:, columns]])
        left = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
        return 1 - left.var() / y.var() * 399 / (399 - len(columns))

    every = list(range(5))
    assert got["all"].value == pytest.approx(adjusted(every))
    for j, name in enumerate(table):
        without = adjusted([k for k in every if k != j])
        assert got[name].value == pytest.approx(adjusted(every) - without)
    # trees find a bent relation that a line does not, and nothing in noise
    brightness = table["brightness"].to_numpy()
    bent = np.abs(brightness - np.median(brightness))
    by_line = explained_variance.explained(bent, table)["all"]
    assert explained_variance.explained_by_trees(bent, table).low > by_line.high
    assert explained_variance.explained_by_trees(rng.normal(size=400), table).low < 0


@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_what_statistics_leave_counts_only_where_a_second_noise_finds_it(hidden: float) -> None:
    """Half of the variance is known and half is noise; or a third each, and a third is hidden."""
    rng = np.random.default_rng(3)
    known, other, *noise = rng.normal(size=(4, 3000))
    scores = known + hidden * other + np.stack(noise)
    found = explained_variance.repeatable_beyond(scores, [pd.DataFrame({"known": known})] * 2)
    assert found.value == pytest.approx(hidden / 3, abs=0.05)
    assert found.low > 0.25 if hidden else found.low < 0 < found.high
