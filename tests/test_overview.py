"""What a run tells of itself: costs, remaining time, the doctor."""

from __future__ import annotations

import io
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from rich.console import Console

from issl.commands import cli, progress
from issl.commands.progress import Overview, in_words
from issl.experiments import cost
from issl.experiments.cache import Artifacts
from issl.experiments.plan import Plan
from issl.experiments.plans_paper import PLANS
from issl.experiments.settings import Data
from issl.experiments.stages import Embed, Influence, Pretrain
from issl.pretraining.recipes import recipe

DATA = Data(name="scenes", n=48)
TRAIN = Pretrain(data=DATA, recipe=recipe("simclr", "short"), width=1, epochs=1, batch_size=16)


def test_more_work_costs_more() -> None:
    for kind in ("n", "epochs", "width"):
        changed = {"data": Data(name="scenes", n=96)} if kind == "n" else {kind: 2}
        assert cost.seconds(TRAIN.model_copy(update=changed)) > cost.seconds(TRAIN)
    scored = Influence(pretrain=TRAIN, data=DATA)
    assert cost.seconds(scored.model_copy(update={"draws": 4})) > cost.seconds(scored)
    few = Data(name="scenes", n=48, first=10)
    assert cost.seconds(scored.model_copy(update={"data": few})) < cost.seconds(scored)
    assert 0.05 < cost.speed(torch.device("cpu")) < 50


def test_every_stage_once_and_after_what_it_reads() -> None:
    for plan in PLANS.values():
        found = list(cost.every(plan().stages().values()))
        place = {stage.label: k for k, stage in enumerate(found)}
        assert len(place) == len(found) >= len({s.label for s in plan().stages().values()})
        for stage in found:
            assert all(place[need.label] < place[stage.label] for need in stage.needs().values())


class Pair(Plan):
    """A plan of two stages that read a third."""

    notebook: ClassVar[str] = "pair"

    def stages(self):
        return {"a": Influence(pretrain=TRAIN, data=DATA), "b": Embed(pretrain=TRAIN, data=DATA)}


def test_what_is_left_follows_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    artifacts = Artifacts(tmp_path)
    seen = Overview([Pair()], artifacts)
    costs = {stage.label: cost.seconds(stage) for stage in cost.every(Pair().stages().values())}
    whole = sum(costs.values()) + cost.NOTEBOOK
    assert seen.cost == costs and seen.remaining() == pytest.approx(whole)  # nothing known yet: the model's word
    # this machine takes ten times as long as the model says
    artifacts.computed.append(TRAIN.label)
    now[0] += 10 * costs[TRAIN.label]
    belief = 0.2 * whole
    factor = (10 * costs[TRAIN.label] + belief) / (costs[TRAIN.label] + belief)
    assert seen.remaining() == pytest.approx((whole - costs[TRAIN.label]) * factor) and 1.3 < factor < 10
    artifacts.computed += [s.label for s in Pair().stages().values()]
    seen.notebook("ok")
    assert seen.remaining() == pytest.approx(0) and seen.told().startswith("3 of 3 stages, 1 of 1 notebooks")


def test_a_later_run_counts_what_is_missing(tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path)
    artifacts.get(TRAIN)
    assert set(Overview([Pair()], Artifacts(tmp_path)).cost) == {s.label for s in Pair().stages().values()}


def test_lines_where_there_is_no_terminal_and_a_bar_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = Overview([Pair()], Artifacts(tmp_path))
    with seen.shown():
        seen.stage("a", TRAIN, 1.0)
    assert "a: pretrain" in (line := capsys.readouterr().out) and "0 of 3 stages" in line and line.count("\n") == 1
    drawn = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda: Console(file=drawn, force_terminal=True, width=120))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    with seen.shown():
        seen.stage("a", TRAIN, 1.0)
        seen.notebook("ok      [01]")
    text = drawn.getvalue()
    assert "a: pretrain" in text and "ok      [01]" in text and "1 of 1 notebooks" in text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 s"), (80, "80 s"), (150, "2.5 min"), (600, "10 min"), (9000, "2.5 h"), (3e5, "3 days")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert in_words(float(seconds)) == words


def test_the_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("ISSL_DATA", raising=False)
    assert cli.main(["doctor", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    for word in ("python", "torch", "GPU", "memory", "disk", "ISSL_DATA", "scenes", "drawn, any number"):
        assert word in told
    assert "cifar10   not here" in told and told.count("issl download") == 1
    lines = {line.split()[0]: line for line in told.splitlines() if line.startswith("  ")}
    assert "stages to compute, about" in lines["quick"] and "needs cifair10, cifar10, fairface" in lines["mini"]
    monkeypatch.setattr("issl.commands.doctor.os.access", lambda *_: False)
    assert cli.main(["doctor", "--out", str(tmp_path)]) == 1
    assert "cannot be written; choose another place with --out DIR" in capsys.readouterr().out
