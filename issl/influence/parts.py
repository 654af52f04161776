"""Score a large set in parts, which are tasks of an engine: each part is a file.

    FOLDER/fit/00000.safetensors …     the curvature's sums over FIT_PART images each
    FOLDER/curvature.safetensors       of all: their sum
    FOLDER/scores/00000.parquet …      the scores of SCORE_PART images each; one parquet data set

What is there is not computed again. The grid depends on the number of images alone, so the scores
do not depend on who computed what.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path

from torch import nn

from issl.data.images import Images, LazyPixels, own_names
from issl.engine import Task
from issl.errors import IsslError
from issl.files import atomic, remove_leftovers
from issl.influence.curvature_file import KeptCurvature, as_setting, encoder_digest, read_curvature
from issl.influence.kept import fit_measurement, load_fitted
from issl.influence.passes import Computing
from issl.influence.scorer import Measurement

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
    _claim(folder, _identity(scoring, fit_part, score_part))
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
    """A hash of all that decides the numbers: weights, pixels, indices, settings."""
    what, pixels = scoring.what, scoring.images.pixels
    settings = [
        as_setting(what.perturbation),
        repr(what.curvature),
        what.seed,
        what.draws,
        as_setting(what.loss),
        list(what.skip),
        None if scoring.kept is None else read_curvature(scoring.kept).parts,
        scoring.computing.precision,
        *grid,
        encoder_digest(scoring.encoder),
    ]
    found = hashlib.sha256(repr(settings).encode())
    if isinstance(pixels, LazyPixels):
        found.update(pixels.identity().encode())
    else:
        found.update(pixels.contiguous().numpy().data)
    found.update(scoring.images.index.numpy().data)
    return found.hexdigest()


def _claim(folder: Path, identity: str) -> None:
    """A folder that is filled bit by bit belongs to one computation."""
    mark = folder / "identity.json"
    remove_leftovers(folder)
    if mark.exists() and json.loads(mark.read_text())["identity"] != identity:
        raise IsslError(
            f"{folder} holds scores of another encoder, images or setting; use another folder"
        )
    if not mark.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise IsslError(
                f"folder {folder} cannot be written ({error}); choose another"
            ) from error
        with atomic(mark) as part:
            part.write_text(json.dumps({"identity": identity}))


def _missing(folder: Path, count: int, size: int, suffix: str) -> list[tuple[Path, range]]:
    """The files of a grid that are not there, each with its images."""
    folder.mkdir(parents=True, exist_ok=True)
    grid = [range(start, min(start + size, count)) for start in range(0, count, size)]
    files = [(folder / f"{k:05}.{suffix}", rows) for k, rows in enumerate(grid)]
    return [(path, rows) for path, rows in files if not path.exists()]


def _fit(load: Callable[[], Scoring], rows: range, path: Path) -> None:
    scoring = load()
    images = scoring.images.subset(rows)
    fit_measurement(scoring.encoder, images, scoring.what, scoring.computing).save(path)


def _add(folder: Path, whole: Path) -> None:
    parts = map(read_curvature, sorted(folder.glob("[0-9]*.safetensors")))
    reduce(KeptCurvature.add, parts).save(whole)


def _score(load: Callable[[], Scoring], curvature: Path, rows: range, path: Path) -> None:
    scoring = load()
    what = scoring.what
    fitted = load_fitted(
        curvature,
        scoring.encoder,
        perturbation=what.perturbation,
        curvature=what.curvature,
        loss=what.loss,
        device=scoring.computing.device,
    )
    images = scoring.images.subset(rows)
    table = fitted.score(images, computing=scoring.computing)
    beside = own_names(images.attributes, [str(name) for name in table if name != "index"])
    joined = table.merge(beside, on="index", how="left", validate="one_to_one")
    joined.attrs = table.attrs
    with atomic(path) as part:
        joined.to_parquet(part, index=False)
