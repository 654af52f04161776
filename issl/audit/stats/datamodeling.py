"""Does a score predict what training on other images changes?

Linear datamodeling score (LDS; Ilyas et al. 2022, arXiv 2202.00622; Park et al. 2023, arXiv
2303.14186, §2): encoders are trained on random subsets S_1 … S_m; the sum of a query's scores over
the images in S_k predicts its loss, and

    LDS = mean over queries q of Spearman_k( prediction_q(S_k), measured_q(S_k) )

A training that is repeated under other seeds gives another measurement, so no prediction can reach
1 (`ceiling`). Intervals are percentiles of a bootstrap of everything that was drawn, at once.
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
from issl.errors import IsslError

Table = Float[np.ndarray, "q m"]  # a number for each query and subset
Runs = Float[np.ndarray, "s q m"]  # one encoder's measurements, repeated


def predicted_losses(scores: Float[np.ndarray, "q n"], kept: Bool[np.ndarray, "m n"]) -> Table:
    """−Σ_{i∈S_k} influence(i → q): each query's loss after each training, up to level and unit.

    Positive influence makes a query more stable: the more of it in a subset, the lower the loss.
    """
    return -np.asarray(scores, float) @ np.asarray(kept, float).T


def lds(predicted: Table, measured: Table) -> Estimate:
    """The mean over queries of the rank correlation over subsets, in [−1, 1].

    A query that does not vary counts 0. The bootstrap resamples queries and subsets.
    """
    return _two_way([predicted, measured], _spearman)


def lds_difference(predicted: Table, other: Table, measured: Table) -> Estimate:
    """The LDS of one prediction minus that of another, on the same queries and subsets."""

    def statistic(p: Table, o: Table, y: Table) -> np.ndarray:
        return _spearman(p, y) - _spearman(o, y)

    return _two_way([predicted, other, measured], statistic)


def repeatability(measured: Runs) -> Estimate:
    """The same correlation between any two of s ≥ 2 repetitions, mean over all pairs."""
    if measured.ndim != 3 or len(measured) < 2:
        raise IsslError(f"repeatability of shape {measured.shape}: need two or more repetitions")

    def statistic(*runs: Table) -> np.ndarray:
        return np.mean([_spearman(a, b) for a, b in itertools.combinations(runs, 2)], axis=0)

    return _two_way(list(measured), statistic)


def ceiling(between: Estimate, repetitions: int) -> Estimate:
    """The greatest correlation of any prediction with the mean of s repetitions.

    √(s r / (1 + (s − 1) r)), where any two repetitions correlate by r; 0 where r ≤ 0 (Spearman
    1910, Brown 1910).
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
    """The mean of a statistic of each query, over resampled queries and subsets."""
    tables = [np.asarray(t, float) for t in tables]
    shapes = {t.shape for t in tables}
    if len(shapes) != 1 or len(tables[0].shape) != 2 or tables[0].shape[1] < 3:
        raise IsslError(
            f"tables of shape {sorted(shapes)}: need one shape (queries, subsets), 3 or more "
            "subsets"
        )
    (q, m), rng = tables[0].shape, np.random.default_rng(0)
    found = np.empty(RESAMPLES)
    for k in range(RESAMPLES):
        rows, columns = rng.integers(0, q, q), rng.integers(0, m, m)
        found[k] = statistic(*(t[rows][:, columns] for t in tables)).mean()
    return percentiles(statistic(*tables).mean(), found, q)


def log_loss(losses: Any) -> np.ndarray:
    """Logarithms of stability losses; a view that changes nothing, which has none, counts 1e-8."""
    return np.log(np.maximum(np.asarray(losses, float), 1e-8))


def centred(values: Float[np.ndarray, "*s q m"]) -> Float[np.ndarray, "*s q m"]:
    """Less the mean over queries: a whole training can be more or less stable than another, which
    is no image's doing."""
    return values - values.mean(-2, keepdims=True)


def retrained_losses(table: pd.DataFrame) -> Runs:
    """The queries' log stability losses after each training, centred.

    Args:
        table: seed, subset, stability_loss, a row for each query, in the same order after each
            training.
    """
    runs = [
        np.stack([log_loss(one["stability_loss"]) for _, one in run.groupby("subset")], 1)
        for _, run in table.groupby("seed")
    ]
    return centred(np.stack(runs))


def changes_without(asked: pd.DataFrame) -> Table:
    """What is asked of each query after a training without each subset, less the same after the
    training on all images.

    Args:
        asked: subset (-1: all images), query and value.
    """
    values = asked.pivot_table("value", "query", "subset")
    return values.drop(columns=-1).sub(values[-1], axis=0).to_numpy()


def predicted_changes(
    derivatives: Float[np.ndarray, "q n"], left_out: Iterable[Sequence[int]]
) -> Table:
    """−Σ_{i∈S_k} ∂m_q/∂w_i of each subset that is left out: the change of m_q, to first order."""
    derivatives = np.asarray(derivatives, float)
    return np.stack([-derivatives[:, places].sum(1) for places in left_out], 1)


def kept(left_out: Iterable[Sequence[int]], n: int) -> Bool[np.ndarray, "m n"]:
    """Which of n images are in each subset, by the positions of those that it leaves out."""
    return np.stack([~np.isin(np.arange(n), places) for places in left_out])


def own_rise(before: Any, after: Any, at: int) -> float:
    """By how much the log loss of image `at` rises, more than that of the other images on average:
    a whole run can drift.

    Args:
        before: stability losses of all images after training on all of them.
        after: the same without image `at`.
    """
    rise = log_loss(after) - log_loss(before)
    return float(rise[at] - np.delete(rise, at).mean())


def own_move(before: Float[Tensor, "n d"], after: Float[Tensor, "n d"], at: int) -> float:
    """How far the features of image `at` move, in parts of the median image's: the logarithm of the
    ratio of cosine distances; arguments as in `own_rise`."""
    moved = 1 - torch.cosine_similarity(before, after).numpy()
    return float(np.log(max(moved[at], 1e-12) / max(np.median(moved), 1e-12)))


def query_changes(
    before: Float[Tensor, "q d"], after: Float[Tensor, "q d"], losses: Any, losses_after: Any
) -> pd.DataFrame:
    """What a training without some images changed of queries, against the training on all.

    Args:
        before: features after training on all images.
        after: features after training without some.
        losses: stability losses, `losses_after` likewise.

    Returns:
        moved, the log cosine distance of a query's features; and rise of its log loss, less the
        mean over queries.
    """
    a, b = (torch.nn.functional.normalize(f.double(), dim=1) for f in (after, before))
    moved = (1 - (a * b).sum(1)).clamp(min=1e-12).log().numpy()
    now, then = (log_loss(values) for values in (losses_after, losses))
    return pd.DataFrame({"moved": moved, "rise": (now - now.mean()) - (then - then.mean())})


def rankings(
    scores: Mapping[str, np.ndarray], measured: Float[np.ndarray, "s n"]
) -> dict[str, Estimate]:
    """How scores of images rank what was measured of them under several seeds.

    Args:
        scores: by name, ours first, then its rivals.
        measured: a row for each seed.

    Returns:
        "spearman", our correlation with the mean over seeds; for each rival "spearman_RIVAL", its
        own, and "less_RIVAL", ours less that; "seeds_agree" and the "ceiling" that it sets;
        "mean_change" of all images.
    """
    (ours, *rivals), truth = scores, measured.mean(0)
    agree = agreement(measured, "spearman")
    found = {"ceiling": ceiling(agree, len(measured)), "seeds_agree": agree}
    found |= {"mean_change": mean(truth), "spearman": correlation(scores[ours], truth, "spearman")}
    for name in rivals:
        found[f"spearman_{name}"] = correlation(scores[name], truth, "spearman")
        found[f"less_{name}"] = correlation_difference(scores[ours], scores[name], truth)
    return found
