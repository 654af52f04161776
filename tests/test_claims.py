"""The rules by which claims are judged, the records, and the tables of verdicts made of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import issl
from issl import cli
from issl.audit import claims, verdicts
from issl.audit.profiles import PLANS, covered, profiles, read_profile
from issl.audit.stats.statistics import Estimate
from issl.files import REPOSITORY

LEARNED = {"knn": 0.7, "untrained": 0.24, "encoders": 3}
SEEDS = "noise_seed_correlation"  # asks for r above 0.924


def estimate(value: float, half: float = 0.1) -> Estimate:
    return Estimate(value, value - half, value + half, 2000)


def judged(value: float, profile: str = "overnight", **about: Any) -> tuple[str, str]:
    about = {"dataset": "cifar10", "learned": LEARNED} | about
    got = claims.judge(SEEDS, {"pearson": estimate(value, 0.01)}, profile, **about)
    return got["outcome"], got["verdict"]


def test_a_test_is_contradicted_only_where_it_could_have_held_and_an_outcome_is_over_all() -> None:
    needs = claims.Condition(metric="ceiling", bound="value", above=0.3)
    above = claims.Condition(metric="rho", bound="low", above=0.0, needs=needs)
    below = claims.Condition(metric="rho", bound="high", below=0.0, needs=needs)
    for low, high, ceiling, state in (
        (0.1, 0.3, 0.2, "holds"),
        (-0.1, 0.2, 0.6, "undecided"),
        (-0.3, -0.1, 0.6, "contradicted"),
        (-0.3, -0.1, 0.2, "undecided"),  # too little could be seen
        (np.nan, np.nan, 0.6, "undecided"),
    ):
        top, middle = Estimate(ceiling, 0.0, 1.0, 9), (low + high) / 2
        assert above.state({"rho": Estimate(middle, low, high, 9), "ceiling": top}) == state
        assert below.state({"rho": Estimate(-middle, -high, -low, 9), "ceiling": top}) == state
    exact = claims.Condition(metric="rho", bound="value", above=0.0)
    assert exact.state({"rho": estimate(-1.0, 0)}) == "contradicted"
    p = claims.Condition(metric="p", bound="value", below=0.05, p_value=True)
    assert [p.state({"p": estimate(v, 0)}) for v in (0.01, 0.3)] == ["holds", "undecided"]

    assert claims.outcome(["holds", "holds"]) == "reproduced"
    assert claims.outcome(["undecided", "holds", "contradicted"]) == "partly"
    assert claims.outcome(["undecided", "contradicted"]) == "contradicted"
    assert claims.outcome(["undecided", "undecided"]) == "undecided"


def test_a_verdict_needs_a_profile_and_encoders_that_have_learned() -> None:
    assert judged(0.95) == ("reproduced", "reproduced")
    assert judged(0.5) == ("contradicted", "contradicted")
    assert judged(0.95, "mini") == ("reproduced", claims.UNTESTED)
    assert judged(0.95, "paper-cifar100", dataset="cifar100")[1] == "reproduced"
    assert judged(0.95, dataset="fairface", learned=LEARNED | {"knn": 0.3})[1] == "reproduced"
    for dataset, changed in (
        ("cifar10", {"knn": 0.64}),
        ("cifar10", {"encoders": 2}),
        ("fairface", {"knn": 0.26}),
    ):
        few = judged(0.95, dataset=dataset, learned=LEARNED | changed)
        assert few == ("reproduced", claims.UNTESTED)
    with pytest.raises(issl.IsslError, match="what they learned"):
        judged(0.95, learned=None)
    for value, verdict in ((1e-9, claims.PASSED), (1.0, claims.FAILED)):  # of the code
        metrics = {"relative_difference": estimate(value, 0)}
        assert claims.judge("method_exact", metrics, "quick", "scenes")["verdict"] == verdict


def test_the_files_of_claims_and_words_agree_with_the_notebooks() -> None:
    asked = set()
    for name, claim in claims.claims().items():
        assert claim.notebook in PLANS and set(claim.profiles) <= set(profiles())
        for test in claim.tests:
            asked |= {test.metric} | ({test.needs.metric} if test.needs else set())
            assert claims.threshold(name, test.metric) == test.threshold
            assert claim.question is None or test.metric in claim.numbers
        if claim.superseded:  # by one that decides, about the same
            by = claims.claims()[claim.superseded.by]
            assert by.superseded is None and by.notebook == claim.notebook
    assert asked <= set(claims.all_words())
    uses = [c.use for c in claims.claims().values() if c.use]
    assert len(uses) == len(set(uses))


def test_readings_change_their_choices_alone_and_their_outcomes_are_counted() -> None:
    names = covered("overnight-projector")
    plain = read_profile("overnight", names)
    for profile, choices in claims.readings().items():
        for name, read in read_profile(profile, names).items():
            changes = {"profile": profile, **choices}
            if name == "01_seed_correlation":
                changes["draws"] = read.draws  # sixteen take hours
            assert read == plain[name].model_copy(update=changes)
    for said, found in {
        "holds in each of the 2 that": ["reproduced", "reproduced"],
        "holds in each of 4": ["reproduced"] * 4,
        "depends on": ["reproduced", "contradicted"],
        "holds in 1, undecided in 1": ["reproduced", "undecided"],
        "holds in none of the 2 that": ["undecided", "contradicted"],
    }.items():
        assert claims.over_readings(found).startswith(said)


def recorded(folder: Path, name: str, variant: str, **metrics: Estimate) -> verdicts.Record:
    """At overnight."""
    source = claims.provenance("overnight", {}, torch.device("cpu"), ["influence/1"])
    about: dict[str, Any] = {"dataset": "cifar10", "learned": LEARNED, "n": 2000, "seeds": [0]}
    return claims.record(name, metrics, source, folder, variant, **about)


@pytest.fixture
def records(tmp_path: Path) -> list[verdicts.Record]:
    """Of three claims: a check, one with two methods, one with two tests."""
    recorded(tmp_path, SEEDS, "byol", pearson=estimate(0.95))
    recorded(tmp_path, SEEDS, "simclr", pearson=estimate(0.8))
    pairs = {"auc_injected": estimate(0.65, 0.05), "precision": estimate(0.2)}
    recorded(tmp_path, "low_influence_duplicates", "simclr", **pairs)
    recorded(tmp_path, "method_exact", "", relative_difference=estimate(1e-9, 0))
    return verdicts.read_records(tmp_path.glob("claim_*.json"))


def test_records_are_read_in_order_and_a_bad_one_is_named(records, tmp_path) -> None:
    names = [SEEDS, SEEDS, "low_influence_duplicates"]
    assert [r["name"] for r in records] == ["method_exact", *names]
    assert [r["variant"] for r in records] == ["", "simclr", "byol", "simclr"]
    # pairs judged by people are not in every data set: that test is not asked there
    assert [t["metric"] for t in records[-1]["tests"]] == ["auc_injected", "precision"]
    (tmp_path / "mini").mkdir()
    verdicts.keep(records, tmp_path / "mini")
    assert verdicts.kept_records(tmp_path) == records
    path = tmp_path / "claim_x.json"
    for text in (json.dumps({**records[0], "name": "moon_is_cheese"}), "{"):
        path.write_text(text)
        with pytest.raises(issl.IsslError, match="claim_x"):
            verdicts.read_records([path])


def test_the_tables_are_the_records_and_small_scales_decide_nothing(records) -> None:
    row = verdicts.table(records).loc[1]
    assert row[["low", "high", "tests_held"]].tolist() == pytest.approx([0.7, 0.9, 0])
    answers = verdicts.answers(records, records)
    assert answers.iloc[0, 1:5].tolist() == ["no", "yes", "r = 0.80 [0.70, 0.90] (> 0.924)", "–"]
    assert len(answers) == 2  # a check asks no question
    other = [
        r | {"provenance": {**r["provenance"], "profile": "overnight-projector"}} for r in records
    ]
    assert verdicts.answers([], records).empty
    over = verdicts.answers(records, [*records, *other])
    assert over["holds in"].tolist() == ["2 of 4", "0 of 2"]
    # where a claim was measured at a larger scale, too, a smaller one is left out of the README
    small = [r | {"provenance": r["provenance"] | {"profile": "mini"}} for r in records]
    assert verdicts.answers([*small, *records], records).equals(answers)
    untested = [r | {"verdict": claims.UNTESTED} for r in small[1:3]]
    mixed = verdicts.answers([small[1], untested[1]], records)
    assert mixed.iloc[0, 1:3].tolist() == ["no", "untested"]


def test_superseded_tests_stay_visible_and_decide_nothing(tmp_path: Path) -> None:
    metrics = {m: Estimate(0.6, 0.4, 0.7, 9) for m in ("spearman", "share_of_ceiling", "ceiling")}
    for name in ("predicts_leaving_one_out_held", "predicts_leaving_one_out"):
        written = recorded(tmp_path, name, "", **metrics)
        # kept before its test was superseded: today's rules hold
        kept = json.dumps(written | {"verdict": "reproduced"})
        (tmp_path / f"claim_{name}.json").write_text(kept)
    found = verdicts.read_records(tmp_path.glob("claim_*.json"))
    assert [r["verdict"] for r in found] == ["reproduced", "superseded"]
    assert len(verdicts.good_for(found)["reproduced"]) == 1
    standing, superseded = verdicts.markdown(found).split("Superseded tests")
    assert "Superseded on" not in standing and f"by `{found[0]['name']}`" in superseded


def test_the_first_record_by_todays_tests_is_told(records: list[verdicts.Record]) -> None:
    made = {"time": "2026-01-02T00:00:00Z", "commit": "abcdef0123 with changes", "profile": "mini"}
    one = records[1]
    earlier = one | {"provenance": one["provenance"] | made}
    page = verdicts.markdown([one], history=[one, earlier])
    assert "first kept record at mini 2026-01-02 in abcdef0 (with changes)" in page
    other = earlier | {"tests": [earlier["tests"][0] | {"above": 0.5}]}
    assert "mini" not in verdicts.markdown([one], history=[one, other])
    assert "with an earlier test" in verdicts.markdown([one], history=[other])


def test_the_pages_show_the_records_that_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    for page, text in verdicts.pages(REPOSITORY).items():
        assert page.read_text() == text, f"{page}: run `issl verdicts --readme`"
    kept = verdicts.kept_records(REPOSITORY / "figures")
    assert kept and cli.main(["verdicts"]) == 0
    assert capsys.readouterr().out == verdicts.markdown(kept)
