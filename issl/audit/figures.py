"""Panels of the notebooks that do not draw over the kit (`issl.audit.kit`) yet; it goes with
them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes

from issl.audit.kit import COLOURS, literal, save, style
from issl.audit.stats.statistics import Estimate
from issl.pretraining.recipes import NAMES

PALETTE = "colorblind"
__all__ = ["COLOURS", "save", "style"]


def forest(
    axes: Axes,
    rows: Sequence[tuple[str, Estimate]],
    label: str,
    nothing: float | None = None,
    colours: Any = None,
) -> None:
    """Estimates with their 95% intervals, one line each, the first on top; a dashed line at
    `nothing`, no effect.

    colours   one for all, or one a row
    """
    names, estimates = [name for name, _ in rows], [e for _, e in rows]
    colours = sns.color_palette(PALETTE)[0] if colours is None else colours
    each = [colours] * len(rows) if isinstance(colours, tuple | str) else colours
    _intervals(axes, np.arange(len(rows))[::-1], estimates, each, 1.3, 16)
    _finish(axes, names, estimates, label, nothing)


def forests(
    axes: Axes,
    names: Sequence[str],
    by_group: Mapping[str, Sequence[Estimate]],
    label: str,
    nothing: float | None = None,
    colours: Mapping[str, Any] = COLOURS,
    marks: Mapping[str, str] | None = None,
) -> None:
    """As `forest`, with several methods (or other groups) per row, in their colours and marks, the
    first on top."""
    step = 0.7 / max(1, len(by_group))
    for k, (group, estimates) in enumerate(by_group.items()):
        at = np.arange(len(names))[::-1] + step * ((len(by_group) - 1) / 2 - k)
        mark = "o" if marks is None else marks[group]
        _intervals(
            axes,
            at,
            estimates,
            [colours[group]] * len(names),
            1.1,
            10,
            NAMES.get(group, group),
            mark,
        )
    _finish(axes, names, [e for estimates in by_group.values() for e in estimates], label, nothing)


def _intervals(
    axes: Axes,
    at: np.ndarray,
    estimates: Sequence[Estimate],
    colours: Any,
    width: float,
    size: float,
    label: str | None = None,
    mark: str = "o",
) -> None:
    """Points with their intervals; an open end goes far beyond any panel."""
    ends = np.clip([[e.low, e.high] for e in estimates], -1e12, 1e12)
    axes.hlines(at, *ends.T, color=colours, lw=width)
    axes.scatter(
        [e.value for e in estimates], at, c=colours, s=size, zorder=3, label=label, marker=mark
    )


def _finish(
    axes: Axes,
    names: Sequence[str],
    estimates: Sequence[Estimate],
    label: str,
    nothing: float | None,
) -> None:
    """Names, label, the line of no effect; where an interval is open, limits that hold all that is
    finite."""
    if nothing is not None:
        axes.axvline(nothing, color="grey", lw=0.8, ls="--")
    axes.set_yticks(np.arange(len(names))[::-1], [literal(name) for name in names])
    axes.set(xlabel=label, ylim=(-0.6, len(names) - 0.4))
    values = np.array([[e.value, e.low, e.high] for e in estimates])
    if np.isinf(values).any():
        known = [*values[np.isfinite(values)], *([] if nothing is None else [nothing])]
        room = 0.1 * np.ptp(known) or 0.1
        axes.set_xlim(min(known) - room, max(known) + room)
