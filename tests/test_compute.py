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
from typing import ClassVar

import pandas as pd
import pytest
import torch
import yaml

from issl import cli
from issl.audit import profiles, run, scheduler
from issl.audit.cache import Artifacts
from issl.audit.compute import Bundle, compute
from issl.audit.plan import Plan
from issl.audit.profiles import ProfileOptions, read_profile
from issl.audit.scheduler import Ended, Scheduler
from issl.audit.stages import Embed, Evaluate, Influence
from issl.audit.workers import Job
from issl.pretraining.encoder import Head, new_encoder, save_encoder

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
    monkeypatch.setattr(profiles, "profiles", lambda: {"tiny": path})
    monkeypatch.delenv("ISSL_DATA", raising=False)
    return path


def change(path: Path, **common) -> None:
    path.write_text(yaml.safe_dump({**TINY, "common": {**TINY["common"], **common}}))


def test_what_there_is_to_do_comes_in_order_and_once(tiny: Path, tmp_path: Path) -> None:
    plans = read_profile("tiny", ["00_method", "07_outliers"], out=str(tmp_path))
    found = [task.stage for task in Scheduler(plans.values(), lambda _: False).tasks.values()]
    # two notebooks read one encoder each, and the second a network before training
    assert (
        len(found) == len({s.label for s in found})
        and [s.name for s in found].count("pretrain") == 3
    )
    for k, stage in enumerate(found):
        assert all(needed in found[:k] for needed in stage.needs().values())


class Chain(Plan):
    """A plan whose stages read each other."""

    notebook: ClassVar[str] = "chain"

    def stages(self):
        data = self.data()
        encoder = self.pretrain()
        train, test = (
            Embed(pretrain=encoder, data=data),
            Embed(pretrain=encoder, data=self.data("test")),
        )
        influence, evaluate = (
            Influence(pretrain=encoder, data=data),
            Evaluate(train=train, test=test),
        )
        return [encoder, influence, train, test, evaluate]


def chain(*there: int, jobs: int = 1) -> tuple[Chain, Scheduler]:
    """The plan and its scheduler, where the stages at these places are cached."""
    plan = Chain(n=64)
    cached = [plan.stages()[k] for k in there]
    return plan, Scheduler([plan], lambda stage: stage in cached, jobs)


def test_what_is_ready_what_is_blocked_and_how_long_it_takes() -> None:
    plan, s = chain(3, jobs=2)
    encoder, influence, train, test, evaluate = s.tasks.values()
    todo = (encoder, influence, train, evaluate)
    assert s.ready() == [encoder] and test.state == "cached" and not s.settled(plan)
    # nothing measured: the model's word, two at once
    assert s.remaining() == pytest.approx(sum(task.cost for task in todo) / 2)
    s.start(encoder)
    assert s.running() == [encoder] and s.ready() == []
    s.end(encoder, Ended(10 * encoder.cost))  # this machine takes ten times as long
    assert s.ready() == [influence, train] and s.renewed(plan)
    factor = (10 * encoder.cost + 0.2 * s.whole) / (encoder.cost + 0.2 * s.whole)
    rest = influence.cost + train.cost + evaluate.cost
    assert s.remaining() == pytest.approx(factor * rest / 2) and 1.3 < factor < 10
    s.start(train)
    train.began -= 1e6  # longer than expected: no less than nothing is left of it
    assert s.remaining() == pytest.approx(factor * (rest - train.cost) / 2)
    s.end(influence, Ended(1.0, "no gradient"))
    assert (
        evaluate.state == "waiting" and s.problem(plan) is influence
    )  # evaluate does not read the scores
    s.end(train, Ended(1.0, "the time budget is spent", late=True))
    assert train.state == "out of time" and evaluate.state == "blocked" and s.ready() == []
    assert (evaluate.error, evaluate.late) == ("the time budget is spent", True) and s.settled(plan)
    assert (
        s.count() == "1 done, 1 failed, 1 out of time, 1 cached, 1 blocked"
        and "blocked" in s.table()
    )


def test_what_one_job_of_a_cluster_makes() -> None:
    """A training, and what follows from it, as far as it is small; the rest when that is done."""
    _, s = chain()
    encoder, influence, train, test, evaluate = s.tasks.values()
    assert s.bundle() == [encoder, influence, train, test, evaluate]
    train.cost = 1e4
    assert s.bundle() == [encoder, influence, test]  # evaluate reads train
    for task in s.bundle():
        s.start(task)
    assert s.bundle() == []
    s.end(encoder, Ended(1.0))
    s.postpone([influence, test])  # the job ended before
    assert s.bundle() == [influence, test]
    train.cost = encoder.cost = 1e4  # a large one comes alone
    influence.state = test.state = "done"
    assert s.bundle() == [train]


def test_the_longest_chain_starts_first() -> None:
    plan, s = chain()
    s = Scheduler([plan], lambda stage: stage == plan.stages()[0], jobs=2, longest_first=True)
    _, influence, train, test, evaluate = s.tasks.values()
    assert influence.path == influence.cost and train.path == train.cost + evaluate.cost
    assert [task.path for task in s.ready()] == sorted(
        (influence.path, train.path, test.path), reverse=True
    )
    assert s.ready()[0] is max(influence, train, test, key=lambda task: task.path)
    s.end(test, Ended(1.0))
    assert test not in s.ready()


def test_a_job_stops_at_the_first_stage_that_does_not_end_well(tmp_path: Path) -> None:
    wrong, right = Chain(n=64, width=1, batch_size=65).pretrain(), Chain(n=64, width=1).pretrain()
    jobs = tuple(Job(stage, tmp_path, "cpu", 1) for stage in (right, wrong, right))
    good, bad = Bundle(jobs)()
    assert not good.error and "batch_size=65" in bad.error


def test_a_failure_blocks_all_that_follows_from_it() -> None:
    plan, s = chain()
    encoder, *others = s.tasks.values()
    s.start(encoder)
    s.end(encoder, Ended(1.0, "batch_size=65"))
    assert {task.state for task in others} == {"blocked"} and {task.error for task in others} == {
        "batch_size=65"
    }
    assert s.ready() == [] and s.settled(plan) and s.remaining() == 0 and not s.renewed(plan)


def test_what_is_missing_is_made_only_where_something_needs_it() -> None:
    class Last(Chain):
        notebook: ClassVar[str] = "last"

        def stages(self):
            return super().stages()[-1:]

    plan = Last(n=64)
    done = Scheduler([plan], lambda stage: isinstance(stage, Evaluate))
    assert done.count() == "3 not needed, 1 cached" and done.ready() == [] and done.remaining() == 0
    half = Scheduler([plan], lambda stage: isinstance(stage, Embed))
    assert half.count() == "1 not needed, 2 cached, 1 waiting"
    assert [task.stage for task in half.ready()] == plan.stages()


def test_side_by_side_here_and_then_the_notebooks_only_read(tiny: Path, tmp_path: Path) -> None:
    said: list[str] = []
    options = ProfileOptions("tiny", only="07", out=tmp_path / "out")
    assert compute(options, jobs=2, say=said.append) == 0
    assert (
        said[0] == "profile tiny: 16 stages, 16 waiting"
        and "16 done in" in said[-1]
        and "s left" in "".join(said)
    )
    assert "simclr seed 0, scenes train n=64" in said[-1]
    again: list[str] = []
    assert compute(options, jobs=2, say=again.append) == 0
    assert again[0] == "profile tiny: 16 stages, 16 cached" and "16 cached in 0 s" in again[-1]
    artifacts = Artifacts(tmp_path / "out" / "artifacts")
    plan = read_profile("tiny", ["07_outliers"], out=str(tmp_path / "out"))["07_outliers"]
    assert [artifacts.get(s).is_dir() for s in plan.stages()] == [True] * len(
        plan.stages()
    ) and artifacts.computed == []


def test_a_failure_is_shown_and_blocks_what_needs_it_alone(tiny: Path, tmp_path: Path) -> None:
    change(tiny, batch_size=65)
    said: list[str] = []
    assert compute(ProfileOptions("tiny", only="07", out=tmp_path / "out"), say=said.append) == 1
    printed = "\n".join(said)
    assert "batch_size=65: need 2 to 64" in printed and "2 failed, 14 blocked" in said[-1]


def test_out_of_time(tiny: Path, tmp_path: Path) -> None:
    said: list[str] = []
    assert (
        compute(
            ProfileOptions("tiny", only="07", out=tmp_path / "out", minutes=0.0), say=said.append
        )
        == 3
    )
    assert (
        "the same command continues from here" in "\n".join(said)
        and "2 out of time, 14 blocked" in said[-1]
    )


def test_run_out_of_time(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(
            [
                "run",
                "--profile",
                "tiny",
                "--only",
                "07",
                "--out",
                str(tmp_path),
                "--time-budget",
                "0",
            ]
        )
        == 3
    )
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
def test_bad_commands(
    arguments: list[str], message: str, tiny: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch
    given = [
        "compute",
        "--out",
        str(tmp_path),
        *([] if "--profile" in arguments else ["--profile", "tiny"]),
    ]
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
def test_a_real_slurm_trains_two_side_by_side(
    tiny: Path, tmp_path: Path, slurm, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "BUNDLE", 1.5)  # s: each training has a job of its own
    change(tiny, n=1024, epochs=10)
    said: list[str] = []
    out = tmp_path / "out"
    options = ProfileOptions("tiny", only="00,07", out=out)
    assert (
        compute(options, jobs=2, cluster="slurm", slurm={"cpus_per_task": "1"}, say=said.append)
        == 0
    )
    assert "15 done in" in said[-1]
    times = []
    for path in (out / "artifacts" / "pretrain").glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        made = manifest["made_with"]
        if manifest["config"]["epochs"] == 0:
            continue  # the network before training
        end = datetime.fromisoformat(made["finished"]).timestamp()
        times.append((end - made["seconds"], end))
    (a, b), (c, d) = times
    assert max(a, c) < min(b, d), f"one after the other: {times}"
    assert run.run(options) == 0
    assert (
        "2 of 2 notebooks ended well" in (printed := capsys.readouterr().out)
        and "stages: 0 computed" in printed
    )


@pytest.mark.slow
def test_the_documented_command_for_slurm(
    tiny: Path, tmp_path: Path, slurm, monkeypatch, repository: Path
) -> None:
    """As it stands, GPU and all, on a profile that takes seconds."""
    (line,) = re.findall(
        r"^issl compute .*--cluster slurm.*$",
        (repository / "docs/scale.md").read_text(),
        re.MULTILINE,
    )
    monkeypatch.setattr(profiles, "profiles", lambda: {"paper": tiny})
    given = [*shlex.split(line)[1:], "cpus_per_task=1"]
    assert cli.main([*given, "--only", "00", "--out", str(tmp_path)]) == 0
    made = json.loads(
        next((tmp_path / "artifacts" / "pretrain").glob("*/manifest.json")).read_text()
    )
    assert made["made_with"]


@pytest.mark.slow
def test_scores_in_parts_on_slurm(tmp_path: Path, slurm, capsys) -> None:
    """An array that fits, a job that merges, an array that scores."""
    encoder = new_encoder(1, Head(hidden=8, out=8), 0).train()
    with torch.no_grad():
        encoder(torch.rand(32, 3, 32, 32))  # BatchNorm has seen images
    save_encoder(tmp_path / "e.safetensors", encoder, {})
    given = [
        "influence",
        "--data",
        "scenes",
        "--images",
        "24",
        "--encoder",
        str(tmp_path / "e.safetensors"),
        "--rank",
        "2",
    ]
    given += ["--device", "cpu", "--out"]
    assert cli.main([*given, str(tmp_path / "all"), "--cluster", "slurm", "--jobs", "2"]) == 0
    said = capsys.readouterr().out
    assert "fit: 2 jobs" in said and "merge: 1 jobs" in said and "score: 2 jobs" in said
    assert cli.main([*given, str(tmp_path / "one.parquet")]) == 0
    one, parts = (
        pd.read_parquet(tmp_path / "one.parquet"),
        pd.read_parquet(tmp_path / "all" / "scores"),
    )
    pd.testing.assert_frame_equal(one, parts, rtol=1e-5)


def test_all_of_a_profile_is_all_that_a_run_reads(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the images of the report."""
    change(tiny)
    plans = yaml.safe_load(tiny.read_text()) | {
        "report": {"methods": ["simclr"], "shown": 32, "rank": 2}
    }
    tiny.write_text(yaml.safe_dump(plans))
    monkeypatch.setattr(
        "issl.audit.profiles.covered", lambda profile: []
    )  # of all notebooks: none, for speed
    assert compute(ProfileOptions("tiny", out=tmp_path), say=lambda _: None) == 0
    plan = read_profile("tiny", ["report"], out=str(tmp_path))["report"]
    assert all(Artifacts(tmp_path / "artifacts").has(stage) for stage in plan.stages())
