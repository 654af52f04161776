"""The figure of notebook 16: what each way to look at an image predicts of a training, method by method."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from issl.analysis.statistics import Estimate
from issl.experiments.plans_own import Channel, TrainingAware
from issl.pretraining.recipes import NAMES
from issl.reporting import figures

CHANNELS: dict[Channel, tuple[str, str]] = {  # mark, label
    "BatchNorm held": ("o", "the weights alone (BatchNorm held)"),
    "as trained": ("s", "as trained"),
    "BatchNorm alone": ("D", "BatchNorm's statistics alone, no weight trained"),
}


def ladder(plan: TrainingAware, table: pd.DataFrame, n: int) -> Figure:
    """A panel per method: the LDS of every predictor, in each way to measure; grey: the ceiling, BatchNorm held.

    table   method, channel, predictor (or "ceiling"), value, low, high, n
    n       how many images are scored
    """
    names = [name for name in table["predictor"].unique() if name != "ceiling"]
    size = (figures.PAGE, 0.75 + 0.36 * len(names))
    figure, axes = plt.subplots(1, len(plan.methods), figsize=size, sharey=True, sharex=True, squeeze=False)
    colours = dict(zip(CHANNELS, sns.color_palette(figures.PALETTE)[:3], strict=True))
    for ax, method in zip(axes[0], plan.methods, strict=True):
        part = table[table["method"] == method]
        top = _one(part, "BatchNorm held", "ceiling")
        ax.axvspan(top.low, top.high, color="0.92", lw=0)
        ax.axvline(top.value, color="0.6", lw=1)
        ax.axvline(0, color="grey", lw=0.8, ls="--")
        for k, (channel, (mark, label)) in enumerate(CHANNELS.items()):
            at = np.arange(len(names))[::-1] + 0.26 * (1 - k)
            found = [_one(part, channel, name) for name in names]
            strong: dict[str, Any] = {"color": colours[channel], "alpha": 1.0 if k == 0 else 0.55}
            ax.hlines(at, [e.low for e in found], [e.high for e in found], lw=1.3 if k == 0 else 0.9, **strong)
            ax.scatter([e.value for e in found], at, marker=mark, s=16 if k == 0 else 9, label=label, lw=0, **strong)
        ax.set_yticks(np.arange(len(names))[::-1], names)
        ax.set(title=f"{NAMES[method]} (ceiling {top.value:.2f})", ylim=(-0.6, len(names) - 0.4))
    axes[0][len(plan.methods) // 2].set_xlabel("LDS: rank correlation of prediction and retraining, over subsets")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(_headline(plan, table, n), fontsize=8.5)
    return figure


def _one(part: pd.DataFrame, channel: Channel, predictor: str) -> Estimate:
    (row,) = part[(part["channel"] == channel) & (part["predictor"] == predictor)].to_dict("records")
    return Estimate.of(row)


def _headline(plan: TrainingAware, table: pd.DataFrame, n: int) -> str:
    found = []
    for method in plan.methods:
        part = table[table["method"] == method]
        ours, paper = (_one(part, "BatchNorm held", name).value for name in ("marginal effect", "paper"))
        found.append(f"{NAMES[method]} {ours:.2f} against {paper:.2f}")
    return (
        f"What a training does to a query: marginal effect against the paper's score: {', '.join(found)}\n"
        f"({plan.dataset}, {n} images scored, encoders of width {plan.width} trained on {plan.n}; "
        f"{plan.encoders} an objective, {plan.subsets} subsets, {plan.seeds} seeds, {plan.queries} queries; "
        f"{plan.profile} profile)"
    ).replace("-", "−")
