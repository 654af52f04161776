"""The figure of notebook 14: the graph without its bridges, and influence by the share of uniform
backgrounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from issl.audit import figures, kit
from issl.audit.claims import threshold
from issl.audit.plans_own import Bridges
from issl.audit.stats.statistics import Estimate
from issl.pretraining.recipes import NAMES

REMOVED = ("influence", "betweenness", "lowest influence")
BACKGROUNDS = {  # name in the legend, colour, shift of its points (in share), line width
    "uniform": ("any uniform", "black", 0.0, 1.6),
    "white": ("white", "0.75", -0.012, 0.9),
    "black": ("black", "0.35", 0.006, 0.9),
    "colour": ("colour", sns.color_palette(figures.PALETTE)[1], 0.012, 0.9),
}


def bridges(
    plan: Bridges,
    chart: pd.DataFrame,
    removed: pd.DataFrame,
    doses: pd.DataFrame,
    slope: Estimate | None,
) -> Figure:
    """(a) a map of the first method's features; (b) to (d) gains over random removal; (e) doses,
    where encoders were trained for them (`slope` is not None).

    chart    x, y, label, top (is its influence among the highest?): one row per image that is shown
    removed  method, removed, share, metric, value, low, high, n
    doses    share, seed, background, value, low, high, n; slope: of value by share, any uniform
             background
    """
    figure = plt.figure(figsize=(kit.PAGE, 5.2))
    halves: Any = figure.subfigures(2, 1, height_ratios=[1, 1])  # its type says one
    above, below = halves
    places, modular, silhouette = above.subplots(1, 3, width_ratios=[1.1, 1, 1])
    _places(places, chart)
    places.set_title(
        f"a  {NAMES[plan.methods[0]]}: ○ top {plan.shares[0]:.0%}, colours: classes", loc="left"
    )
    for ax, metric, letter in ((modular, "modularity", "b"), (silhouette, "separability", "c")):
        names = ["influence,\nmatched", "influence", "betweenness", "lowest\ninfluence"]
        gains = _gains(plan, removed, metric, plan.shares[0])
        test = {
            m: _gain(removed, m, "influence", f"{metric} (matched)", plan.shares[0])
            for m in plan.methods
        }
        gains = {m: [test[m], *gains[m]] for m in plan.methods}
        figures.forests(ax, names, gains, f"gain over random removal, {plan.shares[0]:.0%}", 0.0)
        before = _gain(removed, "untrained", "influence", f"{metric} (matched)", plan.shares[0])
        ax.plot(before.value, len(names) - 0.55, "x", color="0.4", ms=4)
        figures.asked(
            ax, threshold("influence_holds_classes_together_matched", f"{metric}_gain_matched")
        )
        ax.set_title(f"{letter}  {metric}", loc="left")
        ax.locator_params(axis="x", nbins=4)
    silhouette.set_yticklabels([])
    widths = [1.0] if slope is None else [1.0, 1.6]
    probe, *rest = below.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    gains = _gains(plan, removed, "probe", plan.shares[-1], 100)
    label = f"linear probe less that without {plan.shares[-1]:.0%}\nat random (points of accuracy)"
    figures.forests(probe, REMOVED, gains, label, 0.0)
    probe.set_title("d  does the probe gain?", loc="left")
    probe.legend(
        frameon=False, fontsize=6.5, loc="lower left", bbox_to_anchor=(-0.55, -0.42), ncol=1
    )
    for ax in rest:
        _doses(ax, doses)
        ax.set_title(f"e  dose and response: slope {slope}", loc="left")
    above.suptitle(_headline(plan, removed), fontsize=8.5)
    return figure


def _places(ax: Axes, chart: pd.DataFrame) -> None:
    ax.scatter(
        chart["x"],
        chart["y"],
        c=chart["label"],
        cmap="tab10",
        s=3,
        lw=0,
        alpha=0.6,
        rasterized=True,
    )
    head = chart[chart["top"]]
    ax.scatter(head["x"], head["y"], s=10, facecolors="none", edgecolors="black", lw=0.6)
    ax.set(xticks=[], yticks=[], xlabel="t-SNE of the features")


def _gain(removed: pd.DataFrame, method: str, which: str, metric: str, share: float) -> Estimate:
    chosen = (removed["method"] == method) & (removed["removed"] == which)
    (row,) = removed[chosen & (removed["metric"] == metric) & (removed["share"] == share)].to_dict(
        "records"
    )
    return Estimate.of(row)


def _gains(
    plan: Bridges, removed: pd.DataFrame, metric: str, share: float, factor: float = 1.0
) -> dict[str, Sequence[Estimate]]:
    """What each method gains without each kind of image."""
    return {
        m: [_gain(removed, m, which, metric, share).scaled(factor) for which in REMOVED]
        for m in plan.methods
    }


def _doses(ax: Axes, doses: pd.DataFrame) -> None:
    """One mark per training, lines through the means."""
    for background, (name, colour, shift, width) in BACKGROUNDS.items():
        part = doses[doses["background"] == background]
        mean = part.groupby("share")["value"].mean()
        bars = np.stack([part["value"] - part["low"], part["high"] - part["value"]])
        ax.plot(100 * (mean.index + shift), mean, color=colour, lw=width, label=name)
        ax.errorbar(
            100 * (part["share"] + shift),
            part["value"],
            yerr=bars,
            fmt="o",
            ms=3,
            lw=0.7,
            color=colour,
        )
    ax.axhline(0, color="grey", lw=0.8, ls="--")
    ax.set(xlabel="scenes with a uniform background in training (%)", xlim=(-3, 103))
    ax.set_ylabel("log influence,\nless that of textured ones")
    ax.legend(frameon=False, fontsize=6.5, ncol=4, loc="best")


def _headline(plan: Bridges, removed: pd.DataFrame) -> str:
    first, share = plan.methods[0], plan.shares[0]
    metrics = ("modularity", "separability")
    gain = {m: _gain(removed, first, "influence", f"{m} (matched)", share).value for m in metrics}
    doses = f"; e: {plan.drawn:,} scenes" if plan.trained_doses else ""
    found = ", ".join(f"{metric} {value:+.3f}" for metric, value in gain.items()).replace("-", "−")
    return (
        f"{NAMES[first]}, without the {share:.0%} of highest influence: {found} against as many of "
        "each class\n"
        f"({plan.set_name}, n = {plan.n:,}{doses}; bars: 95%; dotted: what would matter; ×: "
        "untrained; "
        f"{plan.profile} profile)"
    )
