"""The figures of notebook 17: the formula as a derivative, under another loss, and under
damping."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from issl.audit import figures
from issl.audit.plans_own import Derivation
from issl.audit.stats.statistics import Estimate

TRAINED = ("stability loss", "Barlow Twins")  # on what, in the order of the colours C0 and C1


def derived(
    plan: Derivation,
    by_epsilon: pd.DataFrame,
    stopped: pd.DataFrame,
    predicted: Float[Tensor, " n"],
    change: Float[Tensor, " n"],
    r: Estimate,
) -> Figure:
    """The formula against retraining: as ε shrinks, for whole images, and for trainings that stop
    early.

    by_epsilon   epsilon, error
    stopped      steps, formula, error: two formulas for each number of steps
    predicted, change   influence / n, and what leaving the image out did to its own loss; r: their
                        rank correlation
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(figures.PAGE, 2.5))
    left.loglog(by_epsilon["epsilon"], by_epsilon["error"], marker="o", color="C0")
    left.set(xlabel="ε, the image's extra weight", ylabel="relative error of −H⁻¹g")
    left.set_title("a  exact as ε → 0", loc="left")
    middle.scatter(predicted, change, s=9, lw=0, color="C0")
    middle.axline((0, 0), slope=1, color="grey", lw=0.7, ls=":")
    smallest = 0.5 * float(min(predicted.min(), change[change > 0].min()))
    middle.set(xscale="log", yscale="log", xlim=(smallest, None), ylim=(smallest, None))
    middle.set(xlabel="influence / n", ylabel="rise of its own loss,\ntrained without the image")
    middle.set_title(f"b  leaving out: ρ = {r.value:.2f}", loc="left")
    for k, (name, part) in enumerate(stopped.groupby("formula", sort=False)):
        right.loglog(part["steps"], part["error"], marker="o", ms=3, color=f"C{k}", label=name)
    right.set(xlabel="steps T of gradient descent", ylabel="relative error")
    right.set_title("c  stopped early", loc="left")
    right.legend(frameon=False)
    figure.suptitle(
        "At a minimum the formula is the derivative of the retrained weights; before it, damping helps\n"
        f"({plan.set_name}, {plan.images} images, {plan.hidden} tanh units; dotted: equality)",
        fontsize=8.5,
    )
    return figure


def another_loss(
    plan: Derivation,
    agreement: Mapping[str, Mapping[str, Estimate]],
    spectra: Mapping[str, Float[Tensor, " p"]],
) -> Figure:
    """How well each formula ranks what training without each image does, by the loss that was
    trained; eigenvalues.

    agreement   by the loss that was trained, then by formula
    spectra     eigenvalues by curvature, largest first
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(figures.PAGE, 3.0), width_ratios=[1.35, 1])
    colours = {trained: f"C{k}" for k, trained in enumerate(TRAINED)}
    by_group = {trained: list(agreement[trained].values()) for trained in TRAINED}
    label = "Spearman ρ with the change of the image's own\nstability loss, trained without it"
    figures.forests(left, list(agreement[TRAINED[0]]), by_group, label, 0.0, colours)
    handles, names = left.get_legend_handles_labels()
    names = [f"trained on: {name}" for name in names]
    figure.legend(handles, names, frameon=False, loc="outside lower left", ncols=2)
    left.set_title("a  which formula ranks what retraining shows?", loc="left")
    for k, (name, e) in enumerate(spectra.items()):
        right.plot(range(1, len(e) + 1), e, color=f"C{k + 2}", label=name, lw=1.3)
    scale = float(max(e[0] for e in spectra.values()))
    right.set_yscale("symlog", linthresh=1e-5 * scale, linscale=0.4)
    right.set_yticks([-(10.0**k) for k in (-1, -3)] + [0] + [10.0**k for k in (-5, -3, -1)])
    right.axhline(0, color="grey", lw=0.7)
    right.set(xlabel="eigenvalue, by size", ylabel="eigenvalue (logarithmic)")
    right.set_title("b  only the Hessian goes below 0", loc="left")
    right.legend(frameon=False)
    both = [agreement[t]["paper's: Fisher by layer"].value for t in TRAINED]
    figure.suptitle(
        f"The paper's formula ranks retraining with ρ = {both[0]:.2f} where the stability loss is what was trained, "
        f"{both[1]:.2f} where it is not\n({plan.set_name}, {plan.images} images; bars: 95% intervals)",
        fontsize=8.5,
    )
    return figure


def damped(
    plan: Derivation,
    scores: Float[np.ndarray, "d n"],
    sweep: pd.DataFrame,
    by_rank: pd.DataFrame,
    directions: float,
) -> Figure:
    """Scores from no damping to much, what they become, and what a projection keeps.

    scores      one row for each damping of `sweep` (damping, mean_score, leverage, norm)
    by_rank     rank, projection, directions, rho
    directions  the mean of the exact scores at the paper's damping
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(figures.PAGE, 2.6))
    left.loglog(sweep["damping"], scores, color="C0", lw=0.5, alpha=0.5)
    middle.semilogx(sweep["damping"], sweep["leverage"], color="C2", label="leverage")
    middle.semilogx(sweep["damping"], sweep["norm"], color="C3", label="‖g‖², by layer")
    for ax in (left, middle):
        ax.axvline(plan.damping, color="grey", lw=0.8, ls="--")
        ax.set_xlabel("damping (dashed: the score's)")
    left.set(ylabel="influence, one line per image")
    left.set_title("a  from rarity to size", loc="left")
    middle.set(ylabel="Spearman ρ of the scores with", ylim=(None, 1.05))
    middle.set_title("b  what is ranked", loc="left")
    middle.legend(frameon=False)
    for k, (projection, part) in enumerate(by_rank.groupby("projection", sort=False)):
        right.plot(
            part["rank"], part["directions"] / directions, color=f"C{k}", marker="o", ms=3, ls=":"
        )
        right.plot(part["rank"], part["rho"], color=f"C{k}", marker="o", ms=3, label=projection)
    right.set(xscale="log", xlabel="LoGra rank k", ylim=(None, 1.05))
    right.set_title("c  ranking (solid), level (dotted)", loc="left")
    right.legend(frameon=False)
    figure.suptitle(
        "Little damping ranks images by how rare their gradient's direction is, much by how long it is\n"
        f"({plan.set_name}, {plan.images} images; c: ρ with the exact scores, and mean score ÷ theirs)",
        fontsize=8.5,
    )
    return figure
