"""The figures of notebook 15: two lists for a query, and what retraining without each of them changes."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from issl.analysis.statistics import Estimate
from issl.data.images import Images
from issl.experiments.plans_own import Kind, Taught
from issl.reporting import figures

COMPARED = {
    "change_less_nearest": "influence − nearest",
    "change_less_random": "influence − random",
    "change_less_anothers": "influence −\nanother's list",
    "nearest_less_random": "nearest − random",
    "nearest_less_anothers": "nearest −\nanother's list",
}
RISES = {"loss_rise": "influence", "loss_rise_nearest": "nearest"}


def lists(plan: Taught, images: Images, queries: Images, first: Mapping[str, Int[np.ndarray, "q k"]]) -> Figure:
    """A row per query: the query, its images of highest influence, a gap, its nearest images.

    first   positions among `images`, the best first, of "influence" and "nearest"
    """
    rows = min(plan.shown, len(queries))
    figure, ax = plt.subplots(figsize=(figures.PAGE, 0.55 + 0.38 * rows))
    gap, pixels = torch.full_like(images.pixels[:1], 255), []
    for q in range(rows):
        taught, near = (images.pixels[first[name][q][: plan.top]] for name in ("influence", "nearest"))
        pixels += [queries.pixels[q : q + 1], taught, gap, near]
    shown = torch.cat(pixels)
    gallery = Images(shown, None, pd.DataFrame({"index": range(len(shown))}), images.name)
    title = f"query | {plan.top} of highest influence on it | its {plan.top} nearest"
    figures.gallery(ax, gallery, title, columns=2 * plan.top + 2)
    return figure


def retraining(
    plan: Taught, results: Mapping[Kind, Mapping[str, Estimate]], rho: np.ndarray, overlap: float, n: int
) -> Figure:
    """(a), (b) how much a query changes, by the kind of retraining; (c) how much less stable it is; (d) both scores.

    results  of each kind of retraining, by metric
    rho      of each query the rank correlation of influence and similarity; overlap: the share common to both lists
    n        how many training images there are
    """
    size = (figures.PAGE, 2.7)
    figure, (continued, scratch, losses, both) = plt.subplots(1, 4, figsize=size, width_ratios=[1, 1, 0.9, 0.8])
    blue, orange = figures.COLOURS[plan.method], sns.color_palette(figures.PALETTE)[1]
    for ax, kind, letter in zip((continued, scratch), plan.kinds_of_retraining, "ab", strict=True):
        lines = [(text, results[kind][name]) for name, text in COMPARED.items()]
        figures.forest(ax, lines, "change of the query\n(log cosine distance)", 0.0, [blue] * 3 + [orange] * 2)
        ax.set_title(f"{letter}  {kind}", loc="left")
    scratch.set_yticklabels([])
    lines = [
        (f"{text}\n({kind})", results[kind][name]) for kind in plan.kinds_of_retraining for name, text in RISES.items()
    ]
    figures.forest(losses, lines, "rise of its log loss,\nless without random ones", 0.0, [blue, orange] * 2)
    losses.set_title("c  less stable?", loc="left")
    losses.tick_params(axis="y", labelsize=6.5)
    _histogram(both, rho)
    both.set_title("d  do they differ?", loc="left")
    figure.suptitle(_headline(plan, results, overlap, n), fontsize=8)
    return figure


def _histogram(ax: Axes, rho: np.ndarray) -> None:
    ax.hist(rho, bins=np.linspace(-1, 1, 21).tolist(), color="0.6")
    ax.set(xlabel="ρ of influence and\nsimilarity, one query", ylabel="queries", xlim=(-1, 1))
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.axvline(0, color="grey", lw=0.8, ls="--")


def _headline(plan: Taught, results: Mapping[Kind, Mapping[str, Estimate]], overlap: float, n: int) -> str:
    times = []
    for kind in plan.kinds_of_retraining:
        e = results[kind]["change_less_nearest"]
        value, low, high = np.exp([e.value, e.low, e.high])
        times.append(f"{value:.2f} [{low:.2f}, {high:.2f}] ({kind})")
    return (
        f"Without the {plan.k} images of highest influence on it a query changes {' and '.join(times)}\n"
        f"times as much as without its {plan.k} nearest; the lists share {overlap:.0%} ({plan.dataset}, n = {n}, "
        f"{plan.asked} queries, {plan.seeds} seeds, {plan.profile} profile; bars: 95%)"
    )
