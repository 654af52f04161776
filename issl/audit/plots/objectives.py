"""The figures of notebook 18: what each objective sees, where it pulls, and what happens to the
stability loss."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from issl.audit import figures, kit
from issl.audit.plans_own import Objectives
from issl.pretraining.recipes import NAMES

SEES = {
    "simclr": ("which view each view picks", "view"),
    "byol": ("each image's own two views", "image"),
    "barlow_twins": ("how components correlate", "component"),
}
SHORT = {**NAMES, "barlow_twins": "Barlow", "stability": "stability"}


def seen(
    plan: Objectives,
    matrices: Mapping[str, Float[Tensor, "_ _"]],
    moves: Mapping[str, Float[Tensor, "b b"]],
) -> Figure:
    """Above, the matrix that each objective sees; below, what one step on the projections does to
    the images' cosines.

    matrices   SimCLR's probabilities (2b, 2b), BYOL's cosines on the diagonal (b, b), Barlow Twins'
               correlations (d, d)
    moves      changes of the cosines between the first views (rows) and the second views (columns)
    """
    figure, axes = plt.subplots(2, len(matrices), figsize=(kit.PAGE, 4.6))
    largest = max(float(m.abs().max()) for m in moves.values())
    for (above, below), (name, matrix) in zip(axes.T, matrices.items(), strict=True):
        what, unit = SEES[name]
        extreme = float(matrix.abs().max())
        shown = np.where(np.eye(len(matrix)) > 0, matrix, np.nan) if name == "byol" else matrix
        above.set_facecolor("0.93")  # what is not looked at
        colours = (
            {"cmap": "Reds", "vmin": 0}
            if name == "simclr"
            else {"cmap": "RdBu_r", "vmin": -extreme}
        )
        first = above.imshow(shown, vmax=extreme, interpolation="nearest", **colours)
        above.set_title(f"{NAMES[name]} sees\n{what}", loc="left")
        above.set(xlabel=unit, ylabel=unit)
        figure.colorbar(first, ax=above, shrink=0.7)
        second = below.imshow(
            moves[name], cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="nearest"
        )
        own = float(moves[name].diagonal().mean())
        other = float(moves[name][~np.eye(len(moves[name]), dtype=bool)].mean())
        below.set_title(f"same image {own:+.2f},\ndifferent ones {other:+.3f}", loc="left")
        below.set(xlabel="image, second view", ylabel="image, first view")
        figure.colorbar(second, ax=below, shrink=0.7)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    figure.suptitle(
        "Above: what each objective looks at. Below: what one step does to the cosines (red: "
        "closer)\n"
        f"({plan.set_name}, {plan.batch} images, the same projections for all three; grey: not "
        "looked at)",
        fontsize=8.5,
    )
    return figure


def gradients(
    plan: Objectives, tables: Mapping[str, Float[np.ndarray, "k k"]], own: pd.DataFrame
) -> Figure:
    """Cosines between the losses' gradients along a SimCLR training, and of each method's own with
    the stability loss.

    tables   one matrix for each moment: the objectives and, last, the stability loss; on the
             diagonal two batches
    own      method, when, cosine ("with stability" or "between batches"), value, low, high
    """
    names = [SHORT[m] for m in (*plan.methods, "stability")]
    figure = plt.figure(figsize=(kit.PAGE, 2.9))
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[2.3, 1])[0]
    for k, (ax, (when, table)) in enumerate(
        zip(left.subplots(1, len(tables)), tables.items(), strict=True)
    ):
        ax.imshow(table, cmap="RdBu_r", vmin=-1, vmax=1)
        for (row, column), value in np.ndenumerate(table):
            colour = "white" if abs(value) > 0.6 else "black"
            ax.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color=colour
            )
        ax.set_xticks(range(len(names)), names, rotation=90)
        ax.set_yticks(range(len(names)), names if k == 0 else [])
        ax.set_title(when, loc="left")
    ax, moments = right.subplots(), list(tables)
    for (method, cosine), part in own.groupby(["method", "cosine"], sort=False):
        name, with_stability = str(method), cosine == "with stability"
        label = NAMES[name] if with_stability else None
        style = "-" if with_stability else ":"
        ax.plot(
            moments,
            part["value"],
            color=figures.COLOURS[name],
            ls=style,
            marker="o",
            ms=3,
            label=label,
        )
        if with_stability:
            ax.fill_between(
                moments, part["low"], part["high"], color=figures.COLOURS[name], alpha=0.15, lw=0
            )
    ax.axhline(0, color="grey", lw=0.7, ls="--")
    ax.set_xticks(range(len(moments)), ["before", "half", "end"])
    ax.set(
        ylabel="cosine with the stability loss\n(dotted: two batches of one loss)",
        ylim=(None, 1.02),
    )
    ax.set_title("each at its own weights", loc="left")
    ax.legend(frameon=False, fontsize=6.5)
    figure.suptitle(
        "Cosines between gradients of the weights, along a SimCLR training (diagonal: two batches "
        "of one loss)\n"
        f"({plan.set_name}, batches of {plan.gradient_batch}, mean of {plan.gradient_draws}; "
        "shaded: their range)",
        fontsize=8.5,
    )
    return figure


def curves(plan: Objectives, table: pd.DataFrame, descended: Mapping[str, pd.Series]) -> Figure:
    """The objective, the stability loss, and two quotients along each training.

    table       method, epoch, and the columns that are drawn
    descended   the objective by epoch, of each method
    """
    figure, axes = plt.subplots(1, 4, figsize=(kit.PAGE, 2.5))
    panels = {
        "stability loss": "b  stability loss",
        "noise, relative": "c  noise ÷ other image",
        "views, relative": "d  view ÷ other image",
    }
    for name, history in descended.items():
        colour = figures.COLOURS[name]
        axes[0].plot(history.index + 1, history / history.iloc[0], color=colour, label=NAMES[name])
        part = table[table["method"] == name]
        for ax, column in zip(axes[1:], panels, strict=True):
            ax.plot(part["epoch"], part[column], color=colour, marker="o", ms=2.5)
    axes[0].set_title("a  its own objective", loc="left")
    axes[0].set(ylabel="in parts of the first epoch's", ylim=(0, None))
    for ax, (column, title) in zip(axes[1:], panels.items(), strict=True):
        ax.set_title(title, loc="left")
        ax.set(ylim=(0, 1.08 * table[column].max()))
    for ax in axes:
        ax.set_xlabel("epoch")
    figure.legend(loc="outside lower center", ncols=len(descended), frameon=False)
    ends = table.groupby("method", sort=False)["stability loss"].agg(
        lambda v: v.iloc[-1] / v.iloc[0]
    )
    text = ", ".join(f"{NAMES[str(name)]} {times:.2f}" for name, times in ends.items())
    figure.suptitle(
        f"Stability loss at the end, in parts of that before training: {text}\n"
        f"({plan.set_name}, {plan.asked_data().first} test images, width {plan.width}, one "
        "training each; 1 − cos)",
        fontsize=8.5,
    )
    return figure
