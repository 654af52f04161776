"""`issl explain` and `issl attribute`: their lists against the library's, a training's derivative
against central differences."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from nets import same_weights
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Tensor, nn

import issl
from issl import cli, through_training
from issl.audit.cache import Artifacts
from issl.audit.settings import Data
from issl.audit.stages import Pretrain
from issl.data import datasets
from issl.data.identity import SetIdentity
from issl.influence.scores import as_queries
from issl.measures import knn_margins, mean_of, stability_measures
from issl.pretraining.encoder import load_encoder, read_encoder, resnet18
from issl.pretraining.learner import Learner, save_learner
from issl.pretraining.loop import Execution, optimizer_of, pretrain, take
from issl.pretraining.methods import METHODS
from issl.pretraining.other_encoders import open_encoder
from issl.pretraining.recipes import Recipe, plain, recipe
from issl.pretraining.states import Run
from issl.through_training import agreement, influence_through_training, random_subsets, values_of

HOW = {"curvature": issl.LoGra(4), "draws": 4, "computing": issl.Computing(batch_size=64)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder trained on 64 scenes by the command line."""
    path = tmp_path_factory.mktemp("encoder") / "mine.safetensors"
    told = "pretrain --data scenes --n 64 --width 2 --epochs 1 --batch-size 32 --recipe short"
    assert cli.main([*told.split(), "--out", str(path)]) == 0
    return path


def run(encoder: Path, out: Path, image: str = "test:3", *more: str) -> int:
    shared = ["--encoder", str(encoder), "--data", "scenes", "--out", str(out / "why.png")]
    shared += ["--rank", "4", "--k", "5"]
    return cli.main(["explain", image, *shared, *more])


def test_the_lists_are_those_of_the_scores(trained: Path, tmp_path: Path, capsys) -> None:
    assert run(trained, tmp_path) == 0
    assert "test image 3 among 64 images of scenes" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "why.csv")
    encoder, images = load_encoder(trained), issl.load("scenes", n=64)
    query = issl.load("scenes", "test").subset([3])
    scores = issl.cross_influence(encoder, images, as_queries(query), **HOW)[0]
    with torch.no_grad():
        features = encoder(torch.cat([images.pixels, query.pixels]).float() / 255)
    features = torch.nn.functional.normalize(features, dim=1)
    near = (features[:-1] @ features[-1]).numpy()
    of = {name: part.set_index("rank") for name, part in table.groupby("list")}
    assert of["taught"]["index"].tolist() == scores.argsort(descending=True)[:5].tolist()
    assert of["opposed"]["index"].tolist() == scores.argsort()[:5].tolist()
    assert of["nearest"]["index"].tolist() == np.argsort(-near, kind="stable")[:5].tolist()
    np.testing.assert_allclose(of["taught"]["influence"], scores.topk(5)[0], rtol=1e-4)
    assert of["nearest"]["similarity_rank"].tolist() == [1, 2, 3, 4, 5]
    assert (tmp_path / "why.png").stat().st_size > 10_000
    for other in (["--data", "scenes-swapped"], ["--images", "32"]):  # it was trained on others
        assert run(trained, tmp_path, "test:3", *other) == 2
        assert f"not on {other[1]}" in capsys.readouterr().err


def test_a_file_says_which_part_it_saw_and_at_which_size(tmp_path: Path) -> None:
    path = tmp_path / "tested.safetensors"
    told = "pretrain --data scenes --split test --n 48 --width 1 --epochs 1 --batch-size 16"
    assert cli.main([*told.split(), "--recipe", "short", "--out", str(path)]) == 0
    assert run(path, tmp_path, "train:7") == 0
    own = pd.read_csv(tmp_path / "why.csv").query("list == 'itself'")["index"]
    assert own.tolist() == [int(issl.load("scenes", "test", n=48).index[7])]
    header, tensors = read_encoder(path)
    save_file(tensors, path, {"issl": json.dumps(header | {"size": 64})})
    assert open_encoder(str(path)).size == 64


def test_a_training_image_stands_by_itself(trained: Path, tmp_path: Path) -> None:
    assert run(trained, tmp_path, "train:7") == 0
    table = pd.read_csv(tmp_path / "why.csv")
    others, row = table[table["list"] != "itself"], table[table["list"] == "itself"].iloc[0]
    assert row["index"] == 7 and 7 not in others["index"].tolist()
    assert others["similarity_rank"].min() == 1 and others["influence_rank"].max() == 63
    assert row["similarity"] == pytest.approx(1)
    own = issl.self_influence(load_encoder(trained), issl.load("scenes", n=64), **HOW)
    assert row["influence"] == pytest.approx(own["influence"][7], rel=1e-3)


def test_a_photo_is_fitted_only_where_asked_for(trained, photos, tmp_path: Path, capsys) -> None:
    photo = str(photos / "a/00.jpg")
    assert run(trained, tmp_path, photo) == 2
    said = capsys.readouterr().err
    assert "00.jpg is 40 × 30 px" in said and "--fit" in said
    assert run(trained, tmp_path, photo, "--fit") == 0


def test_a_stages_encoder_and_images_that_changed(tmp_path: Path, capsys, monkeypatch) -> None:
    stage = Pretrain(data=Data(name="scenes", n=40), width=1, epochs=1, batch_size=20)
    encoder = Artifacts(tmp_path).get(stage) / "encoder.safetensors"
    assert run(encoder, tmp_path) == 0
    assert "among 40 images of scenes" in capsys.readouterr().out
    monkeypatch.setattr(datasets, "identity", lambda *_: SetIdentity("another", "scenes"))
    assert run(encoder, tmp_path) == 2
    assert "other images of scenes" in capsys.readouterr().err


N, BATCH = 12, 6
SMALL = {"epochs": 2, "batch_size": BATCH, "seed": 3}
QUIET = Execution(precision="fp32", progress=False)


def drawn(split: str, n: int) -> issl.Images:
    found = issl.load("scenes", split, n=n)
    return replace(found, pixels=found.tensor()[:, :, 8:24, 8:24], masks=None)


IMAGES, QUERY = drawn("train", N), drawn("test", 3)


def how(method: str, optimizer: str = "sgd") -> Recipe:
    """A recipe under which a few steps move the weights."""
    rate = {"sgd": 0.5, "lars": 3.0}[optimizer]
    return replace(recipe(method, "short"), optimizer=optimizer, lr=rate, small=0.0, trust=0.02)


def network(whole: bool = False) -> nn.Module:
    """A smooth backbone, which finite differences suit, or a whole ResNet."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if whole:
            return resnet18(1)
        return nn.Sequential(
            *(nn.Conv2d(3, 4, 3, 2, bias=False), nn.BatchNorm2d(4), nn.Tanh()),
            *(nn.Conv2d(4, 8, 3, 2), nn.BatchNorm2d(8), nn.Tanh()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )


def learner(how: Recipe, whole: bool = False) -> Learner:
    """In double precision, and smooth: its ReLUs are replaced."""
    made = Learner(how, 1, 10 if how.method == "supervised" else None, 0)
    made.encoder.backbone = network(whole)
    if how.method == "byol":
        made.target.backbone = copy.deepcopy(made.encoder.backbone).requires_grad_(False)
    for parent in list(made.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.Tanh())
    return made.double()


def trained_with(run: Run, weights: Tensor) -> Learner:
    """The project's own loop on weighted images."""
    course, made = run.course(), copy.deepcopy(run.start).train()
    optimizer = optimizer_of(made, run.batch_size)
    for number in range(course.steps):
        step = course.step(number)
        take(step, made, optimizer, "fp32", weights[step.rows])
    return made


CASES = [*((method, "sgd") for method in METHODS), ("simclr", "lars"), ("byol", "lars")]


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("method", "optimizer"), CASES)
def test_the_derivative_is_that_of_the_whole_training(method, optimizer, whole) -> None:
    """Of a small network, or of a whole ResNet: the central difference of trainings."""
    start = learner(how(method, optimizer), whole)
    found = influence_through_training(start, IMAGES, QUERY, **SMALL)

    def ends(i: int, weight: float) -> Tensor:
        """What is measured if image i has this weight."""
        weights = torch.ones(N, dtype=torch.float64)
        weights[i] = weight
        return values_of(trained_with(found.run, weights), found.measures)

    def difference(i: int, eps: float) -> Tensor:
        return (ends(i, 1 + eps) - ends(i, 1 - eps)) / (2 * eps)

    for i in [0, 5]:
        # of fourth order: the plain difference of a whole ResNet is off by up to 1e-5
        want = (4 * difference(i, 1e-6) - difference(i, 2e-6)) / 3
        error = (found.derivatives[:, i] - want).norm() / want.norm()
        assert error < 1e-6, (i, float(error))
    assert found.derivatives.abs().gt(0).all()  # every image counts
    # a weight of zero is the training without the image
    left_out = values_of(found.run.trained([4]), found.measures)
    torch.testing.assert_close(ends(4, 0), left_out, rtol=1e-8, atol=1e-12)
    assert not torch.allclose(found.value, left_out)


@pytest.mark.parametrize(("method", "optimizer"), [("simclr", "sgd"), ("byol", "lars")])
def test_the_training_is_pretrains(method: str, optimizer: str) -> None:
    recipe = replace(how(method, optimizer), lr=0.2, small=0.5)
    found = influence_through_training(3, IMAGES, QUERY, recipe, width=1, **SMALL)
    encoder, _ = pretrain(IMAGES, recipe, width=1, **SMALL, execution=QUIET)
    same_weights(encoder, found.learner.encoder)
    kept = torch.ones(N, dtype=torch.bool)
    kept[[1, 8]] = False
    without, _ = pretrain(IMAGES, recipe, width=1, **SMALL, keep=kept, gaps=True, execution=QUIET)
    same_weights(without, found.run.trained([1, 8]).encoder)


def test_kept_states_are_memory_or_files_or_computed_again_and_runs_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Learner(how("byol"), 1, None, 0)
    want = influence_through_training(start, IMAGES, QUERY, **SMALL)
    again = influence_through_training(start, IMAGES, QUERY, **SMALL, every=3)
    torch.testing.assert_close(again.derivatives, want.derivatives, rtol=0, atol=0)
    assert again.state_bytes == want.state_bytes // 2  # steps 0 and 3 of four

    save, saved = through_training.Back.save, []

    def interrupted(self: through_training.Back) -> None:
        save(self)
        saved.append(self.number)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(through_training, "SAVED", 0.0)
    monkeypatch.setattr(through_training.Back, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        influence_through_training(start, IMAGES, QUERY, **SMALL, folder=tmp_path)
    on_disk = influence_through_training(start, IMAGES, QUERY, **SMALL, folder=tmp_path)
    assert saved == [3, 2, 1, 0]
    torch.testing.assert_close(on_disk.derivatives, want.derivatives, rtol=0, atol=0)
    torch.testing.assert_close(on_disk.growth, want.growth)
    turned = replace(IMAGES, pixels=IMAGES.tensor().flip(3))
    for images, queries, changes, named in [
        (IMAGES, IMAGES.subset(range(2)), {}, "other measures"),
        (turned, QUERY, {}, "images differ"),
        (IMAGES, QUERY, {"seed": 4}, "seed differ"),
    ]:
        with pytest.raises(issl.IsslError, match=named):
            influence_through_training(start, images, queries, **SMALL | changes, folder=tmp_path)


def test_removals_are_trainings_and_small_ones_are_predicted() -> None:
    start = learner(replace(how("simclr"), lr=0.02))
    found = influence_through_training(start, IMAGES, QUERY, **SMALL)
    subsets = random_subsets(N, 0.1, 8)
    table = found.removals(subsets)
    measured = values_of(found.run.trained(subsets[2]), found.measures) - found.value
    of_third = table[table["subset"] == 2]
    np.testing.assert_array_equal(of_third["measured"], measured)
    np.testing.assert_allclose(of_third["predicted"], -found.derivatives[:, subsets[2][0]].numpy())
    said, queries = agreement(table).iloc[0], [q for _, q in table.groupby("query")]
    ranks = [stats.spearmanr(q["predicted"], q["measured"]).statistic for q in queries]
    assert said["lds"] == pytest.approx(np.mean(ranks)) and said["lds"] > 0.8
    (slope,) = np.linalg.lstsq(table[["predicted"]], table["measured"], rcond=None)[0]
    assert said["slope"] == pytest.approx(slope) and 0.5 < slope < 2


def test_a_mean_is_the_mean_and_a_vote_of_a_bank_is_by_hand() -> None:
    net = learner(how("simclr")).encoder.backbone.eval()
    each = stability_measures(QUERY, together=2)
    with torch.no_grad():
        values = torch.cat([measure(net) for measure in each])
        torch.testing.assert_close(mean_of(each)(net), values.mean()[None])
        bank = net(IMAGES.pixels.double() / 255)
        labels = torch.arange(N) % 2
        asked = replace(QUERY, labels=torch.tensor([0, 1, 1]))
        found = torch.cat([m(net) for m in knn_margins(asked, bank, labels, 0.5)])
        features = net(asked.pixels.double() / 255)
    cosines = nn.functional.cosine_similarity(features[:, None], bank[None], dim=2)
    votes = (cosines / 0.5).exp()
    shares = votes @ nn.functional.one_hot(labels).double() / votes.sum(1, keepdim=True)
    want = (shares[:, 0] - shares[:, 1]) * torch.tensor([1, -1, -1])
    torch.testing.assert_close(found, want)
    with pytest.raises(issl.IsslError, match="classes"):
        knn_margins(replace(QUERY, labels=torch.tensor([0, 1, 2])), bank, labels)


def test_a_learner_in_a_file_and_a_training_that_diverges(tmp_path: Path) -> None:
    file, other = tmp_path / "learner.safetensors", Learner(how("simclr"), 2, None, 0)
    save_learner(file, other, {}, half=False)
    by_file = influence_through_training(file, IMAGES, QUERY, how("simclr"), **SMALL)
    by_learner = influence_through_training(other, IMAGES, QUERY, **SMALL)
    torch.testing.assert_close(by_file.derivatives, by_learner.derivatives)
    with pytest.raises(issl.IsslError, match="diverged at step"):
        broken = replace(how("simclr"), lr=1e30)
        influence_through_training(0, IMAGES, QUERY, broken, width=1, **SMALL)


def test_the_command_lists_what_the_library_finds(tmp_path: Path, capsys) -> None:
    """And says whether it predicts."""
    byol, file, out = recipe("byol", "short"), tmp_path / "e.safetensors", tmp_path / "a.csv"
    start = Learner(byol, 1, None, 0)
    save_learner(file, start, {"recipe": plain(byol)}, half=False)
    given = "attribute --images scenes --n 12 --queries scenes --asked 2 --batch-size 6".split()
    given += ["--k", "3", "--check", "3", "--encoder", str(file), "--device", "cpu"]
    assert cli.main([*given, "--out", str(out)]) == 0
    assert "LDS" in capsys.readouterr().out
    images, queries = (issl.load("scenes", split).subset(range(12)) for split in ("train", "test"))
    again = replace(byol, optimizer="sgd", lr=0.05, small=1.0)
    want = influence_through_training(
        start, images, as_queries(queries.subset([0, 1])), again, epochs=1, batch_size=6
    ).derivatives
    found = load_file(out.with_suffix(".safetensors"))["derivatives"]
    np.testing.assert_allclose(found, want, rtol=1e-6)
    lists = pd.read_csv(out).groupby(["query", "list"])["index"].apply(list)
    for q in range(2):
        order = np.argsort(want[q].numpy()).tolist()
        assert lists[q, "helped"] == order[:3] and lists[q, "hurt"] == order[::-1][:3]
