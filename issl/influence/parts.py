"""Score a large set in parts. Each part is a task of an engine, and writes one file.

    FOLDER/fit/00000.safetensors …     the curvature's sums over FIT_PART images each
    FOLDER/curvature.safetensors       the sums over all images
    FOLDER/scores/00000.parquet …      the scores of SCORE_PART images each; one parquet data set

Files that exist are not computed again. The grid of parts depends only on the number of images, so
the scores do not depend on which process computed which part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path

import pandas as pd
from torch import nn

from issl.data.images import Images, LazyPixels, own_names
from issl.engine import Task
from issl.errors import IsslError
from issl.files import atomic, file_digest, remove_leftovers, write_json
from issl.influence.kept import Fitted, as_setting, fit, load_fitted
from issl.influence.scorer import Computing, Measurement
from issl.pretraining.checkpoint import weights_digest

FIT_PART, SCORE_PART = 16_384, 2_048  # images


@dataclass(frozen=True)
class Scoring:
    """Which images are scored under which encoder, and how; `kept`: an existing curvature file."""

    encoder: nn.Module
    images: Images
    what: Measurement
    computing: Computing = Computing()
    kept: Path | None = None

    def fitted(self, path: Path) -> Fitted:
        """The curvature in this file."""
        what = self.what
        return load_fitted(
            path,
            self.encoder,
            perturbation=what.perturbation,
            curvature=what.curvature,
            loss=what.loss,
            device=self.computing.device,
        )

    def identity(self) -> str:
        """A hash of everything that the scores depend on: weights, pixels, indices, settings."""
        kept = None if self.kept is None else file_digest(self.kept)
        settings = {name: as_setting(value) for name, value in vars(self.what).items()}
        others = kept, self.computing.precision, weights_digest(self.encoder)
        found = hashlib.sha256(repr([settings, *others]).encode())
        pixels = self.images.pixels
        if isinstance(pixels, LazyPixels):
            found.update(pixels.identity().encode())
        else:
            found.update(pixels.contiguous().numpy().data)
        found.update(self.images.index.numpy().data)
        return found.hexdigest()


def score_in_parts(
    folder: Path,
    load: Callable[[], Scoring],
    fit_part: int = FIT_PART,
    score_part: int = SCORE_PART,
) -> dict[str, Task]:
    """The tasks that fill a folder with scores: only those whose files do not exist yet. Each
    process calls `load` for each of its parts, so `load` should cache its result."""
    scoring = load()
    images, curvature = scoring.images, scoring.what.curvature
    several = scoring.kept is None and len(images) > fit_part
    if several and curvature.moment_images(images.index[:1]) is not None:
        raise IsslError(
            f"curvature {curvature} makes its bases from images, so each part would have its own; "
            "use logra, or fit in one piece with `issl fit` and give --curvature-from"
        )
    _claim(folder, f"{scoring.identity()}-{fit_part}-{score_part}")
    whole = folder / "curvature.safetensors"
    tasks: dict[str, Task] = {}
    before = []
    if scoring.kept is None and not whole.exists():
        for path, rows in _missing(folder / "fit", len(images), fit_part, "safetensors"):
            tasks[f"fit/{path.stem}"] = Task(partial(_fit, load, rows, path))
        tasks["curvature"] = Task(partial(_add, load, folder / "fit", whole), list(tasks))
        before = ["curvature"]
    for path, rows in _missing(folder / "scores", len(images), score_part, "parquet"):
        work = partial(_score, load, scoring.kept or whole, rows, path)
        tasks[f"scores/{path.stem}"] = Task(work, before)
    return tasks


def with_attributes(scores: pd.DataFrame, images: Images) -> pd.DataFrame:
    """The scores, with each image's attributes."""
    beside = own_names(images.attributes, [str(name) for name in scores if name != "index"])
    table = scores.merge(beside, on="index", how="left", validate="one_to_one")
    table.attrs = scores.attrs
    return table


def _claim(folder: Path, identity: str) -> None:
    """Reserve a folder, which is filled bit by bit, for one computation."""
    mark = folder / "identity.json"
    remove_leftovers(folder)
    if not mark.exists():
        write_json(mark, {"identity": identity})
    elif json.loads(mark.read_text())["identity"] != identity:
        raise IsslError(
            f"{folder} holds scores of another encoder, images or setting; use another folder"
        )


def _missing(folder: Path, count: int, size: int, suffix: str) -> list[tuple[Path, range]]:
    """The files of a grid that do not exist yet, each with the range of its images."""
    folder.mkdir(parents=True, exist_ok=True)
    grid = [range(start, min(start + size, count)) for start in range(0, count, size)]
    files = [(folder / f"{k:05}.{suffix}", rows) for k, rows in enumerate(grid)]
    return [(path, rows) for path, rows in files if not path.exists()]


def _fit(load: Callable[[], Scoring], rows: range, path: Path) -> None:
    scoring = load()
    images, computing = scoring.images.subset(rows), scoring.computing
    fit(scoring.encoder, images, **vars(scoring.what), computing=computing).save(path)


def _add(load: Callable[[], Scoring], folder: Path, whole: Path) -> None:
    parts = map(load().fitted, sorted(folder.glob("[0-9]*.safetensors")))
    reduce(Fitted.add, parts).save(whole)


def _score(load: Callable[[], Scoring], curvature: Path, rows: range, path: Path) -> None:
    scoring = load()
    images = scoring.images.subset(rows)
    table = scoring.fitted(curvature).score(images, computing=scoring.computing)
    with atomic(path) as part:
        with_attributes(table, images).to_parquet(part, index=False)
