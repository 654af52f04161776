"""The figures of notebook 03: who has a uniform frame, what another background does to a score, and
who bridges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from issl.audit import figures
from issl.audit.claims import threshold
from issl.audit.plans_paper import BackgroundBias
from issl.audit.stats import statistics
from issl.audit.stats.statistics import Estimate
from issl.data.images import Images
from issl.pretraining.recipes import NAMES

Measured = Mapping[
    tuple[str, str], Mapping[str, Estimate]
]  # by method ("" for pixels) and score, then by metric

SHORT = {"influence": "influence", "stability loss ℓ": "loss ℓ", "gradient norm ‖g‖": "norm ‖g‖"}
PANELS = (  # metric, its value without any relation, title, label
    ("enrichment_top5", 1, "b  detector, top 5%", "relative risk (log)"),
    ("auc", 0.5, "c  detector, all", "AUC"),
    ("auc_labels", 0.5, "d  labelled", "AUC"),
)
BRIDGES = (
    ("cross_class_difference_of_degree", "share of edges to other classes,\ntop 5% less controls"),
    ("betweenness_log_ratio_of_degree", "betweenness: log ratio,\ntop 5% to controls"),
)


def uniform_frames(
    plan: BackgroundBias, images: Images, uniform: np.ndarray, order: np.ndarray, measured: Measured
) -> Figure:
    """Above, the images of highest and lowest influence under the first method, uniform frames
    outlined; below, the share of uniform frames by rank, and each score's relation with them.

    uniform  (n,) is the frame uniform?
    order    (n,) positions, highest influence first
    """
    method = plan.methods[0]
    figure = plt.figure(figsize=(figures.PAGE, 5.1))
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[1, 1.35])[:, 0]
    ends = ((order[: plan.gallery], "highest"), (order[::-1][: plan.gallery], "lowest"))
    for ax, (rows, title) in zip(above.subplots(1, 2), ends, strict=True):
        figures.gallery(
            ax, images.subset(rows.tolist()), f"{title} influence", frames=uniform[rows].tolist()
        )
    share, *panels = below.subplots(1, 4, width_ratios=[1.15, 1, 1, 1])
    _by_rank(share, uniform[order], figures.COLOURS[method])
    _relations(plan, panels, measured)
    m = measured[method, "influence"]
    above.suptitle(
        f"{NAMES[method]}: what a detector calls uniform is {m['enrichment_top5'].value:.1f}× as frequent "
        f"in the top 5% by influence, AUC {m['auc'].value:.2f}"
        + (f"; by eye, AUC {m['auc_labels']}" if "auc_labels" in m else "")
        + f"\n({images.name}, n = {len(images):,}, {plan.encoders} encoder{'s' * (plan.encoders > 1)} a method, "
        f"{plan.profile} profile; bars: 95% intervals; dashed: no relation, dotted: the test)\n"
        f"above and a: {NAMES[method]}, seed {plan.seed}; outlined: what the detector calls uniform",
        fontsize=8.5,
    )
    return figure


def galleries(
    plan: BackgroundBias, images: Images, orders: Mapping[str, np.ndarray], uniform: np.ndarray
) -> Figure:
    """The images of highest and of lowest influence under the first encoder of each method, uniform
    frames outlined.

    orders   of each method, positions, highest influence first
    uniform  (n,) is the frame uniform?
    """
    figure, axes = plt.subplots(2, len(orders), figsize=(figures.PAGE, 3.9), squeeze=False)
    for column, (method, order) in zip(axes.T, orders.items(), strict=True):
        for ax, rows, end in zip(column, (order, order[::-1]), ("highest", "lowest"), strict=True):
            chosen = rows[: plan.gallery]
            outlined = uniform[chosen].tolist()
            figures.gallery(
                ax, images.subset(chosen.tolist()), f"{NAMES[method]}: {end}", 6, outlined
            )
    counts = [f"{NAMES[m]} {uniform[order[: plan.gallery]].sum()}" for m, order in orders.items()]
    figure.suptitle(
        f"Called uniform by the detector (outlined), of the {plan.gallery} of highest influence: {', '.join(counts)}; "
        f"by chance {plan.gallery * uniform.mean():.1f}\n"
        f"({images.name}, n = {len(images):,}, seed {plan.seed}, {plan.profile} profile)",
        fontsize=8.5,
    )
    return figure


def by_colour(
    plan: BackgroundBias, images: Images, labels: pd.DataFrame, measured: Measured
) -> Figure:
    """AUC of each score against backgrounds that are known: all uniform ones, white, black and
    other ones, where there were enough of a kind to measure it.

    labels  as `issl.audit.data.background_labels` gives them
    """
    colours = labels["colour"].value_counts()
    kinds = {"auc_labels": ("all uniform", int(labels["uniform"].sum()))}
    kinds |= {f"auc_labels_{c}": (c, int(colours.get(c, 0))) for c in ("white", "black", "other")}
    found = measured[plan.methods[0], "influence"]
    kinds = {metric: kind for metric, kind in kinds.items() if metric in found}
    keys = [(m, score) for score in SHORT for m in plan.methods] + [
        key for key in measured if not key[0]
    ]
    names = [f"{SHORT[score]}, {NAMES[m]}" if m else score for m, score in keys]
    paints = [figures.COLOURS.get(m, "0.4") for m, _ in keys]
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(figures.PAGE, 3.1), sharey=True, squeeze=False
    )
    for ax, (metric, (kind, count)) in zip(axes[0], kinds.items(), strict=True):
        rows = [(name, measured[key][metric]) for name, key in zip(names, keys, strict=True)]
        figures.forest(ax, rows, "AUC", 0.5, paints)
        ax.set_xlim(0, 1)
        ax.set_title(f"{kind} ({count})", loc="left")
    said = [f"{kind} {found[metric].value:.2f}" for metric, (kind, _) in kinds.items()]
    figure.suptitle(
        f"Known backgrounds against those that are not uniform, {NAMES[plan.methods[0]]}, influence: AUC "
        f"{', '.join(said)}\n"
        f"({images.name}, {len(labels)} labelled images, {plan.profile} profile; bars: 95% intervals; "
        "dashed: no relation)",
        fontsize=8.5,
    )
    return figure


def _by_rank(ax: Axes, ranked: np.ndarray, colour: tuple[float, float, float]) -> None:
    """The share of uniform frames in each twentieth of the ranks."""
    part = np.arange(len(ranked)) * 20 // len(ranked)
    points = [statistics.proportion(ranked[part == k]).scaled(100) for k in range(20)]
    spread = [[e.value - e.low for e in points], [e.high - e.value for e in points]]
    at = (np.arange(20) + 0.5) * 5
    ax.errorbar(at, [e.value for e in points], yerr=spread, fmt="o", ms=3, lw=0.8, color=colour)
    ax.axhline(100 * ranked.mean(), color="grey", lw=0.8, ls="--")
    ax.set(ylabel="uniform frames (%)", ylim=(0, None), xlabel="influence rank (%),\nhighest first")
    ax.set_title("a  per 5% of ranks", loc="left")


def _relations(plan: BackgroundBias, panels: list[Axes], measured: Measured) -> None:
    """One panel per metric, one line per score; the scores of influence on grey."""
    keys = [(method, score) for score in SHORT for method in plan.methods] + [
        key for key in measured if not key[0]
    ]
    names = [f"{SHORT[score]}, {NAMES[method]}" if method else score for method, score in keys]
    colours = [figures.COLOURS.get(method, "0.4") for method, _ in keys]
    missing = Estimate(np.nan, np.nan, np.nan, 0)
    for ax, (metric, nothing, title, label) in zip(panels, PANELS, strict=True):
        rows = [
            (name, measured[key].get(metric, missing))
            for name, key in zip(names, keys, strict=True)
        ]
        figures.forest(ax, rows, label, nothing, colours)
        figures.asked(ax, threshold("uniform_backgrounds_by_eye", metric))
        ax.set_title(title, loc="left")
        if ax is not panels[0]:
            ax.set_yticklabels([])
        for k, (_, score) in enumerate(keys):
            if score == "influence":
                ax.axhspan(len(keys) - 1.5 - k, len(keys) - 0.5 - k, color="0.93", lw=0, zorder=0)
    panels[0].set_xscale("log")
    panels[0].set_xlim(0.1, 40)
    panels[0].set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
    panels[0].minorticks_off()


def swapped(
    plan: BackgroundBias,
    scenes: Images,
    change: pd.DataFrame,
    by_kind: dict[str, Estimate],
    rows: dict[str, Estimate],
) -> Figure:
    """The same scenes on each background, and how much higher their scores are there than on a
    texture.

    scenes   with the attributes scene and background, as `issl.load("scenes-swapped")` gives them
    change   change of log influence, a row per scene, a column per flat background
    by_kind  its mean on each flat background
    rows     what the right panel draws: four of influence, then two of other scores
    """
    flat = list(by_kind)
    figure = plt.figure(figsize=(figures.PAGE, 2.9))
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1, 1.7])[0]
    pairs = zip(scenes.attributes["scene"], scenes.attributes["background"], strict=True)
    position = {pair: k for k, pair in enumerate(pairs)}
    shown = [
        position[scene, background]
        for scene in change.index[:5]
        for background in ("texture", *flat)
    ]
    title = "one scene a row:\ntextured, white, black, colour"
    figures.gallery(left.subplots(), scenes.subset(shown), title, columns=4)
    violin, forest = right.subplots(1, 2, width_ratios=[1, 1])
    sns.violinplot(
        change.melt(value_name="change"),
        x="background",
        y="change",
        order=flat,
        hue="background",
        hue_order=flat,
        inner="quart",
        linewidth=0.8,
        ax=violin,
        palette=["0.9", "0.45", sns.color_palette(figures.PALETTE)[1]],
        legend=False,
    )
    violin.axhline(0, color="grey", lw=0.8, ls="--")
    violin.set(ylabel="log influence less that\non a textured background", xlabel="background")
    violin.set_title("a  the same scene, swapped", loc="left")
    colours: list[Any] = [figures.COLOURS[plan.methods[0]]] * 4 + ["0.4"] * 2
    figures.forest(forest, list(rows.items()), "mean change of the log", 0.0, colours)
    forest.set_title("b  with 95% intervals", loc="left")
    factors = [
        f"{np.exp(e.value):.2f} [{np.exp(e.low):.2f}, {np.exp(e.high):.2f}] ({background})"
        for background, e in by_kind.items()
    ]
    figure.suptitle(
        f"The same object on another background: influence multiplied by\n{', '.join(factors)}\n"
        f"(drawn scenes, n = {plan.swapped:,} × 4, {NAMES[plan.methods[0]]}, {plan.profile} profile)",
        fontsize=8.5,
    )
    return figure


def bridges(plan: BackgroundBias, images: Images, table: pd.DataFrame) -> Figure:
    """How much more the top 5% by each score bridge classes than others of the same classes with as
    many neighbours.

    table  method, score, metric, value, low, high, n
    """
    figure, panels = plt.subplots(1, 2, figsize=(figures.PAGE, 2.5), sharey=True)
    headline = []
    for ax, (metric, label) in zip(panels, BRIDGES, strict=True):
        part = table[table["metric"] == metric].to_dict("records")
        found = {(r["method"], r["score"]): Estimate.of(r) for r in part}
        keys = [(m, score) for score in SHORT for m in plan.methods] + [
            key for key in found if not key[0]
        ]
        rows = [(f"{score}, {NAMES[m]}" if m else score, found[m, score]) for m, score in keys]
        figures.forest(ax, rows, label, 0.0, [figures.COLOURS.get(m, "0.4") for m, _ in keys])
        figures.asked(ax, threshold("semantic_bridges_of_degree", metric))
        e = found[plan.methods[0], "influence"]
        headline.append(str(e))
    figure.suptitle(
        f"{NAMES[plan.methods[0]]}'s top 5% by influence less their controls: share of edges to other classes "
        f"{headline[0]}, log betweenness {headline[1]}\n"
        f"({images.name}, n = {len(images):,}, {plan.neighbours} neighbours, {plan.profile} profile; "
        "controls: of the same class, with as many edges;\ndashed: no bridge, dotted: the test)",
        fontsize=8.5,
    )
    return figure
