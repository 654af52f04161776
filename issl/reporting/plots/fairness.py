"""The figures of notebook 05: which groups differ in influence, and what thinning a group changes."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from issl.analysis.statistics import Estimate
from issl.experiments.plans_paper import Fairness
from issl.pretraining.recipes import NAMES
from issl.reporting import figures

NEGLIGIBLE = 0.147  # rank-biserial effects below it


def group_effects(plan: Fairness, groups: pd.DataFrame, ranks: np.ndarray, table: pd.DataFrame) -> Figure:
    """The effect of each group against the rest, and the first method's mean rank by two attributes.

    groups  an attribute in each column, one row per image
    ranks   (n,) of the first method's scores, 0 lowest to 1 highest
    table   method, attribute, group, images, effect (an Estimate), adjusted_p: one row per test
    """
    tests = {(r["method"], r["attribute"], r["group"]): r for r in table.to_dict("records")}
    keys = list(dict.fromkeys((attribute, group) for _, attribute, group in tests))
    size = (figures.PAGE, 1.4 + 0.19 * len(keys))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, width_ratios=[1, 1.1])
    names = []
    for key in keys:
        rows = [tests[m, *key] for m in plan.methods]
        star = "*" if all(r["adjusted_p"] < 0.05 for r in rows) else ""
        names.append(f"{key[1]} ({rows[0]['images']}){star}")
    effects: dict[str, Sequence[Estimate]] = {m: [tests[m, *key]["effect"] for key in keys] for m in plan.methods}
    figures.forests(left, names, effects, "rank-biserial effect, group against the rest", 0.0)
    if len(plan.methods) > 1:
        shown = left.get_legend_handles_labels()
        figure.legend(*shown, loc="outside lower left", ncols=len(plan.methods), frameon=False)
    for bound in (-NEGLIGIBLE, NEGLIGIBLE):
        left.axvline(bound, color="grey", lw=0.6, ls=":")
    left.set_title("a  groups (images); * all methods p < 0.05", loc="left")
    first, second = groups.columns[0], groups.columns[:2][-1]
    _mean_ranks(right, groups.assign(rank=ranks), first, second)
    right.set_title(f"b  {first} × {second}, {NAMES[plan.methods[0]]} (images)", loc="left")
    most = max(tests.values(), key=lambda r: abs(r["effect"].value))
    figure.suptitle(
        f"Largest effect: {most['attribute']} = {most['group']}, {most['effect']} ({NAMES[most['method']]}); "
        f"{sum(r['adjusted_p'] < 0.05 for r in tests.values())} of {len(tests)} tests differ after correction\n"
        f"({plan.dataset}, n = {plan.n:,}, {plan.profile} profile; bars: 95% intervals; "
        f"dotted: negligible below ±{NEGLIGIBLE})",
        fontsize=8.5,
    )
    return figure


def _mean_ranks(ax: Axes, ranked: pd.DataFrame, first: str, second: str) -> None:
    """The mean rank of each pair of groups, with the number of images."""
    mean = ranked.pivot_table("rank", index=first, columns=second, aggfunc="mean")
    count = ranked.pivot_table("rank", index=first, columns=second, aggfunc="size", fill_value=0)
    spread = max(0.05, float(np.nanmax(np.abs(mean.to_numpy() - 0.5))))
    words = mean.map("{:.2f}".format) + "\n(" + count.astype(int).astype(str) + ")"
    sns.heatmap(
        mean, vmin=0.5 - spread, vmax=0.5 + spread, cmap="PuOr_r", annot=words, fmt="", annot_kws={"size": 6.5},
        cbar_kws={"label": "mean influence rank"}, ax=ax,
    )  # fmt: skip
    ax.tick_params(axis="y", labelrotation=0)


def thinning(plan: Fairness, members: int, rises: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """How far the mean rank of the thinned group rises beyond the control, over training seeds and for each.

    members  images of the group
    rises    method, seed, rise: one row per image of the group and per seed
    table    method, who, estimate: one row per part of the group
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(figures.PAGE, 2.4), width_ratios=[1.25, 1])
    rows = table.to_dict("records")
    lines = [(f"{r['who']}, {NAMES[r['method']]}", r["estimate"]) for r in rows]
    colours = [figures.COLOURS[r["method"]] for r in rows]
    figures.forest(left, lines, "change of the mean influence rank (1 = all ranks)", 0.0, colours)
    left.set_title("a  thinned less random removal", loc="left")
    each = rises.groupby(["method", "seed"], as_index=False)["rise"].mean()
    sns.stripplot(
        each, x="method", y="rise", hue="method", order=list(plan.methods), palette=figures.COLOURS, ax=right,
        legend=False, jitter=False,
    )  # fmt: skip
    right.axhline(0, color="grey", lw=0.8, ls="--")
    right.set_xticks(range(len(plan.methods)), [NAMES[m] for m in plan.methods])
    right.set(xlabel="", ylabel="change of the mean rank")
    right.set_title("b  one point per training seed", loc="left")
    all_of_it = [(NAMES[r["method"]], r["estimate"]) for r in rows if r["who"] == "all of the group"]
    figure.suptitle(
        f"{plan.groups()[1]} cut to {plan.keep:.0%}: change of its mean influence rank\n"
        + ", ".join(f"{e.value:+.2f} [{e.low:+.2f}, {e.high:+.2f}] ({name})" for name, e in all_of_it)
        + f"\n({plan.dataset}, {members} of {plan.n:,} images are of the group, {plan.profile} profile; "
        f"bars: 95% intervals over {plan.seeds} training seeds)",
        fontsize=8.5,
    )
    return figure
