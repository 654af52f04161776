"""The figures of notebook 02: what the perturbations look like, and how well two seeds agree under
each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from issl.audit import figures, kit
from issl.audit.plans_paper import AUGMENTATIONS, AugmentationAblation
from issl.audit.stats.statistics import Estimate
from issl.data.images import Images
from issl.pretraining.recipes import NAMES

PAPER, PAPER_AUGMENTED = (
    0.974,
    (0.719, 0.744),
)  # the paper's r under Gaussian noise, and under SSL augmentations
COLOURS = dict(
    zip(("noise", *AUGMENTATIONS), sns.color_palette(figures.PALETTE, 7), strict=True)
) | {"centred": "0.45"}
LABELS = {"noise": "Gaussian noise", "chain": "full SSL chain", "centred": "Gaussian noise, mean 0"}


def gallery(plan: AugmentationAblation, images: Images, views: dict[str, Tensor]) -> Figure:
    """A few images, and their views in [0, 1] under each perturbation."""
    figure, axes = plt.subplots(1, 1 + len(views), figsize=(kit.PAGE, 2.1))
    kit.gallery(axes[0], images, "image", columns=2)
    for ax, (name, view) in zip(axes[1:], views.items(), strict=True):
        seen = Images((view.clamp(0, 1) * 255).round().byte(), None, images.attributes, images.name)
        kit.gallery(
            ax, seen, f"noise σ={plan.std:g}" if name == plan.usual else _kind(name), columns=2
        )
    return figure


def comparison(
    plan: AugmentationAblation,
    images: Images,
    table: pd.DataFrame,
    untrained: pd.DataFrame,
    rival: Mapping[Any, Any],
) -> Figure:
    """The first method's r between two seeds: at usual strength (a), by strength (b) and by the
    number of draws (c).

    table  method, perturbation, draws, mean_loss, metric, value, low, high, n
    untrained  the same of the network before training (a cross in a)
    rival  the best augmentation: perturbation, r, inside_grid, margin_usual, margin_matched
    """
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(kit.PAGE, 2.9), width_ratios=[1.05, 1.3, 0.9]
    )
    r = table[(table["method"] == plan.methods[0]) & (table["metric"] == "pearson")]
    first = r[r["draws"] == plan.draws[0]]
    by_name = _by_name(first)
    order = _best_first(plan, first)
    left.axvspan(*PAPER_AUGMENTED, color="0.85", lw=0)
    left.axvline(PAPER, color="black", lw=0.9)
    rows = [(_label(name), by_name[name]) for name in order]
    figures.forest(
        left, rows, "Pearson r between two seeds", None, [COLOURS[_kind(name)] for name in order]
    )
    before = _by_name(
        untrained[(untrained["method"] == plan.methods[0]) & (untrained["metric"] == "pearson")]
    )
    places = range(len(order) - 1, -1, -1)
    left.plot([before[name].value for name in order], list(places), "x", color="0.4", ms=4)
    left.set_title("a  one draw (×: untrained)", loc="left")
    for kind in COLOURS:
        part = first[first["perturbation"].map(_kind) == kind].sort_values("mean_loss")
        part = part.assign(
            mean_loss=part["mean_loss"] * (1.06 if kind == "centred" else 1)
        )  # else one hides the other
        _curve(middle, part, "mean_loss", kind, 1.4 if kind in ("noise", "centred") else 0.8)
    lowest = min(0, first["low"].min()) - 0.03
    middle.set(xscale="log", xlabel="strength: mean stability loss (log)", ylim=(lowest, 1.05))
    middle.set_title("b  by strength", loc="left")
    for name in (plan.usual, *plan.at_full()):
        _curve(right, r[r["perturbation"] == name], "draws", _kind(name), 1.2)
    right.axhspan(*PAPER_AUGMENTED, color="0.85", lw=0)
    right.axhline(PAPER, color="black", lw=0.9)
    right.set(xscale="log", xlabel="draws K averaged", ylim=middle.get_ylim())
    right.set_xticks(list(plan.draws), [str(k) for k in plan.draws])
    right.minorticks_off()
    right.set_title("c  more draws", loc="left")
    matched = (
        f"at equal strength {rival['margin_matched']}"
        if rival["inside_grid"]
        else "no noise of the grid is as weak"
    )
    figure.suptitle(
        f"Gaussian noise r = {by_name[plan.usual].value:.2f}; "
        f"best augmentation ({_kind(rival['perturbation'])}) r = {rival['r']:.2f}; "
        f"margin {rival['margin_usual']}, {matched}\n"
        f"({images.name}, {len(images):,} images scored, {NAMES[plan.methods[0]]}, {plan.profile} "
        "profile; "
        "bars: 95% intervals;\n"
        "colours as in a, grey: noise of mean 0, drawn a little to the right; line and band: the "
        "paper)",
        fontsize=8.5,
    )
    return figure


def each_method(plan: AugmentationAblation, images: Images, first: pd.DataFrame) -> Figure:
    """r between two seeds at usual strength, a row per perturbation, the methods in their colours.

    first  rows of `comparison`'s table: Pearson's r, the first number of draws
    """
    by_method = {method: _by_name(first[first["method"] == method]) for method in plan.methods}
    order = _best_first(plan, first[first["method"] == plan.methods[0]])
    figure, ax = plt.subplots(figsize=(kit.PAGE * 0.62, 0.7 + 0.22 * len(order)))
    rows: dict[str, Sequence[Estimate]] = {
        method: [of[name] for name in order] for method, of in by_method.items()
    }
    label = "Pearson r between two seeds, usual strength, one draw"
    figures.forests(ax, [_label(name) for name in order], rows, label, 0.0)
    ax.axvline(PAPER, color="black", lw=0.9)
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set_title(
        "Gaussian noise: r = "
        f"{', '.join(f'{of[plan.usual].value:.2f}' for of in by_method.values())}; "
        f"line: the paper's {PAPER}\n"
        f"({images.name}, {len(images):,} images scored, {plan.profile} profile; bars: 95% "
        "intervals)",
        loc="left",
    )
    return figure


def _kind(name: str) -> str:
    return name.split()[0]


def _label(name: str) -> str:
    return LABELS.get(_kind(name), _kind(name))


def _by_name(first: pd.DataFrame) -> dict[str, Estimate]:
    return {r["perturbation"]: Estimate.of(r) for r in first.to_dict("records")}


def _best_first(plan: AugmentationAblation, first: pd.DataFrame) -> list[str]:
    """The paper's noise and every augmentation at strength 1, by their r."""
    names = [plan.usual, *plan.at_full()]
    by_name = _by_name(first)
    return sorted(names, key=lambda name: -by_name[name].value)


def _curve(ax: Axes, part: pd.DataFrame, x: str, kind: str, width: float) -> None:
    spread = [part["value"] - part["low"], part["high"] - part["value"]]
    ax.errorbar(
        part[x],
        part["value"],
        yerr=spread,
        marker="o",
        ms=3.5,
        lw=width,
        color=COLOURS[kind],
        elinewidth=0.7,
        label=_label(kind),
    )
