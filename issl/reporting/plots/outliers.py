"""The figure of notebook 07: how well the score, and simpler ones, find the images that were injected."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from issl.analysis.statistics import Estimate
from issl.data.images import Images
from issl.experiments.plans_paper import Outliers
from issl.pretraining.recipes import NAMES
from issl.reporting import figures


def detected(
    plan: Outliers,
    images: Images,
    influence: np.ndarray,
    truths: dict[str, np.ndarray],
    found: dict[tuple[str, str, str, str], Estimate],
    less_loss: Estimate,
) -> Figure:
    """The first method's images of highest influence, and the AUC of every detector, for each kind of image.

    influence  (n,) of the first method
    truths     which images (n,) are strange: `all`, and each kind
    found      by method, detector, truth and metric
    less_loss  AUC of the first method's influence less that of its stability loss
    """
    first, strange = plan.methods[0], truths["all"]
    figure = plt.figure(figsize=(figures.PAGE, 4.7))
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[1, 1.9])[:, 0]
    rows = np.argsort(-influence, kind="stable")[:32]
    title = (
        f"{NAMES[first]}: the 32 of highest influence; outlined: {strange[rows].sum()} injected "
        f"({strange.mean():.1%} of all images are)"
    )
    figures.gallery(above.subplots(), images.subset(rows), title, columns=16, frames=strange[rows].tolist())
    detectors = list(dict.fromkeys(detector for _, detector, _, _ in found))
    keys = [(m, detector) for detector in detectors for m in plan.methods]
    panels = below.subplots(1, len(truths), sharey=True, squeeze=False)[0]
    for ax, (truth, positive) in zip(panels, truths.items(), strict=True):
        lines = [(f"{detector}, {NAMES[m]}", found[m, detector, truth, "auc"]) for m, detector in keys]
        figures.forest(ax, lines, "AUC", 0.5, [figures.COLOURS[m] for m, _ in keys])
        ax.set_title(f"{truth} ({positive.sum()})", loc="left")
        ax.set_xlim(-0.03, 1.03)
        ax.set_xticks([0, 0.5, 1])
        _shade(ax, [detector == "influence" for _, detector in keys])
    figure.suptitle(
        f"{NAMES[first]}: influence finds injected strange images with AUC {found[first, 'influence', 'all', 'auc']}; "
        f"{less_loss.value:+.2f} [{less_loss.low:+.2f}, {less_loss.high:+.2f}] against the plain loss\n"
        f"({plan.dataset}, n = {plan.n:,}, {plan.profile} profile; bars: 95% intervals; dashed: chance)",
        fontsize=8.5,
    )
    return figure


def _shade(ax: Axes, rows: list[bool]) -> None:
    """A grey band behind these rows of a forest, the first on top."""
    for k, shaded in enumerate(rows):
        if shaded:
            ax.axhspan(len(rows) - 1.5 - k, len(rows) - 0.5 - k, color="0.93", lw=0, zorder=0)
