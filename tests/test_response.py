"""Correlations with retraining, against their definitions and on predictions of known worth."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import issl
from issl.audit.stats import datamodeling, explained_variance
from issl.audit.stats.pixel_features import pixel_features, texture

RNG = np.random.default_rng(0)
TRUTH = RNG.normal(size=(20, 40))  # 20 queries, 40 subsets


def test_lds_is_the_mean_of_spearmans_by_query() -> None:
    predicted = TRUTH + RNG.normal(size=TRUTH.shape)
    want = np.mean([stats.spearmanr(p, y).statistic for p, y in zip(predicted, TRUTH, strict=True)])
    got = datamodeling.lds(predicted, TRUTH)
    assert got.value == pytest.approx(want) and got.low < got.value < got.high and got.n == 20
    assert datamodeling.lds(np.zeros_like(TRUTH), TRUTH).value == 0  # it predicts nothing
    noise = datamodeling.lds(RNG.normal(size=TRUTH.shape), TRUTH)
    assert noise.low < 0 < noise.high
    better = datamodeling.lds_difference(predicted, RNG.normal(size=TRUTH.shape), TRUTH)
    assert better.low > 0
    assert datamodeling.lds_difference(predicted, predicted, TRUTH).high == 0


@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_the_ceiling_is_what_the_truth_itself_reaches(noise: float) -> None:
    """Repetitions are truth and noise: their mean goes with the truth up to the ceiling."""
    truth = np.random.default_rng(1).normal(size=(80, 150))
    runs = truth + noise * np.random.default_rng(2).normal(size=(3, 80, 150))
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
    runs = RNG.uniform(0.1, 1, size=(2, 3, 4))  # seeds, queries, subsets
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
    with pytest.raises(issl.IsslError, match="20 images"):
        explained_variance.explained(score[:20], table[:20])


@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_what_statistics_leave_counts_only_where_a_second_noise_finds_it(hidden: float) -> None:
    """Half of the variance is known and half is noise; or a third each, and a third is hidden."""
    rng = np.random.default_rng(3)
    known, other, *noise = rng.normal(size=(4, 3000))
    scores = known + hidden * other + np.stack(noise)
    found = explained_variance.repeatable_beyond(scores, [pd.DataFrame({"known": known})] * 2)
    assert found.value == pytest.approx(hidden / 3, abs=0.05)
    assert found.low > 0.25 if hidden else found.low < 0 < found.high
