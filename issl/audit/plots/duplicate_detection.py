"""The figures of notebook 04: how well each detector finds duplicates, and the images of lowest
influence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve

from issl.audit import figures
from issl.audit.plans_paper import Duplicates
from issl.audit.stats.statistics import Estimate
from issl.data.images import Images
from issl.pretraining.recipes import NAMES

Key = tuple[str, str]  # method ("" for what needs no encoder), detector
Detectors = Mapping[Key, np.ndarray]

LINES = {
    "low influence": "-",
    "nearest in features": "--",
}  # the detectors of a method whose curve is drawn
GREYS = {"nearest in pixels": "0.2", "perceptual hash": "0.65"}


def label(method: str, detector: str) -> str:
    """A detector's name in figures and tables."""
    return f"{detector}, {NAMES[method]}" if method else detector


def by_detector(detectors: Detectors) -> list[Key]:
    """The keys in another order: all methods of one detector side by side."""
    order = list(dict.fromkeys(detector for _, detector in detectors))
    return sorted(detectors, key=lambda key: order.index(key[1]))


def found(
    plan: Duplicates,
    images: Images,
    detectors: Detectors,
    truths: Mapping[str, tuple[np.ndarray, np.ndarray]],
    table: pd.DataFrame,
) -> Figure:
    """A row per truth: precision-recall curves, average precision and AUC of every detector.

    truths  of each truth which images are duplicates, (n,), and which are asked about, (n,)
    table   method, detector, truth, metric, value, low, high, n
    """
    numbers = {
        (r["method"], r["detector"], r["truth"], r["metric"]): Estimate.of(r)
        for r in table.to_dict("records")
    }
    figure = plt.figure(figsize=(figures.PAGE, 2.9 * len(truths)))
    keys = by_detector(detectors)
    names, colours = (
        [label(*key) for key in keys],
        [figures.COLOURS.get(method, "0.4") for method, _ in keys],
    )
    parts = figure.subfigures(len(truths), 1, squeeze=False)[:, 0]
    for part, (truth, (positive, asked)) in zip(parts, truths.items(), strict=True):
        curve, precision, area = part.subplots(1, 3, width_ratios=[1, 1.15, 1.0])
        _curves(curve, {key: score[asked] for key, score in detectors.items()}, positive[asked])
        curve.set_title(
            f"{truth} pairs, encoders of seed {plan.seed}\nsolid: low influence; dashed: nearest in\n"
            "features; dotted: pixels (dark), hash (light)",
            loc="left",
            fontsize=7.5,
        )
        chance = positive[asked].mean()
        panels = (
            (precision, "average_precision", chance, "average precision"),
            (area, "auc", 0.5, "AUC"),
        )
        for ax, metric, nothing, words in panels:
            rows = [
                (name, numbers[(*key, truth, metric)])
                for name, key in zip(names, keys, strict=True)
            ]
            figures.forest(ax, rows, words, nothing, colours)
            ax.set_xlim(0, 1.03)
            ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
            ax.tick_params(axis="y", labelsize=6.5)
        area.set_yticklabels([])
    main = next(iter(truths))
    ours = {
        method: numbers[method, "low influence", main, "average_precision"]
        for method in plan.methods
    }
    best = max(plan.methods, key=lambda method: ours[method].value)
    members = ", ".join(f"{positive.sum()} {truth}" for truth, (positive, _) in truths.items())
    figure.suptitle(
        f"Average precision of low influence for {main} duplicates: {ours[best]} at best ({NAMES[best]}); "
        f"nearest in its features: {numbers[best, 'nearest in features', main, 'average_precision']}\n"
        f"({images.name}, n = {len(images):,}, {members}, "
        f"{plan.profile} profile; bars: 95% intervals; grey dashes: chance)",
        fontsize=8.5,
    )
    return figure


def _curves(ax: Axes, detectors: Detectors, positive: np.ndarray) -> None:
    for (method, detector), score in detectors.items():
        if (method and detector in LINES) or detector in GREYS:
            precision, recall, _ = precision_recall_curve(positive, score)
            colour = figures.COLOURS.get(method, GREYS.get(detector))
            ax.plot(recall, precision, color=colour, ls=LINES.get(detector, ":"), lw=1.1)
    ax.axhline(positive.mean(), color="grey", lw=0.8, ls="--")
    ax.set(xlabel="recall", ylabel="precision", ylim=(0, 1.02), xlim=(0, 1))


def lowest_of_each_class(
    plan: Duplicates, images: Images, lowest: Mapping[str, Sequence[int]], duplicates: np.ndarray
) -> Figure:
    """The images of lowest influence, five a class (a row), by method; known duplicates are
    outlined.

    lowest      of each method the positions, class by class in alphabetical order
    duplicates  (n,) is the image a member of a known pair?
    """
    classes = sorted(images.attributes["label_name"].unique())
    size = (figures.PAGE, 0.36 * len(classes) + 0.6)
    figure, axes = plt.subplots(1, len(lowest), figsize=size, squeeze=False)
    for ax, (method, rows) in zip(axes[0], lowest.items(), strict=True):
        title = f"{NAMES[method]}: {duplicates[rows].sum()} of {len(rows)} in a pair"
        figures.gallery(ax, images.subset(rows), title, columns=5, frames=duplicates[rows].tolist())
    first, side = axes[0, 0], images.pixels.shape[-1] + 3
    first.set_axis_on()
    first.set_yticks([side * (k + 0.5) for k in range(len(classes))], classes)
    first.set_xticks([])
    first.tick_params(length=0)
    for spine in first.spines.values():
        spine.set_visible(False)
    figure.suptitle(
        f"The five images of lowest influence in each class ({images.name}, {plan.profile} profile; "
        f"outlined: known duplicates, {duplicates.mean():.0%} of all)",
        fontsize=8.5,
    )
    return figure


def series(plan: Duplicates, copies: Images, places: pd.DataFrame) -> Figure:
    """Where the images of the largest series rank, under each encoder.

    copies  its images
    places  encoder (its name), seed, rank in (0, 1], 1 the highest influence: a row per image and
            encoder
    """
    names = list(dict.fromkeys(places["encoder"]))
    colours = {NAMES[m]: colour for m, colour in figures.COLOURS.items() if m in NAMES}
    rows = [
        (str(name), seed, group["rank"])
        for (name, seed), group in places.groupby(["encoder", "seed"], sort=False)
    ]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(figures.PAGE, 0.22 * len(rows) + 1.1), width_ratios=[1, 1.9]
    )
    shown = copies.subset(np.arange(min(24, len(copies))))
    figures.gallery(left, shown, f"{len(shown)} of its {len(copies)} images", columns=6)
    for y, (name, _, ranks) in enumerate(rows):
        right.scatter(
            ranks, np.full(len(ranks), -y), s=6, alpha=0.5, color=colours.get(name, "0.4"), lw=0
        )
        right.plot([ranks.median()] * 2, [-y - 0.35, -y + 0.35], color="black", lw=1.3)
    right.axvline(0.5, color="grey", lw=0.8, ls="--")
    right.set_yticks(
        [-y for y in range(len(rows))],
        [f"{name}, seed {seed}" for name, seed, _ in rows],
        fontsize=7,
    )
    right.set(
        xlim=(0, 1),
        xlabel="rank of influence among all images (1: the highest)",
        ylim=(-len(rows) + 0.4, 0.6),
    )
    medians = {
        name: places[places["encoder"] == name].groupby("seed")["rank"].median().mean()
        for name in names
    }
    places_of_each = ", ".join(f"{median:.2f} {name}" for name, median in medians.items())
    figure.suptitle(
        f"One photograph is there {len(copies)} times: median rank {places_of_each}\n"
        f"({copies.name}, n = {plan.n:,}, {plan.profile} profile; black: the median; grey dashes: the middle)",
        fontsize=8.5,
    )
    return figure
