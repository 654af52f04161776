"""Check that the released encoders give the released tables: compute them again and compare."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import pandas as pd

from issl.audit.cache import Artifacts, Stage, released_index
from issl.audit.profiles import ProfileOptions, all_stages, check
from issl.audit.stages import Influence, Table
from issl.errors import IsslError
from issl.files import provided

EQUAL = 1e-4  # relative to the larger of a number and its column's standard deviation
IN_RANK = 0.9999  # Spearman's rank correlation


def compared(stages: Iterable[Stage], artifacts: Artifacts) -> Iterator[tuple[str, bool]]:
    """A line about each released table computed here, and False if it differs but should not."""
    for stage in stages:
        if isinstance(stage, Table) and (path := released_table(stage)) is not None:
            most, rank = differences_from_released(stage, artifacts)
            same = most <= EQUAL or rank >= IN_RANK
            word = "same" if same else "DIFFERS" if stage.repeatable else "other"
            yield f"{word:8} {path}: at most {most:.1e}, rank {rank:.6f}", same or word == "other"


def released_table(stage: Stage) -> str | None:
    """The path of the released table that the stage should equal, in released/."""
    index = released_index(provided("released"))
    if not isinstance(stage, Table) or stage.label not in index:
        return None
    return str(index[stage.label]["files"][stage.file]["path"])


def differences_from_released(stage: Table, artifacts: Artifacts) -> tuple[float, float]:
    """`differences` of the stage's table, made here, and the released one."""
    released = replace(artifacts, released=provided("released"), only=None)
    here = pd.read_parquet(artifacts.file(stage, stage.file))
    return differences(here, pd.read_parquet(released.released_file(stage, stage.file)))


def differences(here: pd.DataFrame, kept: pd.DataFrame) -> tuple[float, float]:
    """The largest difference between two tables of the same rows (relative to the larger of a
    number and its column's standard deviation), and the lowest rank correlation of a column."""
    if list(here) != list(kept) or len(here) != len(kept):
        return np.inf, -1.0
    numbers = list(kept.select_dtypes(["number", "bool"]))
    a, b = here[numbers].astype(float), kept[numbers].astype(float)
    same_words = here.drop(columns=numbers).equals(kept.drop(columns=numbers))
    if not (same_words and a.isna().equals(b.isna())):
        return np.inf, -1.0
    scale = b.abs().clip(lower=b.std().fillna(0.0), axis=1)
    apart = ((a - b).abs() / scale.where(scale > 0, 1.0)).max().fillna(0.0)
    if not (differ := list(apart.index[apart > 0])):
        return 0.0, 1.0
    ranks = a[differ].corrwith(b[differ], method="spearman").fillna(-1.0)  # a constant has none
    return float(apart.max()), float(ranks.min())


def check_again(options: ProfileOptions) -> int:
    """Score all training images again under the first released encoder, and compare; the exit code
    is 1 if the table differs."""
    plans = replace(options, door="encoders", only=options.only or "01").plans()
    check(plans, options.folder)
    index = released_index(provided("released"))
    for plan in plans.values():
        scores = (s for s in all_stages([plan]) if isinstance(s, Influence))
        first = next((s for s in scores if s.label in index), None)
        if first is not None:
            artifacts = plan.artifacts(progress=True)
            which = first.data.which
            print(f"data    {which.name}, identity {which.digest}", flush=True)
            artifacts.get(first)
            ended = list(compared([first], artifacts))
            print("\n".join(line for line, _ in ended), flush=True)
            return int(not all(same for _, same in ended))
    raise IsslError(f"--check: profile {options.profile} has no released scores")
