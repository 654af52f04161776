"""The first look: the photos of the highest and of the lowest influence, and in words what tells
them apart."""

from __future__ import annotations

import textwrap
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure

from issl.audit.figures import PAGE, gallery, literal
from issl.audit.stats.pixel_features import pixel_features
from issl.audit.stats.statistics import spearman
from issl.data.images import Images
from issl.data.published import SOURCES

COLUMNS = 12  # of a gallery
NAMED = 3  # classes at each end
STATISTICS = {
    "brightness": "brightness",
    "contrast": "contrast",
    "border_std": "the variation of their outermost pixels",
}


def table(scores: pd.DataFrame, images: Images) -> pd.DataFrame:
    """One row per image, by falling influence: index, label_name, influence, stability_loss, and
    the simple statistics of its pixels (`pixel_features`)."""
    names = np.array(SOURCES["cifar10"].names["label"])[images.require_labels().numpy()]
    columns = ["index", "influence", "stability_loss"]
    found = scores[columns].assign(label_name=names, position=np.arange(len(images)))
    found = found.merge(pixel_features(images), on="index", validate="one_to_one")
    return found.sort_values("influence", ascending=False, kind="stable").reset_index(drop=True)


def seen(ranked: pd.DataFrame, shown: int) -> list[str]:
    """What `table` says about the images at both ends, in sentences; every number is counted
    here."""
    ends = {"highest": ranked.head(shown), "lowest": ranked.tail(shown)}
    classes = {
        end: _listed(
            [f"{name} ({count})" for name, count in Counter(rows["label_name"]).most_common(NAMED)]
        )
        for end, rows in ends.items()
    }
    sentences = [
        f"The {shown} of highest influence: mostly {classes['highest']}; of lowest: {classes['lowest']}."
    ]
    statistic = max(STATISTICS, key=lambda name: abs(_apart(ranked[name].to_numpy(), shown)))
    means = [rows[statistic].mean() for rows in (*ends.values(), ranked)]
    sentences.append(
        f"Of three simple statistics they differ most in {STATISTICS[statistic]}: on average {means[0]:.2f} against "
        f"{means[1]:.2f} ({means[2]:.2f} in all; pixels from 0 to 1)."
    )
    by_loss = set(
        ranked.sort_values("stability_loss", ascending=False, kind="stable")["position"].head(shown)
    )
    both = len(by_loss & set(ranked["position"].head(shown)))
    rank = spearman(ranked["influence"].to_numpy(), ranked["stability_loss"].to_numpy())
    sentences.append(
        f"Of those {shown} highest, {both} are also among the {shown} of highest stability loss, which costs a forward "
        f"pass (rank correlation over all {len(ranked):,}: {rank.value:.2f})."
    )
    return sentences


def draw(
    ranked: pd.DataFrame, images: Images, shown: int, encoder: str, sentences: list[str]
) -> Figure:
    """Both ends of the ranking, with what was counted below."""
    rows = -(-shown // COLUMNS)
    figure = plt.figure(figsize=(PAGE, 1.35 + 2 * rows * PAGE / COLUMNS))
    upper, lower = figure.subplots(2, 1)
    ends = {"Highest": ranked.head(shown), "Lowest": ranked.tail(shown).iloc[::-1]}
    for ax, (end, part) in zip((upper, lower), ends.items(), strict=True):
        reach = [
            np.format_float_positional(v, 2, fractional=False, trim="-")
            for v in part["influence"].iloc[[0, -1]]
        ]
        gallery(
            ax,
            images.subset(part["position"].to_numpy()),
            f"{end} influence ({reach[0]} to {reach[1]})",
            COLUMNS,
        )
    title, lines = (
        f"{len(ranked):,} photos of CIFAR-10 under a released {encoder}",
        map(_wrapped, sentences),
    )
    figure.suptitle(literal(title), fontsize=9, ha="left", x=0.01)
    figure.supxlabel("\n".join(lines), fontsize=7.5, ha="left", x=0.01)
    return figure


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 132))


def _apart(values: Float[np.ndarray, " n"], shown: int) -> float:
    """How far the means of both ends are from each other, in standard deviations of all."""
    return float((values[:shown].mean() - values[-shown:].mean()) / (values.std() or 1.0))


def _listed(parts: list[str]) -> str:
    return " and ".join(part for part in (", ".join(parts[:-1]), *parts[-1:]) if part)
