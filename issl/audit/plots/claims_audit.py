"""The figure of notebook 11: every claim with its test, ours beside the paper's number."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from issl.audit import figures, verdicts
from issl.audit.claims import FAILED, PASSED, SUPERSEDED, UNTESTED, words
from issl.audit.stats.statistics import Estimate
from issl.audit.verdicts import Record
from issl.pretraining.recipes import NAMES

COLOURS = {
    "reproduced": "C0",
    "partly": "C1",
    "contradicted": "C3",
    "undecided": "0.35",
    UNTESTED: "0.5",
    SUPERSEDED: "0.5",
    PASSED: "C0",
    FAILED: "C3",
}


def all_claims(records: Sequence[Record], profile: str) -> Figure:
    """A row per claim: its words, the estimates of its first test (one mark per method), and its
    verdicts."""
    names = list(dict.fromkeys(r["name"] for r in records))  # by notebook
    size = (figures.PAGE, 0.68 * len(names) + 0.6)
    figure, axes = plt.subplots(
        len(names), 3, figsize=size, width_ratios=[1.3, 1.1, 1.25], squeeze=False
    )
    for (text, numbers, verdict), name in zip(axes, names, strict=True):
        rows = [r for r in records if r["name"] == name]
        _estimates(numbers, rows)
        for ax in (text, verdict):
            ax.set_axis_off()
            ax.set(xlim=(0, 1), ylim=(-0.7, len(rows) - 0.3))
        claim = f"{rows[0]['notebook'][:2]}  {rows[0]['claim']}" + (
            " (ours)" if rows[0]["ours"] else ""
        )
        _text(text, (len(rows) - 1) / 2, textwrap.fill(claim, 42))
        for y, r in enumerate(reversed(rows)):
            who = f"{NAMES.get(r['variant'], r['variant'])}: " if r["variant"] else ""
            held = f"{sum(t['holds'] for t in r['tests'])}/{len(r['tests'])}"
            _text(
                verdict,
                y,
                f"{verdicts.MARKS[r['verdict']]} {who}{r['verdict']} ({held})",
                COLOURS[r["verdict"]],
            )
    reached = [r["verdict"] for r in records]
    counts = ", ".join(f"{reached.count(v)} {v}" for v in verdicts.MARKS if v in reached)
    title = f"{len(names)} claims in {len(records)} tests at the {profile} profile: {counts}"
    figure.suptitle(title, fontsize=9)
    return figure


def _text(ax: Axes, y: float, text: str, colour: str | None = None) -> None:
    shown = ax.text(0, y, text, fontsize=7, va="center", color=colour)
    shown.set_in_layout(False)


def _estimates(ax: Axes, rows: Sequence[Record]) -> None:
    """A claim's first test: the estimates with their intervals, the bound it asks for, the paper's
    number."""
    test = rows[0]["tests"][0]
    bound, paper = test.get("above", test.get("below")), rows[0]["paper"]
    estimates = [Estimate.of(r["metrics"][test["metric"]]) for r in rows]
    enrichment = test["metric"].startswith("enrichment")
    log = enrichment or (max(abs(e.value) for e in estimates) < 1e-2 and bound > 0)
    floor = (0.1 if enrichment else 1e-17) if log else -np.inf
    for y, (r, e) in enumerate(reversed(list(zip(rows, estimates, strict=True)))):
        colour = figures.COLOURS.get(r["variant"], "0.3")
        # an open end leaves the panel
        ends = np.nan_to_num([e.low, e.value, e.high], nan=e.low, posinf=1e12, neginf=-1e12)
        low, value, high = np.maximum(ends, floor)
        ax.plot([low, high], [y, y], color=colour, lw=1.4)
        ax.plot([value], [y], "o", color=colour, ms=4)
    ax.axvline(bound, color="grey", lw=0.9, ls="--")
    head, tail = (1.0, 0.9) if "above" in test else (0.0, 0.1)
    arrow = {"arrowstyle": "->", "color": "grey"}
    ax.annotate("", (head, 1.06), (tail, 1.06), xycoords="axes fraction", arrowprops=arrow)
    marks = [bound]
    if isinstance(paper, float):
        ax.axvline(paper, color="black", lw=1.1)
        marks.append(paper)
    if log:
        ax.set_xscale("log")
    ax.set(xlim=_limits(estimates, marks, floor), ylim=(-0.7, len(rows) - 0.3))
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.tick_params(labelsize=6.5, pad=1)
    ax.set_xlabel(
        textwrap.shorten(words(test["metric"]), 52, placeholder=" …"), fontsize=6.5, labelpad=1
    )


def _limits(
    estimates: Sequence[Estimate], marks: Sequence[float], floor: float
) -> tuple[float, float]:
    """Limits that hold all finite numbers, with some room; of a logarithmic axis where there is a
    floor."""
    log = np.isfinite(floor)
    values = np.array(
        [*(v for e in estimates for v in (e.low, e.value, e.high) if np.isfinite(v)), *marks]
    )
    values = np.log10(np.maximum(values, floor)) if log else values
    room = 0.06 * np.ptp(values) or 0.1
    low, high = float(values.min() - room), float(values.max() + room)
    return (10.0**low, 10.0**high) if log else (low, high)
