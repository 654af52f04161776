"""Differences between groups: the effect and p of one group, over encoders, and groups that are too
small."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import issl
from issl.audit.stats import statistics
from issl.audit.stats.group_differences import group_differences, largest, magnitude
from issl.audit.stats.statistics import Estimate

RNG = np.random.default_rng(0)
N = 600
GROUPS = pd.DataFrame(
    {
        "size": RNG.choice(["3-9", "10-19", "rare"], N, p=[0.6, 0.37, 0.03]),
        "side": RNG.choice(["left", "right"], N),
    }
)
RANKS = RNG.uniform(size=(3, N)) + 0.3 * (GROUPS["size"] == "10-19").to_numpy()


def test_each_group_against_the_rest_over_encoders() -> None:
    table = group_differences(RANKS, GROUPS, 50).set_index("group")
    assert list(table.index) == ["3-9", "10-19", "left", "right"]  # in order, without the rare one
    flag = (GROUPS["size"] == "10-19").to_numpy()
    row = table.loc["10-19"]
    each = [
        2 * stats.mannwhitneyu(r[flag], r[~flag]).statistic / flag.sum() / (~flag).sum() - 1
        for r in RANKS
    ]
    assert row["effect"].value == pytest.approx(np.mean(each)) and row["images"] == flag.sum()
    total = stats.rankdata(RANKS, axis=1).sum(0)
    assert row["p"] == pytest.approx(
        stats.mannwhitneyu(total[flag], total[~flag], method="asymptotic").pvalue
    )
    np.testing.assert_allclose(table["adjusted_p"], statistics.holm(table["p"].tolist()))
    # two groups: what one gains the other loses
    assert table.loc["left", "effect"].value == pytest.approx(-table.loc["right", "effect"].value)
    assert largest(table.reset_index())["group"] == "10-19"


def test_ranks_alone_count_and_what_explains_a_group_leaves_nothing() -> None:
    one = group_differences(RANKS[:1], GROUPS, 50)
    assert one.equals(group_differences(np.exp(RANKS[:1]), GROUPS, 50))
    table = group_differences(RANKS, GROUPS, 50, pd.DataFrame({"why": RANKS.mean(0)})).set_index(
        "group"
    )
    assert abs(table.loc["10-19", "left"].value) < 0.1 < table.loc["10-19", "effect"].value


def test_groups_that_are_all_too_small_are_said() -> None:
    with pytest.raises(issl.IsslError, match=r"no group has 400 images or more.*set smallest"):
        group_differences(RANKS, GROUPS, 400)


def test_magnitude_keeps_the_interval_around_it() -> None:
    assert magnitude(Estimate(-0.3, -0.4, -0.1, 9)) == Estimate(0.3, 0.1, 0.4, 9)
    assert magnitude(Estimate(0.3, 0.1, 0.4, 9)) == Estimate(0.3, 0.1, 0.4, 9)
