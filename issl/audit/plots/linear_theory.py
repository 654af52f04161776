"""The figure of notebook 09: the closed form against automatic differentiation, retraining, and
another seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from issl.audit import figures
from issl.audit.plans_paper import LinearTheory
from issl.audit.stats.statistics import Estimate


def checks(
    plan: LinearTheory,
    closed: Mapping[str, Tensor],
    by_autograd: Mapping[str, Tensor],
    retrained: pd.DataFrame,
    found: Mapping[str, Estimate],
    agreement: Sequence[tuple[str, Estimate]],
) -> Figure:
    """Two checks of the scores, and how well two seeds agree.

    closed, by_autograd  (n,) scores by perturbation
    retrained            perturbation, influence_over_n, change_of_loss: one row per training
                         without an image
    found                the correlation of these two by perturbation
    agreement            of two seeds, by perturbation and loss
    """
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(figures.PAGE, 2.6), width_ratios=[1, 1, 0.9]
    )
    for k, (name, r) in enumerate(found.items()):
        left.scatter(
            closed[name], by_autograd[name], s=7, color=f"C{k}", label=name, alpha=0.7, lw=0
        )
        part = retrained[retrained["perturbation"] == name]
        label = f"{name}, r = {r.value:.3f}"
        middle.scatter(
            part["influence_over_n"], part["change_of_loss"], s=9, color=f"C{k}", lw=0, label=label
        )
    left.axline((1e-3, 1e-3), (1, 1), color="grey", lw=0.7, ls=":")
    left.set(
        xscale="log", yscale="log", xlabel="sensitivity × leverage", ylabel="gᵀ H⁻¹ g by autograd"
    )
    difference = max(float((by_autograd[name] / closed[name] - 1).abs().max()) for name in found)
    left.set_title(f"a  equal to {difference:.0e}", loc="left")
    left.legend(frameon=False)
    middle.axline((0, 0), slope=1, color="grey", lw=0.7, ls=":")
    middle.set(xlabel="influence / n", ylabel="change of its own loss,\ntrained without the image")
    middle.set_title("b  against retraining", loc="left")
    middle.legend(frameon=False, fontsize=6.5, loc="upper left", handletextpad=0)
    lines = [(name.replace(", ", ",\n"), r) for name, r in agreement]
    figures.forest(right, lines, "Spearman ρ, two seeds", 0.0, ["C0", "C0", "C1", "C1"])
    right.set_title("c  whose influence?", loc="left")
    worst = min(found.values(), key=lambda r: r.low)
    figure.suptitle(
        "In a linear encoder influence is sensitivity × leverage; influence / n predicts retraining "
        f"with r = {worst.value:.3f} [{worst.low:.3f}, {worst.high:.3f}] or better\n"
        f"({plan.set_name}, n = {plan.points}, {plan.side}×{plan.side} grey, {plan.profile} profile; "
        "dotted: equality; bars: 95% intervals)",
        fontsize=8.5,
    )
    return figure
