"""The figure of notebook 10: what retraining shows in a convex case, without single images, and on subsets."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from issl.analysis.statistics import Estimate
from issl.experiments.plans_own import Kind, Validation
from issl.pretraining.recipes import NAMES
from issl.reporting import figures


def retraining(plan: Validation, convex: pd.DataFrame, left_out: pd.DataFrame, numbers: pd.DataFrame, n: int) -> Figure:
    """(a) the convex case; (b), (c) one image left out, by the kind of retraining; (d), (e) the LDS of every score.

    convex    influence (over n), change: of the own loss of each image left out
    left_out  kind, image, influence, change (of the own log loss): one row per training
    numbers   part, score, metric, value, low, high, n: all estimates, as they are saved
    n         how many training images there are
    """
    figure = plt.figure(figsize=(figures.PAGE, 5.6))
    halves: Any = figure.subfigures(2, 1, height_ratios=[1, 1.25])  # its type says one
    above, below = halves
    first, *panels = above.subplots(1, 3)
    first.scatter(1e3 * convex["influence"], 1e3 * convex["change"], s=9, lw=0, color="0.35")
    first.axline((0, 0), slope=1, color="grey", lw=0.7, ls=":")
    first.set(xlabel="influence / n (10⁻³)", ylabel="change of own loss (10⁻³)")
    rho = _estimate(numbers, "convex", "loo", "the true Hessian")
    first.set_title(f"a  convex: ρ = {rho.value:.2f}", loc="left", fontsize=7.5)
    for ax, kind, letter in zip(panels, plan.kinds_of_retraining, "bc", strict=True):
        _left_out(ax, plan, left_out[left_out["kind"] == kind])
        rho, top = (_estimate(numbers, "leave one out", f"{kind}: {m}") for m in ("spearman", "ceiling"))
        title = f"{letter}  {kind}: ρ = {rho.value:.2f}, ceiling {top.value:.2f}"
        ax.set_title(title, loc="left", fontsize=7.5)
    panels[0].set_ylabel("change of own log loss")
    for ax, kind, letter in zip(below.subplots(1, 2, sharey=True), plan.kinds_of_retraining, "de", strict=True):
        top = _lds(ax, plan, kind, numbers)
        ax.set_title(f"{letter}  {kind}; grey: ceiling {top.value:.2f}", loc="left")
    above.suptitle(_headline(plan, numbers, n), fontsize=8.5)
    return figure


def _estimate(numbers: pd.DataFrame, part: str, metric: str, score: str | None = None) -> Estimate:
    """The one number of this name, of one score where several have it."""
    found = numbers[(numbers["part"] == part) & (numbers["metric"] == metric)]
    if score is not None:
        found = found[found["score"] == score]
    (row,) = found.to_dict("records")
    return Estimate.of(row)


def _left_out(ax: Axes, plan: Validation, trainings: pd.DataFrame) -> None:
    """Mean and standard error over seeds of each image's change, by its influence."""
    images = trainings.groupby("image")
    mean, error = images.mean(numeric_only=True), images["change"].sem()
    ax.axhline(0, color="grey", lw=0.7, ls=":")
    ax.errorbar(
        mean["influence"], mean["change"], yerr=error, fmt="o", ms=3, lw=0.7, color=figures.COLOURS[plan.method]
    )
    ax.set(xscale="log", xlabel="influence")
    ax.xaxis.set_minor_formatter("")


def _lds(ax: Axes, plan: Validation, kind: Kind, numbers: pd.DataFrame) -> Estimate:
    """The LDS of every score, the paper's first and the similarity last, over their ceiling, which is returned."""
    top = _estimate(numbers, "subsets", f"{kind}: ceiling")
    ax.axvspan(top.low, top.high, color="0.92", lw=0)
    ax.axvline(top.value, color="0.6", lw=1)
    part = numbers[(numbers["part"] == "subsets") & (numbers["metric"] == f"{kind}: lds")]
    lines = [(r["score"], Estimate.of(r)) for r in part.to_dict("records")]
    blue, orange = figures.COLOURS[plan.method], sns.color_palette(figures.PALETTE)[1]
    colours = [blue] + ["0.35"] * (len(lines) - 2) + [orange]
    figures.forest(ax, lines, "LDS: rank correlation with retraining\non subsets", 0.0, colours)
    return top


def _headline(plan: Validation, numbers: pd.DataFrame, n: int) -> str:
    paper, found = next(iter(plan.curvatures())), []
    for kind in plan.kinds_of_retraining:
        top = _estimate(numbers, "subsets", f"{kind}: ceiling")
        found.append(f"{_estimate(numbers, 'subsets', f'{kind}: lds', paper)} {kind} (ceiling {top.value:.2f})")
    return (
        f"What retraining shows: LDS {', '.join(found)}\n"
        f"({plan.dataset}, n = {n}, {NAMES[plan.method]}, width {plan.width}; {plan.images} images left out, "
        f"{plan.subsets} subsets, {plan.seeds} seeds, {plan.queries} queries; {plan.profile} profile)"
    )
