"""Figures: one style, and one way to save them with the numbers behind them and where they come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from issl.analysis.statistics import Estimate
from issl.data.images import Images
from issl.files import atomic
from issl.pretraining.recipes import NAMES

PAGE = 7.0  # inches: the width of two columns of a paper
PALETTE = "colorblind"
COLOURS = dict(zip(NAMES, sns.color_palette(PALETTE), strict=False))  # of each method, the same in every figure


def style(screen: bool = True) -> None:
    """Legible at column width, colour-blind safe, text in the PDF as text. screen: is there one? (A terminal: no.)"""
    if not screen:
        plt.switch_backend("agg")
    sns.set_theme(context="paper", style="ticks", palette=PALETTE)
    mpl.rcParams.update(
        {
            "figure.dpi": 110, "savefig.dpi": 220, "savefig.bbox": "tight", "pdf.fonttype": 42, "font.size": 8,
            "axes.titlesize": 8.5, "axes.labelsize": 8, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5,
            "legend.fontsize": 7.5, "axes.spines.top": False, "axes.spines.right": False,
            "figure.constrained_layout.use": True,
        }
    )  # fmt: skip


def save(figure: Figure, name: str, data: pd.DataFrame, folder: Path, provenance: dict[str, Any]) -> list[Path]:
    """Write NAME.png, NAME.pdf, NAME.csv (the numbers drawn) and NAME.json (where they come from)."""
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "pdf", "csv", "json")]
    with atomic(paths[0]) as part:
        figure.savefig(part, format="png")
    with atomic(paths[1]) as part:
        figure.savefig(part, format="pdf", metadata={"CreationDate": None})
    with atomic(paths[2]) as part:
        data.to_csv(part, index=False)
    with atomic(paths[3]) as part:
        part.write_text(json.dumps(provenance, indent=1) + "\n")
    return paths


def training(history: pd.DataFrame, title: str) -> Figure:
    """A run's curves from the history of `issl.pretraining.loop`: the loss, the features' spread, and the kNN accuracy
    where it was watched. The last value of each stands in its title."""
    panels = {"loss": "loss", "feature_std": "spread of the features", "knn_accuracy": "kNN accuracy"}
    panels = {column: label for column, label in panels.items() if column in history}
    figure, axes = plt.subplots(1, len(panels), figsize=(PAGE, 2.1), squeeze=False)
    for ax, (column, label) in zip(axes[0], panels.items(), strict=True):
        known = history.dropna(subset=[column])
        ax.plot(known["epoch"] + 1, known[column], marker="o", markersize=2.5, linewidth=1.2)
        ax.set(xlabel="epoch", ylabel=label, title=f"{label}: {known[column].iloc[-1]:.2f} at the end")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if column != "loss":
            ax.set_ylim(0, 1.05 * max(1.0 if column == "feature_std" else 0.0, known[column].max()))
    figure.suptitle(title, fontsize=9)
    return figure


def forest(
    axes: Axes, rows: Sequence[tuple[str, Estimate]], label: str, nothing: float | None = None, colours: Any = None
) -> None:
    """Estimates with their 95% intervals, one line each, the first on top; a dashed line at `nothing`, no effect.

    colours   one for all, or one a row
    """
    names, estimates = [name for name, _ in rows], [e for _, e in rows]
    colours = sns.color_palette(PALETTE)[0] if colours is None else colours
    each = [colours] * len(rows) if isinstance(colours, tuple | str) else colours
    _intervals(axes, np.arange(len(rows))[::-1], estimates, each, 1.3, 16)
    _finish(axes, names, estimates, label, nothing)


def forests(
    axes: Axes, names: Sequence[str], by_method: dict[str, Sequence[Estimate]], label: str, nothing: float | None = None
) -> None:
    """As `forest`, with several methods a row, in their colours, the first on top."""
    step = 0.7 / max(1, len(by_method))
    for k, (method, estimates) in enumerate(by_method.items()):
        at = np.arange(len(names))[::-1] + step * ((len(by_method) - 1) / 2 - k)
        _intervals(axes, at, estimates, [COLOURS[method]] * len(names), 1.1, 10, NAMES[method])
    _finish(axes, names, [e for estimates in by_method.values() for e in estimates], label, nothing)


def _intervals(
    axes: Axes, at: np.ndarray, estimates: Sequence[Estimate], colours: Any, width: float, size: float,
    label: str | None = None,
) -> None:  # fmt: skip
    """Points with their intervals; an open end goes far beyond any panel."""
    ends = np.clip([[e.low, e.high] for e in estimates], -1e12, 1e12)
    axes.hlines(at, *ends.T, color=colours, lw=width)
    axes.scatter([e.value for e in estimates], at, c=colours, s=size, zorder=3, label=label)


def _finish(axes: Axes, names: Sequence[str], estimates: Sequence[Estimate], label: str, nothing: float | None) -> None:
    """Names, label, the line of no effect; where an interval is open, limits that hold all that is finite."""
    if nothing is not None:
        axes.axvline(nothing, color="grey", lw=0.8, ls="--")
    axes.set_yticks(np.arange(len(names))[::-1], list(names))
    axes.set(xlabel=label, ylim=(-0.6, len(names) - 0.4))
    values = np.array([[e.value, e.low, e.high] for e in estimates])
    if np.isinf(values).any():
        known = [*values[np.isfinite(values)], *([] if nothing is None else [nothing])]
        room = 0.1 * np.ptp(known) or 0.1
        axes.set_xlim(min(known) - room, max(known) + room)


def gallery(axes: Axes, images: Images, title: str, columns: int = 8, frames: Sequence[bool] | None = None) -> None:
    """Images in reading order, as many as given; those with a true entry in `frames` get a border."""
    axes.set_title(title, loc="left")
    rows = -(-len(images) // columns)
    side, gap = images.pixels.shape[-1], 3
    canvas = np.full((rows * (side + gap), columns * (side + gap), 3), 255, np.uint8)
    for k, pixels in enumerate(images.pixels.numpy()):
        y, x = divmod(k, columns)
        y, x = y * (side + gap), x * (side + gap)
        canvas[y : y + side, x : x + side] = pixels.transpose(1, 2, 0)
        if frames is not None and frames[k]:
            axes.add_patch(
                Rectangle(
                    (x - 1.5, y - 1.5),
                    side + 2,
                    side + 2,
                    fill=False,
                    clip_on=False,
                    lw=1.3,
                    ec=sns.color_palette(PALETTE)[1],
                )
            )
    axes.imshow(canvas, interpolation="nearest")
    axes.set_axis_off()
