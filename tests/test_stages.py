"""The cache: what is computed again and what is not, and two processes at once; bad settings;
BatchNorm's statistics apart from the weights."""

import copy
import dataclasses
import hashlib
import json
import multiprocessing
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pandas as pd
import pytest
import torch
from disk import png
from nets import same_weights
from pydantic_core import PydanticUndefined
from torch import nn

import issl
from issl import Augmentation, Curvature, GaussianNoise, Images, LoGra
from issl.audit import stages, table_stages
from issl.audit.cache import Artifacts, Stage
from issl.audit.config import Config, as_plain
from issl.audit.given import Given
from issl.audit.plans_paper import SeedCorrelation
from issl.audit.settings import Data
from issl.audit.stages import Draw, Embed, Influence, Layers, Pretrain, Prune, Stability
from issl.audit.stats.evaluate import knn_hits, probe_hits
from issl.audit.stats.pixel_features import pixel_features
from issl.audit.table_stages import COPY, Ablation, CopiesDiscount
from issl.data import scenes
from issl.data.views import View
from issl.influence.curvature import KINDS, named_curvature
from issl.influence.scores import as_queries
from issl.pretraining.batchnorm import copy_statistics, estimate_statistics
from issl.pretraining.learner import load_learner
from issl.pretraining.loop import pretrain
from issl.pretraining.recipes import recipe

DATA = Data(name="scenes", n=48)
TRAIN = Pretrain(data=DATA, width=1, epochs=1, batch_size=16)


def influence(**changes) -> Influence:
    return Influence(**{"pretrain": TRAIN, "data": DATA, "curvature": LoGra(2), **changes})


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """What the tests of single stages share."""
    return Artifacts(tmp_path_factory.mktemp("artifacts"))


def test_what_depends_on_a_changed_field_is_computed_and_nothing_twice(tmp_path: Path) -> None:
    for stage, computed in (
        (influence(), ["pretrain", "influence"]),
        (influence(), []),
        (influence(seed=1), ["influence"]),
        (influence(perturbation=GaussianNoise(std=0.1)), ["influence"]),
        (influence(pretrain=TRAIN.model_copy(update={"seed": 1})), ["pretrain", "influence"]),
        (Embed(pretrain=TRAIN, data=DATA), ["embed"]),
    ):
        again = Artifacts(tmp_path)
        again.get(stage)
        assert [label.split("/")[0] for label in again.computed] == computed
    assert len(influence().read(again).attrs["damping"]) == 20


def test_other_images_are_scored_under_the_curvature_of_the_data(artifacts: Artifacts) -> None:
    test = Data(name="scenes", split="test", n=20)
    scores = influence(others=test).read(artifacts)
    assert scores["index"].tolist() == test.load().index.tolist()
    fitted = issl.fit(TRAIN.encoder(artifacts), DATA.load(), GaussianNoise(), LoGra(2))
    want = fitted.score(test.load())
    np.testing.assert_allclose(scores["influence"], want["influence"], rtol=1e-5)
    # its own curvature would give other scores
    alone = influence(data=test).read(artifacts)["influence"]
    assert not np.allclose(scores["influence"], alone, rtol=0.05)


def test_some_layers_are_scored(artifacts: Artifacts) -> None:
    for output in ("features", "projector"):
        how = {"curvature": issl.Diagonal(), "output": output}
        scores = {k: influence(layers=k, **how).read(artifacts) for k in get_args(Layers)}
        first, last = scores["first convolution"], scores["last block"]
        assert (len(first.attrs["damping"]), len(last.attrs["damping"])) == (1, 2)
        parts = first["influence"] + last["influence"]  # a score is a sum over layers
        assert ((parts > 0) & (parts < scores["all"]["influence"])).all()


def make(root: Path, stage: Stage) -> int:
    """How many stages had to be computed."""
    torch.set_num_threads(1)
    artifacts = Artifacts(root, checkpoint_seconds=0.0)
    artifacts.get(stage)
    return len(artifacts.computed)


def test_two_processes_make_a_stage_once(tmp_path: Path) -> None:
    stage = Pretrain(data=Data(name="scenes", n=96), width=1, epochs=2, batch_size=32)
    context = multiprocessing.get_context("forkserver")  # torch refuses to train in a plain fork
    context.set_forkserver_preload(["issl.audit.stages"])
    with context.Pool(2) as pool:
        told = pool.starmap_async(make, [(tmp_path, stage)] * 2, chunksize=1)
        assert sorted(told.get(timeout=900)) == [0, 1]
    assert not list(tmp_path.rglob("*.part"))


def test_a_key_is_the_hash_of_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults do not count, so fields may come and go; what an artifact needs does."""
    trained = Pretrain(data=DATA, width=4, epochs=2)
    data = {"images": f"scenes-{scenes.VERSION}", "n": 48}
    assert trained.settings() == {"data": data, "width": 4, "epochs": 2}
    content = {"stage": "pretrain", "version": Pretrain.version, "settings": trained.settings()}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert trained.key == digest[:16]
    assert len({influence(curvature=named_curvature(kind)).key for kind in KINDS}) == len(KINDS)
    blur = influence(perturbation=Augmentation("blur", 0.5)).settings()["perturbation"]
    assert blur == {"type": "Augmentation", "kind": "blur", "strength": 0.5}
    assert json.dumps(as_plain([1.0, 0.5])) == "[1, 0.5]"  # 1 and 1.0 give one key
    assert influence(pretrain=trained).settings()["pretrain"] == trained.label
    before = influence().key
    monkeypatch.setattr(Pretrain, "version", Pretrain.version + 1)
    assert influence(pretrain=TRAIN.model_copy()).key != before


def test_defaults_are_pinned() -> None:
    """Keys leave defaults out, so a default that changes must raise the version of every stage that
    has it: else old artifacts would pass for new ones. Then, or for a field that is new or gone,
    write what this test found into stage_defaults.json."""
    found: dict[str, dict[str, Any]] = {}

    def look_at(kind: Any) -> None:
        """A type, and those inside it."""
        inside = list(get_args(kind))
        if kind is Curvature:
            inside += [type(named_curvature(name)) for name in KINDS]
        elif isinstance(kind, type) and kind.__name__ not in found:
            if issubclass(kind, Config):
                fields = kind.model_fields.items()
                defaults = {k: f.get_default(call_default_factory=True) for k, f in fields}
            elif dataclasses.is_dataclass(kind):
                defaults = {f.name: f.default for f in dataclasses.fields(kind)}
            else:
                return
            needed = (PydanticUndefined, dataclasses.MISSING)
            shown = {k: "needed" if d in needed else as_plain(d) for k, d in defaults.items()}
            version = {"version": kind.version} if issubclass(kind, Stage) else {}
            found[kind.__name__] = shown | version
            inside += [get_type_hints(kind)[name] for name in defaults]
        for part in inside:
            look_at(part)

    for stage in (*vars(stages).values(), *vars(table_stages).values(), Given):
        if isinstance(stage, type) and issubclass(stage, Stage):
            look_at(stage)
    assert found == json.loads((Path(__file__).parent / "stage_defaults.json").read_text())


def test_an_ablation_holds_each_score_under_its_name(artifacts: Artifacts) -> None:
    scores = {
        "noise": influence(perturbation=GaussianNoise(0.0, 0.1), seed=3),
        "flip": influence(perturbation=Augmentation("flip", 0.5), draws=2),
    }
    table = Ablation(names=list(scores), scores=list(scores.values())).read(artifacts)
    for name, score in scores.items():
        own = score.read(artifacts).assign(draws=score.draws, seed=score.seed)
        part = table[table["perturbation"] == name]
        pd.testing.assert_frame_equal(part[own.columns].reset_index(drop=True), own)


def test_a_set_is_loaded_once_and_again_where_its_files_changed(tmp_path: Path) -> None:
    picture = tmp_path / "1.png"
    picture.write_bytes(png(np.zeros((3, 32, 32), np.uint8)))
    data = Data(name=f"folder:{tmp_path}")
    key = data.identity
    first, again = data.load(), data.load()
    assert first.pixels is again.pixels
    first.attributes["mine"] = 1  # no one else's
    assert "mine" not in again.attributes and "mine" not in data.load().attributes
    picture.write_bytes(png(np.full((3, 32, 32), 9, np.uint8)) + b" ")
    with pytest.raises(issl.IsslError, match="changed while it was used"):
        data.load()  # its key is that of the images before
    data = Data(name=data.name)
    assert int(data.load().pixels.max()) == 9 and data.identity != key


def test_prune_and_thin_choose_what_they_say(artifacts: Artifacts) -> None:
    scored = influence()
    order = scored.read(artifacts)["influence"].rank(ascending=False, method="first").to_numpy()

    def pruned(which: str, seed: int = 0, share: float = 0.25) -> list[int]:
        return Prune(influence=scored, which=which, share=share, seed=seed).read(artifacts)

    assert sorted(order[pruned("top")]) == list(range(1, 13))
    assert sorted(order[pruned("bottom")]) == list(range(37, 49))
    assert pruned("bottom", share=0.001) == pruned("top", share=0.001) == []
    assert len(pruned("random")) == 12 and pruned("random") != pruned("random", 1)
    classes = scored.data.load().require_labels()
    matched = pruned("random of class")
    assert torch.equal(classes[matched].bincount(), classes[pruned("top")].bincount())
    assert matched != pruned("random of class", 1) and len(set(matched)) == 12
    border = pixel_features(scored.data.load())["border_std"]
    flattest = border.rank(method="first").to_numpy() <= 24
    top, some = pruned("top flat"), pruned("random flat")
    assert flattest[top].all() and flattest[some].all()
    assert len(top) == len(some) == 12 and top != some
    assert max(order[top]) < min(set(order[flattest]) - set(order[top]))
    thin = {"data": DATA, "attribute": "group", "value": "warm", "keep": 0.25}
    group = DATA.load().attributes["group"].to_numpy()
    removed = stages.Thin(**thin).read(artifacts)
    assert set(group[removed]) == {"warm"} and len(removed) == round(0.75 * (group == "warm").sum())
    random = stages.Thin(**thin, at_random=True).read(artifacts)
    assert len(random) == len(removed) and set(group[random]) == {"warm", "cool"}


def test_pick_draw_and_top_choose_what_they_say(artifacts: Artifacts) -> None:
    scored = influence()
    scores = scored.read(artifacts)["influence"].to_numpy()
    ends = [stages.Pick(influence=scored, quantile=q).read(artifacts) for q in (0.0, 1.0)]
    assert ends == [[int(scores.argmax())], [int(scores.argmin())]]
    half, other = (stages.Draw(data=DATA, share=0.5, seed=s).read(artifacts) for s in (0, 1))
    assert len(set(half)) == len(other) == 24 and half != other
    query = Data(name="scenes", split="test", n=5)
    cross = stages.Cross(pretrain=TRAIN, data=DATA, query=query, curvature=LoGra(4), draws=2)
    asked, known = (Embed(pretrain=TRAIN, data=data) for data in (query, DATA))
    near = stages.Nearness(train=known, query=asked)
    how = {"curvature": LoGra(4), "draws": 2, "computing": issl.Computing(batch_size=64)}
    images, queries = DATA.load(), as_queries(query.load())
    want = issl.cross_influence(TRAIN.encoder(artifacts), images, queries, **how)
    torch.testing.assert_close(cross.read(artifacts), want)
    a, b = (torch.nn.functional.normalize(f.read(artifacts), dim=1) for f in (asked, known))
    torch.testing.assert_close(near.read(artifacts).float(), a @ b.T, rtol=1e-4, atol=1e-5)
    for stage in (cross, near):
        best = stage.read(artifacts)[3].topk(4).indices.sort()[0].tolist()
        assert stages.Top(scores=stage, query=3, k=4).read(artifacts) == best


def test_copies_lower_a_score_as_if_they_were_in_the_set(artifacts: Artifacts) -> None:
    images, encoder = DATA.load(), TRAIN.encoder(artifacts)
    stage = CopiesDiscount(pretrain=TRAIN, data=DATA, curvature=LoGra(4), copies=(3,), picked=2)
    found = stage.read(artifacts)
    position = int((images.index == found["index"][0]).nonzero())
    index = torch.cat([images.index, images.index[position] + COPY * torch.arange(1, 4)])
    pixels = torch.cat([images.tensor(), images.tensor()[[position] * 3]])
    with_copies = Images(pixels, None, pd.DataFrame({"index": index}), "with copies")
    for k, some in enumerate((images, with_copies)):
        want = issl.self_influence(encoder, some, curvature=LoGra(4))["influence"][position]
        assert found["influence"][k] == pytest.approx(want, rel=1e-4)
    still = stage.model_copy(update={"perturbation": GaussianNoise(0.1, 0.0)}).read(artifacts)
    np.testing.assert_allclose(still["influence"], still["predicted"], rtol=0.1)  # λ moves a little
    assert (still["influence"][1::2].to_numpy() < still["influence"][::2].to_numpy()).all()


def test_stability_is_the_loss_that_influence_reports(artifacts: Artifacts) -> None:
    how = {"draws": 2, "seed": 3, "output": "projector"}
    got = stages.Stability(pretrain=TRAIN, data=DATA, **how).read(artifacts)
    want = influence(**how).read(artifacts)
    np.testing.assert_allclose(got["stability_loss"], want["stability_loss"], rtol=1e-3)
    assert (got["index"] == want["index"]).all()


def test_a_data_set_of_some_classes_and_of_a_share_of_uniform_backgrounds() -> None:
    images = Data(name="scenes", n=60, classes=(1, 4)).load()
    every = Data(name="scenes", n=60).load()
    chosen = every.index[torch.isin(every.labels, torch.tensor([1, 4]))]
    assert sorted(images.index.tolist()) == sorted(chosen.tolist())
    assert Data(name="scenes", n=60, uniform=1.0).load().attributes["uniform"].mean() > 0.95
    assert not Data(name="scenes", n=60, uniform=0.0).load().attributes["uniform"].any()


def test_evaluation_is_of_the_features(artifacts: Artifacts) -> None:
    test = Data(name="scenes", split="test", n=20)
    sets = [Embed(pretrain=TRAIN, data=data) for data in (DATA, test)]
    table = stages.Evaluate(train=sets[0], test=sets[1], k=20).read(artifacts)
    assert table["index"].tolist() == test.load().index.tolist()
    known = [t for part in sets for t in (part.read(artifacts), part.data.load().labels)]
    hits, c = probe_hits(*known)
    np.testing.assert_array_equal(table["knn"], knn_hits(*known, k=20))
    np.testing.assert_array_equal(table["probe"], hits)
    assert 0 < table["knn"].sum() < 20 and table.attrs["C"] == c


def test_training_without_a_choice_is_training_without_its_positions(artifacts: Artifacts) -> None:
    scored = influence()
    pruned = TRAIN.model_copy(update={"without": Prune(influence=scored, which="top", share=0.25)})
    keep = torch.ones(DATA.n, dtype=torch.bool)
    keep[pruned.without.read(artifacts)] = False
    how = TRAIN.model_dump(include={"width", "epochs", "batch_size", "seed"})
    want, _ = pretrain(DATA.load(), TRAIN.recipe, **how, keep=keep)
    same_weights(pruned.encoder(artifacts), want.backbone)


def test_supervised_influence_is_of_the_cross_entropy(artifacts: Artifacts) -> None:
    model = TRAIN.model_copy(update={"recipe": recipe("supervised", "short")})
    how = {"perturbation": GaussianNoise(0.0, 0.0), "curvature": issl.Identity()}
    scores = influence(pretrain=model, loss="cross_entropy", **how).read(artifacts)
    encoder, images = model.encoder(artifacts, "projector"), DATA.load()
    losses = torch.nn.functional.cross_entropy(
        encoder(images.pixels.float() / 255), images.labels, reduction="none"
    )
    np.testing.assert_allclose(scores["loss"], losses.detach(), rtol=1e-4, atol=1e-5)
    # the gradient's norm over the same weights, by plain automatic differentiation, one image
    scored = torch.nn.Conv2d | torch.nn.Linear
    weights = [m.weight for m in encoder.modules() if isinstance(m, scored)]
    gradient = torch.autograd.grad(losses[0], weights)
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    assert scores["grad_norm"][0] == pytest.approx(float(norm), rel=1e-3)


def test_a_bad_setting_is_named_with_its_path_and_value() -> None:
    for build in (Pretrain.model_validate, lambda given: Pretrain(**given)):
        with pytest.raises(issl.IsslError, match=r"^Pretrain: .*without\.Draw\.share = 2: .*\Z"):
            build({"data": DATA, "without": {"data": DATA, "share": 2}})


def test_a_union_takes_the_member_that_fits_and_copies_are_equal() -> None:
    run = Pretrain(data={"name": "scenes", "n": 48}, without={"data": DATA, "share": 0.5})
    assert run.data == DATA and run.without == stages.Draw(data=DATA, share=0.5)
    assert run == copy.deepcopy(run) == pickle.loads(pickle.dumps(run))


QUERY = Data(name="scenes", split="test", n=6)
SIZES = {"width": 1, "batch_size": 16}
FIRST = Pretrain(data=DATA, recipe=recipe("byol", "short"), **SIZES, epochs=2, snapshots=(1,))
LEFT_OUT = Draw(data=DATA, share=0.5)
HALF = Pretrain(
    **SIZES, data=DATA, recipe=FIRST.recipe, epochs=1, seed=7, start=FIRST, without=LEFT_OUT
)


def statistics(net: nn.Module) -> torch.Tensor:
    return torch.cat([v.flatten() for k, v in net.state_dict().items() if "running" in k])


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.flatten() for p in net.parameters()])


def test_estimated_statistics_are_those_of_the_images_and_of_no_order() -> None:
    """A single layer, where mean and variance can be taken by hand."""
    images = issl.load("scenes", n=20)
    net = estimate_statistics(nn.Sequential(nn.BatchNorm2d(3)), images, View(), batch_size=20)
    x = (images.pixels.float() / 255).transpose(0, 1).flatten(1)
    want = torch.cat([x.mean(1), x.var(1)])
    torch.testing.assert_close(statistics(net), want, rtol=1e-5, atol=1e-6)
    assert not net.training
    shuffled = images.subset(torch.randperm(20, generator=torch.Generator().manual_seed(0)))
    one, other = (
        estimate_statistics(nn.Sequential(nn.BatchNorm2d(3)), some, View(0.3), (16, 16), 8)
        for some in (images, shuffled)
    )
    assert torch.equal(statistics(one), statistics(other))


def test_a_measurement_with_held_statistics_sees_the_weights_alone(artifacts: Artifacts) -> None:
    def losses(**how: object) -> np.ndarray:
        return Stability(data=QUERY, draws=2, **how).read(artifacts)["stability_loss"].to_numpy()

    before, held = losses(pretrain=FIRST), losses(pretrain=HALF, statistics=FIRST)
    assert len({tuple(v) for v in (before, held, losses(pretrain=HALF))}) == 3
    np.testing.assert_array_equal(losses(pretrain=FIRST, statistics=FIRST), before)
    first, half = FIRST.encoder(artifacts), HALF.encoder(artifacts)
    mixed = copy_statistics(first, HALF.encoder(artifacts))
    assert torch.equal(statistics(mixed), statistics(first))
    assert torch.equal(weights(mixed), weights(half))
    with torch.no_grad():
        features = mixed(QUERY.load().pixels.float() / 255)
    found = Embed(pretrain=HALF, data=QUERY, statistics=FIRST).read(artifacts)
    torch.testing.assert_close(found, features)
    estimated = Embed(pretrain=HALF, data=QUERY, estimated=DATA).read(artifacts)
    assert not torch.equal(estimated, features)


def test_a_continued_training_starts_from_the_whole_learner(artifacts: Artifacts) -> None:
    """BYOL's target goes on, where it was kept."""
    kept = load_learner(artifacts.get(FIRST) / "encoder.safetensors")
    seen: dict[str, torch.Tensor] = {}
    torch.testing.assert_close(weights(FIRST.learner(artifacts)), weights(kept))

    def look(done: int, learner: nn.Module) -> None:
        seen["target"] = learner.target.backbone[1].weight.detach().clone()

    still = replace(FIRST.recipe, lr=1e-30, tau=1.0)
    pretrain(DATA.load(), still, **SIZES, epochs=1, start=kept, after_epoch=look)
    torch.testing.assert_close(seen["target"], kept.target.backbone[1].weight)
    pretrain(DATA.load(), still, **SIZES, epochs=1, start=kept.encoder, after_epoch=look)
    assert not torch.allclose(seen["target"], kept.target.backbone[1].weight)


def test_an_untrained_network_is_calibrated_and_can_be_scored(artifacts: Artifacts) -> None:
    raw = Pretrain(data=DATA, recipe=recipe("simclr", "short"), epochs=0, **SIZES)
    ready = raw.model_copy(update={"calibrated": True})
    assert torch.equal(weights(raw.encoder(artifacts)), weights(ready.encoder(artifacts)))
    want = estimate_statistics(raw.encoder(artifacts), DATA.load(), raw.recipe.view_a)
    assert torch.equal(statistics(want), statistics(ready.encoder(artifacts)))
    assert Influence(pretrain=ready, data=DATA).read(artifacts)["influence"].median() > 0
    plan = SeedCorrelation(n=48, width=1, snapshots=1)  # one untrained network for all methods
    fresh = {plan.untrained(plan.pretrain(method)).key for method in plan.methods}
    assert len(fresh) == 1 and plan.untrained(plan.pretrain(number=1)).key not in fresh
