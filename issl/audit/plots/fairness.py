"""The figures of notebook 05: which groups differ in influence, and what thinning a group
changes."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from issl.audit import figures, kit
from issl.audit.plans_paper import Fairness
from issl.audit.stats.group_differences import largest
from issl.audit.stats.statistics import Estimate
from issl.pretraining.recipes import NAMES

SIZES = (
    (0.147, "negligible"),
    (0.33, "small"),
    (0.474, "medium"),
    (np.inf, "large"),
)  # of rank-biserial effects
NEGLIGIBLE = SIZES[0][0]


def group_effects(
    plan: Fairness, groups: pd.DataFrame, ranks: np.ndarray, table: pd.DataFrame
) -> Figure:
    """The effect of each group against the rest, and the mean rank by two attributes.

    groups  an attribute in each column, one row per image
    ranks   (n,) mean over all encoders, 0 lowest to 1 highest
    table   scored (a method, `all methods` or `untrained`), attribute, group, images, effect (an
            Estimate), adjusted_p
    """
    tests = {(r["scored"], r["attribute"], r["group"]): r for r in table.to_dict("records")}
    keys = list(dict.fromkeys((attribute, group) for _, attribute, group in tests))
    size = (kit.PAGE, 1.7 + 0.22 * len(keys))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, width_ratios=[1, 1.1])
    overall = [tests["all methods", *key] for key in keys]
    names = [
        f"{r['group']} ({r['images']:,}){'*' if r['adjusted_p'] < 0.05 else ''}" for r in overall
    ]
    effects: dict[str, Sequence[Estimate]] = {
        m: [tests[m, *key]["effect"] for key in keys] for m in plan.methods
    }
    figures.forests(left, names, effects, "rank-biserial effect: ranks lower  ←  0  →  higher", 0.0)
    before = [tests["untrained", *key]["effect"].value for key in keys]
    left.plot(before, np.arange(len(keys))[::-1], "x", color="0.35", ms=4, label="untrained")
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="outside lower left",
        ncols=len(plan.methods) + 1,
        frameon=False,
    )
    for bound in (-NEGLIGIBLE, NEGLIGIBLE):
        left.axvline(bound, color="grey", lw=0.6, ls=":")
    furthest = max(
        1.3 * NEGLIGIBLE,
        *(abs(end) for r in tests.values() for end in (r["effect"].low, r["effect"].high)),
    )
    left.set_xlim(-1.05 * furthest, 1.05 * furthest)
    left.set_title("a  group (images) against the rest; * p < 0.05", loc="left")
    first, second = groups.columns[0], groups.columns[:2][-1]
    _mean_ranks(right, groups.assign(rank=ranks), first, second)
    right.set_title(f"b  {first} × {second} (images)", loc="left")
    most = largest(pd.DataFrame(overall))
    same, e = tests["untrained", most["attribute"], most["group"]]["effect"], most["effect"]
    word = next(word for bound, word in SIZES if abs(e.value) < bound)
    encoders = f"{plan.encoders} encoder{'s' if plan.encoders > 1 else ''}"
    if len(plan.methods) > 1:
        encoders += " a method"
    figure.suptitle(
        f"The group that differs most, {most['group']} ({most['attribute']}), ranks "
        f"{'higher' if e.value > 0 else 'lower'} by a {word} effect: {e}; untrained: "
        f"{same.value:.2f}\n"
        f"({plan.set_name}, n = {plan.n:,}, {encoders}, "
        f"{plan.profile} profile; bars: 95% intervals; between the dotted lines: negligible)",
        fontsize=8.5,
    )
    return figure


def _mean_ranks(ax: Axes, ranked: pd.DataFrame, first: str, second: str) -> None:
    """The mean rank of each pair of groups, with the number of images."""
    mean = ranked.pivot_table("rank", index=first, columns=second, aggfunc="mean")
    count = ranked.pivot_table("rank", index=first, columns=second, aggfunc="size", fill_value=0)
    spread = max(0.05, float(np.nanmax(np.abs(mean.to_numpy() - 0.5))))
    words = mean.map("{:.2f}".format) + "\n(" + count.astype(int).map("{:,}".format) + ")"
    sns.heatmap(
        mean,
        vmin=0.5 - spread,
        vmax=0.5 + spread,
        cmap="PuOr_r",
        annot=words,
        fmt="",
        annot_kws={"size": 6.5},
        cbar_kws={"label": "mean influence rank (0.5: no difference)"},
        ax=ax,
    )
    ax.tick_params(axis="y", labelrotation=0)


def thinning(plan: Fairness, members: int, rises: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """How far the mean rank of the thinned group rises beyond the control, over training seeds and
    for each.

    members  images of the group
    rises    method, seed, rise: one row per image of the group and per seed
    table    method, who, estimate: one row per part of the group
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(kit.PAGE, 2.4), width_ratios=[1.25, 1])
    rows = table.to_dict("records")
    lines = [(f"{r['who']}, {NAMES[r['method']]}", r["estimate"]) for r in rows]
    colours = [figures.COLOURS[r["method"]] for r in rows]
    figures.forest(left, lines, "change of the mean influence rank (1 = all ranks)", 0.0, colours)
    left.locator_params(axis="x", nbins=6)
    left.set_title("a  thinned less random removal", loc="left")
    each = rises.groupby(["method", "seed"], as_index=False)["rise"].mean()
    methods = list(plan.methods)
    sns.stripplot(
        each,
        x="method",
        y="rise",
        hue="method",
        order=methods,
        palette=figures.COLOURS,
        ax=right,
        legend=False,
        jitter=False,
    )
    right.axhline(0, color="grey", lw=0.8, ls="--")
    right.set_xticks(range(len(methods)), [NAMES[m] for m in methods])
    right.set(xlabel="", ylabel="change of rank")
    right.set_title("b  one point per training seed", loc="left")
    whole = [(NAMES[r["method"]], r["estimate"]) for r in rows if r["who"] == "all of the group"]
    known = [f"{e.value:.2f}".replace("-", "−") if np.isinf(e.low) else str(e) for _, e in whole]
    over = (
        "one training seed, so no interval is known"
        if plan.seeds == 1
        else f"95% intervals over {plan.seeds} seeds"
    )
    figure.suptitle(
        f"With the group {plan.groups()[1]} cut to {plan.keep:.0%} of its training images, its "
        "mean rank changes by "
        + ", ".join(f"{change} ({name})" for change, (name, _) in zip(known, whole, strict=True))
        + f"\n({plan.set_name}, {members:,} of {plan.n:,} images are of the group, "
        f"{plan.profile} profile; {over})",
        fontsize=8.5,
    )
    return figure
