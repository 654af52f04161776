"""What a run says when it has ended: to the terminal, and at the head of the report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from issl import cli
from issl.audit import guide as guides
from issl.audit import run
from issl.audit.claims import provenance, record
from issl.audit.guide import guide
from issl.audit.plans import PLANS
from issl.audit.stats.statistics import Estimate
from issl.audit.verdicts import read_records

ALL = list(PLANS)


def left(
    folder: Path,
    profile: str,
    r: float = 0.97,
    dataset: str = "cifar10",
    knn: float = 0.7,
    error: float = 1e-9,
) -> list[dict]:
    """The records of a run: a claim about encoders, one about linear ones, and a check of the
    code."""
    source = provenance(profile, {}, torch.device("cpu"), [])
    about = {
        "dataset": dataset,
        "n": 40,
        "seeds": [0],
        "learned": {"knn": knn, "untrained": 0.2, "encoders": 3},
    }
    record(
        "noise_seed_correlation",
        {"pearson": Estimate(r, r - 0.01, r + 0.01, 40)},
        source,
        folder,
        "simclr",
        **about,
    )
    record(
        "training_seed_correlation",
        {"pearson": Estimate(r, r - 0.01, r + 0.01, 40)},
        source,
        folder,
        **about,
    )
    record(
        "method_exact",
        {"relative_difference": Estimate(error, error, error, 40)},
        source,
        folder,
        **about,
    )
    return read_records(sorted(folder.glob("claim_*.json")))


def test_a_rehearsal_says_so_and_what_to_open_and_how_to_go_on(tmp_path: Path) -> None:
    found = guide("quick", left(tmp_path, "quick", dataset="scenes", knn=0.123), ALL)
    assert found.rehearsal and "rehearsal on drawn images" in found.what[0]
    assert "their kNN accuracy is at most 12% (untrained: 20%)" in found.what[0]
    assert "not tested" not in " ".join(found.what)
    assert [name for name, _ in found.first] == ["00_method", "03_background_bias", "10_validation"]
    assert [
        name for name, _ in guide("quick", left(tmp_path, "quick"), ["01_seed_correlation"]).first
    ] == ["01_seed_correlation"]
    assert set(guides.START) <= set(PLANS)
    for _, commands in found.further:
        for command in commands:
            words = command.split()
            given = ["run", *words[1:]] if words[0] == "./run_all.sh" else words[1:]
            cli.parser(given[0]).parse_args(given)  # an unknown option ends the test
    assert "drawn" not in guide("mini", left(tmp_path, "mini", knn=0.3), ALL).what[0]


def test_a_run_at_scale_says_what_it_decided(tmp_path: Path) -> None:
    found = guide("overnight", left(tmp_path, "overnight"), ALL)
    assert not found.rehearsal and found.further == []
    assert found.what == ["Decided, by tests that were stated beforehand: 2 reproduced."]
    assert [name for name, _ in found.first] == ["01_seed_correlation", "11_claims_audit"]
    assert "the claim holds" in found.first[0][1].lower()


def test_a_check_of_the_code_that_failed_is_never_left_out(tmp_path: Path) -> None:
    for profile, dataset in (("quick", "scenes"), ("overnight", "cifar10")):
        assert not any(
            "FAILED" in text
            for text in guide(profile, left(tmp_path, profile, dataset=dataset), ALL).what
        )
        found = guide(profile, left(tmp_path, profile, dataset=dataset, error=0.5), ALL)
        assert any(
            "A check of the code FAILED: largest relative difference" in text for text in found.what
        )


def test_without_records_there_is_little_to_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guide("quick", [], ["09_linear_theory"]) == guides.Guide(False, [], [], [])
    run._print_guide("quick", tmp_path)
    assert capsys.readouterr().out == ""


def test_the_terminal_shows_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results/quick"
    left(results, "quick", dataset="scenes")
    (results / "00_method.ipynb").write_text("{}")
    picture = tmp_path / "figures/quick/first_look.png"
    picture.parent.mkdir(parents=True)
    picture.touch()
    run._print_guide("quick", results)
    printed = capsys.readouterr().out
    assert (
        "This was a rehearsal on drawn images" in printed
        and max(map(len, printed.splitlines())) <= 140
    )
    lines = printed.split("Open first")[1].splitlines()
    assert lines[1].split()[0] == "first_look" and lines[2].split()[0] == "00_method"
    assert "./run_all.sh --profile overnight --data-root DIR" in printed
