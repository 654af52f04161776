"""Every notebook through papermill at a tiny setting: not only that it runs, but what its numbers
are."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from nbformat import read

from issl.audit import claims, profiles, run, verdicts
from issl.audit.cache import Artifacts
from issl.audit.plans import PLANS
from issl.audit.plans_own import ALL, Channel, Kind
from issl.audit.plans_paper import EQUAL
from issl.audit.profiles import ProfileOptions
from issl.audit.stages import Stability
from issl.audit.stats import explained_variance, statistics
from issl.audit.stats.neighbour_graph import induced, knn_graph, modularity, nearest
from issl.audit.stats.pixel_features import pixel_features
from issl.audit.verdicts import Record
from issl.evaluate import stability_losses
from issl.pretraining.batchnorm import estimate_statistics

# run with `--dist loadfile`: one worker runs them, once

TWO = ["simclr", "byol"]  # of several methods two show what happens with several
TINY: dict[str, Any] = {
    "common": {
        "n": 96,
        "n_test": 48,
        "width": 1,
        "epochs": 1,
        "batch_size": 32,
        "duplicates": 0.1,
        "atypical": 0.1,
    },
    "00_method": {"images": 16},
    **{
        name: {"rank": 4}
        for name, plan in PLANS.items()
        if "rank" in plan.model_fields and name != "00_method"
    },
    "01_seed_correlation": {"rank": 4, "methods": ["byol"], "draws": [1, 4, 16]},
    "02_augmentation_ablation": {"rank": 4, "scored": 32, "sigmas": [0.2], "centred": [0.02, 0.4]},
    "03_background_bias": {
        "rank": 4,
        "methods": TWO,
        "drawn": 96,
        "drawn_epochs": 1,
        "swapped": 16,
    },
    "04_duplicates": {"rank": 4, "methods": TWO},
    "05_fairness": {"rank": 4, "thinned": "cool", "smallest": 8, "encoders": 2},
    "06_pruning": {
        "rank": 4,
        "arms": ["top", "bottom", "random", "top flat", "random flat"],
        "judges_epochs": 2,
    },
    "07_outliers": {"rank": 4, "methods": TWO, "made_strange": 0.25, "encoders": 2},
    "08_supervised_vs_ssl": {"rank": 4, "methods": TWO, "supervised": 2, "equal_std": 0.1},
    "09_linear_theory": {"points": 60, "removed": 10},
    "10_validation": {
        "rank": 4,
        "width": 2,
        "images": 4,
        "subsets": 4,
        "queries": 6,
        "continued_epochs": 1,
        "draws": 2,
        "kinds": ["exact"],
        "points": 40,
    },
    "12_continual": {"rank": 4, "drawn": 64, "legs": 1, "leg_epochs": 1, "neighbours": 5},
    "13_explained": {"rank": 4, "methods": TWO, "encoders": 2},
    "14_bridges": {
        "rank": 4,
        "methods": TWO,
        "neighbours": 5,
        "shares": [0.1],
        "draws": 20,
        "doses": [0.2, 0.5, 0.8],
        "drawn": 96,
    },
    "15_taught": {
        "rank": 4,
        "width": 2,
        "epochs": 2,
        "queries": 6,
        "asked": 2,
        "drawn": 2,
        "continued_epochs": 1,
        "continued_batch": 16,
        "draws": 2,
    },
    "16_training_aware": {
        "rank": 4,
        "epochs": 2,
        "methods": ["simclr"],
        "queries": 3,
        "candidates": 64,
        "continued_epochs": 1,
        "unseen": 8,
        "own": 4,
        "removals": {0.01: 3, 0.05: 4},
        "draws": 1,
    },
    "17_derivation": {"images": 12, "steps": 9},
    "18_objectives": {
        "rank": 4,
        "methods": ["simclr", "byol", "barlow_twins", "vicreg"],
        "epochs": 3,
        "snapshots": 2,
        "batch": 6,
        "gradient_batch": 8,
        "gradient_draws": 2,
    },
    "19_multiverse": {
        "rank": 4,
        "ranks": [8],
        "dampings": [1.0],
        "averaged": 2,
        "copies": [1, 2],
        "copied_ranks": [4],
    },
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of all notebooks, run once."""
    folder = tmp_path_factory.mktemp("notebooks")
    profile = folder / "tiny.yaml"
    profile.write_text(yaml.safe_dump(TINY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiles, "profiles", lambda: {"tiny": profile})
        patch.delenv("ISSL_DATA", raising=False)
        assert run.run(ProfileOptions("tiny", out=folder)) == 0, (
            "a notebook failed; its error is in the captured output"
        )
        assert run.run(ProfileOptions("tiny", out=folder, only="03,04")) == 0
    return folder


@pytest.fixture
def plan(out: Path) -> Callable[[str], Any]:
    def of(name: str) -> Any:
        fields = {**TINY["common"], **TINY.get(name, {}), "profile": "tiny", "out": str(out)}
        return PLANS[name](**fields)

    return of


COMPARED = "08_supervised_vs_ssl"


def record(out: Path, name: str) -> Record:
    return json.loads((out / f"results/tiny/claim_{name.replace(' ', '_')}.json").read_text())


def numbers(out: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(out / f"figures/tiny/{name}.csv")


def test_each_leaves_figures_an_executed_copy_and_its_claims(out: Path) -> None:
    for name in PLANS:
        assert {p.suffix for p in (out / "figures/tiny").glob(f"{name}.*")} >= {
            ".png",
            ".pdf",
            ".csv",
            ".json",
        }
        cells = read(out / f"results/tiny/{name}.ipynb", as_version=4).cells
        assert all(c.execution_count for c in cells if c.cell_type == "code" and c.source)
    left = {json.loads(p.read_text())["name"] for p in (out / "results/tiny").glob("claim_*.json")}
    assert left == measured()


# of the superseded claims, those that notebooks measure no more
PAST = {
    "curvature_predicts_better",
    "high_influence_atypical",
    "predicts_leaving_one_out",
    "predicts_subsets",
    "semantic_bridges",
    "training_aware_list_is_the_querys",
    "training_aware_predicts",
    "uniform_backgrounds",
}


def measured() -> set[str]:
    """The claims that leave records."""
    assert all(claims.claims()[name].superseded for name in PAST)
    return set(claims.claims()) - PAST


def test_no_record_passes_for_a_larger_scale(out: Path) -> None:
    for path in (out / "results/tiny").glob("claim_*.json"):
        written = json.loads(path.read_text())
        assert written["provenance"]["profile"] == "tiny"
        assert written["verdict"] in (claims.UNTESTED, claims.SUPERSEDED)
        for m in written["metrics"].values():
            if None not in (m["low"], m["value"], m["high"]):
                assert m["low"] <= m["value"] + 1e-9 and m["value"] <= m["high"] + 1e-9, path.name


def test_00_at_full_rank_logra_is_exact(out: Path) -> None:
    assert record(out, "method_exact")["metrics"]["relative_difference"]["value"] < 1e-6


def test_01_is_the_correlation_of_the_scores_in_the_cache(out: Path, plan) -> None:
    p = plan("01_seed_correlation")
    scores = {labels: one["influence"] for labels, one in p.each("scores").items()}

    def r(a: tuple[int, int], b: tuple[int, int], method: str = "byol", kind: Any = "pearson"):
        return scores[method, *a].corr(scores[method, *b], method=kind)

    # of the noise, the mean over two encoders; of the training, each encoder under its own noise
    wanted = {"noise": [((0, 0), (0, 1)), ((1, 0), (1, 1))], "training": [((0, 0), (1, 1))]}
    for (reading, pairs), kind in product(wanted.items(), ("pearson", "spearman")):
        got, want = (
            record(out, f"{reading}_seed_correlation.byol"),
            [r(*p, kind=kind) for p in pairs],
        )
        assert got["metrics"][kind]["value"] == pytest.approx(np.mean(want))
        assert np.mean(want) < 0.999  # another seed, another score
        assert got["learned"]["encoders"] == 2 and 0 <= got["learned"]["knn"] <= 1
    table = numbers(out, "01_seed_correlation").set_index(["seed", "method", "metric"])["value"]
    assert table["training, same noise", "byol", "pearson"] == pytest.approx(r((0, 0), (1, 0)))
    fresh = r((0, 0), (0, 1), "untrained")
    assert table["untrained", "untrained", "pearson"] == pytest.approx(fresh)
    labels = ["seed", "method", "draws"]
    draws = numbers(out, "01_seed_correlation_draws").set_index(labels)["value"]
    averaged = p.each("averaged")
    four = [averaged["byol", 4, k, k]["influence"] for k in (0, 1)]
    assert draws["training", "byol", 4] == pytest.approx(four[0].corr(four[1]))


def test_02_compares_with_the_best_augmentation(out: Path) -> None:
    table, got = (
        numbers(out, "02_augmentation_ablation"),
        record(out, "gaussian_most_stable.simclr"),
    )
    pearson = table[(table["metric"] == "pearson") & (table["method"] == "simclr")]
    first, averaged = (
        pearson[pearson["draws"] == draws].set_index("perturbation")["value"] for draws in (1, 4)
    )
    others = first[~first.index.str.startswith("noise")]
    assert got["rival"] == others.idxmax()
    margin = got["metrics"]["margin_usual"]["value"]
    assert margin == pytest.approx(first["noise 0.2"] - others.max())
    assert set(table["draws"]) == {1, 4} and set(table["method"]) == {"simclr", "untrained"}
    of_draws = record(out, "sixteen_draws.simclr")["metrics"]
    assert of_draws["pearson_noise_averaged"]["value"] == pytest.approx(averaged["noise 0.2"])
    assert of_draws["pearson_augmentations_averaged"]["value"] == pytest.approx(
        averaged.drop("noise 0.2").mean()
    )
    assert of_draws["pearson_augmentations_single"]["value"] == pytest.approx(
        first.filter(regex="[a-z] 1$").mean()
    )


def test_03_compares_with_the_truth_and_with_the_detector(out: Path, plan) -> None:
    p = plan("03_background_bias")
    images = p.data().load()
    assert record(out, "causal_background")["n"] == 16
    # on scenes the truth is known of every ordinary image, whatever the detector says
    ordinary = (images.attributes["atypical"] == "").to_numpy()
    scores = p.influence(p.pretrain("byol")).read(p.artifacts())["influence"].to_numpy()[ordinary]
    want = statistics.auc(scores, images.attributes["uniform"].to_numpy(bool)[ordinary])
    got = record(out, "uniform_backgrounds_by_eye.byol")["metrics"]
    assert got["auc_labels"]["value"] == pytest.approx(want.value)
    scores = p.influence(p.pretrain("byol")).read(p.artifacts())["influence"].to_numpy()
    uniform = pixel_features(images)["uniform"].to_numpy()
    pooled = statistics.enrichment(scores, uniform, 0.05)
    assert got["enrichment_top5"]["value"] == pytest.approx(pooled.value)


def test_04_exact_duplicates_are_nearest_in_pixels(out: Path, plan) -> None:
    images = plan("04_duplicates").data().load()
    assert (images.attributes["duplicate_kind"] == "exact").sum() >= 2
    table = numbers(out, "04_duplicates").set_index(["detector", "method", "metric"])["value"]
    assert table["nearest in pixels", "no encoder", "auc_exact"] == 1.0
    assert table["perceptual hash", "no encoder", "auc_exact"] > 0.95
    got = record(out, "low_influence_duplicates.simclr")
    want = table["low influence", "simclr", "auc_injected"]
    assert got["metrics"]["auc_injected"]["value"] == pytest.approx(want)
    # no judged pairs in this set
    assert [t["metric"] for t in got["tests"]] == ["auc_injected", "precision"]


def test_05_thinning_takes_images_of_the_group_alone(out: Path, plan) -> None:
    p = plan("05_fairness")
    artifacts, groups = p.artifacts(), p.data().load().attributes["group"].to_numpy()
    thinned, at_random = (p.removal(0, at_random).read(artifacts) for at_random in (False, True))
    assert set(groups[thinned]) == {"cool"} and len(thinned) == len(at_random) == round(
        0.9 * (groups == "cool").sum()
    )
    table = numbers(out, "05_fairness")
    assert (table["adjusted_p"] >= table["p"]).all() and (table["images"] >= p.smallest).all()


def test_05_the_p_and_the_effect_are_of_one_group_and_over_encoders(out: Path, plan) -> None:
    p = plan("05_fairness")
    groups = p.training_set.attributes[list(p.groups()[0])].astype(str)
    scores = p.each("scores")
    assert list(scores) == [("simclr", 0), ("simclr", 1), ("untrained", 0)]
    ranks = [one["influence"].rank().to_numpy() for one in scores.values()]
    got = record(out, "group_differences_of_one.simclr")
    attribute, group = got["largest_group"].split(": ")
    member = (groups[attribute] == group).to_numpy()
    first, second, before = (2 * statistics.auc(r, member).value - 1 for r in ranks)
    metrics = {k: m["value"] for k, m in got["metrics"].items()}
    assert metrics["signed_effect"] == pytest.approx((first + second) / 2)
    assert metrics["largest_effect"] == pytest.approx(abs(first + second) / 2)
    assert metrics["untrained"] == pytest.approx(before)
    table = numbers(out, "05_fairness")
    row = table[
        (table["scored"] == "simclr")
        & (table["attribute"] == attribute)
        & (table["group"] == group)
    ].iloc[0]
    assert metrics["its_adjusted_p"] == pytest.approx(row["adjusted_p"])
    assert row["p"] == pytest.approx(statistics.rank_biserial(sum(ranks[:2]), member)[1])
    assert abs(metrics["signed_effect"]) == table[table["scored"] == "simclr"]["value"].abs().max()
    assert got["seeds"] == [0, 1] and got["learned"]["encoders"] == 2
    # of one method, a record of all methods would say the same again
    assert not list(out.glob("results/**/claim_group_differences_of_one.all*"))
    assert record(out, "group_differences.simclr")["seeds"] == [0]  # as it was
    assert record(out, "thinned_group_rises.simclr")["learned"]["encoders"] == p.seeds
    after, member = p.each("scores without"), (groups["group"] == "cool").to_numpy()
    thinned, at_random = (
        after["simclr", 0, which]["influence"].rank()[member] for which in ("group", "random")
    )
    rise = (thinned.mean() - at_random.mean()) / len(groups)
    metrics = record(out, "thinned_group_rises.simclr")["metrics"]
    assert metrics["rank_difference"]["value"] == pytest.approx(rise)


def test_06_and_08_are_the_accuracies_of_the_encoders_trained_without(out: Path, plan) -> None:
    pruning, compared = plan("06_pruning"), plan("08_supervised_vs_ssl")
    # the scored encoder's own length, not the judges'
    assert pruning.scores("simclr").pretrain.epochs == 1
    assert {pruning.judge("simclr", s).epochs for s in pruning.judges} == {2}
    whole, by_ssl, by_label, drawn = (
        compared.cells["runs"].stages["simclr", removed, 1].train.pretrain.without
        for removed in ("none", "top by ssl", "top by supervised", "random")
    )
    assert whole is None and (by_ssl.which, by_label.which, drawn.which) == ("top", "top", "random")
    assert (by_ssl.influence.loss, by_label.influence.loss) == ("stability", "cross_entropy")
    for p, figure, count in ((pruning, "06_pruning", 12), (compared, f"{COMPARED}_pruning", 16)):
        labels = p.cells["runs"].columns.split()
        table = numbers(out, figure)
        runs = table[table["table"] == "runs"].set_index(labels)
        assert len(runs) == count
        for at, hits in p.each("runs").items():
            for column in ("probe", "knn"):
                assert runs.loc[at, column] == pytest.approx(hits[column].mean())


def test_07_new_images_are_scored_under_the_curvature_of_the_training_set(out: Path, plan) -> None:
    p = plan("07_outliers")
    new = p.new_images()
    kind = new.load().attributes["atypical"].to_numpy()
    assert (kind != "").sum() >= 12 and new.inject.duplicates == 0 and new.split == "test"
    for stage in p.tables()["scores"].stages.values():
        assert (stage.data, stage.others) == (p.data(), new)
    no_static = (kind != "") & ~np.isin(kind, ["corrupted", "static"])
    rest = no_static | (kind == "")

    def auc(score: pd.DataFrame) -> float:
        return statistics.auc(score["influence"].to_numpy()[rest], no_static[rest]).value

    scores = p.each("scores")
    want = np.mean([auc(score) for (method, _), score in scores.items() if method == "byol"])
    got = record(out, "high_influence_ambiguous.byol")
    assert got["metrics"]["auc_without_static"]["value"] == pytest.approx(want)
    assert [t["metric"] for t in got["tests"]] == ["auc_without_static"]  # nobody judged scenes
    table = numbers(out, "07_outliers").set_index(["method", "detector", "metric"])["value"]
    assert table["byol", "influence", "auc_without_static"] == pytest.approx(want)
    control = auc(scores["untrained", 0])
    assert got["metrics"]["untrained_auc_without_static"]["value"] == pytest.approx(control)
    assert table["untrained", "influence", "auc_without_static"] == pytest.approx(control)


def test_08_is_the_difference_of_two_correlations_without_their_noise(out: Path, plan) -> None:
    p = plan(COMPARED)
    scores = {labels: one["influence"] for labels, one in p.each("scores").items()}

    def rho(x: pd.Series, y: pd.Series) -> float:
        return float(x.corr(y, method="spearman"))

    def agreement(e: tuple[str, int], f: tuple[str, int]) -> float:
        (a, b), (c, d) = ([scores[*g, k] for k in range(2)] for g in (e, f))
        return (rho(a, d) + rho(b, c)) / 2 / np.sqrt(rho(a, b) * rho(c, d))

    first, second = (("simclr", k) for k in range(2))
    seeds = agreement(first, second)
    across, control = (
        np.mean([agreement(e, (who, k)) for e in (first, second) for k in range(2)])
        for who in ("supervised", EQUAL)
    )
    got = record(out, "supervised_differs_more_than_seeds.simclr")["metrics"]
    assert got["seeds"]["value"] == pytest.approx(seeds)
    assert got["supervised"]["value"] == pytest.approx(across)
    assert got["seeds_less_supervised"]["value"] == pytest.approx(seeds - across)
    assert got["supervised_at_equal_strength"]["value"] == pytest.approx(control) != across
    assert got["seeds_less_supervised_at_equal_strength"]["value"] == pytest.approx(seeds - control)
    weak = p.cells["scores"].stages[EQUAL, 1, 1]
    assert weak.perturbation.std == 0.1 and weak.pretrain.method == "supervised"
    own_loss = [one["influence"] for one in p.each("by cross-entropy").values()]
    plain = np.mean([rho(scores[*e, 0], ce) for e in (first, second) for ce in own_loss])
    assert got["spearman_cross_entropy"]["value"] == pytest.approx(plain)
    old = record(out, "supervised_differs.simclr")
    assert old["metrics"]["spearman"]["value"] == pytest.approx(plain)
    knn = [
        h["knn"].mean()
        for (who, _), h in p.each("accuracy").items()
        if who in ("simclr", "supervised")
    ]
    assert old["learned"]["knn"] == pytest.approx(min(knn)) and old["learned"]["encoders"] == 2


def test_09_closed_form(out: Path) -> None:
    got = record(out, "linear_closed_form")["metrics"]
    assert (
        got["relative_difference"]["value"] < 1e-10 and got["retraining_exact_form"]["value"] < 1e-4
    )
    table = numbers(out, "09_linear_theory")
    np.testing.assert_allclose(table["change_of_loss"], table["change_by_formula"], rtol=1e-4)


def log_losses(stage: Stability, artifacts: Artifacts) -> np.ndarray:
    return np.log(np.maximum(stage.read(artifacts)["stability_loss"].to_numpy(), 1e-8))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(pd.Series(a).corr(pd.Series(b), method="spearman"))


def test_10_is_what_the_trainings_in_the_cache_show(out: Path, plan) -> None:
    assert record(out, "convex_theory")["metrics"]["relative_difference"]["value"] < 1e-6
    p = plan("10_validation")
    n, tables = len(p.training_set), p.tables()
    after, own = (tables[name].stages for name in ("after subsets", "own losses"))
    before = np.exp(log_losses(p.query_losses(pretrain=p.pretrain()), p.store))
    influence = p.each("scores")[p.method, 0]["influence"].to_numpy()
    places = [at for (at,) in p.each("picked").values()]
    assert places[0] == influence.argmax()  # the image at the head of the score
    for kind in p.kinds_of_retraining:
        runs = [
            np.stack([log_losses(after[kind, "BatchNorm held", s, k], p.store) for k in range(4)])
            for s in range(2)
        ]
        measured = np.mean([run - run.mean(1, keepdims=True) for run in runs], 0).T
        predicted = np.zeros_like(measured)
        for k, gone in p.each("left out").items():
            assert len(gone) == n // 2
            scores = p.each("on queries")["LoGra, rank 4"].numpy() / before[:, None]
            predicted[:, k] = -np.delete(scores, gone, 1).sum(1)
        predicted -= predicted.mean(0)
        want = np.mean([rank_correlation(a, b) for a, b in zip(predicted, measured, strict=True)])
        got = record(out, f"predicts_subsets_held.{kind}")["metrics"]
        assert got["lds"]["value"] == pytest.approx(want) and 0 <= got["ceiling"]["value"] <= 1
        changes = []
        for i, at in enumerate(places):
            full, without = (
                np.mean([log_losses(own[kind, s, k], p.store) for s in range(2)], axis=0)
                for k in (ALL, i)
            )
            rise = without - full
            changes.append(rise[at] - np.delete(rise, at).mean())
        got = record(out, f"predicts_leaving_one_out_held.{kind}")["metrics"]
        assert got["mean_change"]["value"] == pytest.approx(np.mean(changes), rel=1e-4)
        want = rank_correlation(influence[places], np.array(changes))
        assert got["spearman"]["value"] == pytest.approx(want)
    found = record(out, "moves_own_features.continued")["metrics"]
    assert {"spearman", "less_stability_loss", "less_gradient_norm", "ceiling"} <= found.keys()
    # with no weight trained, queries' losses move all the same
    alone = after["continued", "BatchNorm alone", 0, 0]
    assert alone.pretrain == p.pretrain()
    assert np.abs(log_losses(alone, p.store) - np.log(before)).max() > 1e-3


def test_12_forgotten_are_the_neighbours_lost_beyond_the_control(out: Path, plan) -> None:
    p = plan("12_continual")
    scores, features, stages = p.each("scores"), p.each("features"), p.cells["features"].stages
    for task in p.tasks:
        old, new = (d.load() for d in p.sets(task))
        key = "label_name" if task == "classes" else "uniform"
        assert not set(old.attributes[key]) & set(new.attributes[key])
        for claim, channel in (
            ("predicts_forgetting_held", "BatchNorm held"),
            ("predicts_forgetting", "as trained"),
        ):
            ways = [(task, 0, *way, channel) for way in (("first", 0), ("second", 1), ("more", 1))]
            held = p.encoder(task, 0) if channel == "BatchNorm held" else None
            assert [stages[at].statistics for at in ways] == [None, held, held]
            first, second, more = (nearest(features[at], 5)[0] for at in ways)
            lost = [
                [len(set(a) - set(b)) / 5 for a, b in zip(first, way, strict=True)]
                for way in (second, more)
            ]
            excess = np.round(np.subtract(*lost), 9)
            got = record(out, f"{claim}.{task}")
            assert got["metrics"]["mean_forgotten"]["value"] == pytest.approx(excess.mean())
            influence = scores[task, 0, "first", 0]["influence"]
            want = influence.corr(pd.Series(excess), method="spearman")
            assert got["metrics"]["spearman"]["value"] == pytest.approx(want)
            assert got["n"] == len(influence)


def test_13_the_share_of_what_two_noise_seeds_agree_on(out: Path, plan) -> None:
    p = plan("13_explained")
    table = numbers(out, "13_explained").set_index(["method", "kind", "metric"])["value"]
    table, scores = table.sort_index(), p.each("scores")
    contrast = pixel_features(p.data().load())["contrast"]
    for who in ("byol", "untrained"):
        of = [k for method, k, noise in scores if method == who and noise == 0]
        pairs = [[scores[who, k, noise]["influence"] for noise in (0, 1)] for k in of]
        rs = [
            np.corrcoef(*(explained_variance.normal_scores(v.to_numpy()) for v in pair))[0, 1]
            for pair in pairs
        ]
        assert table[who, "together", "repeatable"] == pytest.approx(np.mean(rs))
        plain = [pair[0].corr(contrast, method="spearman") for pair in pairs]
        assert table[who, "alone", "contrast"] == pytest.approx(np.mean(plain))
    got = record(out, "more_than_statistics.byol")
    assert got["metrics"]["repeatable"]["value"] == pytest.approx(
        table["byol", "together", "repeatable"]
    )
    assert got["metrics"]["all_statistics"]["value"] == pytest.approx(
        table["byol", "together", "all, trees"]
    )
    share = got["metrics"]["untrained_pixels_of_repeatable"]["value"]  # of one encoder
    untrained = table["untrained", "together"]
    assert share == pytest.approx(untrained["pixels, trees"] / untrained["repeatable"])
    assert got["seeds"] == [0, 1] and got["learned"]["encoders"] == 2


def removed_rows(table: pd.DataFrame, method: str, which: str) -> pd.Series:
    rows = table[(table["method"] == method) & (table["removed"] == which)]
    return rows.set_index("metric")["value"]


def test_14_gains_are_over_random_removal_and_doses_compare_the_same_scenes(
    out: Path, plan
) -> None:
    p = plan("14_bridges")
    table = numbers(out, "14_bridges")
    removed = table[(table["removed"] == "betweenness") & (table["metric"] == "modularity")]
    assert (removed["low"] < removed["value"]).all() and (removed["value"] < removed["high"]).all()
    # against removals of as many of each class, the classes' own counts are the same
    p_images, score = (
        p.data().load(),
        p.influence(p.pretrain("byol")).read(p.artifacts())["influence"].to_numpy(),
    )
    keep, classes = ~statistics.top(score, 0.1), p_images.require_labels().numpy()
    net = knn_graph(nearest(p.features(p.pretrain("byol")).read(p.artifacts()), p.neighbours)[0])
    ours = removed_rows(table, "byol", "influence")
    without_top = modularity(induced(net, keep), classes[keep])
    between = without_top - ours["modularity (matched)"], without_top - ours["modularity"]
    assert (
        all(abs(mean - modularity(net, classes)) < 0.05 for mean in between)
        and between[0] != between[1]
    )
    images = p.dose(0.5).load()
    assert bool((p.dose(0.2).load().masks == images.masks).all())
    plain = (
        (images.attributes["atypical"] == "") & (images.attributes["duplicate_kind"] == "")
    ).to_numpy()
    influence = p.each("doses")[0.5, 0]["influence"]
    scores = np.log(influence.clip(lower=influence[influence > 0].min()).to_numpy())
    uniform = images.attributes["uniform"].to_numpy(bool)
    dose = numbers(out, "14_bridges_doses").set_index(["background", "share"])
    assert dose.loc[("uniform", 0.5), "value"] == pytest.approx(
        scores[uniform & plain].mean() - scores[~uniform & plain].mean()
    )


def test_15_compares_trainings_without_the_lists(out: Path, plan) -> None:
    p = plan("15_taught")
    removals, features = p.each("removals"), p.each("features")
    losses = {k: np.log(t["stability_loss"].to_numpy()) for k, t in p.each("losses").items()}
    lists = list(p.each("scores").items())
    for (which, scores), q in product(lists, range(2)):
        speaks_for = -scores[q] if which == "effect" else scores[q]
        assert removals[which, q] == sorted(speaks_for.topk(p.k).indices.tolist())
    assert p.effect().run not in [p.retrained("continued", s) for s in range(p.seeds)]

    def moved(kind: Kind, channel: Channel, s: int, which: str, q: int) -> float:
        """How far a query's features are from those of the training on all images."""
        ways = ((kind, channel, s, which, q), (kind, channel, s, "none", ALL))
        a, b = (features[way][q].double() for way in ways)
        return float((1 - torch.cosine_similarity(a, b, 0)).log())

    def rise(kind: Kind, s: int, which: str, made_for: int, q: int) -> float:
        """Of a query's log loss, BatchNorm held, less the mean over queries."""
        held = (kind, "BatchNorm held", s)
        change = losses[*held, which, made_for] - losses[*held, "none", ALL]
        return float(change[q] - change.mean())

    claims_of = {
        "taught_more_than_nearest_held": "BatchNorm held",
        "taught_more_than_nearest": "as trained",
    }
    each = list(product(range(2), range(2)))  # seeds and queries
    for kind, (claim, channel) in product(p.kinds_of_retraining, claims_of.items()):
        ours, nearest_ = (
            np.mean([moved(kind, channel, s, which, q) for s, q in each])
            for which in ("influence", "nearest")
        )
        got = record(out, f"{claim}.{kind}")["metrics"]["change_less_nearest"]["value"]
        assert got == pytest.approx(ours - nearest_, rel=1e-3, abs=1e-3)
    prefixes = {"effect": "", "influence": "influence_", "nearest": "nearest_"}
    for kind, (which, prefix) in product(p.kinds_of_retraining, prefixes.items()):
        own, anothers = (
            np.mean([rise(kind, s, which, (q + other) % 2, q) for s, q in each]) for other in (0, 1)
        )
        got = record(out, f"effect_list_is_the_querys.{kind}")["metrics"]
        wanted = pytest.approx(own - anothers, rel=1e-3, abs=1e-4)
        assert got[f"{prefix}rise_less_anothers"]["value"] == wanted
    table = numbers(out, "15_taught")
    measured = table[table["metric"] == "single"].groupby("kind")["channel"].unique()
    assert {kind: set(found) for kind, found in measured.items()} == {
        kind: set(p.channels(kind)) for kind in p.kinds_of_retraining
    }


def test_16_is_what_the_trainings_in_the_cache_show(out: Path, plan) -> None:
    p = plan("16_training_aware")
    derivatives, removed = p.each("each")["simclr", 0, 0].numpy(), p.read("removed")
    got = record(out, "training_derivative_predicts.simclr")["metrics"]
    for share, count in p.removals.items():
        part = removed[(removed["run"] == 0) & (removed["share"] == share)]
        values = part.set_index(["query", "subset"])["value"]
        left_out = [draw.read(p.store) for draw in p.random(share, count)]
        want = []
        for q, row in enumerate(derivatives):
            change = [values[q, k] - values[q, -1] for k in range(count)]
            want.append(rank_correlation([-row[out].sum() for out in left_out], change))
        assert got[f"lds_{100 * share:g}"]["value"] == pytest.approx(np.mean(want))
    runs = [p.each("unseen")["simclr", 0, r].numpy()[:2].mean(0) for r in range(p.runs)]
    score = p.each("scores")["simclr", 0]["influence"]
    of_size = record(out, "influence_is_the_effect.simclr")["metrics"]
    want = rank_correlation(score, np.mean([abs(run) for run in runs], 0))
    assert of_size["spearman"]["value"] == pytest.approx(want)
    rows = {"without 1%", "without 5%", "other order and views", "two measurements agree"}
    assert rows <= set(numbers(out, "16_training_aware")["predictor"])


def test_17_the_formula_is_the_derivative_and_the_theory_needs_the_loss_that_was_trained(
    out: Path,
) -> None:
    assert (
        record(out, "formula_is_the_derivative")["metrics"]["relative_difference"]["value"] < 1e-3
    )
    table = numbers(out, "17_derivation").groupby("table")
    error = table.get_group("epsilon").sort_values("epsilon")["error"].to_numpy()
    np.testing.assert_allclose(np.log10(error[1] / error[0]), 1, atol=0.1)  # of first order
    rho = table.get_group("agreement").set_index(["trained", "formula"])["value"]
    assert rho["stability loss", "Hessian of ℓ"] == rho["stability loss", "as derived"] > 0.9
    sweep = table.get_group("sweep").sort_values("damping")
    # 12 independent gradients in each of two layers: without damping every image has a leverage of
    # 12 in both
    assert (
        sweep["mean_score"].iloc[0] == pytest.approx(2 * 12, rel=0.01)
        and sweep["norm"].iloc[-1] > 0.99
    )


def test_18_is_what_the_states_in_the_cache_show(out: Path, plan) -> None:
    assert record(out, "objective_gradients")["metrics"]["relative_difference"]["value"] < 1e-6
    p = plan("18_objectives")
    images, asked = p.data().load(), p.asked_data().load()
    table = numbers(out, "18_objectives").dropna(subset="stability loss")
    table = table.set_index(["method", "epoch"])
    assert p.methods[-1] == "vicreg"  # a formula of ours, beside the paper's three
    for (method,) in p.tables()["trainings"].stages:
        assert p.states(method) == (1, 2, 3)
        run = p.training(method)
        backbone = run.learner(p.artifacts(), 2).encoder.backbone
        estimate_statistics(backbone, images, run.recipe.view_a)
        losses = stability_losses(backbone, asked, p.noise, p.measured_seed, p.draws)
        assert table.loc[(method, 2), "stability loss"] == pytest.approx(losses.mean(), rel=1e-4)
    assert table.loc[("simclr", 0), "stability loss"] == pytest.approx(
        table.loc[("byol", 0), "stability loss"]
    )


def test_11_holds_every_record(out: Path) -> None:
    folder = out / "figures/tiny"
    kept, table = verdicts.read_records([folder / "claims.json"]), numbers(out, "11_claims_audit")
    assert len(kept) == len(table) == len(list((out / "results/tiny").glob("claim_*.json")))
    assert set(table["name"]) == measured()
    text = (folder / "11_claims_audit.md").read_text()
    for name in table["name"]:
        assert claims.claims()[name].claim.rstrip(".") in text


def test_a_second_run_leaves_them_alone(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiles, "profiles", lambda: {"tiny": out / "tiny.yaml"})
        patch.delenv("ISSL_DATA", raising=False)
        assert run.run(ProfileOptions("tiny", out=out)) == 0
    printed = capsys.readouterr().out
    assert "0 of 0 missing stages" in printed and printed.count("current ") == len(PLANS)
