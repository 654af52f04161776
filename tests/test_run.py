"""The runner: notebooks end to end at a tiny setting, failures, bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
import yaml

from issl import cli
from issl.audit import notebooks, profiles, run
from issl.audit.cache import Artifacts, missing
from issl.audit.notebooks import fingerprint, is_current, note_made
from issl.audit.plan import Plan
from issl.audit.profiles import PLANS, ProfileOptions, all_stages
from issl.engine import Engine
from issl.errors import IsslError

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
    monkeypatch.delenv("ISSL_DATA", raising=False)
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


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--profile huge", "profile 'huge'"),
        ("--only 99", "notebook '99'"),
        ("--profile mini --data-root /nowhere", "there is no /nowhere/"),
        ("--out /proc/nothing", "cannot be written"),
        ("--cluster-option gpu", "--cluster-option gpu"),
    ],
)
def test_bad_input_is_one_line_before_any_work(arguments, named: str, capsys, monkeypatch) -> None:
    monkeypatch.delenv("ISSL_DATA", raising=False)
    monkeypatch.setattr(Engine, "run", lambda *_: pytest.fail("work was started"))
    assert cli.main(["run", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1


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


def test_the_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.delenv("ISSL_DATA", raising=False)
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
    for wrong, named in (
        ({"base": "tinier"}, "tinier.yaml: base 'tinier'"),
        ({"common": {"epoch": 3}}, "tinier.yaml, notebook 00_method: .*'epoch'"),
    ):
        tinier.write_text(yaml.safe_dump(wrong))
        with pytest.raises(IsslError, match=named):
            ProfileOptions("tinier", out=tmp_path).plans()
