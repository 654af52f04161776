"""Do groups of images score differently? Each against the rest, under one encoder or several."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import scipy  # its parts are imported when they are first used
from jaxtyping import Float

from issl.audit.stats import statistics
from issl.audit.stats.statistics import Estimate
from issl.errors import IsslError


def group_differences(
    ranks: Float[np.ndarray, "e n"],
    groups: pd.DataFrame,
    smallest: int,
    given: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """One row per group with at least `smallest` images inside it and outside it.

        effect = P(an image of the group ranks higher) − P(lower)   (rank-biserial, mean over
        encoders)

    p is Mann-Whitney's on the images' mean ranks over the encoders; adjusted_p is adjusted for the
    number of groups (Holm).

    Args:
        ranks: of the same n images under e encoders, higher for a higher score.
        groups: an attribute in each column, one row per image.
        given: columns that might explain a difference (brightness, say).

    Returns:
        Columns attribute, group, images, value, low, high, n, p, adjusted_p; with `given`, left:
        the partial rank correlation of score and membership given those columns.

    Raises:
        IsslError: where no group is that large.
    """
    ranks = scipy.stats.rankdata(ranks, axis=1)
    total, rows = ranks.sum(0), []  # sums of half-integers are exact, so ties stay ties
    for attribute in groups:
        for group in sorted(groups[attribute].unique(), key=_in_order):
            flag = (groups[attribute] == group).to_numpy()
            if not smallest <= flag.sum() <= len(flag) - smallest:
                continue
            row = {"attribute": attribute, "group": group, "images": int(flag.sum())}
            effects = [statistics.rank_biserial(r, flag)[0] for r in ranks]
            row |= statistics.over_encoders(effects).as_dict()
            row["p"] = statistics.rank_biserial(total, flag)[1]
            if given is not None:
                parts = [statistics.partial_spearman(r, flag.astype(float), given) for r in ranks]
                row["left"] = statistics.over_encoders(parts).value
            rows.append(row)
    if not rows:
        most = {a: int(groups[a].value_counts().iloc[0]) for a in groups}
        raise IsslError(
            f"no group has {smallest} images or more, with as many others; the largest of each "
            f"attribute: {most}. Take more images, or set smallest to fewer"
        )
    return pd.DataFrame(rows).assign(adjusted_p=statistics.holm([r["p"] for r in rows]))


def largest(table: pd.DataFrame) -> pd.Series:
    """The row with the largest effect in absolute value."""
    return table.iloc[int(np.argmax(table["value"].abs()))]


def most_different(
    table: pd.DataFrame, untrained: pd.DataFrame
) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """The group that differs most, for a record.

    Args:
        table: as `group_differences` gives it.
        untrained: the same for the network before training.

    Returns:
        Its adjusted p, its effect and that effect before training; and which groups differ.
    """
    most, differ = largest(table), table[table["adjusted_p"] < 0.05]
    effect, p = Estimate.of(most.to_dict()), float(most["adjusted_p"])
    same = untrained[
        (untrained["attribute"] == most["attribute"]) & (untrained["group"] == most["group"])
    ]
    metrics = {
        "its_adjusted_p": Estimate(p, p, p, len(table)),
        "largest_effect": magnitude(effect),
        "signed_effect": effect,
        "untrained": Estimate.of(same.iloc[0].to_dict()),
    }
    return metrics, {
        "largest_group": f"{most['attribute']}: {most['group']}",
        "groups_that_differ": list(differ["attribute"] + ": " + differ["group"]),
        "tests_corrected_for": len(table),
    }


def magnitude(effect: Estimate) -> Estimate:
    """The size of an effect, whatever its sign."""
    if effect.value >= 0:
        return effect
    return Estimate(-effect.value, -effect.high, -effect.low, effect.n)


def _in_order(group: str) -> tuple[int, int, str]:
    """3-9 before 10-19."""
    first = str(group).split("-")[0]
    return (0, int(first), "") if first.isdigit() else (1, 0, str(group))
