"""The figure of notebook 13: how much of the score simple statistics explain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from issl.audit import figures
from issl.audit.plans_own import Explained
from issl.audit.stats.explained_variance import FORWARD
from issl.audit.stats.statistics import Estimate
from issl.pretraining.recipes import NAMES

COLOURS = {**figures.COLOURS, "untrained": "0.45"}
MARKS = {**dict.fromkeys(NAMES, "o"), "untrained": "x"}
ByMethod = Mapping[str, Mapping[str, Estimate]]


def statistics_of_the_score(
    plan: Explained, alone: ByMethod, unique: ByMethod, together: ByMethod
) -> Figure:
    """What each statistic alone, each in addition to the others, and all together say about
    influence.

    alone, unique  by method (and `untrained`) and statistic: Spearman's ρ, and the R² that is lost
                   without it
    together       by method and group of statistics: R²
    """
    figure, axes = plt.subplots(1, 3, figsize=(figures.PAGE, 3.6), width_ratios=[1, 1, 0.95])
    names = list(next(iter(alone.values())))
    figures.forests(
        axes[0], names, _rows(alone, names), "Spearman ρ with influence", 0.0, COLOURS, MARKS
    )
    figures.forests(
        axes[1], names, _rows(unique, names), "unique R² (lost without it)", 0.0, COLOURS, MARKS
    )
    axes[1].set_yticklabels([])
    groups = list(next(iter(together.values())))
    figures.forests(
        axes[2], groups, _rows(together, groups), "R² of influence", None, COLOURS, MARKS
    )
    axes[2].set_xlim(min(0, *(e.low for row in together.values() for e in row.values())) - 0.02, 1)
    axes[2].axvline(0, color="grey", lw=0.8, ls="--")
    axes[2].axhspan(-0.5, 1.5, color="0.93", lw=0, zorder=0)
    axes[0].set_xlim(
        -1, 1
    )  # an interval of three encoders can reach beyond what a correlation can be
    for ax, text in zip(
        axes, ("a  each alone", "b  what only it knows", "c  together"), strict=True
    ):
        ax.set_title(text, loc="left")
    for ax in axes[:2]:
        ax.axhline(len(FORWARD) - 0.5, color="0.8", lw=0.7)
    axes[1].legend(frameon=False, fontsize=6.5, loc="center right")
    shown = ("pixels, trees", "all, trees", "left, and repeatable")
    found = [
        f"{NAMES.get(m, m)} {' / '.join(f'{row[k].value:.2f}' for k in shown)}"
        for m, row in together.items()
    ]
    figure.suptitle(
        "How much of influence do simple statistics explain? "
        "R² on unseen images, by pixels /\n"
        "with a forward pass / left, though a second noise finds it again:\n"
        f"{';  '.join(found)}\n({plan.set_name}, n = {plan.n:,}, {plan.encoders} encoder"
        f"{'s' if plan.encoders > 1 else ''} a method, {plan.profile} profile; bars: 95% intervals)",
        fontsize=8.5,
    )
    return figure


def _rows(estimates: ByMethod, names: Sequence[str]) -> dict[str, Sequence[Estimate]]:
    return {method: [row[name] for name in names] for method, row in estimates.items()}
