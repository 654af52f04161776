"""The kit that notebooks draw with: one style, and a few kinds of panel.

A panel takes a tidy table (`issl.audit.stats.tables`): a row for each estimate, with the columns
value, low and high, and columns that say what it is about.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from issl.audit.claims import all_words
from issl.data.images import Images
from issl.pretraining.recipes import NAMES

PAGE = 7.0  # inches: the width of two columns of a paper
PALETTE = sns.color_palette("colorblind")
# each method has the same colour in every figure; anything else is grey
COLOURS: dict[str, Any] = dict(zip(NAMES, PALETTE, strict=False))
# ways to retrain, and to measure a retrained encoder (`issl.audit.plans_own.Channel`); the deciding
# one is black
COLOURS |= {"continued": PALETTE[0], "from scratch": PALETTE[1]}
COLOURS |= {"BatchNorm held": "black", "as trained": PALETTE[4], "BatchNorm alone": "0.65"}
COLOURS |= dict.fromkeys(("no encoder", "pixels"), "black")
GREY = "0.45"
GAP = 3  # pixels, between the images of a gallery
MARK = PALETTE[1]  # the outline of marked images in a gallery


def style() -> None:
    """Set a style that is legible at column width and colour-blind safe; PDFs keep text as text."""
    sns.set_theme(context="paper", style="ticks", palette="colorblind")
    rc: dict[Any, Any] = {"figure.constrained_layout.use": True, "pdf.fonttype": 42}
    rc |= {"figure.dpi": 110, "savefig.dpi": 220, "savefig.bbox": "tight"}
    rc |= {"axes.spines.top": False, "axes.spines.right": False}
    rc |= dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 7)
    rc |= dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize", "legend.fontsize"), 8)
    mpl.rcParams.update(rc)


def panels(
    count: int, height: float = 2.6, widths: Sequence[float] | None = None, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A page-wide row of panels."""
    figure, axes = plt.subplots(
        1, count, figsize=(PAGE, height), width_ratios=widths, squeeze=False, **options
    )
    return figure, list(axes[0])


def title(figure: Figure, finding: str, caption: str) -> None:
    """Title a figure with its finding, in a sentence, and below it the scope (`Plan.caption`)."""
    figure.suptitle(literal(f"{finding}\n{caption}"), fontsize=8.5)


def literal(text: object) -> str:
    """The text with `$` escaped, because matplotlib would read a formula between two of them."""
    return str(text).replace("$", r"\$")


def name(method: str) -> str:
    """A method as people write it."""
    return NAMES.get(method, method)


def in_words(what: str) -> str:
    """A method or a metric as people write it; any other text as it is."""
    return (all_words() | NAMES).get(what, what)


def forest(
    axes: Axes,
    table: pd.DataFrame,
    label: str,
    rows: str = "score",
    colour: str = "method",
    nothing: float | None = None,
    asked: float | None = None,
    legend: bool = False,
) -> None:
    """Estimates with their intervals: a line for each of `rows`, the first on top, and in it one
    point for each of `colour`.

    Args:
        table: tidy, with value, low and high.
        rows: the column that names lines.
        colour: the column that colours points, methods mostly.
        nothing: where to draw a dashed line, for no effect.
        asked: where to draw a dotted line, for a claim's `issl.audit.claims.threshold`.
        legend: name the colours, below the figure.
    """
    if colour not in table:
        table = table.assign(**{colour: ""})
    lines, groups = (list(dict.fromkeys(table[column])) for column in (rows, colour))
    of_line = {line: list(dict.fromkeys(part)) for line, part in table.groupby(rows)[colour]}
    for group in groups:
        part = table[table[colour] == group]
        # a group that is alone in its lines stands in their middle
        together = [of_line[line] for line in part[rows]]
        offset = [(0.7 / len(g)) * ((len(g) - 1) / 2 - g.index(group)) for g in together]
        at = np.array([len(lines) - 1 - lines.index(line) for line in part[rows]]) + offset
        paint = colour_of(group, groups)
        ends = part[["low", "high"]].astype(float).fillna({"low": -np.inf, "high": np.inf})
        axes.hlines(at, *np.clip(ends.to_numpy(), -1e12, 1e12).T, color=paint, lw=1.2)
        shown = literal(name(group))
        axes.scatter(part["value"].astype(float), at, color=paint, s=12, zorder=3, label=shown)
    if nothing is not None:
        axes.axvline(nothing, color="grey", lw=0.8, ls="--")
    if asked is not None:
        axes.axvline(asked, color="black", lw=0.9, ls=":", zorder=0.5, label="what the test asks")
    _name_lines(axes, lines, label)
    axes.locator_params(axis="x", nbins=3)  # numbers of many digits would touch each other
    values = table[["value", "low", "high"]].astype(float).to_numpy()
    if not np.isfinite(values).all():  # limits that include every finite number
        known = [*values[np.isfinite(values)], *([] if nothing is None else [nothing])]
        known = known or [0.0]  # nothing that could be drawn
        room = 0.1 * np.ptp(known) or 0.1
        axes.set_xlim(min(known) - room, max(known) + room)
    if legend and isinstance(axes.figure, Figure):
        handles, labels = axes.get_legend_handles_labels()
        axes.figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)


def colour_of(group: str, groups: Sequence[str]) -> Any:
    """A method's own colour; grey for anything else beside methods; else a colour by position."""
    if group in COLOURS or any(g in COLOURS for g in groups) or len(groups) == 1:
        return COLOURS.get(group, GREY)
    return PALETTE[list(groups).index(group) % len(PALETTE)]


def _name_lines(axes: Axes, lines: Sequence[str], label: str) -> None:
    axes.set_yticks(np.arange(len(lines))[::-1], [literal(in_words(line)) for line in lines])
    axes.set(xlabel=label, ylim=(-0.6, len(lines) - 0.4))


def gallery(
    axes: Axes, images: Images, label: str, columns: int = 8, outlined: Sequence[bool] | None = None
) -> None:
    """All images in reading order; those that are `outlined` get a border."""
    axes.set_title(literal(label), loc="left")
    side = images.pixels.shape[-1]
    step = side + GAP
    canvas = np.full((-(-len(images) // columns) * step, columns * step, 3), 255, np.uint8)
    for k, pixels in enumerate(images.tensor().numpy()):
        y, x = divmod(k, columns)
        canvas[y * step : y * step + side, x * step : x * step + side] = pixels.transpose(1, 2, 0)
        if outlined is not None and outlined[k]:
            corner, size = (x * step - 1.5, y * step - 1.5), side + 2
            box = Rectangle(corner, size, size, fill=False, clip_on=False, lw=1.3, ec=MARK)
            axes.add_patch(box)
    axes.imshow(canvas, interpolation="nearest")
    axes.set_axis_off()


def scatter(
    axes: Axes, x: np.ndarray, y: np.ndarray, xlabel: str, ylabel: str, colour: Any = None
) -> None:
    """One point per image; at most 5,000, drawn at random but the same ones each time."""
    some = np.random.default_rng(0).permutation(len(x))[:5000]
    axes.scatter(x[some], y[some], s=4, lw=0, alpha=0.5, color=colour or PALETTE[0])
    axes.set(xlabel=xlabel, ylabel=ylabel)


def curves(axes: Axes, table: pd.DataFrame, x: str, label: str, colour: str = "method") -> None:
    """A line with its interval for each of `colour`, along the column `x`."""
    for group, part in table.groupby(colour, sort=False):
        paint = COLOURS.get(str(group), GREY)
        axes.plot(part[x], part["value"], "o-", color=paint, ms=3, label=name(str(group)))
        axes.fill_between(part[x], part["low"], part["high"], color=paint, alpha=0.15, lw=0)
    axes.set(xlabel=x, ylabel=label)


def name_rows(axes: Axes, images: Images, names: Sequence[str]) -> None:
    """A name at the left of each row of a gallery."""
    step = images.pixels.shape[-1] + GAP
    for k, row in enumerate(names):
        place = (-4, (k + 0.5) * step)
        axes.text(*place, literal(row), ha="right", va="center", fontsize=7.5)


def dots(
    axes: Axes, table: pd.DataFrame, x: str, rows: str, label: str, middle: str = "median"
) -> None:
    """Every value of the column `x`, in a line for each of `rows` (coloured if a method), with a
    bar at the `middle`, median or mean."""
    lines = list(dict.fromkeys(table[rows]))
    for y, line in enumerate(lines[::-1]):
        values = table.loc[table[rows] == line, x]
        paint = COLOURS.get(line, GREY)
        axes.scatter(values, np.full(len(values), y), color=paint, s=10, alpha=0.5, lw=0)
        axes.vlines(values.agg(middle), y - 0.3, y + 0.3, color="black", lw=1.4)
    _name_lines(axes, lines, label)


def specifications(
    curve: Axes, choices: Axes, table: pd.DataFrame, columns: Sequence[str], label: str
) -> None:
    """A specification curve (Simonsohn et al. 2020): an estimate under every combination of
    choices, in increasing order, and below each what was chosen.

    Args:
        table: tidy, with value, low and high; a row for each combination.
        columns: the choices.
        label: of the estimates.
    """
    rows = [(c, value) for c in columns for value in dict.fromkeys(table[c])]
    table = table.sort_values("value", ignore_index=True)
    curve.vlines(table.index, table["low"], table["high"], color=GREY, lw=0.8)
    curve.scatter(table.index, table["value"], color=PALETTE[0], s=10, zorder=3)
    curve.set(ylabel=label, xticks=[])
    for y, (column, value) in enumerate(reversed(rows)):
        chosen = table.index[table[column] == value]
        choices.scatter(chosen, np.full(len(chosen), y), color="black", marker="s", s=6)
    names = [literal(value) for _, value in reversed(rows)]
    choices.set_yticks(range(len(rows)), names)
    choices.set(xticks=[], ylim=(-0.7, len(rows) - 0.3), xlabel="each column is one combination")
