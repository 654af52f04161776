"""The audit's numbers on planted truths, the claim rules, and the figures' files."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import issl
from issl.audit import claims, figures
from issl.audit.stats import statistics
from issl.audit.stats.pixel_features import pixel_features
from issl.audit.stats.statistics import Estimate

RNG = np.random.default_rng(0)
FLAG = RNG.random(2000) < 0.2


def test_a_shuffled_score_finds_nothing_and_a_planted_one_all() -> None:
    noise, planted = RNG.random(2000), FLAG + 0.01 * RNG.random(2000)
    for share in (0.01, 0.05):
        e = statistics.enrichment(noise, FLAG, share)
        assert e.low < 1 < e.high
        e = statistics.enrichment(planted, FLAG, share)
        rest = FLAG[~statistics.top(planted, share)].mean()
        assert e.value == pytest.approx(1 / rest) and e.low > 3
    e = statistics.auc(noise, FLAG)
    assert e.low < 0.5 < e.high and e.high - e.low < 0.1
    assert statistics.auc(planted, FLAG).value == 1.0


def test_intervals_cover() -> None:
    """Of 100 draws under no relation, about 95 intervals hold the true value."""
    rng, hits = np.random.default_rng(1), 0
    for _ in range(100):
        x, given_ = rng.normal(size=(2, 200)), pd.DataFrame({"c": rng.normal(size=200)})
        e = statistics.partial_spearman(x[0], x[1], given_)
        hits += e.low < 0 < e.high
    assert 88 <= hits <= 100


def test_partial_correlation_removes_a_common_cause() -> None:
    rng = np.random.default_rng(2)
    cause = rng.normal(size=3000)
    a, b = cause + rng.normal(size=3000), cause + rng.normal(size=3000)
    assert np.corrcoef(a, b)[0, 1] > 0.4
    e = statistics.partial_spearman(a, b, pd.DataFrame({"cause": cause}))
    assert abs(e.value) < 0.06
    # without controls it is Spearman's own
    from scipy.stats import spearmanr

    assert statistics.partial_spearman(
        a, b, pd.DataFrame(index=range(3000))
    ).value == pytest.approx(spearmanr(a, b).statistic)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 10))
def test_ranks_alone_matter(seed: int, power: float) -> None:
    rng = np.random.default_rng(seed)
    score, order = rng.random(300) + 0.1, rng.permutation(300)
    flag = rng.random(300) < 0.5
    assert statistics.enrichment(score, flag, 0.05) == statistics.enrichment(
        score[order] ** power, flag[order], 0.05
    )


def test_uniform_frames_are_found_where_the_truth_is_known() -> None:
    images = issl.load("scenes", n=1500)
    plain = (images.attributes["atypical"] == "").to_numpy()
    truth = images.attributes["uniform"].to_numpy()[plain]
    judged = pixel_features(images)[plain]
    assert statistics.auc(-judged["border_std"].to_numpy(), truth).low > 0.9
    assert judged["uniform"][~truth].mean() < 0.02


def test_image_statistics_by_hand() -> None:
    pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    pixels[0, :, 2:6, 2:6] = 255  # a black frame around a white square
    pixels[1] = torch.arange(8) * 30
    got = pixel_features(issl.Images(pixels, None, pd.DataFrame({"index": [5, 6]}), "two"))
    assert got["index"].tolist() == [5, 6] and got["uniform"].tolist() == [True, False]
    assert got["brightness"][0] == pytest.approx(0.25, abs=1e-5) and got["border_std"][0] == 0
    assert got["contrast"][0] == pytest.approx(np.sqrt(0.25 * 0.75), abs=1e-5)


def test_enrichment_without_events_is_open_ended() -> None:
    score, flag = np.arange(100.0), np.arange(100) < 50
    e = statistics.enrichment(score, flag, 0.05)
    assert (e.value, e.low, e.high) == (0, 0, np.inf) and e.as_dict()["high"] is None
    e = statistics.enrichment(-score, np.arange(100) < 3, 0.05)
    assert e.value == np.inf and e.low == 0 and e.as_dict()["value"] is None


def test_nothing_to_compare_is_said() -> None:
    with pytest.raises(issl.IsslError, match="true of none of 5"):
        statistics.auc(np.arange(5.0), np.zeros(5, bool))
    with pytest.raises(issl.IsslError, match=r"share=1\.5"):
        statistics.top(np.arange(5), 1.5)


LEARNED = {"knn": 0.7, "untrained": 0.24, "encoders": 3}


def estimates(low: float) -> dict[str, Estimate]:
    return {
        m: Estimate(low + 0.1, low, low + 0.2, 9)
        for m in ("enrichment_top1", "enrichment_top5", "auc", "partial_correlation")
    }


@pytest.mark.parametrize(
    ("low", "profile", "outcome", "verdict"),
    [
        (1.5, "overnight", "reproduced", "reproduced"),
        (0.7, "overnight", "partly", "partly"),
        (-0.5, "paper", "contradicted", "contradicted"),
        (1.5, "mini", "reproduced", claims.UNTESTED),
        (1.5, "quick", "reproduced", claims.UNTESTED),
    ],
)
def test_verdicts(low: float, profile: str, outcome: str, verdict: str) -> None:
    metrics = {m: estimates(low)["auc"] for m in ("cross_class_difference_of_degree",)}
    metrics["betweenness_log_ratio_of_degree"] = Estimate(low - 0.6, low - 0.7, low - 0.5, 9)
    got = claims.judge("semantic_bridges_of_degree", metrics, profile, "cifar10", LEARNED)
    assert (got["outcome"], got["verdict"]) == (outcome, verdict)


@pytest.mark.parametrize(
    ("dataset", "changed", "enough"),
    [
        ("cifar10", {}, True),
        ("cifar10", {"knn": 0.64}, False),
        ("cifar10", {"encoders": 2}, False),
        ("fairface", {"knn": 0.3}, True),
        ("fairface", {"knn": 0.26}, False),
        ("cifar100", {"knn": 0.36}, True),
    ],
)
def test_a_verdict_needs_encoders_that_have_learned(
    dataset: str, changed: dict[str, float], enough: bool
) -> None:
    r = Estimate(0.95, 0.94, 0.96, 9)
    got = claims.judge(
        "noise_seed_correlation", {"pearson": r}, "overnight", dataset, LEARNED | changed
    )
    assert got["outcome"] == "reproduced"
    assert got["verdict"] == ("reproduced" if enough else claims.UNTESTED)


def test_claims_about_encoders_ask_what_they_learned_and_checks_of_the_code_do_not() -> None:
    r = Estimate(0.95, 0.94, 0.96, 9)
    with pytest.raises(issl.IsslError, match="say what they learned"):
        claims.judge("noise_seed_correlation", {"pearson": r}, "quick", "cifar10")
    with pytest.raises(issl.IsslError, match="no rule for what its encoders"):
        claims.judge("noise_seed_correlation", {"pearson": r}, "paper", "folder:x", LEARNED)
    exact = {"relative_difference": Estimate(1e-9, 1e-9, 1e-9, 9)}
    assert claims.judge("method_exact", exact, "quick", "scenes")["verdict"] == claims.PASSED
    wrong = {"relative_difference": Estimate(1.0, 1.0, 1.0, 9)}
    assert claims.judge("method_exact", wrong, "quick", "scenes")["verdict"] == claims.FAILED


def test_over_encoders_holds_both_sources_of_error() -> None:
    def half(e: Estimate) -> float:
        return (e.high - e.low) / 2

    one = Estimate(0.5, 0.4, 0.6, 50)
    assert statistics.over_encoders([one]) == one
    same = statistics.over_encoders(
        [one] * 4
    )  # nothing between encoders: what is left is the images' error
    assert same.value == 0.5 and half(same) == pytest.approx(0.1, rel=0.05)
    exact = [Estimate(v, v, v, 50) for v in (0.0, 1.0, 5.0)]  # nothing within: Student's
    student = stats.ttest_1samp([0.0, 1.0, 5.0], 0).confidence_interval()
    over = statistics.over_encoders(exact)
    assert (over.low, over.high) == pytest.approx((student.low, student.high))
    rng = np.random.default_rng(0)
    many = [Estimate(v, v - 0.196, v + 0.196, 50) for v in rng.normal(0, 0.3, 60)]
    both = np.sqrt(0.1**2 + np.std([e.value for e in many]) ** 2 / 60)
    assert half(statistics.over_encoders(many)) == pytest.approx(1.96 * both, rel=0.06)
    far = [Estimate(v, v, v, 50) for v in (0.0, 0.5, 1.0)]
    assert (statistics.over_encoders(far, 0, 1).low, statistics.over_encoders(far, 0, 1).high) == (
        0,
        1,
    )
    assert statistics.over_encoders(far).low < 0
    opened = statistics.over_encoders([one, Estimate(0.5, -np.inf, 0.6, 50)])
    assert opened.low == -np.inf and opened.high < 0.7
    with pytest.raises(issl.IsslError, match="no encoder was measured"):
        statistics.over_encoders([])


@pytest.mark.parametrize("between", [0.0, 0.3, 1.0, 10.0])
def test_an_interval_over_three_encoders_covers_as_often_as_it_says(between: float) -> None:
    """Whichever is larger: the error over images, which the encoders share, or the spread between
    trainings."""
    rng, runs = np.random.default_rng(5), 1000
    shared, own = rng.normal(0, 1, (runs, 1)), rng.normal(0, 1, (runs, 3))
    covered = 0
    for values in shared + between * own:
        e = statistics.over_encoders([Estimate(v, v - 1.96, v + 1.96, 50) for v in values])
        covered += e.low <= 0 <= e.high
    assert 0.91 <= covered / runs <= 0.98


@pytest.mark.parametrize(
    ("low", "high", "ceiling", "state"),
    [
        (0.1, 0.3, 0.6, "holds"),
        (-0.1, 0.2, 0.6, "undecided"),
        (-0.3, -0.1, 0.6, "contradicted"),
        (-0.3, -0.1, 0.2, "undecided"),
        (0.1, 0.3, 0.2, "holds"),
        (np.nan, np.nan, 0.6, "undecided"),
    ],
)
def test_a_test_is_contradicted_only_where_it_could_have_held(
    low: float, high: float, ceiling: float, state: str
) -> None:
    needs = claims.Condition(metric="ceiling", bound="value", above=0.3)
    above = claims.Condition(metric="rho", bound="low", above=0.0, needs=needs)
    metrics = {
        "rho": Estimate((low + high) / 2, low, high, 9),
        "ceiling": Estimate(ceiling, 0.0, 1.0, 9),
    }
    assert above.state(metrics) == state
    below = claims.Condition(metric="rho", bound="high", below=0.0, needs=needs)
    assert below.state(metrics | {"rho": Estimate(-(low + high) / 2, -high, -low, 9)}) == state
    exact = claims.Condition(metric="rho", bound="value", above=0.0)
    assert exact.state({"rho": Estimate(-1.0, -1.0, -1.0, 1)}) == "contradicted"
    p = claims.Condition(metric="p", bound="value", below=0.05, p_value=True)
    states = [p.state({"p": Estimate(value, value, value, 1)}) for value in (0.01, 0.3)]
    assert states == ["holds", "undecided"]
    with pytest.raises(issl.IsslError, match="'ceiling' was not measured"):
        above.state({"rho": metrics["rho"]})


def test_outcomes() -> None:
    assert (
        claims.outcome(["holds", "holds"]) == "reproduced"
        and claims.outcome(["undecided", "holds"]) == "partly"
    )
    assert claims.outcome(["undecided", "contradicted"]) == "contradicted"
    assert claims.outcome(["undecided", "undecided"]) == "undecided"


def test_a_record_says_where_it_comes_from(tmp_path: Path) -> None:
    source = claims.provenance("mini", {"n": 9}, torch.device("cpu"), ["influence/1"])
    claims.record(
        "uniform_backgrounds",
        estimates(1.5),
        source,
        tmp_path,
        dataset="scenes",
        learned=LEARNED,
        method="simclr",
        n=9,
        seeds=[0],
    )
    written = json.loads((tmp_path / "claim_uniform_backgrounds.json").read_text())
    assert {
        "claim",
        "paper",
        "dataset",
        "method",
        "n",
        "seeds",
        "metrics",
        "verdict",
        "tests",
    } <= set(written)
    assert {"profile", "commit", "hardware", "torch", "parameters"} <= set(written["provenance"])
    with pytest.raises(issl.IsslError, match="claim 'nothing'"):
        claims.judge("nothing", {}, "mini", "cifar10")
    with pytest.raises(issl.IsslError, match="'auc' was not measured"):
        claims.judge(
            "uniform_backgrounds",
            {k: v for k, v in estimates(1.0).items() if k != "auc"},
            "mini",
            "cifar10",
            LEARNED,
        )


def test_every_claim_names_a_notebook_and_its_profiles() -> None:
    from issl.audit.plans import PLANS
    from issl.audit.profiles import profiles

    for entry in claims.claims().values():
        assert entry.notebook in PLANS and set(entry.profiles) <= set(profiles())


def test_figures_come_with_their_numbers(tmp_path: Path) -> None:
    figures.style()
    images = issl.load("scenes", n=10)
    fig, ax = plt.subplots()
    figures.gallery(ax, images, "ten", columns=4, frames=[True] + [False] * 9)
    paths = figures.save(fig, "f", pd.DataFrame({"a": [1]}), tmp_path, {"profile": "quick"})
    plt.close(fig)
    assert [p.suffix for p in paths] == [".png", ".pdf", ".csv", ".json"] and all(
        p.stat().st_size for p in paths
    )
    assert len(list(tmp_path.iterdir())) == 4  # nothing half-written beside them
