"""Released scores as a yardstick: at which percentile of them is an image's score?"""

from __future__ import annotations

import numpy as np
import pandas as pd
from torch import nn

from issl.errors import IsslError
from issl.files import provided
from issl.influence.perturbation import describe
from issl.influence.scorer import Measurement
from issl.pretraining.encoder import load_encoder


def open_reference(name: str, encoder: nn.Module, what: Measurement) -> pd.Series:
    """The released scores under a released encoder, such as cifar10-simclr-w16, in increasing
    order. Scores under `encoder` can be compared with them."""
    folder = provided("released")
    found = sorted((folder / "tables/influence").glob(f"{name}*-noise0.parquet"))
    whole = [p for p in found if p.stem in (f"{name}-noise0", f"{name}-0-noise0")]
    if not whole:
        there = sorted((folder / "tables/influence").glob("*-w*-[0-9]-noise0.parquet"))
        names = ", ".join(p.stem.removesuffix("-noise0") for p in there)
        raise IsslError(
            f"--reference {name}: no scores of that name are released; there are {names}"
        )
    table = pd.read_parquet(whole[0])
    asked = {  # what determines the size of a score, as tables of scores store it
        "curvature": repr(what.curvature),
        "perturbation": describe(what.perturbation),
        "draws": what.draws,
        "skip": list(what.skip),
    }
    for setting, value in asked.items():
        if (kept := table.attrs[setting]) != value:
            raise IsslError(
                f"--reference {name}: its scores have {setting} {kept}, but {value} is "
                "asked for; score with the same settings, or without --reference"
            )
    weights = folder / "encoders" / f"{whole[0].stem.removesuffix('-noise0')}.safetensors"
    if weights.is_file() and _shapes(encoder) != _shapes(load_encoder(weights)):
        raise IsslError(
            f"--reference {name}: the encoder is of another architecture than {weights.name}, and "
            "the sizes of their scores cannot be compared; score without --reference"
        )
    return table["influence"].sort_values()


def percentiles(scores: pd.Series, reference: pd.Series) -> np.ndarray:
    """The share of the reference that each score is above, in percent (n,)."""
    return 100 * np.searchsorted(reference, scores.to_numpy()) / len(reference)


def _shapes(encoder: nn.Module) -> list[tuple[int, ...]]:
    """Of the convolutions and linear layers, in their order."""
    kinds = (nn.Conv2d, nn.Linear)
    return [tuple(m.weight.shape) for m in encoder.modules() if isinstance(m, kinds)]
