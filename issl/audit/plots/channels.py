"""The same numbers measured in several ways: with BatchNorm's statistics held, as trained, and from
them alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from issl.audit import figures
from issl.audit.stats.statistics import Estimate

COLOURS: dict[str, Any] = {
    "BatchNorm held": "black",
    "as trained": sns.color_palette(figures.PALETTE)[4],
    "BatchNorm alone": "0.55",
}
MARKS = {"BatchNorm held": "o", "as trained": "s", "BatchNorm alone": "X"}


def forest(
    ax: Axes, names: Sequence[str], by_channel: Mapping[str, Sequence[Estimate]], label: str
) -> None:
    """Estimates with their intervals, a row per name and a mark per way to measure."""
    figures.forests(ax, names, by_channel, label, 0.0, COLOURS, MARKS)


def legend(figure: Figure, ax: Axes, remarks: Mapping[str, str]) -> None:
    """The marks of a panel, below all panels, some of them with a remark."""
    marks, names = ax.get_legend_handles_labels()
    texts = [f"{name} ({remarks[name]})" if name in remarks else name for name in names]
    figure.legend(
        marks, texts, loc="outside lower right", ncols=len(names), frameon=False, handletextpad=0.1
    )
