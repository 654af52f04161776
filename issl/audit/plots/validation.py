"""The figure of notebook 10: what retraining shows in a convex case, without single images, and on
subsets."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from issl.audit import figures
from issl.audit.plans_own import Channel, Kind, Validation
from issl.audit.plots import channels
from issl.audit.stats.statistics import Estimate
from issl.pretraining.recipes import NAMES


def retraining(plan: Validation, convex: pd.DataFrame, numbers: pd.DataFrame, n: int) -> Figure:
    """(a) the convex case; (b), (c) one image left out: its own features and its own loss; (d), (e)
    the LDS of every score, by the kind of retraining, in every way to measure.

    convex    influence (over n), change: of the own loss of each image left out
    numbers   part, kind, channel, score, metric, value, low, high, n: all estimates, as they are
              saved
    n         how many training images there are
    """
    figure = plt.figure(figsize=(figures.PAGE, 5.8))
    halves: Any = figure.subfigures(2, 1, height_ratios=[1, 1.3])  # its type says one
    above, below = halves
    first, features, loss = above.subplots(1, 3, width_ratios=[0.8, 1, 1])
    first.scatter(1e3 * convex["influence"], 1e3 * convex["change"], s=9, lw=0, color="0.35")
    first.axline((0, 0), slope=1, color="grey", lw=0.7, ls=":")
    first.set(xlabel="influence / n (10⁻³)", ylabel="change of own loss (10⁻³)")
    rho = Estimate.of(
        numbers[(numbers["metric"] == "loo") & (numbers["score"] == "the true Hessian")]
        .iloc[0]
        .to_dict()
    )
    first.set_title(f"a  convex: ρ = {rho.value:.2f}", loc="left", fontsize=7.5)
    for ax, what, letter in ((features, "own features", "b"), (loss, "own loss", "c")):
        _left_out(ax, plan, numbers, what)
        ax.set_title(f"{letter}  without it: {what}", loc="left", fontsize=7.5)
    loss.set_yticklabels([])
    for ax, kind, letter in zip(
        below.subplots(1, 2, sharey=True), plan.kinds_of_retraining, "de", strict=True
    ):
        top = _lds(ax, plan, kind, numbers)
        ax.set_title(f"{letter}  {kind}; grey: ceiling {top.value:.2f}", loc="left")
    handles = [
        Line2D([], [], color=channels.COLOURS[channel], marker=mark, ms=4, lw=0, label=channel)
        for channel, mark in channels.MARKS.items()
    ]
    below.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    above.suptitle(_headline(plan, numbers, n), fontsize=8.5)
    return figure


def _estimate(
    numbers: pd.DataFrame,
    part: str,
    kind: Kind,
    channel: Channel,
    metric: str,
    score: str | None = None,
) -> Estimate:
    """The one number of this name, of one score where several have it."""
    found = numbers[
        (numbers["part"] == part) & (numbers["kind"] == kind) & (numbers["channel"] == channel)
    ]
    found = found[found["metric"] == metric]
    if score is not None:
        found = found[found["score"] == score]
    (row,) = found.to_dict("records")
    return Estimate.of(row)


def _left_out(ax: Axes, plan: Validation, numbers: pd.DataFrame, what: str) -> None:
    """How the score and its rivals rank what one image's absence changed, BatchNorm held; grey
    ticks: the ceiling."""
    rivals = {
        "spearman": "influence",
        "spearman stability loss": "stability loss",
        "spearman gradient norm": "‖g‖",
    }
    blue, lines, colours = figures.COLOURS[plan.method], [], []
    for kind in plan.kinds_of_retraining:
        for metric, label in rivals.items():
            estimate = _estimate(numbers, "leave one out", kind, "BatchNorm held", metric, what)
            lines.append((f"{label} ({kind})" if metric == "spearman" else label, estimate))
            colours.append(blue if metric == "spearman" else "0.45")
    figures.forest(ax, lines, "ρ with the change", 0.0, colours)
    for k, kind in enumerate(plan.kinds_of_retraining):
        top = _estimate(numbers, "leave one out", kind, "BatchNorm held", "ceiling", what).value
        last = len(lines) - 1 - k * len(rivals)
        ax.vlines(top, last - len(rivals) + 0.55, last + 0.45, color="0.6", lw=2)
    ax.set_xlim(-1.05, 1.05)
    ax.tick_params(axis="y", labelsize=6.5)


def _lds(ax: Axes, plan: Validation, kind: Kind, numbers: pd.DataFrame) -> Estimate:
    """The LDS of every score, the paper's first and the similarity last, over their ceiling, which
    is returned."""
    top = _estimate(numbers, "subsets", kind, "BatchNorm held", "ceiling")
    ax.axvspan(top.low, top.high, color="0.92", lw=0)
    ax.axvline(top.value, color="0.6", lw=1)
    of_kind = numbers[
        (numbers["part"] == "subsets") & (numbers["kind"] == kind) & (numbers["metric"] == "lds")
    ]
    for channel in reversed(plan.channels(kind)):  # the one that decides on top
        lines = [
            (r["score"], Estimate.of(r))
            for r in of_kind[of_kind["channel"] == channel].to_dict("records")
        ]
        if channel == "BatchNorm held":
            blue, orange = figures.COLOURS[plan.method], sns.color_palette(figures.PALETTE)[1]
            colours = [blue] + ["0.35"] * (len(lines) - 2) + [orange]
            figures.forest(
                ax, lines, "LDS: rank correlation with retraining\non subsets", 0.0, colours
            )
            ax.xaxis.set_major_locator(MaxNLocator(5))
        else:
            at = np.arange(len(lines))[::-1] + (0.25 if channel == "as trained" else -0.25)
            mark, colour = channels.MARKS[channel], channels.COLOURS[channel]
            ax.scatter([e.value for _, e in lines], at, marker=mark, s=9, color=colour, lw=0)
    return top


def _headline(plan: Validation, numbers: pd.DataFrame, n: int) -> str:
    paper, found = next(iter(plan.curvatures())), []
    for kind in plan.kinds_of_retraining:
        top = _estimate(numbers, "subsets", kind, "BatchNorm held", "ceiling")
        lds = _estimate(numbers, "subsets", kind, "BatchNorm held", "lds", paper)
        found.append(f"{lds} {kind} (ceiling {top.value:.2f})")
    return (
        f"What retraining shows, BatchNorm held: LDS {', '.join(found)}\n"
        f"({plan.set_name}, n = {n}, {NAMES[plan.method]}, width {plan.width}; {plan.images} images left out, "
        f"{plan.subsets} subsets, {plan.seeds} seeds, {plan.queries} queries; {plan.profile} profile)"
    )
