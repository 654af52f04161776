"""Fit and score a large set in parts on a fixed grid: each part is a file, and the files record
what is done.

    FOLDER/fit/00000.safetensors …     sums over FIT_PART images each
    FOLDER/curvature.safetensors       their sum
    FOLDER/scores/00000.parquet …      the scores of SCORE_PART images each; together one parquet
    data set

Any number of processes work on one folder at the same time, and may be killed and started again:
what is there is not computed again. The grid depends on the number of images alone, so the scores
do not depend on who computed what.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import pandas as pd
from pyarrow.dataset import dataset
from torch import nn

from issl.data.images import Images
from issl.errors import IsslError
from issl.files import belongs, make_all
from issl.influence.computing import Computing
from issl.influence.fitted import Fitted, fit, load_fitted
from issl.influence.gradient_store import fingerprint
from issl.influence.kept_curvature import KeptCurvature, as_setting, read
from issl.influence.measurement import Measurement, describe_loss
from issl.influence.perturbation import describe

FIT_PART, SCORE_PART = 16_384, 2_048  # images


@dataclass(frozen=True)
class InParts:
    """A set of images that is fitted and scored in parts.

    folder      of all files
    fit_part    images in each part of the fit; score_part: of the scores
    start       which share of the parts this process begins with, in [0, 1)
    """

    folder: Path
    images: Images
    fit_part: int = FIT_PART
    score_part: int = SCORE_PART
    start: float = 0.0

    def fit(self, encoder: nn.Module, what: Measurement, computing: Computing = Computing()) -> int:
        """Fit the parts that are not there, and add all up to `curvature`; how many were fitted
        here.

        Raises IsslError for bases that are made from images (PCA, EKFAC): each part would have its
        own.
        """
        if (
            what.curvature.moment_images(self.images.index[:1]) is not None
            and len(self._grid(self.fit_part)) > 1
        ):
            raise IsslError(
                f"curvature {what.curvature} makes its bases from images, each part other ones; use logra, or fit in "
                "one piece with `issl fit` and give --curvature-from"
            )
        settings = [
            str(as_setting(what.perturbation, describe(what.perturbation))),
            repr(what.curvature),
            what.seed,
            what.draws,
            what.average,
            describe_loss(what.loss),
            list(what.skip),
            self.fit_part,
        ]
        belongs(self.folder / "fit", fingerprint(encoder, self.images, *settings), "a fit")
        grid = self._grid(self.fit_part)
        paths = [self.folder / "fit" / f"{k:05}.safetensors" for k in range(len(grid))]

        if (there := next((path for path in paths if path.exists()), None)) is not None:
            load_fitted(  # is it what is fitted here?
                there,
                encoder,
                perturbation=what.perturbation,
                curvature=what.curvature,
                loss=what.loss,
                fisher=what.fisher,
            )

        def fit_one(k: int, path: Path) -> None:
            fit(
                encoder,
                self.images.subset(grid[k]),
                what.perturbation,
                what.curvature,
                what.seed,
                draws=what.draws,
                average=what.average,
                loss=what.loss,
                fisher=what.fisher,
                skip=what.skip,
                computing=computing,
            ).save(path)

        made = make_all(paths, fit_one, int(self.start * len(grid)))
        make_all(
            [self.curvature], lambda _, path: reduce(KeptCurvature.add, map(read, paths)).save(path)
        )
        return made

    @property
    def curvature(self) -> Path:
        """The file of the whole curvature."""
        return self.folder / "curvature.safetensors"

    def score(self, fitted: Fitted, computing: Computing = Computing()) -> int:
        """Score the parts that are not there; how many were scored here."""
        settings = (fitted.kept.settings, fitted.kept.parts, computing.precision, self.score_part)
        belongs(
            self.folder, fingerprint(fitted.probe.encoder.model, self.images, *settings), "scores"
        )
        grid = self._grid(self.score_part)
        paths = [self.folder / "scores" / f"{k:05}.parquet" for k in range(len(grid))]

        def score_one(k: int, path: Path) -> None:
            part = self.images.subset(grid[k])
            table = fitted.score(part, computing=computing)
            whole = table.merge(part.attributes, on="index", how="left", validate="one_to_one")
            whole.attrs = table.attrs
            whole.to_parquet(path, index=False)

        return make_all(paths, score_one, int(self.start * len(grid)))

    def table(self, columns: list[str] | None = None) -> pd.DataFrame:
        """The scores of all parts, in the order of the images; of these columns (default: all)."""
        paths = sorted((self.folder / "scores").glob("[0-9]*.parquet"))
        return dataset(paths).to_table(columns).to_pandas()

    def _grid(self, size: int) -> list[range]:
        return [range(k, min(k + size, len(self.images))) for k in range(0, len(self.images), size)]


def fit_and_score_in_parts(
    encoder: nn.Module, what: Measurement, parts: InParts, computing: Computing = Computing()
) -> pd.DataFrame:
    """The scores of all images, by the curvature of all; as `issl.self_influence` gives them."""
    parts.fit(encoder, what, computing)
    fitted = load_fitted(
        parts.curvature,
        encoder,
        perturbation=what.perturbation,
        curvature=what.curvature,
        loss=what.loss,
        fisher=what.fisher,
        device=computing.device,
    )
    parts.score(fitted, computing)
    return parts.table()
