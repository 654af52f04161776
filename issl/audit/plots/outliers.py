"""The figure of notebook 07: do the score and simpler ones find ambiguous images, and those that
were made strange?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from scipy.stats import rankdata

from issl.audit import figures
from issl.audit.claims import threshold
from issl.audit.plans_paper import Outliers
from issl.audit.stats.statistics import Estimate
from issl.data.images import Images
from issl.pretraining.recipes import NAMES

STATIC = ("corrupted", "static")  # kinds of strange images that have noise over them
COLOURS = {**figures.COLOURS, "untrained": "0.45"}
TITLES = {"without static": "all but static", "corrupted": "static", "foreign": "of another set"}
SHOWN = 32  # images of a gallery
Found = Mapping[tuple[str, str, str, str], Estimate]


def atypical(
    plan: Outliers,
    images: Images,
    scores: Mapping[str, Sequence[Mapping[str, np.ndarray]]],
    truths: Mapping[str, np.ndarray],
    found: Found,
    ambiguity: np.ndarray | None,
) -> Figure:
    """The images of highest influence beside the most ambiguous ones, and how well each detector
    finds either.

    scores     by method (or `untrained`): one mapping from detector to scores (n,) for each encoder
    truths     which images (n,) are strange: `without static`, and each kind
    found      by method, detector, truth and metric
    ambiguity  (n,), where it is known
    """
    first, natural = plan.methods[0], images.attributes["atypical"].to_numpy() == ""
    mean_rank = np.mean([rankdata(s["influence"]) for s in scores[first]], axis=0)
    known = ambiguity is not None
    figure = plt.figure(figsize=(figures.PAGE, 5.7 if known else 4.4))
    above, below = figure.subfigures(
        2, 1, squeeze=False, height_ratios=[1.05 if known else 0.5, 1.6]
    )[:, 0]
    if ambiguity is None:
        title = f"highest influence ({NAMES[first]}, mean over encoders); outlined: made strange"
        _gallery(above.subplots(), images, mean_rank, title, ~natural)
    else:
        kept = images.subset(np.flatnonzero(natural))
        top, bottom = above.subplots(2, 1)
        _gallery(
            top, kept, mean_rank[natural], f"highest influence ({NAMES[first]}, mean over encoders)"
        )
        _gallery(
            bottom, kept, ambiguity[natural], "most ambiguous: about these people disagree most"
        )
    questions = [
        *([("ambiguity", "spearman")] if known else []),
        *((truth, "auc") for truth in truths),
    ]
    _detectors(below, list(scores), questions, truths, found)
    auc = found[first, "influence", "without static", "auc"]
    plain = found["untrained", "influence", "without static", "auc"]
    said = [f"Strange images without static: AUC {auc}; untrained {plain.value:.2f}"]
    if known:
        rho, before = (
            found[who, "influence", "ambiguity", "spearman"] for who in (first, "untrained")
        )
        loss = found[first, "stability loss ℓ", "ambiguity", "spearman"].value
        what = "Influence and people's disagreement"
        line = f"{what}: ρ = {rho}; stability loss {loss:.2f}, untrained {before.value:.2f}"
        said.insert(0, line.replace("-", "−"))
    many = f"{plan.encoders} encoder{'s' if plan.encoders > 1 else ''} a method"
    lines = [f"{line} ({NAMES[first]})" for line in said]
    lines.append(
        f"({plan.set_name}, {len(images):,} test images, curvature of {plan.n:,} training images, {many}, "
        f"{plan.profile} profile; bars: 95% intervals; dashed: chance, dotted: the test)"
    )
    figure.suptitle("\n".join(lines), fontsize=8.5)
    return figure


def _gallery(
    ax: Axes, images: Images, score: np.ndarray, title: str, outlined: np.ndarray | None = None
) -> None:
    """The images of the highest score."""
    rows = np.argsort(-score, kind="stable")[:SHOWN]
    frames = None if outlined is None else outlined[rows].tolist()
    figures.gallery(ax, images.subset(rows), title, columns=SHOWN // 2, frames=frames)


def _detectors(
    figure: SubFigure,
    groups: Sequence[str],
    questions: Sequence[tuple[str, str]],
    truths: Mapping[str, np.ndarray],
    found: Found,
) -> None:
    """A panel for each question, a row for each detector, a colour for each method."""
    names = list(dict.fromkeys(detector for _, detector, _, _ in found))
    panels = figure.subplots(1, len(questions), sharey=True, squeeze=False)[0]
    marks = {group: "x" if group == "untrained" else "o" for group in groups}
    for ax, (truth, metric) in zip(panels, questions, strict=True):
        rows = {group: [found[group, name, truth, metric] for name in names] for group in groups}
        by_people = metric == "spearman"
        label, chance = ("Spearman ρ", 0.0) if by_people else ("AUC", 0.5)
        figures.forests(ax, names, rows, label, chance, COLOURS, marks)
        if by_people or truth == "without static":
            figures.asked(
                ax, threshold("high_influence_ambiguous", f"{metric}_{truth.replace(' ', '_')}")
            )
        ax.axhspan(len(names) - 1.5, len(names) - 0.5, color="0.93", lw=0, zorder=0)
        if by_people:
            ax.set_title("ambiguous\nto people", loc="left", fontsize=7.5)
        else:
            name = f"made strange:\n{TITLES.get(truth, truth)} ({truths[truth].sum():,})"
            ax.set_title(name, loc="left", fontsize=7.5)
            ax.set_xlim(-0.03, 1.03)
            ax.set_xticks([0, 0.5, 1])
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(groups),
        frameon=False,
    )
