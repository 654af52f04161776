"""Each query's list of training images, highest score first: how do the lists of two scores
differ?"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from issl.audit.stats.statistics import Estimate, mean

Lists = Int[np.ndarray, "q k"]  # positions of training images


def leading(scores: Float[Tensor, "q n"], k: int) -> Lists:
    """The k images with the highest scores for each query."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :k].numpy()


def overlap(a: Lists, b: Lists) -> Float[np.ndarray, " q"]:
    """The share of a query's list in `a` that is also in its list in `b`."""
    return (a[:, :, None] == b[:, None, :]).any(2).mean(1)


def between_queries(lists: Lists) -> float:
    """The share that the lists of two queries have in common, mean over pairs of queries."""
    pairs = np.array(list(combinations(lists, 2)))
    return float(overlap(pairs[:, 0], pairs[:, 1]).mean())


def differences(
    scores: Mapping[str, Float[Tensor, "q n"]], k: int, labels: np.ndarray, of_query: np.ndarray
) -> dict[str, Estimate]:
    """How the lists of the first k images differ, means over queries.

    Args:
        scores: by name.
        labels: the classes of the training images.
        of_query: the classes of the queries.

    Returns:
        "overlap_A_and_B", what two lists for a query have in common; "rank_correlation_A_and_B" of
        the scores; "same_class_A", the share of a list that is of its query's class.
    """
    lists, found = {name: leading(s, k) for name, s in scores.items()}, {}
    for a, b in combinations(scores, 2):
        pairs = zip(scores[a].numpy(), scores[b].numpy(), strict=True)
        rho = [pd.Series(x).corr(pd.Series(y), method="spearman") for x, y in pairs]
        found[f"overlap_{a}_and_{b}"] = mean(overlap(lists[a], lists[b]))
        found[f"rank_correlation_{a}_and_{b}"] = mean(np.array(rho))
    for name, rows in lists.items():
        found[f"same_class_{name}"] = mean((labels[rows] == of_query[:, None]).mean(1))
    return found
