"""The figures of notebook 15: three lists for a query, and what retraining without each of them
changes."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from issl.audit import figures, kit
from issl.audit.plans_own import Channel, Kind, Taught
from issl.audit.plots import channels
from issl.audit.stats.statistics import Estimate
from issl.data.images import Images

COLOURS = {
    name: sns.color_palette(figures.PALETTE)[k]
    for name, k in {"influence": 0, "training-aware": 2, "nearest": 1}.items()
}
TITLES = {
    "influence": "highest influence on it",
    "training-aware": "highest training-aware influence",
    "nearest": "nearest",
}
# panels by row: the quantity, its axis, and whose comparisons are also shown in every way to
# measure
ROWS = {
    "moved": ("change of the query", "log cosine distance"),
    "rise": ("rise of its stability loss", "log loss"),
}
EVERY_WAY = (
    "change_less_nearest",
    "change_less_random",
    "nearest_change_less_random",
    "influence_rise_less_random",
    "rise_less_random",
    "rise_less_anothers",
)


def lists(
    plan: Taught, images: Images, queries: Images, first: Mapping[str, Int[np.ndarray, "q k"]]
) -> Figure:
    """A row per query: the query, then the images that lead each list.

    first   positions among `images`, the best first, by the name of the list
    """
    rows = min(plan.shown, len(queries))
    widths = [1.0] + [float(plan.top)] * len(first)
    size = (kit.PAGE, 0.3 + kit.PAGE / (sum(widths) + 1) * rows)
    figure, axes = plt.subplots(1, len(widths), figsize=size, width_ratios=widths)
    kit.gallery(axes[0], queries.subset(range(rows)), "query", columns=1)
    for ax, (name, rank) in zip(axes[1:], first.items(), strict=True):
        pixels = images.pixels[rank[:rows, : plan.top].ravel()]  # an image may be on several lists
        chosen = Images(pixels, None, pd.DataFrame({"index": range(len(pixels))}), images.name)
        kit.gallery(ax, chosen, TITLES[name], columns=plan.top)
    return figure


Results = Mapping[Kind, Mapping[Channel, Mapping[str, Estimate]]]


def retraining(
    plan: Taught,
    compared: Mapping[str, tuple[str, str, str]],
    results: Results,
    overlap: float,
    n: int,
) -> Figure:
    """A row for the change of a query, one for the rise of its loss: by the kind of retraining,
    BatchNorm held; and some of the comparisons in every way to measure, where training continued.

    compared   of each metric: what is measured (moved, rise), and the two removals that are
               compared
    results    the metrics by kind of retraining and way to measure
    overlap    the share common to the lists of influence and of the nearest; n: how many training
               images there are
    """
    figure, axes = plt.subplots(2, 3, figsize=(kit.PAGE, 4.6), width_ratios=[1, 1, 1.15])
    for panels, letters, (what, (title, unit)) in zip(
        axes, ("abc", "def"), ROWS.items(), strict=True
    ):
        ours = {name: _words(a, b) for name, (of, a, b) in compared.items() if of == what}
        label = f"difference of\n{unit}"
        for ax, letter, kind in zip(panels, letters, plan.kinds_of_retraining, strict=False):
            held = results[kind]["BatchNorm held"]
            colours = [COLOURS[compared[name][1]] for name in ours]
            figures.forest(
                ax, [(text, held[name]) for name, text in ours.items()], label, 0.0, colours
            )
            ax.set_title(f"{letter}  {title},\n{kind}", loc="left")
        panels[1].set_yticklabels([])
        some = [name for name in ours if name in EVERY_WAY]
        _every_way(panels[2], results["continued"], {name: ours[name] for name in some}, label)
        panels[2].set_title(
            f"{letters[2]}  rows of {letters[0]},\nmeasured in three ways", loc="left"
        )
        for ax in panels:
            ax.tick_params(axis="y", labelsize=6.5)
    channels.legend(
        figure,
        axes[0][2],
        {"BatchNorm held": "as in a, b, d, e", "BatchNorm alone": "no weight trained"},
    )
    figure.suptitle(_headline(plan, results, overlap, n), fontsize=7.5)
    return figure


def _words(a: str, b: str) -> str:
    return f"{a} − {'another’s' if b.startswith(a) else b}"


def _every_way(
    ax: Axes,
    results: Mapping[Channel, Mapping[str, Estimate]],
    names: Mapping[str, str],
    label: str,
) -> None:
    by_channel: dict[str, list[Estimate]] = {
        channel: [metrics[name] for name in names] for channel, metrics in results.items()
    }
    channels.forest(ax, [text.replace(" − ", "\n− ") for text in names.values()], by_channel, label)


def _headline(plan: Taught, results: Results, overlap: float, n: int) -> str:
    changes, rises = (
        ", ".join(
            _times(results[kind]["BatchNorm held"][name], kind) for kind in plan.kinds_of_retraining
        )
        for name in ("change_less_nearest", "rise_less_anothers")
    )
    return (
        f"Change of a query without its {plan.k} most influential images: {changes} times that "
        "without its nearest\n"
        f"Its loss without its training-aware list: {rises} times that without another query’s "
        "(“another’s”)\n"
        f"({plan.set_name}, n = {n}, {plan.asked} queries, {plan.seeds} seeds, {plan.profile} "
        "profile; bars: 95%; "
        f"{overlap:.0%} of the images of highest influence are among the nearest)"
    )


def _times(log: Estimate, kind: Kind) -> str:
    value, low, high = np.exp([log.value, log.low, log.high])
    return f"{value:.2f} [{low:.2f}, {high:.2f}] ({kind})"
