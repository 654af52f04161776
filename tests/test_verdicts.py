"""The table of verdicts: its order, its formats, and the README's copy of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import issl
from issl import cli
from issl.audit import claims, metrics, verdicts
from issl.audit.stats.statistics import Estimate

LEARNED = {"knn": 0.7, "untrained": 0.24, "encoders": 3}


@pytest.fixture
def records(tmp_path: Path) -> list[verdicts.Record]:
    source = claims.provenance("overnight", {}, torch.device("cpu"), [])
    about = {"dataset": "cifar10", "learned": LEARNED, "n": 2000, "seeds": [0]}
    for method, value in (("byol", 0.95), ("simclr", 0.8)):
        e = Estimate(value, value - 0.1, value + 0.1, 2000)
        claims.record(
            "noise_seed_correlation",
            {"pearson": e},
            source,
            tmp_path,
            method,
            method=method,
            **about,
        )
    duplicates = {
        "auc_injected": Estimate(0.65, 0.6, 0.7, 9),
        "precision": Estimate(0.2, 0.1, 0.3, 9),
    }
    claims.record("low_influence_duplicates", duplicates, source, tmp_path, "simclr", **about)
    claims.record(
        "method_exact",
        {"relative_difference": Estimate(1e-9, 1e-9, 1e-9, 9)},
        source,
        tmp_path,
        **about,
    )
    return verdicts.read_records(tmp_path.glob("claim_*.json"))


def test_order_is_that_of_the_claims_then_of_the_methods(records: list[verdicts.Record]) -> None:
    assert [(r["name"], r["variant"]) for r in records] == [
        ("method_exact", ""),
        ("noise_seed_correlation", "simclr"),
        ("noise_seed_correlation", "byol"),
        ("low_influence_duplicates", "simclr"),
    ]


def test_a_metric_that_a_set_does_not_have_is_not_judged(records: list[verdicts.Record]) -> None:
    last = records[-1]
    assert [t["metric"] for t in last["tests"]] == ["auc_injected", "precision"] and last[
        "outcome"
    ] == "partly"
    with pytest.raises(
        issl.IsslError, match="'precision' was not measured"
    ):  # but what every set has is
        claims.judge(
            "low_influence_duplicates",
            {"auc_injected": Estimate(0.6, 0.5, 0.7, 9)},
            "mini",
            "cifar10",
            LEARNED,
        )


def test_superseded_tests_stay_visible_and_decide_nothing(tmp_path: Path) -> None:
    source = claims.provenance("overnight", {}, torch.device("cpu"), [])
    metrics = {m: Estimate(0.6, 0.4, 0.7, 9) for m in ("spearman", "share_of_ceiling", "ceiling")}
    for name in ("predicts_leaving_one_out", "predicts_leaving_one_out_held"):
        claims.record(
            name, metrics, source, tmp_path, dataset="cifar10", learned=LEARNED, n=9, seeds=[0]
        )
    found = verdicts.read_records(tmp_path.glob("claim_*.json"))
    assert [(r["name"], r["outcome"], r["verdict"]) for r in found] == [
        ("predicts_leaving_one_out_held", "reproduced", "reproduced"),
        ("predicts_leaving_one_out", "reproduced", "superseded"),
    ]
    assert [r["name"] for r in verdicts.decided(found)] == ["predicts_leaving_one_out_held"]
    assert len(verdicts.good_for(found)["reproduced"]) == 1
    new, old = verdicts.summary(found)
    assert (
        "Superseded on 2026-11-25 by `predicts_leaving_one_out_held`" in old["claim"]
        and "Superseded" not in new["claim"]
    )
    # a record that was kept before its test was superseded says so, too
    kept = json.loads((tmp_path / "claim_predicts_leaving_one_out.json").read_text()) | {
        "verdict": "reproduced"
    }
    (tmp_path / "claim_predicts_leaving_one_out.json").write_text(json.dumps(kept))
    assert verdicts.read_records(tmp_path.glob("claim_*.json"))[1]["verdict"] == "superseded"


def test_every_superseded_claim_names_the_one_that_decides() -> None:
    old = {name: claim.superseded for name, claim in claims.claims().items() if claim.superseded}
    assert old
    for name, why in old.items():
        assert (
            claims.claims()[why.by].superseded is None
            and claims.claims()[why.by].claim == claims.claims()[name].claim
        )


def test_formats(records: list[verdicts.Record]) -> None:
    lines = verdicts.markdown(records).splitlines()
    assert len(lines) == 2 + 3 and all(
        line.count(" | ") == 5 for line in lines if "---" not in line
    )
    assert "SimCLR 0.80 [0.70, 0.90]<br>BYOL 0.95 [0.85, 1.05]" in lines[3] and "0.974" in lines[3]
    assert "SimCLR ○ contradicted (0/1)<br>BYOL ● reproduced (1/1)" in lines[3]
    assert lines[2].startswith("| The score is") and "(ours)" in lines[2] and "1e-09" in lines[2]
    tex = verdicts.latex(records)
    assert (
        tex.count("&") == 7 * 4
        and "AUC for injected duplicates" in tex
        and tex.count(r"\makecell") == 6
    )
    table = verdicts.table(records)
    assert table.loc[1, ["low", "high", "tests_held", "verdict"]].tolist() == [
        pytest.approx(0.7),
        pytest.approx(0.9),
        0,
        "contradicted",
    ]


def test_what_failed_is_said_with_what_was_asked(records: list[verdicts.Record]) -> None:
    seeds = next(row for row in verdicts.summary(records) if row["measured"] == "r")
    assert seeds["failed"] == ["SimCLR: r above 0.924: it is 0.8"]
    assert verdicts.summary(records)[0]["failed"] == []
    assert (
        verdicts.failures(records[-1])
        == "share of duplicates among the lowest scores above 0.5: it is 0.2"
    )
    one = {"metric": "auc", "bound": "low", "above": 0.5, "holds": False}
    unbounded = {
        **records[-1],
        "tests": [one],
        "metrics": {"auc": {"value": 0.6, "low": None, "high": 0.7, "n": 9}},
    }
    assert verdicts.failures(unbounded) == "low end of AUC above 0.5: it is −∞"


def test_what_it_is_good_for_follows_the_outcomes(records: list[verdicts.Record]) -> None:
    uses = verdicts.good_for(records)
    assert uses["reproduced"] == ["a ranking that holds under another draw of the noise [BYOL]"]
    assert (
        uses["contradicted"][0] == "a ranking that holds under another draw of the noise [SimCLR]"
    )
    named = [c.use for c in claims.claims().values() if c.use]
    assert len(named) == len(set(named)) >= 10
    assert not any(
        c.use for name, c in claims.claims().items() if name in ("method_exact", "convex_theory")
    )


def test_kept_records_come_back_as_they_were(
    records: list[verdicts.Record], tmp_path: Path
) -> None:
    (tmp_path / "mini").mkdir()
    verdicts.keep(records, tmp_path / "mini")
    assert verdicts.kept_records(tmp_path) == records


def test_what_was_measured_on_the_copy_says_so_until_it_is_measured_again(
    records: list[verdicts.Record], tmp_path: Path
) -> None:
    for folder, kept in (
        ("overnight-jpeg", records),
        ("overnight", [r for r in records if r["variant"] == "byol"]),
    ):
        (tmp_path / folder).mkdir()
        verdicts.keep(kept, tmp_path / folder)
    found = verdicts.kept_records(tmp_path)
    row = next(
        line for line in verdicts.short_markdown(found).splitlines() if "two noise seeds" in line
    )
    assert "r = 0.95 [0.85, 1.05] BYOL; on the JPEG copy: 0.80 [0.70, 0.90] SimCLR |" in row
    assert row.endswith("| overnight: ● reproduced; on the JPEG copy: ○ contradicted |")
    said = {r["data"] for r in verdicts.summary(found) if r["measured"] == "r"}
    assert said == {"cifar10", "cifar10 (the JPEG copy)"}
    compared = verdicts.compared_markdown(found).splitlines()
    assert len(compared) == 3  # SimCLR's was not measured again
    assert compared[2].count("BYOL 0.95 [0.85, 1.05]<br>● reproduced") == 2
    drawn = records[0] | {"dataset": "scenes"}
    verdicts.keep([drawn], tmp_path / "overnight-jpeg")
    assert not verdicts.read_records([tmp_path / "overnight-jpeg" / "claims.json"])[0]["copied"]


def test_bad_records_and_readmes(tmp_path: Path, records: list[verdicts.Record]) -> None:
    path = tmp_path / "claim_x.json"
    path.write_text(json.dumps({**records[0], "name": "moon_is_cheese"}))
    with pytest.raises(issl.IsslError, match=r"claim_x\.json records the claim 'moon_is_cheese'"):
        verdicts.read_records([path])
    path.write_text("{")
    with pytest.raises(issl.IsslError, match="cannot be read"):
        verdicts.read_records([path])
    with pytest.raises(issl.IsslError, match="markers"):
        verdicts.in_page("# nothing", "new")
    text = f"a\n{verdicts.BEGIN}\nold\n{verdicts.END}\nb"
    assert verdicts.in_page(text, "new\n") == f"a\n{verdicts.BEGIN}\nnew\n{verdicts.END}\nb"


def test_the_pages_show_the_records_that_are_kept(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for page, text in verdicts.pages(repository).items():
        assert page.read_text() == text, f"{page}: run `issl verdicts --readme`"
    kept = verdicts.kept_records(repository / "figures")
    assert kept and cli.main(["verdicts"]) == 0
    assert capsys.readouterr().out == verdicts.markdown(kept)


def test_every_metric_that_a_test_asks_for_has_words() -> None:
    conditions = [t for claim in claims.claims().values() for t in claim.tests]
    asked = {t.metric for t in [*conditions, *(t.needs for t in conditions if t.needs)]}
    assert asked <= set(metrics.all_words()) and not any(
        "_" in text for text in metrics.all_words().values()
    )
    with pytest.raises(issl.IsslError, match="'moon_phase' has no words"):
        metrics.words("moon_phase")


def test_a_line_for_each_claim(records: list[verdicts.Record]) -> None:
    """In words, at the largest scale; a record of a smaller one is left out."""
    old = [r | {"provenance": r["provenance"] | {"profile": "mini"}} for r in records[1:3]]
    lines = verdicts.short_markdown([*old, *records]).splitlines()
    assert len(lines) == 2 + 2 and "pearson" not in "".join(lines)  # a check is no claim
    assert lines[2].endswith(
        "| r = 0.80 [0.70, 0.90] SimCLR, 0.95 [0.85, 1.05] BYOL | overnight: ○ SimCLR; ● BYOL |"
    )
    assert lines[3].endswith(
        "| AUC for injected duplicates = 0.65 [0.60, 0.70] SimCLR | overnight: ◐ partly, in part contradicted |"
    )
    small = [r | {"verdict": claims.UNTESTED} for r in old]
    assert verdicts.short_markdown(small).endswith("| ◌ so far ○ SimCLR; ● BYOL |\n")
    assert verdicts.short_markdown([old[0], small[1]]).endswith("| ○ SimCLR; ◌ so far ● BYOL |\n")


def test_a_finding_is_a_sentence(records: list[verdicts.Record]) -> None:
    two = verdicts.sentence(records[1:3])
    assert two.startswith(
        "Measured as r, the claim holds with BYOL (0.95 [0.85, 1.05]) and does not hold with SimCLR ("
    )
    assert two.endswith("(0.80 [0.70, 0.90]).")
    assert (
        verdicts.sentence(records[:1]) == "The check passed: largest relative difference = 1e-09."
    )
    small = [records[3] | {"verdict": claims.UNTESTED}]
    assert verdicts.sentence(small) == (
        "The claim holds in part with SimCLR: AUC for injected duplicates = 0.65 [0.60, 0.70]; "
        "at this scale that decides nothing."
    )
