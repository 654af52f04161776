"""What somebody wants to know when a run has ended: what it was, what it decided, what to open
first, how to go on.

The terminal prints it, and the report begins with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from issl.audit import verdicts
from issl.audit.claims import FAILED, SUPERSEDED, UNTESTED, words
from issl.audit.verdicts import Record
from issl.data.datasets import DRAWN
from issl.files import installed

REHEARSAL = 0.5  # share of the tests that the scale allows no verdict on
AT_MOST = 3  # notebooks to open first

START = {  # after a rehearsal: what is worth reading although it decides nothing
    "00_method": "the score step by step, on a few images, every formula checked",
    "03_background_bias": "the same drawn object on four backgrounds: what no set of real photos can show",
    "10_validation": "what training without an image really changes, against what the score predicts",
    "01_seed_correlation": "how far two draws of the noise agree, and two trainings",
    "09_linear_theory": "a linear encoder, where the formula can be checked against retraining",
}


@dataclass(frozen=True)
class Guide:
    """rehearsal   is the scale too small for most tests?
    what           what this run was, and what it decided, in sentences
    first          what to open first, and why: pairs of a notebook and a text
    further        how to go on: pairs of a purpose and commands
    """

    rehearsal: bool
    what: list[str]
    first: list[tuple[str, str]]
    further: list[tuple[str, list[str]]]


def guide(profile: str, records: Sequence[Record], notebooks: Sequence[str]) -> Guide:
    """Of a run.

    records     that it left; notebooks: those that ended well
    """
    rehearsal = _is_rehearsal(records)
    what = (
        [*_rehearsed(records), *_decided(records, rehearsal)]
        if rehearsal
        else _decided(records, rehearsal)
    )
    first = START if rehearsal else _telling(records)
    chosen = [(name, why) for name, why in first.items() if name in notebooks][:AT_MOST]
    return Guide(rehearsal, what, chosen, _further(profile) if rehearsal else [])


def _is_rehearsal(records: Sequence[Record]) -> bool:
    standing = [r for r in records if r["verdict"] != SUPERSEDED]
    return sum(r["verdict"] == UNTESTED for r in standing) > REHEARSAL * len(standing)


def _rehearsed(records: Sequence[Record]) -> list[str]:
    """On which images, with how good encoders."""
    learned = [r["learned"] for r in records if r.get("learned")]
    best = max(learned, key=lambda one: float(one["knn"]), default=None)
    reach = (
        f": their kNN accuracy is at most {best['knn']:.0%} (untrained: {best['untrained']:.0%})"
        if best
        else ""
    )
    if {r["dataset"] for r in records} <= set(DRAWN):
        return [
            f"This was a rehearsal on drawn images, with tiny encoders that trained for seconds{reach}.",
            "It shows how everything works. About the encoders of the paper it decides nothing.",
        ]
    return [
        f"This was a rehearsal: most tests ask for encoders that have learned more, or for more of them{reach}."
    ]


def _decided(records: Sequence[Record], rehearsal: bool) -> list[str]:
    """What was decided, claim by claim where that is little; and checks of the code that failed."""
    reached = verdicts.decided(records)
    found = []
    if rehearsal:
        for name in dict.fromkeys(r["name"] for r in reached):
            own = [r for r in reached if r["name"] == name]
            outcomes = ", ".join(dict.fromkeys(r["verdict"] for r in own))
            found.append(f"Decided all the same: {own[0]['claim'].rstrip('.')} ({outcomes}).")
    elif reached:
        counts = [(sum(r["verdict"] == v for r in reached), v) for v in verdicts.PHRASES]
        listed = ", ".join(f"{count} {v}" for count, v in counts if count)
        open_ = sum(r["verdict"] == UNTESTED for r in records)
        rest = f"; {open_} more need other data or larger encoders" if open_ else ""
        found.append(f"Decided, by tests that were stated beforehand: {listed}{rest}.")
    broken = [r for r in records if r["verdict"] == FAILED]
    found += [
        f"A check of the code FAILED: {words(r['tests'][0]['metric'])} ({r['name']})."
        for r in broken
    ]
    return found


def _telling(records: Sequence[Record]) -> dict[str, str]:
    """The notebooks whose first claim was decided, contradictions first, each with that claim's
    result."""
    reached = verdicts.decided(records)
    found: dict[str, str] = {}
    for outcome in ("contradicted", "reproduced", "partly"):
        for r in reached:
            if r["verdict"] == outcome and r["notebook"] not in found:
                found[r["notebook"]] = verdicts.sentence(
                    [o for o in reached if o["name"] == r["name"]]
                )
    return {
        **dict(list(found.items())[: AT_MOST - 1]),
        "11_claims_audit": "all claims and their tests in one picture",
    }


def _further(profile: str) -> list[tuple[str, list[str]]]:
    run = "issl run" if installed() else "./run_all.sh"
    trained = "--recipe short --width 8 --epochs 20 --batch-size 64 --time-budget 30"
    own = [
        f"issl pretrain --data folder:photos {trained} --out mine.safetensors",
        "issl influence --data folder:photos --encoder mine.safetensors --out scores.parquet",
    ]
    large = "--profile overnight --data-root DIR"
    larger = [
        ("the same on real images, an hour and a half", [f"{run} --profile mini --data-root DIR"]),
        (
            "all of CIFAR-10; each encoder that is not released yet takes two hours",
            [f"{run} {large}"],
        ),
    ]
    return [("your own photos", own), *(larger if profile == "quick" else larger[1:])]
