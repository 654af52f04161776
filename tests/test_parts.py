"""Large sets in parts: the same scores, and nothing computed twice."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from disk import encoder
from nets import make, pictures

import issl
from issl import EKFAC, GaussianNoise, LoGra, cli
from issl.engine import Engine, Task
from issl.influence.parts import Scoring, score_in_parts
from issl.influence.scorer import Measurement

WHAT = Measurement(GaussianNoise(), LoGra(4))


def load(what: Measurement = WHAT, seed: int = 0, kept: Path | None = None) -> Scoring:
    return Scoring(make("residual"), pictures(53, seed=seed), what, kept=kept)


def tasks_of(folder: Path, **other: Any) -> dict[str, Task]:
    return score_in_parts(folder, partial(load, **other), fit_part=20, score_part=8)


def same(folder: Path) -> None:
    table = pd.read_parquet(folder / "scores")  # any reader of parquet data sets joins them
    want = issl.self_influence(make("residual"), pictures(53), WHAT.perturbation, WHAT.curvature)
    assert table["index"].tolist() == want["index"].tolist()
    for column in ("influence", "stability_loss", "grad_norm"):
        np.testing.assert_allclose(table[column], want[column], rtol=1e-9)


def test_parts_give_the_scores_of_the_whole_and_are_not_computed_again(tmp_path: Path) -> None:
    """Three of the fit, their sum, seven of the scores, the last of them in two processes."""
    run = Engine().run(tasks_of(tmp_path))
    for _ in range(6):  # three parts fitted, their sum, two parts scored
        next(run)
    run.close()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("0*.*")}
    rest = tasks_of(tmp_path)
    assert len(written) == 5 and set(rest) == {f"scores/{k:05}" for k in range(2, 7)}
    assert not any(end.error for end in Engine(2).run(rest))
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())
    assert tasks_of(tmp_path) == {}
    same(tmp_path)
    other = tasks_of(tmp_path / "other", kept=tmp_path / "curvature.safetensors")
    assert len(other) == 7 and not any(end.error for end in Engine().run(other))
    same(tmp_path / "other")


def test_a_folder_belongs_to_one_measurement(tmp_path: Path) -> None:
    tasks_of(tmp_path)
    for other in ({"what": replace(WHAT, seed=1)}, {"seed": 1}):
        with pytest.raises(issl.IsslError, match="holds scores of another"):
            tasks_of(tmp_path, **other)
    with pytest.raises(issl.IsslError, match="bases from images"):
        tasks_of(tmp_path / "new", what=replace(WHAT, curvature=EKFAC()))


def test_the_command_fills_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = str(tmp_path / "all"), str(tmp_path / "one.parquet")
    given = "influence --data scenes --n 12 --rank 2 --device cpu --encoder".split()
    given += [encoder(tmp_path / "e.safetensors"), "--out"]
    for out in (folder, file, folder):
        capsys.readouterr()
        assert cli.main([*given, out]) == 0
    assert "0 of 0 missing parts made" in capsys.readouterr().out
    one, parts = (pd.read_parquet(path) for path in (file, tmp_path / "all/scores"))
    pd.testing.assert_frame_equal(one, parts, rtol=1e-6)
