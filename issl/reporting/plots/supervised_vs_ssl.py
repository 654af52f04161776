"""The figures of notebook 08: do the scores of supervised and SSL models agree, and how do both respond to pruning?"""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from scipy import stats

from issl.analysis.statistics import Estimate
from issl.data.images import Images
from issl.experiments.plans_paper import SupervisedVsSSL
from issl.pretraining.recipes import NAMES
from issl.reporting import figures

SHORT = {
    "supervised, ": "sup. ", "supervised: ": "sup.: ", "cross-entropy": "CE", "stability loss": "stability",
}  # fmt: skip
BOUND = 0.5  # of the claim


def agreement(
    plan: SupervisedVsSSL, images: Images, ssl: np.ndarray, supervised: np.ndarray,
    measured: Mapping[str, Mapping[str, Estimate]],
) -> Figure:  # fmt: skip
    """Ranks of both scores, how well all pairs of scores agree, and the images of highest influence on each model.

    ssl, supervised  (n,) scores of the first method, and of the supervised model's cross-entropy
    measured         by pair of scores, the claim's pair first: spearman, overlap_top5
    """
    first = NAMES[plan.methods[0]]
    claimed = next(iter(measured.values()))["spearman"]
    figure = plt.figure(figsize=(figures.PAGE, 5.4))
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.15, 1])[:, 0]
    scatter, rho, shared = above.subplots(1, 3, width_ratios=[1.05, 1, 1])
    x, y = (100 * stats.rankdata(score) / len(score) for score in (ssl, supervised))
    scatter.scatter(x, y, s=4, alpha=0.4, lw=0, color=figures.COLOURS[plan.methods[0]], rasterized=True)
    scatter.set(xlabel=f"influence rank, {first} (%)", ylabel="supervised, cross-entropy (%)")
    scatter.set_title(f"a  ρ = {claimed}", loc="left")
    _all_pairs(rho, {name: es["spearman"] for name, es in measured.items()}, "Spearman ρ", 0.0)
    rho.set_title("b  dotted: the bound", loc="left")
    top = {name: es["overlap_top5"] for name, es in measured.items()}
    _all_pairs(shared, top, "overlap of the top 5%", 0.05)
    shared.set_title("c  dashed: chance", loc="left")
    shared.set_yticklabels([])
    _highest(below, images, {first: ssl, "supervised, cross-entropy": supervised})
    between = [es["spearman"].value for name, es in measured.items() if "supervised" not in name]
    others = f"; two SSL methods: ρ = {min(between):.2f} to {max(between):.2f}" if between else ""
    figure.suptitle(
        f"{first} and a supervised model: ρ = {claimed}{others}\n"
        f"({plan.dataset}, n = {plan.n:,}, {plan.profile} profile; bars: 95% intervals)",
        fontsize=8.5,
    )
    return figure


def _all_pairs(ax: Axes, estimates: Mapping[str, Estimate], label: str, nothing: float) -> None:
    """One line per pair; those that the claim is about in red."""
    lines, colours = [], []
    for pair, e in estimates.items():
        name = pair
        for long, short in SHORT.items():
            name = name.replace(long, short)
        lines.append((name, e))
        colours.append("C3" if "~ sup. CE" in name else "0.4")
    figures.forest(ax, lines, label, nothing, colours)
    ax.axvline(BOUND, color="black", lw=0.7, ls=":")
    ax.tick_params(axis="y", labelsize=6.5)


def _highest(figure: SubFigure, images: Images, scores: Mapping[str, np.ndarray]) -> None:
    """The 30 images of highest influence by each score."""
    classes = images.attributes["label_name"]
    for ax, (name, score) in zip(figure.subplots(1, len(scores)), scores.items(), strict=True):
        rows = np.argsort(-score, kind="stable")[:30]
        title = f"highest influence, {name}\n({classes.iloc[rows].nunique()} classes)"
        figures.gallery(ax, images.subset(rows), title, columns=10)


def pruning_response(plan: SupervisedVsSSL, differences: pd.DataFrame) -> Figure:
    """The probe's accuracy without some images less that with all, of both models.

    differences  trained, removed, value, low, high, n: one row per model and a way to remove
    """
    first = NAMES[plan.methods[0]]
    names = {
        "top by ssl": f"top {plan.share:.0%} by {first}", "top by supervised": f"top {plan.share:.0%} by supervised",
        "random": f"random {plan.share:.0%}",
    }  # fmt: skip
    points = {(r["trained"], r["removed"]): Estimate.of(r).scaled(100) for r in differences.to_dict("records")}
    figure, axes = plt.subplots(1, 2, figsize=(figures.PAGE, 1.9), sharey=True)
    for ax, model in zip(axes, plan.trained, strict=True):
        lines = [(name, points[model, removed]) for removed, name in names.items()]
        figures.forest(ax, lines, "probe accuracy less that with all images (points)", 0.0)
        ax.set_title(f"{NAMES[model]} trained without", loc="left")
    value = {(model == "supervised", removed): e.value for (model, removed), e in points.items()}
    figure.suptitle(
        f"Without the top {plan.share:.0%} by SSL influence: {first} {value[False, 'top by ssl']:+.1f}, "
        f"supervised {value[True, 'top by ssl']:+.1f} points; "
        f"at random {value[False, 'random']:+.1f}, {value[True, 'random']:+.1f}\n"
        f"({plan.dataset}, n = {plan.n:,}, {plan.seeds} seeds, {plan.profile} profile; bars: 95% intervals over seeds)",
        fontsize=8.5,
    )
    return figure
