"""Score a large set in parts, which are tasks of an engine: each part is a file.

    FOLDER/fit/00000.safetensors …     the curvature's sums over FIT_PART images each
    FOLDER/curvature.safetensors       of all: their sum
    FOLDER/scores/00000.parquet …      the scores of SCORE_PART images each; one parquet data set

What is there is not computed again. The grid depends on the number of images alone, so the scores
do not depend on who computed what.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path

from torch import nn

from issl.data.images import Images
from issl.engine import Task
from issl.errors import IsslError
from issl.files import atomic, belongs
from issl.influence.computing import Computing
from issl.influence.fitted import fit, load_fitted
from issl.influence.gradient_store import fingerprint
from issl.influence.kept_curvature import KeptCurvature, as_setting, read
from issl.influence.measurement import Measurement, describe_loss
from issl.influence.perturbation import describe

FIT_PART, SCORE_PART = 16_384, 2_048  # images


@dataclass(frozen=True)
class Scoring:
    """Which images are scored under which encoder, and how; `kept` is a curvature that is there."""

    encoder: nn.Module
    images: Images
    what: Measurement
    computing: Computing = Computing()
    kept: Path | None = None


def score_in_parts(
    folder: Path,
    load: Callable[[], Scoring],
    fit_part: int = FIT_PART,
    score_part: int = SCORE_PART,
) -> dict[str, Task]:
    """The tasks that fill a folder with scores, those alone whose files are not there.

    Args:
        folder: of all files.
        load: what is scored; each process calls it for each of its parts, so it should remember.
        fit_part: images in each part of the fit.
        score_part: images in each part of the scores.

    Raises:
        IsslError: if the folder holds something else, or the curvature makes its bases from images
            (PCA, EKFAC): each part would have its own.
    """
    scoring = load()
    images, what = scoring.images, scoring.what
    several = scoring.kept is None and len(images) > fit_part
    if several and what.curvature.moment_images(images.index[:1]) is not None:
        raise IsslError(
            f"curvature {what.curvature} makes its bases from images, each part other ones; use "
            "logra, or fit in one piece with `issl fit` and give --curvature-from"
        )
    belongs(folder, _identity(scoring, fit_part, score_part), "scores")
    whole = folder / "curvature.safetensors"
    fits = _missing(folder / "fit", len(images), fit_part, "safetensors")
    scores = _missing(folder / "scores", len(images), score_part, "parquet")
    tasks, before = {}, []
    if scoring.kept is None and not whole.exists():
        tasks = {path.stem: Task(partial(_fit, load, rows, path)) for path, rows in fits}
        tasks = {f"fit/{name}": task for name, task in tasks.items()}
        tasks["curvature"] = Task(partial(_add, folder / "fit", whole), list(tasks))
        before = ["curvature"]
    curvature = scoring.kept or whole
    for path, rows in scores:
        tasks[f"scores/{path.stem}"] = Task(partial(_score, load, curvature, rows, path), before)
    return tasks


def _identity(scoring: Scoring, *grid: int) -> str:
    """What decides the numbers."""
    what, computing = scoring.what, scoring.computing
    settings = [
        str(as_setting(what.perturbation, describe(what.perturbation))),
        repr(what.curvature),
        what.seed,
        what.draws,
        what.average,
        describe_loss(what.loss),
        list(what.skip),
        None if scoring.kept is None else read(scoring.kept).parts,
        computing.precision,
        *grid,
    ]
    return fingerprint(scoring.encoder, scoring.images, *settings)


def _missing(folder: Path, count: int, size: int, suffix: str) -> list[tuple[Path, range]]:
    """The files of a grid that are not there, each with its images."""
    folder.mkdir(parents=True, exist_ok=True)
    grid = [range(start, min(start + size, count)) for start in range(0, count, size)]
    files = [(folder / f"{k:05}.{suffix}", rows) for k, rows in enumerate(grid)]
    return [(path, rows) for path, rows in files if not path.exists()]


def _fit(load: Callable[[], Scoring], rows: range, path: Path) -> None:
    scoring = load()
    what = scoring.what
    fitted = fit(
        scoring.encoder,
        scoring.images.subset(rows),
        what.perturbation,
        what.curvature,
        what.seed,
        draws=what.draws,
        average=what.average,
        loss=what.loss,
        fisher=what.fisher,
        skip=what.skip,
        untrained=what.untrained,
        computing=scoring.computing,
    )
    fitted.save(path)


def _add(folder: Path, whole: Path) -> None:
    reduce(KeptCurvature.add, map(read, sorted(folder.glob("[0-9]*.safetensors")))).save(whole)


def _score(load: Callable[[], Scoring], curvature: Path, rows: range, path: Path) -> None:
    scoring = load()
    what = scoring.what
    fitted = load_fitted(
        curvature,
        scoring.encoder,
        perturbation=what.perturbation,
        curvature=what.curvature,
        loss=what.loss,
        fisher=what.fisher,
        device=scoring.computing.device,
    )
    images = scoring.images.subset(rows)
    table = fitted.score(images, computing=scoring.computing)
    joined = table.merge(images.attributes, on="index", how="left", validate="one_to_one")
    joined.attrs = table.attrs
    with atomic(path) as part:
        joined.to_parquet(part, index=False)
