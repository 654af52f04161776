"""Large sets in parts: the same scores whoever computes what, and nothing computed twice after a
kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from forked import context
from nets import make, pictures

import issl
from issl import EKFAC, GaussianNoise, LoGra
from issl.files import make_all
from issl.influence.in_parts import InParts, fit_and_score_in_parts
from issl.influence.measurement import Measurement

WHAT = Measurement(GaussianNoise(), LoGra(4))


def parts_of(folder: Path, n: int = 53, start: float = 0.0) -> InParts:
    return InParts(folder, pictures(n), fit_part=20, score_part=8, start=start)


def same(table: pd.DataFrame, n: int = 53) -> None:
    want = issl.self_influence(make("residual"), pictures(n), WHAT.perturbation, WHAT.curvature)
    assert table["index"].tolist() == want["index"].tolist()
    for column in ("influence", "stability_loss", "grad_norm"):
        np.testing.assert_allclose(table[column], want[column], rtol=1e-9)


def test_parts_give_the_scores_of_the_whole(tmp_path: Path) -> None:
    same(fit_and_score_in_parts(make("residual"), WHAT, parts_of(tmp_path)))
    assert len(list((tmp_path / "fit").glob("*.safetensors"))) == 3
    assert len(list((tmp_path / "scores").glob("*.parquet"))) == 7
    same(pd.read_parquet(tmp_path / "scores"))  # any reader of parquet data sets joins them
    table = parts_of(tmp_path).table(["index", "influence"])
    assert list(table) == ["index", "influence"]


def work(folder: Path, start: float) -> tuple[int, int]:
    """One of several processes that were started at any time."""
    torch.set_num_threads(1)
    parts = parts_of(folder, start=start)
    fitted = parts.fit(make("residual"), WHAT)
    scored = parts.score(issl.load_fitted(parts.curvature, make("residual")))
    return fitted, scored


def test_three_processes_share_the_parts(tmp_path: Path) -> None:
    with context.Pool(3) as pool:
        made = pool.starmap(work, [(tmp_path, k / 3) for k in range(3)])
    assert sum(m[0] for m in made) == 3 and sum(m[1] for m in made) == 7  # each part once
    same(parts_of(tmp_path).table())


KILLED = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_in_parts import WHAT, parts_of
from nets import make
import issl
torch.set_num_threads(1)
parts = parts_of(Path(sys.argv[2]))
parts.fit(make("residual"), WHAT)
whole, calls = issl.Fitted.score, []
def score(self, *args, **options):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), 9)  # in the middle of the fourth part
    return whole(self, *args, **options)
issl.influence.fitted.Fitted.score = score
parts.score(issl.load_fitted(parts.curvature, make("residual")))
"""


def test_killed_and_resumed_by_another_number_of_processes(tmp_path: Path) -> None:
    arguments = [str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    assert done.returncode == -signal.SIGKILL
    written = {
        p: p.stat().st_mtime_ns
        for p in [*tmp_path.glob("fit/[0-9]*"), *tmp_path.glob("scores/[0-9]*")]
    }
    assert len(written) == 3 + 3
    with context.Pool(2) as pool:
        made = pool.starmap(work, [(tmp_path, 0.0), (tmp_path, 0.5)])
    assert sum(m[0] for m in made) == 0 and sum(m[1] for m in made) == 4
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in written.items())
    same(parts_of(tmp_path).table())


def test_a_folder_belongs_to_one_measurement(tmp_path: Path) -> None:
    parts, net = parts_of(tmp_path), make("residual")
    parts.fit(net, WHAT)
    other = Measurement(GaussianNoise(), LoGra(4), seed=1)
    with pytest.raises(issl.IsslError, match=r"holds a fit of another encoder, images or setting"):
        parts.fit(net, other)
    fitted = issl.load_fitted(parts.curvature, net)
    parts.score(fitted)
    with pytest.raises(issl.IsslError, match="holds scores of another"):
        InParts(tmp_path, pictures(53, seed=1), 20, 8).score(fitted)
    with pytest.raises(issl.IsslError, match=r"makes its bases from images.*--curvature-from"):
        parts_of(tmp_path / "new").fit(net, Measurement(GaussianNoise(), EKFAC()))


def test_a_file_that_another_holds_is_waited_for(tmp_path: Path) -> None:
    """And made here, if the other one dies."""
    holder = context.Process(target=hold, args=(tmp_path / "a",))
    holder.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.05)
    began, made = time.monotonic(), []
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert (
        make_all(
            [tmp_path / "a"], lambda k, path: (made.append(k), path.write_text("here"))[1] and None
        )
        == 1
    )
    assert made == [0] and (tmp_path / "a").read_text() == "here" and time.monotonic() - began < 60


def hold(path: Path) -> None:
    def never(_: int, part: Path) -> None:
        (part.parent / "held").touch()
        time.sleep(600)

    make_all([path], never)
