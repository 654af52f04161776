"""The agreement of encoders: what noise hides, what shared noise must not add, and how often the
intervals cover."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

import issl
from issl.audit.stats.encoder_agreement import Agreements


def twice(truth: np.ndarray, noise: np.ndarray, size: float = 1.0) -> np.ndarray:
    """Two measurements (2, n) of a quantity with these errors (2, n)."""
    return truth + size * noise


def test_it_finds_what_the_errors_hide() -> None:
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((2, 4000))
    y = 0.6 * x + 0.8 * y  # r = 0.6 between the quantities themselves
    truth = 6 / np.pi * np.arcsin(0.6 / 2)
    first, second = (
        twice(x, rng.standard_normal((2, 4000))),
        twice(y, rng.standard_normal((2, 4000)), 1.5),
    )
    got = Agreements.of([first, second]).between([0], [[1]])
    raw = stats.spearmanr(first[0], second[1]).statistic
    assert raw < 0.3 and got.low < truth < got.high and got.value == pytest.approx(truth, abs=0.06)
    # without errors nothing changes; the scale of a score does not matter; the order of the two
    # does not either
    exact = Agreements.of([np.stack([x, x]), np.stack([y, y])]).between([0], [[1]])
    assert exact.value == pytest.approx(stats.spearmanr(x, y).statistic)
    for pair in ([np.exp(first), second], [second, first], [first[::-1], second[::-1]]):
        assert Agreements.of(pair).between([0], [[1]]).value == pytest.approx(got.value)


def test_an_error_that_two_encoders_share_is_no_agreement() -> None:
    rng = np.random.default_rng(6)
    x, y, noise = (
        rng.standard_normal(4000),
        rng.standard_normal(4000),
        rng.standard_normal((2, 4000)),
    )
    assert stats.spearmanr(*(twice(v, noise)[0] for v in (x, y))).statistic > 0.4
    got = Agreements.of([twice(x, noise), twice(y, noise)]).between([0], [[1]])
    assert got.low < 0 < got.high


def test_differences_are_paired_over_images_and_open_where_nothing_is_reliable() -> None:
    rng = np.random.default_rng(7)
    x, y, z = rng.standard_normal((3, 1500))
    a, b, c = (twice(v, rng.standard_normal((2, 1500)), 0.5) for v in (x, x + 0.3 * y, z))
    alike = np.stack([x, -x])  # two measurements that contradict each other
    found = Agreements.of([a, b, c, alike])
    want = found.value[0, 1] - found.value[0, 2]
    got = found.between([0], [[1]], [[2]])
    assert got.value == pytest.approx(want) and got.low > 0.7
    same = found.between([0], [[1]], [[1]])
    assert [same.value, same.low, same.high] == pytest.approx([0, 0, 0], abs=1e-12)
    assert found.between([0], [[1, 2]], [[2]]).value == pytest.approx(want / 2)
    unreliable = found.between([3], [[0]])
    assert np.isnan(unreliable.value) and (unreliable.low, unreliable.high) == (-np.inf, np.inf)
    with pytest.raises(issl.IsslError, match="has no pair"):
        found.between([0], [[0]])
    with pytest.raises(issl.IsslError, match=r"need \(2, n\) each"):
        Agreements.of([np.stack([x, x, x]), a])
    with pytest.raises(issl.IsslError, match=r"\(2, 1499\)"):
        Agreements.of([a, b[:, 1:]])


def test_the_jackknife_is_that_of_the_encoders() -> None:
    """Where an agreement is the sum of what two encoders bring, θ = μ + 2 ā has the variance 4 s² /
    k."""
    bring = np.array([0.1, -0.2, 0.05, 0.15])
    exact = bring[:, None] + bring[None]
    got = Agreements(exact, np.broadcast_to(exact, (10, 4, 4)), 100).between(
        [0, 1, 2, 3], [[0, 1, 2, 3]]
    )
    half = stats.t.ppf(0.975, 3) * np.sqrt(4 * bring.var(ddof=1) / 4)
    assert [got.value, got.high - got.value] == pytest.approx([2 * bring.mean(), half])
    with_one = Agreements(exact, np.broadcast_to(exact, (10, 4, 4)), 100).between([0], [[1]])
    assert (
        with_one.low == with_one.value == with_one.high
    )  # one pair says nothing about other trainings


@pytest.mark.parametrize("own", [0.0, 0.1])
def test_intervals_cover(own: float) -> None:
    """Three encoders of a method, six of others and two supervised; encoders, pairs and images all
    vary."""
    rng, k, hits = np.random.default_rng(3), 11, 0
    one, others, supervised = [0, 1, 2], [[3, 4, 5], [6, 7, 8]], [9, 10]
    for _ in range(200):
        bring, pairs = rng.normal(0, own, k), rng.normal(0, 0.03, (k, k))
        truth = bring[:, None] + bring[None] + (pairs + pairs.T) / np.sqrt(2)
        errors = rng.normal(0, 0.02, (200, k, k))
        errors = (errors + errors.swapaxes(1, 2)) / np.sqrt(2)
        seen = truth + errors[0]
        got = Agreements(seen, seen + errors[1:], 1000).between(one, others, [supervised])
        hits += got.low <= 0 <= got.high
    assert hits >= 0.92 * 200  # with two supervised ones rather too wide than too narrow
