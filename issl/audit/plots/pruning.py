"""The figure of notebook 06: accuracy after pruning, and the paired differences."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from issl.audit import figures
from issl.audit.plans_paper import Pruning
from issl.audit.stats.statistics import Estimate
from issl.pretraining.recipes import NAMES

STYLES = {
    "top": ("highest influence", "o", "-"),
    "random": ("random", "s", "--"),
    "bottom": ("lowest influence", "^", ":"),
    "top flat": ("highest influence of the flattest frames", "o", "-"),
    "random flat": ("any of the flattest frames", "s", "--"),
}
COMPARED = (
    "top − none",
    "top − random",
    "bottom − random",
    "top flat − none",
    "top flat − random flat",
)


def accuracies(
    plan: Pruning,
    runs: pd.DataFrame,
    differences: pd.DataFrame,
    share: float,
    best: dict[str, Estimate],
) -> Figure:
    """A row per method: probe and kNN accuracy by the share removed, and the probe's paired
    differences.

    runs         method, removed, share, seed, probe, knn: one row per training
    differences  method, share, metric, difference, value, low, high
    share, best  where the top of the first method does best, and its probe's differences there:
                 "none" and "random"
    """
    rows = len(plan.methods)
    size = (figures.PAGE, 2.35 * rows + 0.5)
    figure, axes = plt.subplots(rows, 3, figsize=size, squeeze=False, width_ratios=[1, 1, 1.25])
    several = len(plan.shares) > 1
    for (probe, knn, forest), method in zip(axes, plan.methods, strict=True):
        for ax, metric, title in ((probe, "probe", "linear probe"), (knn, "knn", "kNN")):
            (_by_share if several else _by_arm)(ax, runs[runs["method"] == method], metric)
            ax.set_title(f"{NAMES[method]}, {title}", loc="left")
        if not several:
            knn.set(yticklabels=[], ylabel="")
            knn.set_title("kNN", loc="left")
        part = differences[(differences["method"] == method) & (differences["metric"] == "probe")]
        part = part[part["difference"].isin(COMPARED)]
        lines = [
            (
                r["difference"] + (f", {100 * r['share']:g}%" if several else ""),
                Estimate.of(r).scaled(100),
            )
            for r in part.to_dict("records")
        ]
        colours = ["C0" if name.startswith("top") else "C2" for name, _ in lines]
        figures.forest(forest, lines, "probe: paired difference (points)", 0.0, colours)
        forest.set_title("95% interval over seeds", loc="left")
    if several:
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(
            handles, names, loc="outside lower center", ncols=3, frameon=False, title="removed"
        )
    figure.suptitle(_headline(plan, share, best), fontsize=8.5)
    return figure


def _by_share(ax: Axes, runs: pd.DataFrame, metric: str) -> None:
    none = runs[runs["removed"] == "none"][metric]
    for k, (which, (name, marker, line)) in enumerate(STYLES.items()):
        part = runs[runs["removed"] == which]
        if part.empty:  # not an arm of this plan
            continue
        mean = part.groupby("share")[metric].mean()
        ax.plot(
            [0, *100 * mean.index],
            [100 * none.mean(), *100 * mean],
            color=f"C{k}",
            ls=line,
            lw=1.1,
            label=name,
        )
        ax.scatter(
            100 * part["share"] + 0.25 * (k - 1),
            100 * part[metric],
            color=f"C{k}",
            marker=marker,
            s=14,
        )
    ax.scatter(np.zeros(len(none)), 100 * none, color="0.3", s=14, marker="x")
    ax.set(xlabel="share removed (%)", ylabel="test accuracy (%)")


def _by_arm(ax: Axes, runs: pd.DataFrame, metric: str) -> None:
    """One share: a row for each kind of removal, a line for each seed, a bar at the mean."""
    arms = ["none", *(which for which in STYLES if (runs["removed"] == which).any())]
    table = 100 * runs.pivot_table(index="seed", columns="removed", values=metric)[arms]
    rows = np.arange(len(arms))[::-1]
    ax.plot(table.T, rows, color="0.75", lw=0.7, marker="o", ms=3)
    ax.scatter(table.mean(), rows, color="black", marker="|", s=160, lw=1.6, zorder=3)
    ax.set_yticks(rows, arms)
    ax.set(ylim=(-0.5, len(arms) - 0.5), xlabel="test accuracy (%)", ylabel="removed")
    ax.locator_params(axis="x", nbins=4)


def _headline(plan: Pruning, share: float, best: dict[str, Estimate]) -> str:
    points = {name: str(e.scaled(100)) for name, e in best.items()}
    marks = (
        "one mark per seed, × nothing removed"
        if len(plan.shares) > 1
        else "a line per seed, black: the mean"
    )
    if {"top flat", "random flat"} & set(plan.arms):
        marks += "; flat: of the flattest frames"
    return (
        f"{NAMES[plan.methods[0]]}, trained without its top {share:.0%}: the probe changes by {points['none']} points\n"
        f"against all images, by {points['random']} against random removal\n"
        f"({plan.set_name}, n = {plan.n:,}, {plan.seeds} seeds, {plan.profile} profile; {marks})"
    )
