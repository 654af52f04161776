"""Does a score predict what training on other images changes?

Linear datamodeling score (LDS; Ilyas et al. 2022, arXiv 2202.00622; Park et al. 2023, arXiv
2303.14186, §2): encoders are trained on random subsets S_1 … S_m; the sum of a query's scores over
the images in S_k predicts its loss, and

    LDS = mean over queries q of Spearman_k( prediction_q(S_k), measured_q(S_k) )

Repeating a training under another seed gives another measurement, so no prediction can reach 1
(`ceiling`). Intervals are percentiles of a bootstrap that resamples queries and subsets together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy  # its parts are imported when they are first used
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from issl.audit.stats.resampling import RESAMPLES, pearson
from issl.audit.stats.statistics import (
    Estimate,
    agreement,
    correlation,
    correlation_difference,
    mean,
    percentiles,
)

Table = Float[np.ndarray, "q m"]  # a number for each query and subset
Runs = Float[np.ndarray, "s q m"]  # one encoder's measurements, repeated
BLOCK = 100  # resamples at a time: ten times as fast as one by one, in a tenth of all their memory


def predicted_losses(scores: Float[np.ndarray, "q n"], kept: Bool[np.ndarray, "m n"]) -> Table:
    """−Σ_{i∈S_k} influence(i → q): each query's loss after each training, up to offset and scale.

    Positive influence makes a query more stable: the more a subset has of it, the lower the loss.
    """
    return -np.asarray(scores, float) @ np.asarray(kept, float).T


def lds(predicted: Table, measured: Table) -> Estimate:
    """The mean over queries of the rank correlation over subsets, in [−1, 1].

    A query whose values do not vary counts as 0. The bootstrap resamples queries and subsets.
    """
    return _two_way([predicted, measured], _spearman)


def lds_difference(predicted: Table, other: Table, measured: Table) -> Estimate:
    """The LDS of one prediction minus that of another, on the same queries and subsets."""

    def statistic(p: np.ndarray, o: np.ndarray, y: np.ndarray) -> np.ndarray:
        return _spearman(p, y) - _spearman(o, y)

    return _two_way([predicted, other, measured], statistic)


def repeatability(measured: Runs) -> Estimate:
    """The same correlation between any two of s ≥ 2 repetitions, mean over all pairs."""

    def statistic(*runs: np.ndarray) -> np.ndarray:
        return np.mean([_spearman(a, b) for a, b in itertools.combinations(runs, 2)], axis=0)

    return _two_way(list(measured), statistic)


def ceiling(between: Estimate, repetitions: int) -> Estimate:
    """The greatest correlation of any prediction with the mean of s repetitions.

    √(s r / (1 + (s − 1) r)), where r is the correlation of two repetitions; 0 where r ≤ 0
    (Spearman 1910, Brown 1910).
    """
    r = np.clip([between.value, between.low, between.high], 0, 1)
    value, low, high = np.sqrt(repetitions * r / (1 + (repetitions - 1) * r)).tolist()
    return Estimate(value, low, high, between.n)


def _spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """ρ along the last axis; 0 where one of the two does not vary."""
    return np.asarray(
        pearson(scipy.stats.rankdata(a, axis=-1), scipy.stats.rankdata(b, axis=-1), -1)
    )


def _two_way(tables: Sequence[Table], statistic: Callable[..., np.ndarray]) -> Estimate:
    """The mean over queries of a statistic; the bootstrap resamples queries and subsets."""
    tables = [np.asarray(t, float) for t in tables]
    (q, m), rng = tables[0].shape, np.random.default_rng(0)
    drawn = [(rng.integers(0, q, q), rng.integers(0, m, m)) for _ in range(RESAMPLES)]
    found = []
    for start in range(0, RESAMPLES, BLOCK):
        rows, columns = (np.stack(at) for at in zip(*drawn[start : start + BLOCK], strict=True))
        resampled = (t[rows[:, :, None], columns[:, None, :]] for t in tables)
        found.append(statistic(*resampled).mean(-1))
    return percentiles(statistic(*tables).mean(), np.concatenate(found), q)


def log_loss(losses: Any) -> np.ndarray:
    """Logarithms of stability losses, floored at 1e-8: if a view changes nothing, the loss is 0."""
    return np.log(np.maximum(np.asarray(losses, float), 1e-8))


def centred(values: Float[np.ndarray, "*s q m"]) -> Float[np.ndarray, "*s q m"]:
    """Values minus their mean over queries. One training can be more stable than another as a
    whole, and no single image causes that."""
    return values - values.mean(-2, keepdims=True)


def retrained_losses(table: pd.DataFrame) -> Runs:
    """The queries' log stability losses after each training, centred.

    Args:
        table: columns seed, subset and stability_loss; for each training a row per query, always
            in the same order.
    """
    runs = [
        np.stack([log_loss(one["stability_loss"]) for _, one in run.groupby("subset")], 1)
        for _, run in table.groupby("seed")
    ]
    return centred(np.stack(runs))


def changes_without(asked: pd.DataFrame) -> Table:
    """The measured value of each query after training without each subset, minus its value after
    training on all images.

    Args:
        asked: columns subset (-1: all images), query and value.
    """
    values = asked.pivot_table("value", "query", "subset")
    return values.drop(columns=-1).sub(values[-1], axis=0).to_numpy()


def predicted_changes(
    derivatives: Float[np.ndarray, "q n"], left_out: Iterable[Sequence[int]]
) -> Table:
    """−Σ_{i∈S_k} ∂m_q/∂w_i for each left-out subset S_k: the first-order change of m_q."""
    derivatives = np.asarray(derivatives, float)
    return np.stack([-derivatives[:, places].sum(1) for places in left_out], 1)


def kept(left_out: Iterable[Sequence[int]], n: int) -> Bool[np.ndarray, "m n"]:
    """Which of n images are in each subset, given the positions that it leaves out."""
    return np.stack([~np.isin(np.arange(n), places) for places in left_out])


def own_rise(before: Any, after: Any, at: int) -> float:
    """The rise of the log loss of image `at`, minus the mean rise of the other images, because a
    whole run can drift.

    Args:
        before: stability losses of all images after training on all of them.
        after: the same without image `at`.
    """
    rise = log_loss(after) - log_loss(before)
    return float(rise[at] - np.delete(rise, at).mean())


def own_move(before: Float[Tensor, "n d"], after: Float[Tensor, "n d"], at: int) -> float:
    """How far the features of image `at` move: the log ratio of their cosine distance to the
    median image's. Features are given before and after, as the losses in `own_rise`."""
    moved = 1 - torch.cosine_similarity(before, after).numpy()
    return float(np.log(max(moved[at], 1e-12) / max(np.median(moved), 1e-12)))


def query_changes(
    before: Float[Tensor, "q d"], after: Float[Tensor, "q d"], losses: Any, losses_after: Any
) -> pd.DataFrame:
    """How queries change in a training without some images, compared with training on all.

    Args:
        before: features after training on all images.
        after: features after training without some.
        losses: stability losses after training on all, `losses_after` after training without some.

    Returns:
        Columns moved (log cosine distance between a query's features) and rise (of its log loss,
        minus the mean over queries).
    """
    a, b = (torch.nn.functional.normalize(f.double(), dim=1) for f in (after, before))
    moved = (1 - (a * b).sum(1)).clamp(min=1e-12).log().numpy()
    now, then = (log_loss(values) for values in (losses_after, losses))
    return pd.DataFrame({"moved": moved, "rise": (now - now.mean()) - (then - then.mean())})


def rankings(
    scores: Mapping[str, np.ndarray], measured: Float[np.ndarray, "s n"]
) -> dict[str, Estimate]:
    """How well scores of images rank what was measured for them under several seeds.

    Args:
        scores: by name, ours first, then its rivals.
        measured: a row for each seed.

    Returns:
        "spearman", our correlation with the mean over seeds; for each rival "spearman_RIVAL", its
        correlation, and "less_RIVAL", ours minus that; "seeds_agree" and the "ceiling" that it
        sets; "mean_change", the mean over all images.
    """
    (ours, *rivals), truth = scores, measured.mean(0)
    agree = agreement(measured, "spearman")
    found = {"ceiling": ceiling(agree, len(measured)), "seeds_agree": agree}
    found |= {"mean_change": mean(truth), "spearman": correlation(scores[ours], truth, "spearman")}
    for name in rivals:
        found[f"spearman_{name}"] = correlation(scores[name], truth, "spearman")
        found[f"less_{name}"] = correlation_difference(scores[ours], scores[name], truth)
    return found
