"""Figures: one style, and one way to save them with the numbers behind them and where they come
from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from issl.audit.stats.statistics import Estimate, correlation
from issl.data.images import Images
from issl.files import atomic
from issl.pretraining.recipes import NAMES

PAGE = 7.0  # inches: the width of two columns of a paper
PALETTE = "colorblind"
SHOWN = 16  # images of a gallery at each end of a ranking
COMPARED = 20_000  # the most images whose loss and influence are compared in `scored`
LEAST = 10  # images: a correlation of fewer is not worth a number
COLOURS = dict(
    zip(NAMES, sns.color_palette(PALETTE), strict=False)
)  # of each method, the same in every figure


def style(screen: bool = True) -> None:
    """Legible at column width, colour-blind safe, text in the PDF as text. screen: False draws
    without a window."""
    if not screen:
        plt.switch_backend("agg")
    sns.set_theme(context="paper", style="ticks", palette=PALETTE)
    mpl.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.dpi": 220,
            "savefig.bbox": "tight",
            "pdf.fonttype": 42,
            "font.size": 8,
            "axes.titlesize": 8.5,
            "axes.labelsize": 8,
            "xtick.labelsize": 7.5,
            "ytick.labelsize": 7.5,
            "legend.fontsize": 7.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.constrained_layout.use": True,
        }
    )


def save(
    figure: Figure, name: str, data: pd.DataFrame, folder: Path, provenance: dict[str, Any]
) -> list[Path]:
    """Write NAME.png, NAME.pdf, NAME.csv (the numbers drawn) and NAME.json (where they come
    from)."""
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "pdf", "csv", "json")]
    with atomic(paths[0]) as part:
        figure.savefig(part, format="png")
    with atomic(paths[1]) as part:
        figure.savefig(part, format="pdf", metadata={"CreationDate": None})
    with atomic(paths[2]) as part:
        data.to_csv(part, index=False)
    with atomic(paths[3]) as part:
        part.write_text(json.dumps(provenance, indent=1) + "\n")
    return paths


def literal(name: object) -> str:
    """A name for a figure's text: matplotlib would read what stands between two dollar signs as a
    formula."""
    return str(name).replace("$", r"\$")


def write(figure: Figure, path: Path) -> None:
    """Write a figure alone, in the format of the file's suffix, and close it."""
    with atomic(path) as part:
        figure.savefig(part, format=path.suffix[1:])
    plt.close(figure)


def training(history: pd.DataFrame, title: str) -> Figure:
    """A run's curves from the history of `issl.pretraining.loop`: the loss, the features' spread,
    and the kNN accuracy where it was measured. The last value of each is in its title."""
    panels = {
        "loss": "loss",
        "feature_std": "spread of the features",
        "knn_accuracy": "kNN accuracy",
    }
    panels = {column: label for column, label in panels.items() if column in history}
    figure, axes = plt.subplots(1, len(panels), figsize=(PAGE, 2.1), squeeze=False)
    for ax, (column, label) in zip(axes[0], panels.items(), strict=True):
        known = history.dropna(subset=[column])
        ax.plot(known["epoch"] + 1, known[column], marker="o", markersize=2.5, linewidth=1.2)
        ax.set(
            xlabel="epoch", ylabel=label, title=f"{label}: {known[column].iloc[-1]:.2f} at the end"
        )
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if column != "loss":
            ax.set_ylim(0, 1.05 * max(1.0 if column == "feature_std" else 0.0, known[column].max()))
    figure.suptitle(literal(title), fontsize=9)
    return figure


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


def asked(axes: Axes, at: float) -> None:
    """A dotted line at what a claim's test asks for (`issl.audit.claims.threshold`)."""
    axes.axvline(at, color="black", lw=0.9, ls=":", zorder=0.5)


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


def gallery(
    axes: Axes, images: Images, title: str, columns: int = 8, frames: Sequence[bool] | None = None
) -> None:
    """All images in reading order; those with a true entry in `frames` get a border."""
    axes.set_title(title, loc="left")
    rows = -(-len(images) // columns)
    side, gap = images.pixels.shape[-1], 3
    canvas = np.full((rows * (side + gap), columns * (side + gap), 3), 255, np.uint8)
    for k, pixels in enumerate(images.tensor().numpy()):
        y, x = divmod(k, columns)
        y, x = y * (side + gap), x * (side + gap)
        canvas[y : y + side, x : x + side] = pixels.transpose(1, 2, 0)
        if frames is not None and frames[k]:
            colour = sns.color_palette(PALETTE)[1]
            axes.add_patch(
                Rectangle(
                    (x - 1.5, y - 1.5),
                    side + 2,
                    side + 2,
                    fill=False,
                    clip_on=False,
                    lw=1.3,
                    ec=colour,
                )
            )
    axes.imshow(canvas, interpolation="nearest")
    axes.set_axis_off()


def scored(scores: pd.DataFrame, images: Images, about: str) -> Figure:
    """The images of the highest and of the lowest influence, and influence against the plain
    stability loss.

    scores   as `issl.self_influence` returns them, in the order of the images; of very many, a
             random part is compared
    """
    influence, loss = scores["influence"].to_numpy(), scores["stability_loss"].to_numpy()
    order, k = influence.argsort(kind="stable")[::-1], min(SHOWN, (len(images) + 1) // 2)
    figure = plt.figure(figsize=(PAGE, 3.4))
    left, right = figure.subfigures(1, 2, width_ratios=[1.9, 1])  # type: ignore[misc]
    known = (
        images.attributes["path"]
        if "path" in images.attributes
        else images.attributes["index"].astype(str)
    )
    parts = left.subfigures(2, 1)
    for part, rows, name in zip(
        parts, (order[:k], order[::-1][:k]), ("highest", "lowest"), strict=True
    ):
        ends = [
            np.format_float_positional(influence[i], 3, fractional=False, trim="-")
            for i in (rows[0], rows[-1])
        ]
        part.suptitle(f"{name} influence: {' to '.join(ends)}", x=0.01, ha="left", fontsize=8)
        for place, ax in enumerate(part.subplots(2, SHOWN // 2, squeeze=False).flat):
            ax.set_axis_off()
            if place < k:
                ax.imshow(
                    images.pixels[rows[place]].permute(1, 2, 0).numpy(), interpolation="nearest"
                )
                text = Path(known.iloc[rows[place]]).name
                ax.set_title(
                    literal(text if len(text) < 13 else "…" + text[-11:]), fontsize=5, pad=1.5
                )
    ax = right.subplots()
    sample = np.arange(len(images))
    if len(images) > COMPARED:
        sample = np.random.default_rng(0).choice(len(images), COMPARED, replace=False)
    loss, influence = loss[sample], influence[sample]
    ax.scatter(loss, influence, s=4, lw=0, alpha=0.6)
    ax.set(xlabel="stability loss (0 to 2)", ylabel="influence (no unit)")
    if loss.min() > 0 and influence.min() > 0:  # influence grows like a power of the loss
        ax.set(xscale="log", yscale="log")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
    rho = (
        f"\nρ = {correlation(loss, influence, 'spearman')} (of ranks)"
        if len(images) >= LEAST
        else ""
    )
    points = (
        "one point per image" if len(images) <= COMPARED else f"{COMPARED:,} images drawn at random"
    )
    ax.set_title(f"against the stability loss, {points}{rho}", loc="left", fontsize=7)
    figure.suptitle(
        literal(f"Influence of {len(images):,} images of {images.name} ({about})"), fontsize=8
    )
    return figure


def explained(
    query: Images,
    images: Images,
    table: pd.DataFrame,
    lists: Mapping[str, str],
    loss: float,
    title: str,
) -> Figure:
    """A query beside lists of training images, each with its influence (in parts of the greatest)
    and similarity.

    query   one image, with the attribute `what`
    table   as `issl.commands.explain.lists` returns it; lists: its lists to show, with their titles
    loss    the query's stability loss
    """
    others = table[table["list"] != "itself"]
    k, greatest = int(others["rank"].max()), float(others["influence"].abs().max()) or 1.0
    trained = (
        float(others["training_influence"].abs().max()) or 1.0
        if "training_influence" in others
        else None
    )
    figure = plt.figure(
        figsize=(1.5 + 0.72 * k, 0.5 + 1.17 * len(lists) + (0.0 if trained is None else 0.4))
    )
    left, right = figure.subfigures(1, 2, width_ratios=[1.5, 0.72 * k])  # type: ignore[misc]
    shown = left.subplots()
    shown.imshow(query.pixels[0].permute(1, 2, 0).numpy(), interpolation="nearest")
    shown.set_title(literal(query.attributes["what"][0]), fontsize=8)
    shown.set_xlabel(f"stability loss {loss:.3f}", fontsize=7)
    plain = [shown]
    for row, (name, text) in zip(right.subfigures(len(lists), 1), lists.items(), strict=True):
        row.suptitle(text, x=0.01, ha="left", fontsize=8, fontweight="bold")
        members = table[table["list"] == name].to_dict("records")
        for ax, r in zip(row.subplots(1, k, squeeze=False)[0], members, strict=True):
            ax.imshow(
                images.pixels[r["position"]].permute(1, 2, 0).numpy(), interpolation="nearest"
            )
            label = str(r.get("label_name", Path(str(r.get("path", r["index"]))).name))
            ax.set_title(literal(label if len(label) < 14 else label[:12] + "…"), fontsize=6, pad=2)
            influence, cosine = (
                f"{r['influence'] / greatest:+.2f} (#{r['influence_rank']})",
                f"{r['similarity']:.2f}",
            )
            lines = [influence, f"cos {cosine} (#{r['similarity_rank']})"]
            if trained is not None:
                lines.append(
                    f"tr {r['training_influence'] / trained:+.2f} (#{r['training_influence_rank']})"
                )
            ax.set_xlabel("\n".join(lines), fontsize=5.5, labelpad=2)
            plain.append(ax)
    for ax in plain:
        ax.set(xticks=[], yticks=[])
        for side in ax.spines.values():
            side.set_visible(False)
    legend = (
        "±: influence ÷ the greatest (negative: a step that makes that image more stable makes this one less so); "
        "cos: similarity of features; #: rank of all"
    )
    if trained is not None:
        legend += "\ntr: training-aware influence ÷ the greatest (positive: training on that image makes this one stabler)"
    figure.suptitle(literal(f"{title}\n{legend}"), fontsize=7)
    return figure
