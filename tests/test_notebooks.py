"""Every notebook through papermill at a tiny setting: that it runs, and what its numbers are."""

import json
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from nbformat import read
from scipy.stats import spearmanr

from issl.audit import claims, profiles, run, verdicts
from issl.audit.plans_own import ALL
from issl.audit.plans_paper import EQUAL, ON_VIEWS
from issl.audit.profiles import PLANS, ProfileOptions
from issl.audit.stats import datamodeling, explained_variance, statistics
from issl.audit.stats.neighbour_graph import neighbours_kept
from issl.audit.stats.pixel_features import pixel_features
from issl.measures import stability_losses
from issl.pretraining.batchnorm import estimate_statistics

# run with `--dist loadfile`: one worker runs them, once
PROFILE = Path(__file__).parent / "tiny.yaml"
TINY: dict[str, Any] = yaml.safe_load(PROFILE.read_text())
LONG = "05 06 08 10 12 14 15 16 17 18 19 20".split()
HALVES = {slow: [name for name in PLANS if (name[:2] in LONG) == slow] for slow in (False, True)}


def run_tiny(folder: Path, slow: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiles, "profiles", lambda: {"tiny": PROFILE})
        patch.delenv("ISSL_DATA", raising=False)
        options = ProfileOptions("tiny", out=folder, only=",".join(HALVES[slow]))
        assert run.run(options) == 0, "a notebook failed; its error is in the captured output"


run_once = cache(run_tiny)


@pytest.fixture
def out(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the slow notebooks, or the others, are run, once."""
    slow = request.node.get_closest_marker("slow") is not None
    folder = tmp_path_factory.getbasetemp() / f"notebooks-{'slow' if slow else 'quick'}"
    run_once(folder, slow)
    return folder


def plan(out: Path, name: str) -> Any:
    """The plan of a notebook that was run there."""
    fields = {**TINY["common"], **TINY.get(name, {}), "profile": "tiny", "out": str(out)}
    return PLANS[name](**fields)


def record(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / f"results/tiny/claim_{name.replace(' ', '_')}.json").read_text())


def values(out: Path, name: str) -> dict[str, float]:
    """The numbers of a record, without their intervals."""
    return {metric: m["value"] for metric, m in record(out, name)["metrics"].items()}


def numbers(out: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(out / f"figures/tiny/{name}.csv")


def rank_correlation(a: Any, b: Any) -> float:
    return float(spearmanr(a, b).statistic)


@pytest.mark.parametrize(
    "names", [HALVES[False], pytest.param(HALVES[True], marks=pytest.mark.slow)], ids=len
)
def test_each_leaves_figures_an_executed_copy_and_its_claims(out: Path, names: list[str]) -> None:
    """The checks of the code hold at any scale; about the rest a tiny one decides nothing."""
    for name in names:
        kinds = {p.suffix for p in (out / "figures/tiny").glob(f"{name}.*")}
        assert kinds >= {".png", ".pdf", ".csv", ".json"}
        cells = read(out / f"results/tiny/{name}.ipynb", as_version=4).cells
        assert all(c.execution_count for c in cells if c.cell_type == "code" and c.source)
    records = [json.loads(p.read_text()) for p in (out / "results/tiny").glob("claim_*.json")]
    left = [r["name"] for r in records]
    known = {name: c for name, c in claims.claims().items() if c.notebook in names}
    assert {name for name in known if not known[name].superseded} <= set(left) <= set(known)
    for r in records:
        assert r["verdict"] in (claims.UNTESTED, claims.SUPERSEDED)
        assert r["outcome"] == "reproduced" or not known[r["name"]].check, r["name"]
        for m in r["metrics"].values():
            if None not in (m["low"], m["value"], m["high"]):
                assert m["low"] <= m["value"] + 1e-9 and m["value"] <= m["high"] + 1e-9, r["name"]
    if "11_claims_audit" in names:
        assert sorted(numbers(out, "11_claims_audit")["name"]) == sorted(left)
        assert len(verdicts.read_records([out / "figures/tiny/claims.json"])) == len(left)


def test_01_is_the_correlation_of_the_scores_in_the_cache(out: Path) -> None:
    each = plan(out, "01_seed_correlation").each("scores")
    scores = pd.DataFrame({labels: one["influence"] for labels, one in each.items()})
    for kind in ("spearman", "pearson"):
        r = scores.corr(kind)
        byol = r.loc["byol", "byol"]
        # of the noise, the mean over two encoders; of the training, each under its own noise
        wanted = {"noise": (byol[0, 0][0, 1] + byol[1, 0][1, 1]) / 2, "training": byol[0, 0][1, 1]}
        for reading, want in wanted.items():
            assert values(out, f"{reading}_seed_correlation.byol")[kind] == pytest.approx(want)
            assert want < 0.999  # another seed, another score
    learned = record(out, "noise_seed_correlation.byol")["learned"]
    assert learned["encoders"] == 2 and 0 <= learned["knn"] <= 1
    table = numbers(out, "01_seed_correlation").set_index(["seed", "method", "metric"])["value"]
    assert table["training, same noise", "byol", "pearson"] == pytest.approx(byol[0, 0][1, 0])
    fresh = r["untrained", 0, 0]["untrained", 0, 1]
    assert table["untrained", "untrained", "pearson"] == pytest.approx(fresh)


def test_02_compares_with_the_best_augmentation(out: Path) -> None:
    table = numbers(out, "02_augmentation_ablation")
    pearson = table[(table["metric"] == "pearson") & (table["method"] == "simclr")]
    first = pearson[pearson["draws"] == 1].set_index("perturbation")["value"]
    others = first[~first.index.str.startswith("noise")]
    assert record(out, "gaussian_most_stable.simclr")["rival"] == others.idxmax()
    margin = values(out, "gaussian_most_stable.simclr")["margin_usual"]
    assert margin == pytest.approx(first["noise 0.2"] - others.max())


def test_03_compares_with_the_truth(out: Path) -> None:
    p = plan(out, "03_background_bias")
    known = p.data().load().attributes
    # on scenes the truth is known of every ordinary image, whatever the detector says
    ordinary = known["atypical"] == ""
    scores = p.influence(p.pretrain("byol")).read(p.artifacts())["influence"]
    want = statistics.auc(*(x[ordinary].to_numpy() for x in (scores, known["uniform"])))
    got = values(out, "uniform_backgrounds_by_eye.byol")["auc_labels"]
    assert got == pytest.approx(want.value)
    assert record(out, "causal_background")["n"] == 16


def test_04_exact_duplicates_are_nearest_in_pixels(out: Path) -> None:
    table = numbers(out, "04_duplicates").set_index(["detector", "method", "metric"])["value"]
    assert table["nearest in pixels", "no encoder", "auc_exact"] == 1.0
    assert table["perceptual hash", "no encoder", "auc_exact"] > 0.95
    got = values(out, "low_influence_duplicates.simclr")["auc_injected"]
    assert got == pytest.approx(table["low influence", "simclr", "auc_injected"])


@pytest.mark.slow
def test_05_effects_are_over_encoders_and_thinning_takes_images_of_one_group(out: Path) -> None:
    p = plan(out, "05_fairness")
    groups = p.training_set.attributes[list(p.attributes)].astype(str)
    scores = [one["influence"] for one in p.each("scores").values()]
    claim = "group_differences_of_one.simclr"
    attribute, group = record(out, claim)["largest_group"].split(": ")
    member = (groups[attribute] == group).to_numpy()
    first, second, before = (2 * statistics.auc(s.to_numpy(), member).value - 1 for s in scores)
    got = values(out, claim)
    assert got["signed_effect"] == pytest.approx((first + second) / 2)
    assert got["untrained"] == pytest.approx(before)
    table = numbers(out, "05_fairness")
    scored = table[table["scored"] == "simclr"]
    most = scored.loc[scored["value"].abs().idxmax()]
    assert (most["attribute"], most["group"]) == (attribute, group)
    assert got["its_adjusted_p"] == pytest.approx(most["adjusted_p"])
    cool = p.data().load().attributes["group"].to_numpy() == "cool"
    thinned, at_random = (p.removal(0, chance).read(p.artifacts()) for chance in (False, True))
    assert cool[thinned].all() and len(thinned) == len(at_random) == round(0.9 * cool.sum())
    after = p.each("scores without")
    ranks = [after["simclr", 0, which]["influence"].rank() for which in ("group", "random")]
    rise = (ranks[0][cool].mean() - ranks[1][cool].mean()) / len(cool)
    assert values(out, "thinned_group_rises.simclr")["rank_difference"] == pytest.approx(rise)


@pytest.mark.slow
def test_06_and_08_are_the_accuracies_of_the_encoders_trained_without(out: Path) -> None:
    pruning, compared = plan(out, "06_pruning"), plan(out, "08_supervised_vs_ssl")
    # the scored encoder's own length, not the judges'
    assert pruning.scores("simclr").pretrain.epochs == 1
    assert {pruning.judge("simclr", s).epochs for s in pruning.judges} == {2}
    for p, suffix, count in ((pruning, "", 2 * (1 + 6)), (compared, "_pruning", 16)):
        table = numbers(out, p.notebook + suffix)
        runs = table[table["table"] == "runs"].set_index(p.cells["runs"].columns.split())
        assert len(runs) == count
        for at, hits in p.each("runs").items():
            for column in ("probe", "knn"):
                assert runs.loc[at, column] == pytest.approx(hits[column].mean())


def test_07_new_images_are_scored_under_the_curvature_of_the_training_set(out: Path) -> None:
    p = plan(out, "07_outliers")
    new = p.new_images()
    kind = new.load().attributes["atypical"].to_numpy()
    assert (kind != "").sum() >= 12 and new.inject.duplicates == 0 and new.split == "test"
    for stage in p.tables()["scores"].stages.values():
        assert (stage.data, stage.others) == (p.data(), new)
    rest = ~np.isin(kind, ["corrupted", "static"])

    def auc(score: pd.DataFrame) -> float:
        return statistics.auc(score["influence"].to_numpy()[rest], kind[rest] != "").value

    scores = p.each("scores")
    want = np.mean([auc(score) for (method, _), score in scores.items() if method == "byol"])
    got = values(out, "high_influence_ambiguous.byol")
    assert got["auc_without_static"] == pytest.approx(want)
    assert got["untrained_auc_without_static"] == pytest.approx(auc(scores["untrained", 0]))


@pytest.mark.slow
def test_08_is_the_difference_of_two_correlations_without_their_noise(out: Path) -> None:
    p = plan(out, "08_supervised_vs_ssl")
    scores = {labels: one["influence"] for labels, one in p.each("scores").items()}
    rho = pd.DataFrame(scores).corr("spearman")

    def agreement(e: tuple[str, int], f: tuple[str, int]) -> float:
        between = (rho[*e, 0][*f, 1] + rho[*e, 1][*f, 0]) / 2
        return between / np.sqrt(rho[*e, 0][*e, 1] * rho[*f, 0][*f, 1])

    first, second = (("simclr", k) for k in range(2))
    others = {
        "seeds": [second],
        "supervised": [("supervised", 0), ("supervised", 1)],
        "supervised_at_equal_strength": [(EQUAL, 0), (EQUAL, 1)],
        "supervised_on_ssl_views": [(ON_VIEWS, 0)],
    }
    want = {
        name: np.mean([agreement(e, f) for e, f in product((first, second), of) if e != f])
        for name, of in others.items()
    }
    assert len(set(want.values())) == len(want)
    got = values(out, "supervised_differs_more_than_seeds.simclr")
    for name, agreed in want.items():
        assert got[name] == pytest.approx(agreed)
        if name != "seeds":
            assert got[f"seeds_less_{name}"] == pytest.approx(want["seeds"] - agreed)
    table = numbers(out, p.notebook).set_index(["method", "metric"])["value"]
    assert table["supervised", "seeds"] == pytest.approx(agreement(*others["supervised"]))
    views = p.cells["scores"].stages[ON_VIEWS, 0, 0].pretrain.recipe.view_a
    ssl, usual = (p.training(method).recipe.view_a for method in ("simclr", "supervised"))
    assert views == ssl != usual
    weak = p.cells["scores"].stages[EQUAL, 1, 1]
    assert weak.perturbation.std == 0.1 and weak.pretrain.method == "supervised"


def test_09_closed_form(out: Path) -> None:
    got = values(out, "linear_closed_form")
    assert got["relative_difference"] < 1e-10 and got["retraining_exact_form"] < 1e-4
    table = numbers(out, "09_linear_theory")
    np.testing.assert_allclose(table["change_of_loss"], table["change_by_formula"], rtol=1e-4)


@pytest.mark.slow
def test_10_is_what_the_trainings_in_the_cache_show(out: Path) -> None:
    """By functions that test_statistics.py holds against their definitions."""
    p = plan(out, "10_validation")
    n, tables, seeds = len(p.training_set), p.tables(), range(2)
    after, own = (tables[name].stages for name in ("after subsets", "own losses"))

    def losses(stages: Any, *labels: Any) -> pd.Series:
        return stages[0, *labels].read(p.store)["stability_loss"]

    influence = p.each("scores")[0]["influence"].to_numpy()
    places = [at for (e, _), (at,) in p.each("picked").items() if e == 0]
    assert places[0] == influence.argmax()  # the image at the head of the score
    left_out = list(p.each("left out").values())
    assert {len(gone) for gone in left_out} == {n // 2}
    before = losses(tables["query losses"].stages).to_numpy()[:, None]
    of_log = p.each("on queries")[0, "LoGra, rank 4"].numpy() / before
    predicted = datamodeling.predicted_losses(of_log, datamodeling.kept(left_out, n))
    for kind in p.retraining:
        runs = [[losses(after, kind, "BatchNorm held", s, k) for k in range(4)] for s in seeds]
        measured = datamodeling.centred(np.log(runs).swapaxes(1, 2)).mean(0)
        want = datamodeling.lds(datamodeling.centred(predicted), measured).value
        got = values(out, f"predicts_subsets_held.{kind}")
        assert got["lds"] == pytest.approx(want) and 0 <= got["ceiling"] <= 1
        rises = [
            [
                datamodeling.own_rise(losses(own, kind, s, ALL), losses(own, kind, s, i), at)
                for i, at in enumerate(places)
            ]
            for s in seeds
        ]
        changes = np.mean(rises, 0)
        got = values(out, f"predicts_leaving_one_out_held.{kind}")
        assert got["mean_change"] == pytest.approx(np.mean(changes), rel=1e-4)
        assert got["spearman"] == pytest.approx(rank_correlation(influence[places], changes))


@pytest.mark.slow
def test_12_forgotten_are_the_neighbours_lost_beyond_the_control(out: Path) -> None:
    p = plan(out, "12_continual")
    scores, features, stages = p.each("scores"), p.each("features"), p.cells["features"].stages
    for task in p.tasks:
        old, new = (d.load() for d in p.sets(task))
        key = "label_name" if task == "classes" else "uniform"
        assert not set(old.attributes[key]) & set(new.attributes[key])
        influence = scores[task, 0, "first", 0]["influence"]
        ways = [("first", 0), ("second", 1), ("more", 1)]
        places = [(task, 0, *way, "BatchNorm held") for way in ways]
        held = p.encoder(task, 0)
        assert [stages[at].statistics for at in places] == [None, held, held]
        first, second, more = (features[at] for at in places)
        kept_by = [neighbours_kept(first, then, 5) for then in (second, more)]
        excess = np.round(kept_by[1] - kept_by[0], 9)
        got = values(out, f"predicts_forgetting_held.{task}")
        assert got["mean_forgotten"] == pytest.approx(excess.mean())
        assert got["spearman"] == pytest.approx(rank_correlation(influence, excess))


def test_13_the_share_of_what_two_noise_seeds_agree_on(out: Path) -> None:
    p = plan(out, "13_explained")
    table = numbers(out, "13_explained").set_index(["method", "kind", "metric"])["value"]
    table, scores = table.sort_index(), p.each("scores")
    contrast = pixel_features(p.data().load())["contrast"]
    for who in ("byol", "untrained"):
        of = [k for method, k, noise in scores if method == who and noise == 0]
        pairs = [[scores[who, k, noise]["influence"] for noise in (0, 1)] for k in of]
        normal = [map(explained_variance.normal_scores, np.array(pair)) for pair in pairs]
        rs = [np.corrcoef(*pair)[0, 1] for pair in normal]
        assert table[who, "together", "repeatable"] == pytest.approx(np.mean(rs))
        plain = [rank_correlation(pair[0], contrast) for pair in pairs]
        assert table[who, "alone", "contrast"] == pytest.approx(np.mean(plain))
    got = values(out, "more_than_statistics.byol")
    untrained = table["untrained", "together"]  # of one encoder
    share = untrained["pixels, trees"] / untrained["repeatable"]
    assert got["untrained_pixels_of_repeatable"] == pytest.approx(share)


@pytest.mark.slow
def test_14_doses_compare_the_same_scenes(out: Path) -> None:
    p = plan(out, "14_bridges")
    images = p.dose(0.5).load()
    assert bool((p.dose(0.2).load().masks == images.masks).all())
    known = images.attributes
    plain = ((known["atypical"] == "") & (known["duplicate_kind"] == "")).to_numpy()
    influence = p.each("doses")[0.5, 0]["influence"]
    scores = np.log(influence.clip(lower=influence[influence > 0].min()).to_numpy())
    uniform = known["uniform"].to_numpy(bool)
    dose = numbers(out, "14_bridges_doses").set_index(["background", "share"])
    want = scores[uniform & plain].mean() - scores[~uniform & plain].mean()
    assert dose.loc[("uniform", 0.5), "value"] == pytest.approx(want)


@pytest.mark.slow
def test_15_compares_trainings_without_the_lists(out: Path) -> None:
    p = plan(out, "15_taught")
    features = p.each("features")
    for ((e, which), scores), q in product(p.each("scores").items(), range(2)):
        speaks_for = -scores[q] if which == "effect" else scores[q]
        removed = p.removals(p.training(p.method, e))[which, q].read(p.store)
        assert removed == sorted(speaks_for.topk(p.k).indices.tolist())
    runs = [p.retrained("continued", s, p.training()) for s in range(p.seeds)]
    assert p.effect(p.training()).run not in runs

    def moved(e: int, s: int, q: int, kind: str, which: str) -> float:
        """How far a query's features are from those of the training on all images."""
        ways = ((e, kind, "BatchNorm held", s, *key) for key in ((which, q), ("none", ALL)))
        a, b = (features[way][q].double() for way in ways)
        return float((1 - torch.cosine_similarity(a, b, 0)).log())

    each = list(product(range(p.encoders), range(2), range(2)))  # encoders, seeds and queries
    for kind in p.retraining:
        want = [moved(*at, kind, "influence") - moved(*at, kind, "nearest") for at in each]
        got = values(out, f"taught_more_than_nearest_held.{kind}")["change_less_nearest"]
        assert got == pytest.approx(np.mean(want), rel=1e-3, abs=1e-3)


@pytest.mark.slow
def test_16_is_what_the_trainings_in_the_cache_show(out: Path) -> None:
    p = plan(out, "16_training_aware")
    derivatives, removed = p.each("each")["simclr", 0, 0].numpy(), p.read("removed")
    got = values(out, "training_derivative_predicts.simclr")
    for share, count in p.removals.items():
        part = removed[(removed["run"] == 0) & (removed["share"] == share)]
        after = part.set_index(["query", "subset"])["value"]
        left_out = [draw.read(p.store) for draw in p.random(share, count)]
        want = []
        for q, row in enumerate(derivatives):
            change = [after[q, k] - after[q, -1] for k in range(count)]
            want.append(rank_correlation([-row[gone].sum() for gone in left_out], change))
        assert got[f"lds_{100 * share:g}"] == pytest.approx(np.mean(want))
    runs = [p.each("unseen")["simclr", 0, r].numpy()[:2].mean(0) for r in range(p.runs)]
    score = p.each("scores")["simclr", 0]["influence"]
    want = rank_correlation(score, np.mean([abs(run) for run in runs], 0))
    assert values(out, "influence_is_the_effect.simclr")["spearman"] == pytest.approx(want)


@pytest.mark.slow
def test_17_the_theory_needs_the_loss_that_was_trained(out: Path) -> None:
    table = numbers(out, "17_derivation").groupby("table")
    rho = table.get_group("agreement").set_index(["trained", "formula"])["value"]
    assert rho["stability loss", "Hessian of ℓ"] == rho["stability loss", "as derived"] > 0.9
    sweep = table.get_group("sweep").sort_values("damping")
    # 12 independent gradients in each of two layers: without damping every image has a leverage of
    # 12 in both
    assert sweep["mean_score"].iloc[0] == pytest.approx(2 * 12, rel=0.01)
    assert sweep["norm"].iloc[-1] > 0.99


@pytest.mark.slow
def test_18_is_what_the_states_in_the_cache_show(out: Path) -> None:
    p = plan(out, "18_objectives")
    images, asked = p.data().load(), p.asked_data().load()
    table = numbers(out, "18_objectives").dropna(subset="stability loss")
    losses = table.set_index(["method", "epoch"])["stability loss"]
    for (method,) in p.tables()["trainings"].stages:
        run = p.training(method)
        backbone = run.learner(p.artifacts(), 2).encoder.backbone
        estimate_statistics(backbone, images, run.recipe.view_a)
        want = stability_losses(backbone, asked, p.noise, p.measured_seed, p.draws).mean()
        assert losses[method, 2] == pytest.approx(want, rel=1e-4)
    assert losses["simclr", 0] == pytest.approx(losses["byol", 0])


@pytest.mark.slow
def test_20_is_what_each_state_of_the_training_scores(out: Path) -> None:
    p = plan(out, "20_better_encoders")
    scores, reached = p.each("scores"), p.each("reached")
    table = numbers(out, "20_better_encoders")
    for row in table[table["metric"] == "pearson"].itertuples():
        state = (row.method, row.width, row.epochs, row.encoder)
        a, b = (scores[*state, row.output, row.unit, noise]["influence"] for noise in (0, 1))
        assert row.value == pytest.approx(a.corr(b))
        assert row.knn == pytest.approx(reached[state]["knn"].mean())
    assert {(s[1], s[2]) for s in reached} == {(2, 0), (2, 1), (2, 2), (2, 3), (1, 0), (1, 3)}
    a, b = (scores["simclr", 1, 3, k, "features", "range", k]["influence"] for k in (0, 1))
    narrow = table[(table["metric"] == "pearson_trainings") & (table["width"] == 1)]
    assert narrow["value"].item() == pytest.approx(a.corr(b))
    claim = "same_at_the_papers_accuracy.simclr"
    # four states are too few for a line, so nothing is known
    assert values(out, claim)["share_straight"] == 0
    assert record(out, claim)["outcome"] == "undecided"


def test_a_second_run_leaves_them_alone(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_tiny(out, slow=False)
    printed = capsys.readouterr().out
    assert "0 of 0 missing stages" in printed and printed.count("current ") == len(HALVES[False])
