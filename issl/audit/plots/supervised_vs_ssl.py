"""The figures of notebook 08: do the scores of supervised and SSL models agree, and how do both
respond to pruning?"""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure, SubFigure

from issl.audit import figures, kit
from issl.audit.claims import threshold
from issl.audit.plans_paper import SupervisedVsSSL
from issl.audit.stats.statistics import Estimate
from issl.data.images import Images
from issl.pretraining.recipes import NAMES

EQUAL = "supervised, equal strength"  # as notebook 08 calls its control
ROWS = (
    "another training",
    "another SSL method",
    "supervised",
    EQUAL,
    "untrained",
)  # with whom an encoder is compared
TESTS = (
    "training − supervised",
    "other SSL − supervised",
    f"training − {EQUAL}",
    f"other SSL − {EQUAL}",
)


def agreement(
    plan: SupervisedVsSSL,
    images: Images,
    measured: Mapping[str, Mapping[str, Estimate]],
    scores: Mapping[str, np.ndarray],
) -> Figure:
    """How well an encoder's scores agree with others', the claim's difference, and the images of
    highest influence.

    measured  by method: the agreement with each of ROWS and the differences TESTS, as far as they
              were measured, and `supervised, by cross-entropy`
    scores    (n,) by model, for the galleries
    """
    figure = plt.figure(figsize=(kit.PAGE, 4.4))
    counts = threshold("supervised_differs_more_than_seeds", "seeds_less_supervised")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.6, 1])[:, 0]
    left, right = above.subplots(1, 2, width_ratios=[1.5, 1])
    for ax, rows, label, line in (
        (left, ROWS, "Spearman ρ of influence, noise taken out", 0.0),
        (right, TESTS, "difference of ρ", counts),
    ):
        names = [name for name in rows if all(name in row for row in measured.values())]
        by_method = {m: [row[name] for name in names] for m, row in measured.items()}
        figures.forests(
            ax, [name.replace(", equal", ",\nequal") for name in names], by_method, label, line
        )
        ax.set_xlim(
            max(-1, ax.get_xlim()[0]), min(1.2, ax.get_xlim()[1])
        )  # intervals of three can reach further
    left.set_title("a  agreement of an encoder's scores with …", loc="left")
    left.legend(frameon=False, loc="lower right", fontsize=7)
    right.set_title(f"b  the test: right of {counts:g}?", loc="left")
    _highest(below, images, scores)
    first = measured[plan.methods[0]]
    figure.suptitle(
        f"{NAMES[plan.methods[0]]} agrees with another training of itself by ρ = "
        f"{first['another training']}, with a "
        f"supervised model by {first['supervised']}\n"
        f"(with the model's cross-entropy: {first['supervised, by cross-entropy']}; "
        f"{plan.set_name}, n = {plan.n:,}, "
        f"{plan.encoders} encoders a method, {plan.supervised} supervised, {plan.profile} "
        "profile; 95% intervals)",
        fontsize=8.5,
    )
    return figure


def _highest(figure: SubFigure, images: Images, scores: Mapping[str, np.ndarray]) -> None:
    """The images of highest influence by each score."""
    columns = 24 // len(scores)
    for ax, (name, score) in zip(figure.subplots(1, len(scores)), scores.items(), strict=True):
        rows = np.argsort(-score, kind="stable")[: 3 * columns]
        kit.gallery(ax, images.subset(rows), f"highest influence:\n{name}", columns)


def pruning_response(plan: SupervisedVsSSL, differences: pd.DataFrame) -> Figure:
    """The probe's accuracy without some images less that with all, of both models.

    differences  trained, removed, value, low, high, n: one row per model and a way to remove
    """
    first = NAMES[plan.methods[0]]
    names = {
        "top by ssl": f"top {plan.share:.0%} by {first}",
        "top by supervised": f"top {plan.share:.0%} by supervised",
        "random": f"random {plan.share:.0%}",
    }
    points = {
        (r["trained"], r["removed"]): Estimate.of(r).scaled(100)
        for r in differences.to_dict("records")
    }
    figure, axes = plt.subplots(1, 2, figsize=(kit.PAGE, 1.9), sharey=True)
    for ax, model in zip(axes, plan.trained, strict=True):
        lines = [(name, points[model, removed]) for removed, name in names.items()]
        figures.forest(ax, lines, "probe accuracy less that with all images (points)", 0.0)
        ax.set_title(f"{NAMES[model]} trained without", loc="left")
    value = {(model == "supervised", removed): e.value for (model, removed), e in points.items()}
    figure.suptitle(
        f"Without the top {plan.share:.0%} by SSL influence: {first} "
        f"{value[False, 'top by ssl']:+.1f}, "
        f"supervised {value[True, 'top by ssl']:+.1f} points; "
        f"at random {value[False, 'random']:+.1f}, {value[True, 'random']:+.1f}\n"
        f"({plan.set_name}, n = {plan.n:,}, {plan.seeds} seeds, {plan.profile} profile; "
        "bars: 95% intervals over seeds)",
        fontsize=8.5,
    )
    return figure
