"""The figures of notebook 01: the scores of two seeds against each other, and all runs against
all."""

from __future__ import annotations

from itertools import combinations, product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import pearsonr, spearmanr

from issl.audit import figures
from issl.audit.plans_paper import SeedCorrelation
from issl.audit.stats.statistics import Estimate
from issl.data.images import Images
from issl.pretraining.recipes import NAMES, Method

PAPER = 0.974  # the paper's Pearson correlation under Gaussian noise
PANELS = (  # metric, label, its value without any relation, title
    ("pearson", "Pearson r", 0.0, "solid line: the paper's 0.974"),
    ("spearman", "Spearman ρ", 0.0, "dashed: no relation"),
    ("overlap_top5", "overlap of the top 5%", 0.05, "dashed: chance"),
)


def agreement(
    plan: SeedCorrelation,
    images: Images,
    readings: dict[str, dict[str, np.ndarray]],
    table: pd.DataFrame,
) -> Figure:
    """Above, the scores of two seeds of each method, a row per reading; below, the statistics with
    their intervals.

    readings  by the kind of seed ("noise", and "training" where there are two) and method, scores
              (s, n)
    table     seed, method, metric, value, low, high, n
    """
    figure = plt.figure(figsize=(figures.PAGE, 1.8 + 1.9 * len(readings)))
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[len(readings), 1])[:, 0]
    axes = above.subplots(len(readings), len(plan.methods), squeeze=False)
    for (row, (reading, runs)), (column, method) in product(
        enumerate(readings.items()), enumerate(plan.methods)
    ):
        _scatter(axes[row, column], runs[method][0], runs[method][1], figures.COLOURS[method])
        axes[row, column].set(xlabel=f"influence, {reading} seed A", ylabel=f"{reading} seed B")
        linear, rank = (
            float(measure(*runs[method][:2]).statistic) for measure in (pearsonr, spearmanr)
        )
        axes[row, column].set_title(
            f"{NAMES[method]}, this pair: r = {linear:.2f}, ρ = {rank:.2f}", loc="left", fontsize=8
        )
    panels = below.subplots(1, 3, sharey=True)
    keys = list(product(plan.methods, readings))
    for ax, (metric, label, nothing, title) in zip(panels, PANELS, strict=True):
        part = table[table["metric"] == metric].to_dict("records")
        by_key = {(r["method"], r["seed"]): Estimate.of(r) for r in part}
        rows = [
            (f"{NAMES[method]}, {reading}", by_key[method, reading]) for method, reading in keys
        ]
        figures.forest(ax, rows, label, nothing, [figures.COLOURS[method] for method, _ in keys])
        ax.set_xlim(min(-0.05, min(e.low for _, e in rows) - 0.05), 1.03)
        ax.set_title(title, loc="left")
    panels[0].axvline(PAPER, color="black", lw=0.9)
    r = {
        seed: table[(table["metric"] == "pearson") & (table["seed"] == seed)]["value"]
        for seed in readings
    }
    above.suptitle(
        ". ".join(
            f"Another {seed}{' seed' * (seed == 'noise')}: r = {_range(v)}" for seed, v in r.items()
        )
        + "\n"
        f"({images.name}, n = {len(images):,}, {_encoders(plan)}, {plan.profile} profile; "
        "bars: 95% intervals)",
        fontsize=9,
    )
    return figure


def more_draws(plan: SeedCorrelation, images: Images, by_draws: pd.DataFrame) -> Figure:
    """r against the number of draws averaged, a panel per kind of seed; the line is the paper's
    number.

    by_draws  seed, method, draws, value, low, high, n
    """
    readings = list(by_draws["seed"].unique())
    figure, axes = plt.subplots(
        1, len(readings), figsize=(figures.PAGE, 2.5), sharey=True, squeeze=False
    )
    for ax, reading in zip(axes[0], readings, strict=True):
        for method in plan.methods:
            part = by_draws[(by_draws["seed"] == reading) & (by_draws["method"] == method)]
            spread = [part["value"] - part["low"], part["high"] - part["value"]]
            ax.errorbar(
                part["draws"],
                part["value"],
                yerr=spread,
                color=figures.COLOURS[method],
                marker="o",
                ms=4,
                lw=1.2,
                elinewidth=0.7,
                label=NAMES[method],
            )
        ax.axhline(PAPER, color="black", lw=0.9)
        ax.set(xscale="log", xlabel="draws of the noise averaged")
        ax.set_xticks(list(plan.draws), [str(k) for k in plan.draws])
        ax.minorticks_off()
        ax.set_title(f"another {reading} seed", loc="left")
    axes[0, 0].set_ylabel("Pearson r")
    axes[0, 0].legend(frameon=False, fontsize=7)
    figure.suptitle(
        "More draws measure the score better; two trainings may still disagree about it\n"
        f"({images.name}, {min(plan.averaged, len(images)):,} images, {_encoders(plan)}, "
        f"{plan.profile} profile; line: the paper's {PAPER}; bars: 95% intervals)",
        fontsize=8.5,
    )
    return figure


def _encoders(plan: SeedCorrelation) -> str:
    return f"{plan.encoders} encoder{'s' * (plan.encoders > 1)} a method"


def _range(values: pd.Series) -> str:
    low, high = f"{values.min():.2f}", f"{values.max():.2f}"
    return low if low == high else f"{low} to {high}"


def _scatter(ax: Axes, a: np.ndarray, b: np.ndarray, colour: tuple[float, float, float]) -> None:
    shown = np.linspace(0, len(a) - 1, min(len(a), 5000)).astype(
        int
    )  # more of them would be one blot
    ax.scatter(a[shown], b[shown], s=4, alpha=0.35, color=colour, lw=0, rasterized=True)
    ends = [min(a.min(), b.min()), max(a.max(), b.max())]
    ax.plot(ends, ends, color="grey", lw=0.7, ls=":")
    ax.set(xscale="log", yscale="log")


def all_runs(plan: SeedCorrelation, images: Images, matrix: pd.DataFrame) -> Figure:
    """Rank correlations (runs × runs) as a heat map; the runs of each method in the order of the
    plan."""
    runs = [(m, t, s) for m in plan.methods for t in range(plan.encoders) for s in plan.noises(t)]
    few = len(runs) <= 12  # room for numbers in the cells
    figure, ax = plt.subplots(figsize=(figures.PAGE, 1.3 + (0.36 if few else 0.22) * len(runs)))
    sns.heatmap(
        matrix,
        vmin=0,
        vmax=1,
        cmap="cividis",
        annot=few,
        fmt=".2f",
        annot_kws={"size": 7},
        square=False,
        cbar_kws={"label": "Spearman ρ"},
        xticklabels=[f"{t} · {s}" for _, t, s in runs],
        ax=ax,
    )
    ax.tick_params(axis="x", labelrotation=0 if few else 90)
    ax.set_xlabel("the same runs: training seed · noise seed")
    for k in range(1, len(runs)):
        if runs[k][0] != runs[k - 1][0]:  # between methods
            ax.axhline(k, color="white", lw=1.5)
            ax.axvline(k, color="white", lw=1.5)
    figure.suptitle(
        f"Rank correlation, on average: {_by_kind(runs, matrix.to_numpy())}\n"
        f"({images.name}, n = {len(images):,}, {plan.profile} profile)",
        fontsize=8.5,
    )
    return figure


def _by_kind(runs: list[tuple[Method, int, int]], rho: np.ndarray) -> str:
    """The mean over pairs of runs of each kind, in words."""
    kinds: dict[str, list[float]] = {
        "two noise seeds of one encoder": [],
        "two trainings": [],
        "two methods": [],
    }
    for (i, (m, t, s)), (j, (n, u, v)) in combinations(enumerate(runs), 2):
        if m == n and t == u:
            kinds["two noise seeds of one encoder"].append(rho[i, j])
        elif s == v:  # the same noise, so that the training alone differs
            kinds["two trainings" if m == n else "two methods"].append(rho[i, j])
    return ", ".join(f"{np.mean(found):.2f} {kind}" for kind, found in kinds.items() if found)
