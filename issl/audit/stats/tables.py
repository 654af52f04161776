"""Estimates of several encoders: pooled, and as tidy tables that a figure or a file can take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd

from issl.audit.stats.statistics import Estimate, over_encoders

Numbers = Mapping[str, Estimate]  # by metric
# the possible range of a metric, by the first word of its name; an interval ends there
RANGES = {
    "auc": (0.0, 1.0),
    "enrichment": (0.0,),
    "share": (0.0, 1.0),
    "precision": (0.0, 1.0),
    "pearson": (-1.0, 1.0),
    "spearman": (-1.0, 1.0),
}


def pooled(each: Sequence[Numbers]) -> dict[str, Estimate]:
    """Each metric's mean over encoders, with an interval over encoders and images."""
    return {
        name: over_encoders(
            [numbers[name] for numbers in each], *RANGES.get(name.split("_")[0], ())
        )
        for name in each[0]
    }


def by_method(
    table: pd.DataFrame, numbers: Callable[[pd.DataFrame], Numbers]
) -> dict[str, dict[str, Estimate]]:
    """What `numbers` gives for each encoder's part of a tidy table, pooled over the encoders of
    each method."""
    methods = table.groupby("method", sort=False)
    return {
        str(method): pooled([numbers(one) for _, one in part.groupby("encoder", sort=False)])
        for method, part in methods
    }


SCORES = {
    "influence": "influence",
    "stability_loss": "stability loss ℓ",
    "grad_norm": "gradient norm ‖g‖",
}


def by_score(
    table: pd.DataFrame, numbers: Callable[[str, pd.DataFrame], Numbers]
) -> dict[tuple[str, str], dict[str, Estimate]]:
    """`by_method` for influence and the simpler scores beside it, by method and score; `numbers`
    takes the column's name, too. Of the network before training, only influence."""
    found: dict[tuple[str, str], dict[str, Estimate]] = {}
    for column, score in SCORES.items():
        part = table if column == "influence" else table[table["method"] != "untrained"]
        each = by_method(part, partial(numbers, column))
        found |= {(method, score): metrics for method, metrics in each.items()}
    return found


def tidy(found: Mapping[Any, Numbers], columns: str) -> pd.DataFrame:
    """Estimates as a table: the labels' columns, metric, value, low, high, n.

    Args:
        found: by labels (a tuple, or one), the estimate of each metric.
        columns: what the labels are called, such as "method score".
    """
    rows = []
    for labels, numbers in found.items():
        each = labels if isinstance(labels, tuple) else (labels,)
        about = dict(zip(columns.split(), each, strict=True))
        rows += [about | {"metric": m} | estimate.as_dict() for m, estimate in numbers.items()]
    return pd.DataFrame(rows)


def shown(table: pd.DataFrame, rows: Sequence[str], columns: str = "metric") -> pd.DataFrame:
    """A tidy table made readable: a row for each combination of the columns `rows`, and an estimate
    with its interval in each cell."""
    text = table.assign(text=[str(Estimate.of(r)) for r in table.to_dict("records")])
    wide = text.pivot_table("text", list(rows), columns, aggfunc="first", sort=False)
    return wide.fillna("–").rename_axis(columns=None)
