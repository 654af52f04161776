"""The figure of notebook 16: what each way to look at an image predicts of a training, method by
method."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from issl.audit import kit
from issl.audit.plans_own import Channel, TrainingAware
from issl.audit.plots import channels
from issl.audit.stats.statistics import Estimate
from issl.pretraining.recipes import NAMES


def ladder(plan: TrainingAware, table: pd.DataFrame, n: int) -> Figure:
    """A panel per method: the LDS of every predictor, in each way to measure; grey: the ceiling,
    BatchNorm held.

    table   method, channel, predictor (or "ceiling"), value, low, high, n
    n       how many images are scored
    """
    names = [name for name in table["predictor"].unique() if name != "ceiling"]
    size = (kit.PAGE, 0.75 + 0.36 * len(names))
    figure, axes = plt.subplots(
        1, len(plan.methods), figsize=size, sharey=True, sharex=True, squeeze=False
    )
    for ax, method in zip(axes[0], plan.methods, strict=True):
        part = table[table["method"] == method]
        top = _one(part, "BatchNorm held", "ceiling")
        ax.axvspan(top.low, top.high, color="0.92", lw=0)
        ax.axvline(top.value, color="0.6", lw=1)
        by_channel: dict[str, list[Estimate]] = {
            c: [_one(part, c, name) for name in names] for c in plan.channels("continued")
        }
        channels.forest(ax, names, by_channel, "")
        ax.set_title(f"{NAMES[method]} (ceiling {top.value:.2f})")
    axes[0][len(plan.methods) // 2].set_xlabel(
        "LDS: rank correlation of prediction and retraining, over subsets"
    )
    channels.legend(figure, axes[0][0], {"BatchNorm alone": "no weight trained"})
    figure.suptitle(_headline(plan, table, n), fontsize=8.5)
    return figure


def _one(part: pd.DataFrame, channel: Channel, predictor: str) -> Estimate:
    (row,) = part[(part["channel"] == channel) & (part["predictor"] == predictor)].to_dict(
        "records"
    )
    return Estimate.of(row)


def _headline(plan: TrainingAware, table: pd.DataFrame, n: int) -> str:
    found = []
    for method in plan.methods:
        part = table[table["method"] == method]
        ours, paper = (
            _one(part, "BatchNorm held", name).value for name in ("marginal effect", "paper")
        )
        found.append(f"{NAMES[method]} {ours:.2f} against {paper:.2f}")
    return (
        "What a training does to a query: marginal effect against the paper's score: "
        f"{', '.join(found)}\n"
        f"({plan.set_name}, {n} images scored, encoders of width {plan.width} trained on {plan.n}; "
        f"{plan.encoders} an objective, {plan.subsets} subsets, {plan.seeds} seeds, {plan.queries} "
        "queries; "
        f"{plan.profile} profile)"
    ).replace("-", "−")
