"""A stranger's scores beside the released ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import issl
from issl import cli
from issl.commands.reference import open_reference, percentiles
from issl.errors import IsslError
from issl.files import REPOSITORY
from issl.influence.scorer import Measurement
from issl.pretraining.encoder import Encoder

NAME = "cifar10-simclr-w16"
USUAL = Measurement(issl.GaussianNoise(0.05, 0.2), issl.LoGra(16, 0.1))


@pytest.fixture
def weights() -> Path:
    return REPOSITORY / f"released/encoders/{NAME}-1.safetensors"


def test_a_percentile_is_the_share_of_the_reference_below(weights: Path) -> None:
    reference = open_reference(NAME, issl.load_encoder(weights), USUAL)
    assert len(reference) == 50_000 and reference.is_monotonic_increasing
    asked = pd.Series([0.0, reference.iloc[25_000], reference.max() + 1])
    np.testing.assert_allclose(percentiles(asked, reference), [0, 50, 100], atol=1e-2)


def test_other_settings_or_another_architecture_are_one_error(weights: Path) -> None:
    encoder = issl.load_encoder(weights)
    others = {"curvature": issl.LoGra(8), "perturbation": issl.GaussianNoise(0.05, 0.1), "draws": 2}
    for name, value in others.items():
        with pytest.raises(IsslError, match=f"--reference {NAME}.*{name}"):
            open_reference(NAME, encoder, replace(USUAL, **{name: value}))
    with pytest.raises(IsslError, match="another architecture"):
        open_reference(NAME, Encoder(width=8).backbone, USUAL)


def test_the_command_adds_the_column(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.csv"
    command = f"influence --data scenes --n 24 --reference {NAME} --encoder".split()
    assert cli.main([*command, str(weights), "--out", str(out)]) == 0
    table = pd.read_csv(out)
    assert table["reference_percentile"].between(0, 100).all()
    order = table.sort_values("influence")["reference_percentile"]
    assert order.is_monotonic_increasing
