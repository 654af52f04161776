"""A stranger's scores beside the released ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import issl
from issl import cli
from issl.commands.reference import open_reference
from issl.errors import IsslError
from issl.files import REPOSITORY
from issl.influence.scorer import Measurement
from issl.pretraining.encoder import Encoder

NAME = "cifar10-simclr-w16"
WEIGHTS = REPOSITORY / f"released/encoders/{NAME}-1.safetensors"
USUAL = Measurement(issl.GaussianNoise(0.05, 0.2), issl.LoGra(16, 0.1))


def test_other_settings_or_another_architecture_are_one_error() -> None:
    encoder = issl.load_encoder(WEIGHTS)
    others = {"curvature": issl.LoGra(8), "perturbation": issl.GaussianNoise(0.05, 0.1), "draws": 2}
    for name, value in others.items():
        with pytest.raises(IsslError, match=f"--reference {NAME}.*{name}"):
            open_reference(NAME, encoder, replace(USUAL, **{name: value}))
    with pytest.raises(IsslError, match="another architecture"):
        open_reference(NAME, Encoder(width=8).backbone, USUAL)


def test_a_percentile_is_the_share_of_the_reference_below(tmp_path: Path) -> None:
    reference = open_reference(NAME, issl.load_encoder(WEIGHTS), USUAL)
    assert len(reference) == 50_000
    out = str(tmp_path / "scores.csv")
    command = f"influence --data scenes --n 24 --reference {NAME} --encoder".split()
    assert cli.main([*command, str(WEIGHTS), "--out", out]) == 0
    table = pd.read_csv(out)
    want = [100 * (reference < score).mean() for score in table["influence"]]
    np.testing.assert_allclose(table["reference_percentile"], want, atol=0.01)
    assert min(want) < max(want)
