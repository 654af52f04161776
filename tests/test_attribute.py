"""`issl attribute`: its lists are the library's derivatives, and it says whether they predict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

import issl
from issl import cli
from issl.influence.scores import as_queries
from issl.pretraining.learner import Learner, save_learner
from issl.pretraining.recipes import plain, recipe


def test_lists_are_the_librarys_derivatives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = recipe("byol", "short")
    learner, file, out = Learner(how, 1, None, 0), tmp_path / "e.safetensors", tmp_path / "a.csv"
    save_learner(file, learner, {"recipe": plain(how)}, half=False)
    given = (
        "attribute --images scenes --n 12 --queries scenes --asked 2 --batch-size 6 --k 3".split()
    )
    given += ["--check", "3", "--device", "cpu", "--encoder", str(file), "--out", str(out)]
    assert cli.main(given) == 0
    assert "LDS" in capsys.readouterr().out
    images = issl.load("scenes").subset(range(12))
    queries = issl.load("scenes", "test").subset(range(2))
    again = replace(how, optimizer="sgd", lr=0.05, small=1.0)
    want = issl.influence_through_training(
        learner, images, as_queries(queries), again, epochs=1, batch_size=6
    ).derivatives
    found = load_file(out.with_suffix(".safetensors"))["derivatives"]
    np.testing.assert_allclose(found, want, rtol=1e-6)
    lists = pd.read_csv(out).groupby(["query", "list"])["index"].apply(list)
    for q in range(2):
        order = np.argsort(want[q].numpy()).tolist()
        assert lists[q, "helped"] == order[:3] and lists[q, "hurt"] == order[::-1][:3]
    assert cli.main([*given[:-1], str(tmp_path / "a.txt")]) == 2
    assert cli.main([*given, "--asked", "1000000000"]) == 2
