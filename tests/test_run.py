"""The runner: notebooks end to end at a tiny setting, failures, bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
import yaml
from test_notebooks import TINY

from issl import cli
from issl.audit import notebooks, profiles, run
from issl.audit.cache import Artifacts, Stage, in_dependency_order, missing
from issl.audit.notebooks import fingerprint, is_current, note_made
from issl.audit.plan import Plan
from issl.audit.plans import PLANS
from issl.audit.profiles import ProfileOptions, all_stages, notebooks_folder
from issl.engine import Engine
from issl.errors import IsslError

FEW = {
    "common": {"n": 64, "width": 1, "epochs": 1, "batch_size": 32},
    "07_outliers": {"methods": ["simclr"]},
}


def cells(name: str) -> list:
    return nbformat.read(notebooks_folder() / f"{name}.ipynb", as_version=4).cells


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A profile of the smallest sizes; real notebooks."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    monkeypatch.setattr(profiles, "profiles", lambda: {"tiny": path})
    monkeypatch.delenv("ISSL_DATA", raising=False)
    return path


@pytest.fixture
def books(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], None]:
    """Replaces the notebooks by two cells each, which start fast: books(name, code)."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(run, "notebooks_folder", lambda: folder)

    def write(name: str, code: str) -> None:
        book = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell("n = 0", metadata={"tags": ["parameters"]})]
        )
        book.cells.append(nbformat.v4.new_code_cell(code))
        book.metadata["kernelspec"] = {
            "name": "python3",
            "display_name": "Python 3",
            "language": "python",
        }
        nbformat.write(book, folder / f"{name}.ipynb")

    return write


def test_a_failing_notebook_shows_its_error_and_the_others_go_on(
    books, tmp_path: Path, capsys
) -> None:
    books("00_method", "raise ValueError('the cat sat on the tensor')")
    books("09_linear_theory", "print(n)")
    assert run.run(ProfileOptions("tiny", only="00,09", out=tmp_path / "out")) == 1
    printed = capsys.readouterr().out
    assert "ValueError: the cat sat on the tensor" in printed and "FAILED  00_method" in printed
    assert "ok      09_linear_theory" in printed and "1 of 2 notebooks ended well" in printed
    # what failed is tried again, what ended well is not
    assert run.run(ProfileOptions("tiny", only="00,09", out=tmp_path / "out")) == 1
    printed = capsys.readouterr().out
    assert "FAILED  00_method" in printed and "current 09_linear_theory" in printed


def test_the_output_folder_may_have_any_name(books, tmp_path: Path) -> None:
    books("09_linear_theory", "print(n)")
    out = tmp_path / "run {y} {0} 100%s {{n}} b%20#é' {"
    assert cli.main(["run", "--profile", "tiny", "--only", "09", "--out", str(out)]) == 0
    results = out / "results/tiny"
    copy = nbformat.read(results / "09_linear_theory.ipynb", as_version=4)
    assert copy.cells[-1].outputs[0].text == "96\n"  # the profile's n
    (page,) = (results / "report").glob("09*.html")
    assert page.stat().st_size > 1000
    assert {p for p in tmp_path.iterdir() if p.is_dir()} == {out, tmp_path / "notebooks"}


def test_a_notebook_runs_again_when_what_it_depends_on_changes(
    books, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is decided is tested through `is_current`; that a run heeds it, above."""
    books("00_method", "pass")
    source, plan = (
        run.notebooks_folder() / "00_method.ipynb",
        PLANS["00_method"](profile="tiny", out=str(tmp_path)),
    )
    for path in (
        plan.figures / "00_method.png",
        plan.results / "00_method.ipynb",
        plan.results / "claim_x.json",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"notebook": "00_method"}')
    (plan.results / "claim_y.json").write_text('{"notebook": "03_background_bias"}')

    def key(plan: Plan = plan, device: str = "a CPU") -> str:
        return fingerprint(source, plan, device)

    assert not is_current("00_method", plan, key())
    note_made("00_method", plan, key())
    assert is_current("00_method", plan, key())
    (plan.results / "claim_y.json").unlink()  # another notebook's
    assert is_current("00_method", plan, key())
    for path in (
        plan.figures / "00_method.png",
        plan.results / "claim_x.json",
        plan.results / "00_method.made.json",
    ):
        kept = path.read_bytes()
        for damage in (b"", None):
            path.write_bytes(damage) if damage is not None else path.unlink()
            assert not is_current("00_method", plan, key()), path
        path.write_bytes(kept)
    assert is_current("00_method", plan, key())
    keys = {
        key(),
        key(device="a GPU"),
        key(plan.model_copy(update={"rank": 3})),
        key(plan.model_copy(update={"n": 20})),
    }
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
        ("--device tpu", "device 'tpu'"),
        ("--profile mini --data-root /nowhere", "data root '/nowhere'"),
        ("--out /proc/nothing", "cannot be written"),
        ("--cluster-option gpu", "--cluster-option gpu"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    arguments: str, named: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "run", lambda *_: pytest.fail("work was started"))
    assert cli.main(["run", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"common": {"epoch": 3}}, "tiny.yaml, notebook 00_method: .*'epoch'"),
        ({"common": {"n": 3}}, "n = 3"),
        ({"04_cats": {}}, "'04_cats'"),
        ({"common": {"dataset": "mnist"}}, "'mnist'"),
        ({"common": {"dataset": "folder:/nowhere"}}, "'/nowhere'"),
        ({**TINY, "notebooks": "99"}, "notebook '99'"),
    ],
)
def test_bad_profiles(content: dict, named: str, tiny: Path, tmp_path: Path) -> None:
    tiny.write_text(yaml.safe_dump(content))
    with pytest.raises(IsslError, match=named):
        run.run(ProfileOptions("tiny", out=tmp_path))


def read(folder: Path, only: str = "07") -> Plan:
    (plan,) = ProfileOptions("tiny", only=only, out=folder).plans().values()
    return plan


def test_what_is_missing_is_made_in_order_and_only_where_something_needs_it(
    tiny: Path, tmp_path: Path
) -> None:
    tiny.write_text(yaml.safe_dump(FEW))
    plan, artifacts = read(tmp_path), Artifacts(tmp_path / "artifacts", released=None)
    found = list(missing(plan.stages(), artifacts))
    assert {stage.label for stage in found} == {stage.label for stage in all_stages([plan])}
    assert len({stage.label for stage in found}) == len(found)
    for k, stage in enumerate(found):
        assert all(need in found[:k] for need in stage.needs().values())

    class There(Artifacts):
        """All that the plan reads, and nothing that only those need."""

        def has(self, stage: Stage) -> bool:
            return stage in plan.stages()

    assert list(missing(plan.stages(), There(tmp_path))) == []


def test_stages_side_by_side_here_and_then_the_notebooks_only_read(
    tiny: Path, tmp_path: Path, capsys
) -> None:
    """In two processes; `issl run --stages` makes all that the notebook and the report read."""
    tiny.write_text(yaml.safe_dump(FEW))
    given = ["run", "--profile", "tiny", "--only", "07", "--out", str(tmp_path), "--stages"]
    assert cli.main([*given, "--jobs", "2"]) == 0
    printed = capsys.readouterr().out
    assert "simclr seed 0, scenes train n=64" in printed
    plan, artifacts = read(tmp_path), Artifacts(tmp_path / "artifacts")
    count = len(list(in_dependency_order(plan.stages())))
    assert f" {count} of {count} missing" in printed
    assert all(artifacts.get(stage).is_dir() for stage in plan.stages())
    assert artifacts.computed == []
    assert cli.main(given) == 0 and "0 of 0 missing" in capsys.readouterr().out


def test_a_stage_that_fails_is_shown_and_blocks_its_notebook_alone(
    books, tiny: Path, tmp_path: Path, capsys
) -> None:
    books("07_outliers", "print(n)")
    books("09_linear_theory", "print(n)")
    tiny.write_text(yaml.safe_dump({**FEW, "common": {**FEW["common"], "batch_size": 65}}))
    assert run.run(ProfileOptions("tiny", only="07,09", out=tmp_path / "out")) == 1
    printed = capsys.readouterr().out
    assert "batch_size=65: need 2 to 64" in printed and "blocked 07_outliers" in printed
    assert "ok      09_linear_theory" in printed and "1 of 2 notebooks ended well" in printed


def test_the_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.delenv("ISSL_DATA", raising=False)
    assert cli.main(["doctor", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "identity scenes-" in printed and "stages: 0 released, 0 made here" in printed
    assert cli.main(["doctor", "--out", str(tmp_path), "--device", "tpu"]) == 1
    assert "WRONG       device 'tpu'" in capsys.readouterr().out


SOME = {
    "overnight": ("01", "02", "03", "04", "06", "07", "08", "13", "14"),
    "overnight-injected": ("04",),
    "paper-cifar100": ("01", "02", "04", "06"),
    "paper-byol": ("10", "15"),
    "paper-barlow_twins": ("10", "15"),
}  # notebooks of profiles that are not for all


@pytest.mark.parametrize("profile", ["quick", "mini", "paper", *SOME])
def test_profiles_are_valid(profile: str) -> None:
    names = profiles.covered(profile)
    plans = profiles.read_profile(profile, names)
    assert list(plans) == names and all(p.profile == profile for p in plans.values())
    assert names == [
        name for name in PLANS if name[:2] in SOME.get(profile, tuple(n[:2] for n in PLANS))
    ]


def test_a_profile_may_change_another(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own settings come first, entry by entry."""
    tinier = tiny.with_name("tinier.yaml")
    monkeypatch.setattr(profiles, "profiles", lambda: {"tiny": tiny, "tinier": tinier})
    tinier.write_text(
        yaml.safe_dump(
            {
                "base": "tiny",
                "notebooks": "01,09",
                "common": {"n": 32},
                "01_seed_correlation": {"rank": 3},
            }
        )
    )
    assert [n[:2] for n in profiles.covered("tinier")] == ["01", "09"]
    base, own = (
        profiles.read_profile(p, ["01_seed_correlation"])["01_seed_correlation"]
        for p in ("tiny", "tinier")
    )
    assert own.settings() == {**base.settings(), "profile": "tinier", "n": 32, "rank": 3}
    for base in ("none", "tinier"):
        tinier.write_text(yaml.safe_dump({"base": base}))
        with pytest.raises(IsslError, match=f"tinier.yaml: base '{base}'; it may be tiny"):
            profiles.covered("tinier")


def test_the_variants_of_the_papers_profile_ask_the_same_of_other_methods() -> None:
    for method in ("byol", "barlow_twins"):
        for name, plan in profiles.read_profile(
            f"paper-{method}", profiles.covered(f"paper-{method}")
        ).items():
            there = profiles.read_profile("paper", [name])[name].settings()
            changed = {k for k, v in plan.settings().items() if v != there[k]}
            assert plan.method == method and changed <= {"profile", "method", "snapshots"}


def test_a_profile_may_be_for_some_notebooks_alone(tiny: Path, tmp_path: Path) -> None:
    entries = {"common": TINY["common"], "notebooks": "09", "08_supervised_vs_ssl": {"encoders": 3}}
    tiny.write_text(yaml.safe_dump(entries))
    named = ProfileOptions("tiny", out=tmp_path, only="08")
    assert list(named.plans()) == ["08_supervised_vs_ssl"]  # it has an entry
    assert "08_supervised_vs_ssl" not in ProfileOptions("tiny", out=tmp_path).plans()
    with pytest.raises(IsslError, match="not for notebook 06_pruning"):
        ProfileOptions("tiny", out=tmp_path, only="06").plans()
