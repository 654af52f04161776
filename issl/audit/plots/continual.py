"""The figure of notebook 12: what a second task makes an encoder forget, and what predicts it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from issl.audit import figures, kit
from issl.audit.plans_own import Channel, Continual, Task
from issl.audit.plots import channels
from issl.audit.stats import statistics
from issl.audit.stats.statistics import Estimate
from issl.pretraining.recipes import NAMES

WAYS = {"second": "the second task", "more": "more of the first"}
COLOURS = {"second": sns.color_palette(figures.PALETTE)[3], "more": "0.45"}
TITLES = ("a  is it forgotten?", "b  influence since", "c  which images?", "d  predicted by")
EPOCHS = "epochs after the first task"
LABELS = (EPOCHS, EPOCHS, "rank of influence (%)", "ρ with what is forgotten")


def forgetting(
    plan: Continual,
    course: pd.DataFrame,
    drift: pd.DataFrame,
    images: Mapping[tuple[Task, Channel], pd.DataFrame],
    found: pd.DataFrame,
    labels: Mapping[Task, str],
    sizes: Mapping[Task, int],
) -> Figure:
    """A row per task: neighbours lost, influence over training, forgetting by influence, and what
    predicts it.

    course         task, way, epochs, lost in each way to measure: one row per encoder
    drift          task, way, epochs, spearman: of influence then with influence after the first
                   task
    images         of each image: rank of influence and the share of its neighbours forgotten, both
                   0 to 1
    found          task, channel, score, metric, value, low, high, n
    labels, sizes  of a task: what differs, and how many images the first one has
    """
    size = (kit.PAGE, 2.2 * len(plan.tasks) + 0.6)
    figure, axes = plt.subplots(
        len(plan.tasks), 4, figsize=size, squeeze=False, width_ratios=[1, 1, 1, 1.25]
    )
    for (lost, kept, dots, forest), task in zip(axes, plan.tasks, strict=True):
        _course(lost, plan, course[course["task"] == task], f"{labels[task]}\nneighbours lost (%)")
        _drift(kept, drift[drift["task"] == task])
        kept.set_ylim(min(0, drift["spearman"].min()) - 0.05, 1.05)
        for ax in (lost, kept):
            ax.set_xticks(range(0, plan.legs * plan.leg_epochs + 1, plan.leg_epochs))
        _tenths(dots, images[task, plan.channels[0]], figures.COLOURS[plan.method])
        _predictors(forest, plan, found[found["task"] == task])
    for ax, text in zip(axes[0], TITLES, strict=True):
        ax.set_title(text, loc="left")
    for ax, text in zip(axes[-1], LABELS, strict=True):
        ax.set_xlabel(text)
    axes[0][0].legend(frameon=False, fontsize=6.5, loc="upper left", handlelength=1)
    remarks = {"BatchNorm held": "solid in a, alone in c", "as trained": "dotted in a"}
    channels.legend(figure, axes[0][3], remarks)
    figure.suptitle(_headline(plan, found, sizes), fontsize=8.5)
    return figure


def _course(ax: Axes, plan: Continual, course: pd.DataFrame, label: str) -> None:
    """Means over trainings: a line with BatchNorm held, a dotted one as trained."""
    for (way, text), channel in product(WAYS.items(), plan.channels):
        held = channel == plan.channels[0]
        lost = (
            course[course["way"].isin(["first", way])].groupby("epochs")[f"lost, {channel}"].mean()
        )
        how: dict[str, Any] = (
            {"marker": "o", "ms": 3, "lw": 1.2, "label": text} if held else {"ls": ":", "lw": 1.0}
        )
        ax.plot(lost.index, 100 * lost, color=COLOURS[way], **how)
    ax.set(ylabel=label, ylim=(0, 100))


def _drift(ax: Axes, drift: pd.DataFrame) -> None:
    for way in WAYS:
        line = drift[drift["way"] == way].groupby("epochs")["spearman"].mean()
        ax.plot([0, *line.index], [1, *line], marker="o", ms=3, lw=1.2, color=COLOURS[way])
    ax.set_ylabel("ρ with influence\nafter the first")


def _tenths(ax: Axes, images: pd.DataFrame, colour: tuple[float, float, float]) -> None:
    """One dot per image; means with their intervals of tenths by influence."""
    ax.scatter(100 * images["rank"], 100 * images["forgotten"], s=4, lw=0, alpha=0.35, color=colour)
    tenth = np.minimum(9, (10 * images["rank"].rank(pct=True) - 1e-9).astype(int))
    means = [
        statistics.mean(images["forgotten"][tenth == t].to_numpy()).scaled(100) for t in range(10)
    ]
    bars = [[e.value - e.low for e in means], [e.high - e.value for e in means]]
    ax.errorbar(
        np.arange(5, 100, 10),
        [e.value for e in means],
        yerr=bars,
        fmt="o",
        ms=3,
        lw=0.9,
        color="black",
    )
    ax.axhline(0, color="grey", lw=0.7, ls="--")
    ax.set_ylabel("forgotten (% of neighbours)")


def _predictors(ax: Axes, plan: Continual, found: pd.DataFrame) -> None:
    """Influence first, then what it adds to the others, then the others."""
    by_channel: dict[str, list[Estimate]] = {}
    names: list[str] = []
    for channel in plan.channels:
        part = found[found["channel"] == channel]
        plain = [
            (r["score"], Estimate.of(r))
            for r in part[part["metric"] == "spearman"].to_dict("records")
        ]
        (partial,) = part[part["metric"] == "partial_correlation"].to_dict("records")
        lines = [
            plain[0],
            ("influence given\nloss, kNN distance", Estimate.of(partial)),
            *plain[1:],
        ]
        names, by_channel[channel] = [name for name, _ in lines], [e for _, e in lines]
    channels.forest(ax, names, by_channel, "")


def _headline(plan: Continual, found: pd.DataFrame, sizes: Mapping[Task, int]) -> str:
    held = found[found["channel"] == plan.channels[0]]
    ours = held[(held["score"] == "influence") & (held["metric"] == "spearman")]
    rho = ", ".join(f"ρ = {Estimate.of(r)} ({r['task']})" for r in ours.to_dict("records"))
    n, trainings = (
        " and ".join(f"{sizes[t]:,}" for t in plan.tasks),
        "trainings" if plan.seeds > 1 else "training",
    )
    return (
        f"Influence after the first task against what the second makes forgotten: {rho}\n"
        f"({NAMES[plan.method]}, n = {n}, {plan.seeds} {trainings}; bars: 95% intervals; "
        f"{plan.profile} profile)"
    )
