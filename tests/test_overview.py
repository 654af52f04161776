"""What a run says about itself: costs, remaining time, the doctor."""

from __future__ import annotations

import io
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import yaml
from rich.console import Console
from test_scale import thin

from issl import cli
from issl.audit import cost, doctor, profiles, progress, run, stages
from issl.audit.cache import Artifacts, Stage
from issl.audit.plan import Plan
from issl.audit.plans import PLANS
from issl.audit.progress import Overview, in_words
from issl.audit.scheduler import Ended, Scheduler
from issl.audit.settings import Data
from issl.audit.stages import Embed, Evaluate, Influence, Nearness, Pretrain
from issl.errors import IsslError
from issl.pretraining.encoder import resnet18
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


def test_every_stage_once_and_after_what_it_reads() -> None:
    for plan in PLANS.values():
        found = cost.all_stages([plan()])
        place = {stage.label: k for k, stage in enumerate(found)}
        assert len(place) == len(found) >= len({s.label for s in plan().stages()})
        for stage in found:
            assert all(place[need.label] < place[stage.label] for need in stage.needs().values())


class Pair(Plan):
    """A plan of two stages that read a third."""

    notebook: ClassVar[str] = "pair"

    def stages(self):
        return [Influence(pretrain=TRAIN, data=DATA), Embed(pretrain=TRAIN, data=DATA)]


def overview(there: Callable[[Stage], bool] = lambda _: False) -> Overview:
    return Overview(Scheduler([Pair()], there, other=cost.NOTEBOOK), notebooks=1)


def test_an_interrupt_ends_the_kernels_at_once() -> None:
    kernels: list[subprocess.Popen] = []

    def hang() -> int:
        kernels.append(subprocess.Popen(["sleep", "120"]))
        return kernels[-1].wait()

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), run._notebooks_beside_us(overview()) as start:
        start(hang)
        while not kernels:
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert time.monotonic() - began < 60 and kernels[0].wait() < 0


def test_a_notebook_that_a_stopped_run_ends_is_not_called_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen, killed = overview(), threading.Event()
    kernel = SimpleNamespace(kill=killed.set)
    children = SimpleNamespace(children=lambda recursive: [kernel])
    monkeypatch.setattr(run, "psutil", SimpleNamespace(Process=lambda: children))

    def notebook(line: str) -> None:
        assert killed.wait(60)
        seen.notebook(line)

    with pytest.raises(KeyboardInterrupt), run._notebooks_beside_us(seen) as start:
        start(notebook, "FAILED")
        raise KeyboardInterrupt
    assert capsys.readouterr().out == ""
    with run._notebooks_beside_us(overview()) as start:
        start(overview().notebook, "ok")()
    assert capsys.readouterr().out == "ok\n"


def test_what_is_left_follows_what_was_done() -> None:
    seen = overview()
    costs = {stage.label: cost.seconds(stage) for stage in cost.all_stages([Pair()])}
    whole = sum(costs.values()) + cost.NOTEBOOK
    s = seen.scheduler
    assert {label: task.cost for label, task in s.tasks.items()} == costs
    assert s.remaining() == pytest.approx(whole)  # nothing known yet: the model's word
    # this machine takes ten times as long as the model says
    s.end(s.tasks[TRAIN.label], Ended(10 * costs[TRAIN.label]))
    belief = 0.2 * whole
    factor = (10 * costs[TRAIN.label] + belief) / (costs[TRAIN.label] + belief)
    assert (
        s.remaining() == pytest.approx((whole - costs[TRAIN.label]) * factor) and 1.3 < factor < 10
    )
    assert s.finished() == pytest.approx(costs[TRAIN.label])
    for task in s.ready():
        s.end(task, Ended(1.0))
    seen.notebook("ok")
    assert s.remaining() == pytest.approx(0) and seen.status().startswith(
        "3 of 3 stages, 1 of 1 notebooks"
    )


def test_a_later_run_counts_what_is_missing(tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path)
    artifacts.get(TRAIN)
    to_do = overview(Artifacts(tmp_path).has).scheduler.to_do()
    assert {task.label for task in to_do} == {s.label for s in Pair().stages()}


def test_lines_where_there_is_no_terminal_and_a_bar_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = overview()
    task = seen.scheduler.ready()[0]
    with seen.shown():
        seen.stage(task)
    about = f"{TRAIN.label}: simclr seed 0, scenes train n=48, 0.0 s"
    assert (
        about in (line := capsys.readouterr().out)
        and "0 of 3 stages" in line
        and line.count("\n") == 1
    )
    drawn = io.StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda: Console(file=drawn, force_terminal=True, width=120)
    )
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    with seen.shown():
        seen.stage(task)
        seen.notebook("ok      [01]")
    text = drawn.getvalue()
    assert about in text and "ok      [01]" in text and "1 of 1 notebooks" in text


def test_flop_are_those_of_the_network() -> None:
    """Counted by torch itself, and the launches by the counterfeit GPU
    (tests/test_counterfeit.py)."""
    from torch.utils.flop_counter import FlopCounterMode

    for width, side in ((4, 32), (6, 48)):
        net, x = resnet18(width).eval(), torch.rand(2, 3, side, side)
        outputs: list[int] = []
        for m in net.modules():
            if isinstance(m, torch.nn.Conv2d):
                m.register_forward_hook(lambda _, __, out, to=outputs: to.append(out[0].numel()))
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            net(x)
        found = cost.shape(width, side)
        assert counted.get_total_flops() == 2 * found.flop and sum(outputs) == found.outputs
        assert found.weights == sum(
            m.weight.numel() for m in net.modules() if isinstance(m, torch.nn.Conv2d)
        )
    assert cost.flop(64) == pytest.approx(1.11e9, rel=0.01)


def test_a_gpu_takes_small_trainings_by_their_launches_and_large_ones_by_their_flop() -> None:
    for method in ("simclr", "byol", "barlow_twins", "supervised"):
        small = TRAIN.model_copy(
            update={"recipe": recipe(method, "short"), "data": Data(name="scenes", n=160)}
        )
        launches = 10 * cost.LAUNCHES[method] * cost.H200.launch
        assert cost.seconds(small, cost.H200) == pytest.approx(cost.OVERHEAD + launches)
    paper = Pretrain(
        data=Data(name="cifar10", n=50_000),
        recipe=recipe("simclr"),
        width=64,
        epochs=1,
        batch_size=256,
    )
    want = 195 * 256 * 6 * cost.flop(64) / cost.H200.half
    assert cost.seconds(paper, cost.H200) == pytest.approx(cost.OVERHEAD + want) and 1.5 < want < 3
    scores = Influence(pretrain=paper, data=Data(name="cifar10", n=50_000))
    assert 8 < cost.seconds(scores, cost.H200) < 20 and 2 < cost.gigabytes(scores) < 20
    assert cost.seconds(paper) > 100 * cost.seconds(paper, cost.H200)


def listed(profile: str, capsys: pytest.CaptureFixture[str]) -> dict[str, list[float]]:
    """By kind of stage: number, hours of a GPU and of a CPU, gigabytes."""
    assert cli.main(["doctor", "--profile", profile]) == 0
    lines = [line.replace(",", "").split() for line in capsys.readouterr().out.splitlines()[3:]]
    return {line[0]: [float(v) for v in line[1:]] for line in lines if len(line) == 5}


def test_the_doctor_lists_a_profiles_stages_by_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where its data is not here."""
    content = {
        "notebooks": "07,13",
        "common": {"dataset": "cifar10", "n": 1000, "methods": ["simclr"]},
    }
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(content))
    for module in (profiles, doctor):
        monkeypatch.setattr(module, "profiles", lambda: {"few": tmp_path / "few.yaml"})
    monkeypatch.delenv("ISSL_DATA", raising=False)
    found = listed("few", capsys)
    # one encoder and a network before training; 13 asks both under two noises, 07 about the test
    # images as well
    assert found["pretrain"][0] == 2 and found["influence"][0] == 6 and found["lists"][0] == 1
    assert found["all"][0] == sum(v[0] for k, v in found.items() if k != "all")
    for column in (1, 2):
        assert found["all"][column] == pytest.approx(
            sum(v[column] for k, v in found.items() if k != "all"), abs=0.02
        )
    assert found["all"][3] == max(v[3] for v in found.values())


@pytest.mark.slow
def test_the_papers_profile_fits_into_sixteen_hours(capsys: pytest.CaptureFixture[str]) -> None:
    whole = listed("paper", capsys)["all"]
    assert whole[1] <= 16 and whole[3] < 80


def test_every_kind_of_stage_has_a_cost(tmp_path: Path) -> None:
    """Those that only choose images are named; a kind that the model does not know is an error, not
    0 seconds."""
    torch.save({"state_dict": thin().state_dict()}, tmp_path / "weights.pt")
    scored, few = Influence(pretrain=TRAIN, data=DATA), Data(name="scenes", n=20)
    train, query = Embed(pretrain=TRAIN, data=DATA), Embed(pretrain=TRAIN, data=few)
    chosen = [
        stages.Prune(influence=scored, which="top", share=0.1),
        stages.Pick(influence=scored, quantile=0.5),
        stages.Draw(data=DATA, share=0.1),
        stages.Thin(data=DATA, attribute="group", value="cool"),
        stages.Top(scores=Nearness(train=train, query=query), query=0, k=1),
    ]
    others = [
        TRAIN,
        scored,
        train,
        stages.Stability(pretrain=TRAIN, data=DATA),
        stages.Cross(pretrain=TRAIN, data=DATA, query=few),
        stages.TrainingEffect(pretrain=TRAIN, data=DATA, query=few),
        stages.StatisticsEffect(pretrain=TRAIN, data=DATA, query=few),
        stages.SubsetEffect(
            pretrain=TRAIN, data=DATA, query=few, left_out=(stages.Draw(data=DATA, share=0.5),)
        ),
        Nearness(train=train, query=query),
        stages.Lists(features=train),
        Evaluate(train=train, test=query),
        stages.Neighbours(features=train),
        stages.Betweenness(neighbours=stages.Neighbours(features=train)),
        stages.Given(method="simclr", checkpoint=tmp_path / "weights.pt"),
    ]
    kinds = {
        kind for kind in vars(stages).values() if isinstance(kind, type) and "name" in vars(kind)
    }
    assert {type(stage) for stage in chosen + others} == kinds
    assert {cost.seconds(stage) for stage in chosen} == {cost.OVERHEAD}
    assert all(cost.seconds(stage) > cost.OVERHEAD for stage in others)

    class Unknown(Stage):
        name: ClassVar[str] = "unknown"

    with pytest.raises(IsslError, match=r"stage 'unknown': .*does not say what it costs"):
        cost.seconds(Unknown())


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 s"),
        (80, "80 s"),
        (150, "2.5 min"),
        (600, "10 min"),
        (9000, "2.5 h"),
        (3e5, "3 days"),
    ],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert in_words(float(seconds)) == words


def test_the_doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ISSL_DATA", raising=False)
    assert cli.main(["doctor", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for word in (
        "python",
        "torch",
        "GPU",
        "memory",
        "disk",
        "ISSL_DATA",
        "scenes",
        "drawn, any number",
    ):
        assert word in printed
    assert "cifar10   not here" in printed and printed.count("issl download") == 1
    lines = {line.split()[0]: line for line in printed.splitlines() if line.startswith("  ")}
    assert (
        "stages to compute, about" in lines["quick"]
        and "needs cifair10, cifar10, fairface" in lines["mini"]
    )
    monkeypatch.setattr("issl.audit.doctor.os.access", lambda *_: False)
    assert cli.main(["doctor", "--out", str(tmp_path)]) == 1
    assert "cannot be written; choose another place with --out DIR" in capsys.readouterr().out
