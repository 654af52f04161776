"""The runner: notebooks end to end at a tiny setting, failures, bad input; and what goes wrong
around a run: full disks, killed processes, signals, damaged artifacts, failing tasks, Dask."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import nbformat
import pytest
import torch
import yaml

from issl import cli, engine
from issl.audit import notebooks, profiles, run
from issl.audit.cache import MANIFEST, Artifacts, in_dependency_order, missing
from issl.audit.notebooks import fingerprint, is_current, note_made
from issl.audit.plan import Plan
from issl.audit.profiles import PLANS, ProfileOptions, all_stages
from issl.audit.settings import Data
from issl.audit.stages import Embed, Influence, Pretrain
from issl.engine import Engine, Task
from issl.errors import IsslError
from issl.files import PART, REPOSITORY, atomic, remove_leftovers
from issl.pretraining import loop
from issl.pretraining.checkpoint import Checkpoint
from issl.pretraining.recipes import recipe

FEW = {
    "common": {"n": 64, "width": 1, "epochs": 1, "batch_size": 32},
    "07_outliers": {"methods": ["simclr"]},
}
SPEC = {"name": "python3", "display_name": "Python 3", "language": "python"}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A profile of the smallest sizes."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(FEW))
    monkeypatch.setattr(profiles, "profiles", lambda: {"tiny": path})
    return path


@pytest.fixture
def books(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Replaces the notebooks by two cells each, which start fast: books(name, code)."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(run, "notebooks_folder", lambda: folder)

    def write(name: str, code: str) -> None:
        parameters = nbformat.v4.new_code_cell("n = 0", metadata={"tags": ["parameters"]})
        cells = [parameters, nbformat.v4.new_code_cell(code)]
        book = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": SPEC})
        nbformat.write(book, folder / f"{name}.ipynb")

    return write


def test_what_fails_is_shown_and_tried_again(books, tiny: Path, tmp_path: Path, capsys) -> None:
    """A notebook that fails, and a stage, which blocks its notebook alone; the others go on."""
    books("00_method", "raise ValueError('the cat sat on the tensor')")
    books("07_outliers", "print(n)")
    books("09_linear_theory", "print(n)")
    too_large = {"methods": ["simclr"], "batch_size": 65}
    tiny.write_text(yaml.safe_dump({**FEW, "07_outliers": too_large}))
    told = ProfileOptions("tiny", only="00,07,09", out=tmp_path / "out")
    for ended in ("ok     ", "current"):
        assert run.run(told, engine=Engine()) == 1
        printed = capsys.readouterr().out
        assert "ValueError: the cat sat on the tensor" in printed
        assert "batch_size=65: need 2 to 64" in printed and "blocked 07_outliers" in printed
        assert f"{ended} 09_linear_theory" in printed


def test_the_output_folder_may_have_any_name(books, tmp_path: Path) -> None:
    books("09_linear_theory", "print(n)")
    out = tmp_path / "run {y} {0} 100%s {{n}} b%20#é' {"
    assert cli.main(["run", "--profile", "tiny", "--only", "09", "--out", str(out)]) == 0
    results = out / "results/tiny"
    copy = nbformat.read(results / "09_linear_theory.ipynb", as_version=4)
    assert copy.cells[-1].outputs[0].text == "64\n"  # the profile's n
    (page,) = (results / "report").glob("09*.html")
    assert page.stat().st_size > 1000
    assert {p for p in tmp_path.iterdir() if p.is_dir()} == {out, tmp_path / "notebooks"}


def test_a_notebook_runs_again_after_a_change(books, tmp_path: Path, monkeypatch) -> None:
    """What is decided is tested through `is_current`; that a run heeds it, above."""
    books("00_method", "pass")
    source = run.notebooks_folder() / "00_method.ipynb"
    plan = PLANS["00_method"](profile="tiny", out=str(tmp_path))
    figure, claim = plan.figures / "00_method.png", plan.results / "claim_x.json"
    for path in (figure, plan.results / "00_method.ipynb", claim):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"notebook": "00_method"}')
    other = plan.results / "claim_y.json"
    other.write_text('{"notebook": "03_background_bias"}')

    def key(plan: Plan = plan, device: str = "a CPU") -> str:
        return fingerprint(source, plan, device)

    assert not is_current(plan, key())
    note_made(plan, key())
    other.unlink()
    assert is_current(plan, key())
    for path in (figure, claim, plan.results / "00_method.made.json"):
        kept = path.read_bytes()
        path.write_bytes(b"")
        assert not is_current(plan, key()), path
        path.write_bytes(kept)
    assert is_current(plan, key())
    others = [plan.model_copy(update=update) for update in ({"rank": 3}, {"n": 20})]
    keys = {key(), key(device="a GPU"), *map(key, others)}
    books("00_method", "pass  # edited")
    keys.add(key())
    monkeypatch.setattr(notebooks, "_library", lambda: ["edited"])
    keys.add(key())
    assert len(keys) == 6
    assert key() == key(plan.model_copy(update={"out": "elsewhere"}))


def test_stages_are_made_in_order_where_something_needs_them(tiny, tmp_path: Path, capsys) -> None:
    """In two processes; `issl run --stages` makes all that the notebook and the report read."""
    (plan,) = ProfileOptions("tiny", only="07", out=tmp_path).plans().values()
    artifacts = Artifacts(tmp_path / "artifacts", released=None)
    found = list(missing(plan.stages(), artifacts))
    labels = {stage.label for stage in all_stages([plan])}
    assert sorted(stage.label for stage in found) == sorted(labels)
    for k, stage in enumerate(found):
        assert all(need in found[:k] for need in stage.needs())
    with pytest.MonkeyPatch.context() as patch:  # what only those need that are there is not made
        patch.setattr(Artifacts, "has", lambda _, stage: stage in plan.stages())
        assert list(missing(plan.stages(), artifacts)) == []
    given = f"run --profile tiny --only 07 --out {tmp_path} --stages --jobs 2"
    assert cli.main(given.split()) == 0
    assert f" {len(labels)} of {len(labels)} missing" in capsys.readouterr().out
    assert all(artifacts.get(stage).is_dir() for stage in plan.stages())
    assert artifacts.computed == []


def test_the_doctor(tmp_path: Path, capsys) -> None:
    assert cli.main(["doctor", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "identity scenes-" in printed and "stages: 0 released, 0 made here" in printed
    assert cli.main(["doctor", "--out", str(tmp_path), "--device", "tpu"]) == 1
    assert "WRONG       device 'tpu'" in capsys.readouterr().out


def test_profiles_are_valid() -> None:
    for profile in profiles.profiles():
        names = profiles.covered(profile)
        plans = profiles.read_profile(profile, names)
        assert list(plans) == names and all(p.profile == profile for p in plans.values())
        assert profile not in ("quick", "mini", "paper") or names == list(PLANS)


def test_a_profile_may_change_another(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    """Its own settings come first, entry by entry; and it may be for some notebooks alone."""
    tinier, name = tiny.with_name("tinier.yaml"), "01_seed_correlation"
    monkeypatch.setattr(profiles, "profiles", lambda: {"tiny": tiny, "tinier": tinier})
    changes = {"common": {"n": 32}, name: {"rank": 3}}
    tinier.write_text(yaml.safe_dump({"base": "tiny", "notebooks": "09", **changes}))
    base, own = (profiles.read_profile(p, [name])[name] for p in ("tiny", "tinier"))
    assert own.settings() == {**base.settings(), "profile": "tinier", "n": 32, "rank": 3}
    assert list(ProfileOptions("tinier", out=tmp_path).plans()) == ["09_linear_theory"]
    asked = ProfileOptions("tinier", out=tmp_path, only="01")
    assert list(asked.plans()) == [name]  # it has an entry
    tinier.write_text(yaml.safe_dump({"common": {"epoch": 3}}))
    with pytest.raises(IsslError, match=r"tinier.yaml, notebook 00_method: .*'epoch'"):
        ProfileOptions("tinier", out=tmp_path).plans()


DATA = Data(name="scenes", n=32)
SIMCLR = {"recipe": recipe("simclr", "short"), "width": 1, "epochs": 2, "batch_size": 16}
TRAINED = Pretrain(data=DATA, snapshots=(1,), **SIMCLR)
STAGES = Influence(pretrain=TRAINED, data=DATA), Embed(pretrain=TRAINED, data=DATA)


def made(root: Path) -> dict[str, str]:
    """Make all stages; the digest of every file, and the history but for how long it took."""
    artifacts = Artifacts(root, checkpoint_seconds=0.0, released=None)
    for stage in in_dependency_order(STAGES):
        artifacts.get(stage)
    found = {}
    for path in root.glob(f"*/*/{MANIFEST}"):
        listed = json.loads(path.read_text())["files"]
        found |= {f"{path.parent.name}/{k}": v for k, v in listed.items() if "history" not in k}
    history = TRAINED.history(artifacts).drop(columns="images_per_second")
    return found | {"history": history.to_csv()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Artifacts that were made without a fault."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("undisturbed")
    return root, made(root)


def left_over(root: Path) -> list[Path]:
    return [p for p in root.rglob("*") if PART in p.name]


def test_a_full_disk_at_every_write(tmp_path: Path, monkeypatch, undisturbed: tuple) -> None:
    """Every write of every stage fails once; the next run goes on from there."""
    count, fails_at = 0, 1

    @contextmanager
    def full(path: Path) -> Iterator[Path]:
        nonlocal count
        with atomic(path) as part:
            yield part
            count += 1
            if count == fails_at:
                raise OSError(errno.ENOSPC, "No space left on device")

    for name, module in list(sys.modules.items()):
        if name.startswith("issl.") and hasattr(module, "atomic"):
            monkeypatch.setattr(module, "atomic", full)
    points, finished = 0, 0
    while True:
        count = 0
        try:
            found = made(tmp_path)
            break
        except IsslError as error:
            points += 1
            assert os.strerror(errno.ENOSPC) in str(error) and left_over(tmp_path) == []
        before, finished = finished, len(list(tmp_path.glob(f"*/*/{MANIFEST}")))
        fails_at = 1 if finished > before else fails_at + 1
    assert points >= 8 and found == undisturbed[1]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


DIES_WHILE_IT_WRITES = """
import os, pathlib, signal, sys
from issl.files import atomic
with atomic(pathlib.Path(sys.argv[1])) as part:
    part.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path, undisturbed: tuple) -> None:
    work = tmp_path / "pretrain" / f"{TRAINED.key}.part"
    file = work / "encoder.safetensors"
    done = subprocess.run([sys.executable, "-c", DIES_WHILE_IT_WRITES, file], check=False)
    assert done.returncode == -signal.SIGKILL and len(left_over(work)) == 1
    (old,) = left_over(work)
    os.utime(old, (0, 0))
    with atomic(tmp_path / "mine.json") as part, atomic(work / "mine.json") as mine:
        remove_leftovers(work)
        assert left_over(work) == [mine] and part.exists()  # these are being written
    (work / "mine.json").unlink()
    (work / f".encoder.safetensors{PART}x").write_text("half")  # a moment ago
    assert made(tmp_path) == undisturbed[1]
    assert left_over(tmp_path / "pretrain" / TRAINED.key) == []


def test_sigterm_ends_a_command_as_an_interrupt_does(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(loop, "epoch_batches", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    told = "pretrain --data scenes --n 16 --batch-size 8 --width 1 --epochs 1 --out".split()
    assert cli.main([*told, str(tmp_path / "x.safetensors")]) == 130
    assert "issl: stopped" in capsys.readouterr().err and left_over(tmp_path) == []


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_artifact_is_told_and_made_again_alone(tmp_path, undisturbed, capsys) -> None:
    """A bit that flipped, a file that is gone, and a manifest of no bytes."""
    encoder = "encoder.safetensors"
    damages = (encoder, flip), (encoder, Path.unlink), (MANIFEST, lambda p: p.write_bytes(b""))
    for k, (name, damage) in enumerate(damages):
        root = shutil.copytree(undisturbed[0], tmp_path / str(k))
        others = {p: p.stat().st_mtime_ns for p in root.glob("[!p]*/*/*")}
        damage(root / "pretrain" / TRAINED.key / name)
        assert made(root) == undisturbed[1]
        assert "; it will be made again" in capsys.readouterr().err
        assert {p: p.stat().st_mtime_ns for p in others} == others


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(f"{text}\n")


def fail() -> None:
    raise IsslError("the cat sat on the tensor")


def one_thread_and_gpu() -> None:
    assert torch.get_num_threads() == max(1, (os.cpu_count() or 1) // 2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] in "35"
    assert "MALLOC_TRIM_THRESHOLD_" not in os.environ  # kernels inherit it


def trained(root: Path, kill: bool) -> None:
    """Train; `kill`: the first time, until there is a checkpoint."""
    artifacts = Artifacts(root, checkpoint_seconds=0.0, released=None)
    checkpoint = artifacts.folder(TRAINED).with_suffix(".part") / "checkpoint.safetensors"
    if checkpoint.exists():
        append(root / "resumed", str(os.getpid()))
    elif kill:
        save = Checkpoint.save

        def last(*arguments: object) -> None:
            save(*arguments)
            die()

        Checkpoint.save = last
    artifacts.get(TRAINED)


def test_processes_that_die(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two, which share the cores and the GPUs: a task that kills its process each time fails,
    which blocks what needs it and nothing else; another process goes on from a training's
    checkpoint, and the encoder is the same bit for bit."""
    monkeypatch.setitem(engine.SETTINGS, "distributed.scheduler.allowed-failures", 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    write = partial(append, tmp_path / "log")
    tasks = {
        "a": Task(partial(write, "a")),
        "wrong": Task(fail, ["a"]),
        "late": Task(partial(write, "late"), ["wrong"]),
        "later": Task(partial(write, "later"), ["late"]),
        "b": Task(partial(write, "b"), ["a"]),
        "c": Task(partial(write, "c"), ["a", "b"]),
        "share": Task(one_thread_and_gpu),
        # the last: what waits for its process would go with it
        "killer": Task(die, ["c", "share", "whole", "killed"]),
        "after": Task(fail, ["killer"]),
        "whole": Task(partial(trained, whole, False)),
        "killed": Task(partial(trained, killed, True)),
    }
    ended = {end.name: end for end in Engine(2).run(tasks)}
    assert set(ended) == set(tasks) and ended["later"].error == "the cat sat on the tensor"
    assert "the process that made killer was killed" in ended["killer"].error
    assert {name for name, end in ended.items() if end.blocked} == {"late", "later", "after"}
    well = {name for name, end in ended.items() if not end.error}
    assert well == {"a", "b", "c", "share", "whole", "killed"}
    done = (tmp_path / "log").read_text().split()  # what a dead worker had done may be done again
    assert list(dict.fromkeys(done)) == ["a", "b", "c"]
    assert len((killed / "resumed").read_text().split()) == 1
    one, two = (Artifacts(root).file(TRAINED, "encoder.safetensors") for root in (whole, killed))
    assert one.read_bytes() == two.read_bytes()


def test_processes_that_do_not_start_are_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_processes", Mock(side_effect=RuntimeError("Timed out")))
    with pytest.raises(IsslError, match=r"--jobs 2: .*Timed out.* loopback"):
        list(Engine(jobs=2).run({"one": Task(time.time)}))


def test_a_dask_that_is_there_and_goes_away(tmp_path: Path) -> None:
    told, log = tmp_path / "scheduler.json", tmp_path / "log"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    how = {"env": os.environ | {"PYTHONPATH": paths}, "cwd": tmp_path}

    def start(*words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dask", *words, "--scheduler-file", str(told)]
        process = stack.enter_context(subprocess.Popen(command, **how))
        stack.callback(process.kill)
        return process

    with ExitStack() as stack:
        scheduler = start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        start("worker", "--no-nanny", "--nthreads", "1")
        end = time.monotonic() + 120
        while not told.exists() or not told.read_text():
            assert time.monotonic() < end
            time.sleep(0.1)
        address = json.loads(told.read_text())["address"]
        tasks = {
            "a": Task(partial(append, log, "done stays done")),
            "b": Task(partial(time.sleep, 600), ["a"]),
        }
        run = Engine(scheduler=address).run(tasks)
        assert next(run).name == "a"
        scheduler.kill()
        with pytest.raises(IsslError, match=f"{address} went away"):
            next(run)
        assert log.read_text() == "done stays done\n"


@pytest.mark.slow
def test_a_real_slurm_runs_two_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one node, this machine. Each job asks for a GPU, which it does not use."""
    if os.geteuid() != 0 or not all(shutil.which(p) for p in ("slurmctld", "slurmd", "munged")):
        pytest.skip("needs root and Debian's slurm-wlm and munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # a socket's path must be short
    script, log = REPOSITORY / "tests/slurm.sh", tmp_path / "log"
    subprocess.run([script, "start", folder], check=True)
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}")
    tasks = {"first": Task(partial(append, log, "first"))}
    tasks |= {name: Task(partial(time.sleep, 10), ["first"]) for name in ("a", "b")}
    tasks["last"] = Task(partial(append, log, "last"), ["a", "b"])
    options = [("walltime", "10"), ("memory", "200MB"), ("log_directory", str(tmp_path))]
    options += [("lifetime", "5m"), ("directive", "--gpus-per-node=1")]
    try:
        ended = list(Engine(2, "slurm", options).run(tasks))
    finally:
        subprocess.run([script, "stop", folder], check=True)
        shutil.rmtree(folder, ignore_errors=True)
    assert [end.error for end in ended] == [""] * 4 and ended[-1].name == "last"
    assert log.read_text().split() == ["first", "last"]
