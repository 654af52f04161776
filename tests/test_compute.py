"""`issl compute`: what there is to do, side by side on this machine, failures, and a real Slurm."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from issl.commands import cli, run
from issl.commands.compute import Board, Work, closure, compute
from issl.commands.run import read_profile
from issl.experiments.cache import Artifacts
from issl.experiments.settings import Data
from issl.experiments.stages import Embed, Evaluate, Influence, Pretrain

TINY = {
    "common": {"n": 64, "width": 1, "epochs": 1, "batch_size": 32},
    "00_method": {"seed": 1, "images": 16},
    "07_outliers": {"methods": ["simclr"]},
}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A profile with two encoders, of seeds 0 and 1."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    monkeypatch.setattr(run, "profiles", lambda: {"tiny": path})
    monkeypatch.delenv("ISSL_DATA", raising=False)
    return path


def change(path: Path, **common) -> None:
    path.write_text(yaml.safe_dump({**TINY, "common": {**TINY["common"], **common}}))


def test_what_there_is_to_do_comes_in_order_and_once(tiny: Path, tmp_path: Path) -> None:
    plans = read_profile("tiny", ["00_method", "07_outliers"], out=str(tmp_path))
    found = list(closure(plans.values()).values())
    assert [s.name for s in found].count("pretrain") == 2 and len(found) == len({s.label for s in found}) == 4
    for k, stage in enumerate(found):
        assert all(needed in found[:k] for needed in stage.needs().values())


def board() -> Board:
    data = Data(name="scenes", n=64)
    encoder = Pretrain(data=data)
    train, test = Embed(pretrain=encoder, data=data), Embed(pretrain=encoder, data=Data(name="scenes", n=32))
    chain = [encoder, Influence(pretrain=encoder, data=data), train, test, Evaluate(train=train, test=test)]
    return Board({s.label: Work(s) for s in chain})


def test_what_is_ready_what_is_blocked_and_how_long_it_takes() -> None:
    b = board()
    encoder, influence, train, test, evaluate = b.works.values()
    assert b.ready() == [encoder] and b.remaining(1) is None
    encoder.state, encoder.seconds = "done", 100.0
    assert b.ready() == [influence, train, test]
    train.state, train.seconds, test.state = "done", 8.0, "cached"
    assert b.ready() == [influence, evaluate]
    influence.state = "failed"
    b.block()
    assert evaluate.state == "waiting"  # it does not read the scores
    evaluate.state, test.state = "done", "waiting"
    assert b.remaining(2) == pytest.approx(4.0)  # one more of a kind that took 8 s, two at once
    encoder.state = test.state = evaluate.state = "waiting"
    encoder.state = "failed"
    b.block()
    assert (test.state, evaluate.state) == ("blocked", "blocked") and b.ready() == []
    assert "1 done" in b.count() and "blocked" in b.table()


def test_side_by_side_here_and_then_the_notebooks_only_read(tiny: Path, tmp_path: Path) -> None:
    said: list[str] = []
    arguments = {"only": "07", "out": tmp_path / "out", "jobs": 2, "say": said.append}
    assert compute("tiny", **arguments) == 0
    assert said[0] == "profile tiny: 3 stages, 3 waiting" and "3 done in" in said[-1] and "s left" in "".join(said)
    assert "simclr seed 0, scenes train n=64" in said[-1]
    again: list[str] = []
    assert compute("tiny", **{**arguments, "say": again.append}) == 0
    assert again[0] == "profile tiny: 3 stages, 3 cached" and "3 cached in 0 s" in again[-1]
    artifacts = Artifacts(tmp_path / "out" / "artifacts")
    plan = read_profile("tiny", ["07_outliers"], out=str(tmp_path / "out"))["07_outliers"]
    assert [artifacts.get(s).is_dir() for s in plan.stages()] == [True] * 3 and artifacts.computed == []


def test_a_failure_is_shown_and_blocks_what_needs_it_alone(tiny: Path, tmp_path: Path) -> None:
    change(tiny, batch_size=65)
    said: list[str] = []
    assert compute("tiny", only="07", out=tmp_path / "out", say=said.append) == 1
    told = "\n".join(said)
    assert "batch_size=65: need 2 to 64" in told and "1 failed, 2 blocked" in said[-1]
    log = next(Path(line.split(": ", 1)[1]) for line in told.splitlines() if "its log: " in line)
    assert log.is_file()


def test_out_of_time(tiny: Path, tmp_path: Path) -> None:
    said: list[str] = []
    assert compute("tiny", only="07", out=tmp_path / "out", minutes=0.0, say=said.append) == 3
    assert "the same command continues from here" in "\n".join(said) and "1 out of time, 2 blocked" in said[-1]


def test_run_out_of_time(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--profile", "tiny", "--only", "07", "--out", str(tmp_path), "--time-budget", "0"]) == 3
    printed = capsys.readouterr().out
    assert "LATE    07_outliers" in printed and "was not begun, the time budget is spent" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs", "0"], "--jobs 0: need 1 or more"),
        (["--cluster", "pbs"], "--cluster 'pbs': choose local or slurm"),
        (["--slurm", "gpu"], "--slurm gpu: write KEY=VALUE"),
        (["--cluster", "slurm"], "is sbatch on the path?"),
        (["--profile", "huge"], "profile 'huge'"),
    ],
)
def test_bad_commands(arguments: list[str], message: str, tiny: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch
    given = ["compute", "--out", str(tmp_path), *([] if "--profile" in arguments else ["--profile", "tiny"])]
    assert cli.main([*given, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.fixture
def slurm(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A Slurm of one node, this machine."""
    if os.geteuid() != 0 or not all(shutil.which(p) for p in ("slurmctld", "slurmd", "munged")):
        pytest.skip("needs root and Debian's slurm-wlm and munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # a socket's path must be short
    script = repository / "tests" / "slurm.sh"
    subprocess.run([script, "start", folder], check=True)
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    try:
        yield SimpleNamespace(folder=folder)
    finally:
        subprocess.run([script, "stop", folder], check=True)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_a_real_slurm_trains_two_side_by_side(tiny: Path, tmp_path: Path, slurm, capsys) -> None:
    change(tiny, n=512, epochs=4)
    out, said = tmp_path / "out", []
    assert (
        compute("tiny", only="00,07", out=out, jobs=2, cluster="slurm", slurm={"cpus_per_task": "1"}, say=said.append)
        == 0
    )
    assert "4 done in" in said[-1]
    times = []
    for path in (out / "artifacts" / "pretrain").glob("*/manifest.json"):
        made = json.loads(path.read_text())["made_with"]
        end = datetime.fromisoformat(made["finished"]).timestamp()
        times.append((end - made["seconds"], end))
    (a, b), (c, d) = times
    assert max(a, c) < min(b, d), f"one after the other: {times}"
    assert run.run("tiny", only="00,07", out=out) == 0
    assert "2 of 2 notebooks ended well" in (printed := capsys.readouterr().out) and "stages: 0 computed" in printed


@pytest.mark.slow
def test_the_readmes_command_for_slurm(tiny: Path, tmp_path: Path, slurm, monkeypatch, repository: Path) -> None:
    """As it stands, GPU and all, on a profile that takes seconds."""
    (line,) = re.findall(r"^issl compute .*--cluster slurm.*$", (repository / "README.md").read_text(), re.MULTILINE)
    monkeypatch.setattr(run, "profiles", lambda: {"paper": tiny})
    given = [*shlex.split(line)[1:], "cpus_per_task=1"]
    assert cli.main([*given, "--only", "00", "--out", str(tmp_path)]) == 0
    made = json.loads(next((tmp_path / "artifacts" / "pretrain").glob("*/manifest.json")).read_text())
    assert made["made_with"]


def test_all_of_a_profile_is_all_that_a_run_reads(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the images of the report."""
    change(tiny)
    plans = yaml.safe_load(tiny.read_text()) | {"report": {"methods": ["simclr"], "shown": 32, "rank": 2}}
    tiny.write_text(yaml.safe_dump(plans))
    monkeypatch.setattr("issl.commands.compute.select", lambda only: [])  # of all notebooks: none, for speed
    assert compute("tiny", out=tmp_path, say=lambda _: None) == 0
    plan = read_profile("tiny", ["report"], out=str(tmp_path))["report"]
    assert all(Artifacts(tmp_path / "artifacts").has(stage) for stage in plan.stages())
