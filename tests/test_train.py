"""`issl pretrain` from the command line: an encoder with its history and curves, resume, bad
commands, torchrun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import issl
from issl import cli
from issl.pretraining.loop import Execution, pretrain
from issl.pretraining.recipes import recipe

COMMON = [
    "pretrain",
    "--data",
    "scenes",
    "--n",
    "64",
    "--recipe",
    "short",
    "--width",
    "2",
    "--batch-size",
    "16",
]


def test_an_encoder_with_its_history_and_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "byol.safetensors"
    arguments = [
        *COMMON,
        "--method",
        "byol",
        "--epochs",
        "3",
        "--watch",
        "32",
        "--watch-every",
        "2",
        "--out",
        str(out),
    ]
    assert cli.main([*arguments, "--time-budget", "0"]) == 3
    assert (
        "stopped after 0 of 3 epochs, the time budget is spent; the same command"
        in capsys.readouterr().err
    )
    assert not out.exists() and out.with_name("byol.safetensors.checkpoint").is_file()
    assert cli.main(arguments) == 0
    assert "3 epochs in" in capsys.readouterr().out
    assert sorted(p.name for p in out.parent.iterdir()) == [
        "byol.csv",
        "byol.png",
        "byol.safetensors",
    ]
    history = pd.read_csv(out.with_suffix(".csv"))
    assert len(history) == 3 and history["knn_accuracy"].notna().tolist() == [False, True, True]
    want, _ = pretrain(
        issl.load("scenes", n=64), recipe("byol", "short"), width=2, epochs=3, batch_size=16
    )
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(issl.load_encoder(out)(x), want.backbone(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "e.pt"], "ends in .safetensors"),
        (["--out", "/proc/x/e.safetensors"], "cannot be made"),
        (["--data", "folder:/nowhere"], "image folder '/nowhere' does not exist"),
        (["--batch-size", "100"], "batch_size=100: need 2 to 64"),
    ],
)
def test_bad_commands(arguments: list[str], message: str, tmp_path: Path, capsys) -> None:
    assert cli.main([*COMMON, "--out", str(tmp_path / "e.safetensors"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.slow
def test_under_torchrun(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "issl"]
    # torchrun would take --n for an abbreviation of its own options
    common = ["--images" if a == "--n" else a for a in COMMON]
    arguments = [*common, "--epochs", "1", "--precision", "fp32", "--out"]
    done = subprocess.run(
        [*run, *arguments, str(tmp_path / "two.safetensors")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "on 2 processes" in done.stdout, done.stderr
    assert cli.main([*arguments, str(tmp_path / "one.safetensors")]) == 0
    one, two = (pd.read_csv(tmp_path / f"{k}.csv")["loss"] for k in ("one", "two"))
    pd.testing.assert_series_equal(one, two, rtol=1e-3)


@pytest.mark.slow
def test_compiled_is_the_same(tmp_path: Path) -> None:
    images, settings = issl.load("scenes", n=64), {"width": 2, "epochs": 1, "batch_size": 32}
    how = recipe("simclr", "short")
    (_, plain), (_, fast) = (
        pretrain(images, how, **settings, execution=Execution(precision="fp32", compiled=c))
        for c in ("off", "on")
    )
    pd.testing.assert_series_equal(plain["loss"], fast["loss"], rtol=1e-3)
