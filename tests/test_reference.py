"""A stranger's scores beside the released ones: percentiles, and only of the same kind."""

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
from issl.influence.scorer import Measurement
from issl.pretraining.encoder import Encoder, save_encoder

NAME = "cifar10-simclr-w16"
USUAL = Measurement(issl.GaussianNoise(0.05, 0.2), issl.LoGra(16, 0.1))


@pytest.fixture
def weights(repository: Path) -> Path:
    return repository / f"released/encoders/{NAME}-1.safetensors"


def test_a_percentile_is_the_share_of_the_reference_below(weights: Path) -> None:
    reference = open_reference(NAME, issl.load_encoder(weights), USUAL)
    assert len(reference) == 50_000 and reference.is_monotonic_increasing
    asked = pd.Series([0.0, reference.iloc[25_000], reference.max() + 1])
    np.testing.assert_allclose(percentiles(asked, reference), [0, 50, 100], atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"curvature": issl.LoGra(8, 0.1)}, "curvature"),
        ({"perturbation": issl.GaussianNoise(0.05, 0.1)}, "perturbation"),
        ({"draws": 2}, "draws"),
    ],
)
def test_other_settings_are_one_error(changes: dict, named: str, weights: Path) -> None:
    with pytest.raises(IsslError, match=f"--reference {NAME}.*{named}"):
        open_reference(NAME, issl.load_encoder(weights), replace(USUAL, **changes))


def test_another_architecture_or_an_unknown_name_is_one_error(weights: Path) -> None:
    with pytest.raises(IsslError, match="another architecture"):
        open_reference(NAME, Encoder(width=8).backbone, USUAL)
    with pytest.raises(IsslError, match=r"nothing-w16.*there are .*cifar10-simclr-w16-0"):
        open_reference("nothing-w16", issl.load_encoder(weights), USUAL)


def test_the_command_adds_the_column(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.csv"
    given = ["influence", "--data", "scenes", "--n", "24", "--encoder", str(weights)]
    assert cli.main([*given, "--reference", NAME, "--out", str(out)]) == 0
    table = pd.read_csv(out)
    assert table["reference_percentile"].between(0, 100).all()
    order = table.sort_values("influence")["reference_percentile"]
    assert order.is_monotonic_increasing
    save_encoder(tmp_path / "small.safetensors", Encoder(width=2), {})
    small = [*given[:-1], str(tmp_path / "small.safetensors"), "--out", str(out)]
    assert cli.main([*small, "--reference", NAME]) == 2
