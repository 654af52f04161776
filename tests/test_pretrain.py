"""The laws of the loop: order, views and masks, resume, the time budget, divergence, several
processes."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import pandas as pd
import pytest
import torch

import issl
from issl.audit.cache import Artifacts
from issl.audit.settings import Data
from issl.audit.stages import Pretrain
from issl.data.views import View
from issl.errors import OutOfTime
from issl.evaluate import embed, knn_hits, knn_watch
from issl.files import read_safetensors
from issl.pretraining.checkpoint import Checkpoint
from issl.pretraining.data_parallel import batchnorm_over_all, sum_gradients
from issl.pretraining.encoder import BasicBlock, Head, load_encoder, new_encoder, save_encoder
from issl.pretraining.learner import Learner, load_learner
from issl.pretraining.loop import Execution, epoch_order, epoch_uniforms, pretrain
from issl.pretraining.recipes import RECIPES, recipe
from issl.shards import Shards

SMALL = {"width": 2, "epochs": 2, "batch_size": 16, "execution": Execution(progress=False)}
METHODS = list(RECIPES["short"])
SUPERVISED, BYOL, SIMCLR = (recipe(m, "short") for m in ("supervised", "byol", "simclr"))


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method", ["simclr", "byol"])
def test_leaving_an_image_out_changes_nothing_else(method: str) -> None:
    """Order and views of the others are drawn over the whole set, whatever is left out: bit for
    bit."""
    images = issl.load("scenes", n=64)
    seen: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    @dataclass(frozen=True)
    class Spy(View):
        which: str = "a"

        def __call__(self, pixels, u, size=None):
            seen.append((self.which, pixels, u, super().__call__(pixels, u, size)))
            return seen[-1][-1]

    base = recipe(method, "short")
    spies = {k: Spy(**asdict(getattr(base, k)), which=k[-1]) for k in ("view_a", "view_b")}
    keep = torch.ones(64, dtype=torch.bool)
    keep[11] = False
    runs = []
    for mask in (None, keep):
        seen.clear()
        pretrain(
            images,
            base.model_copy(update={**spies, "small": 0.0}),
            **{**SMALL, "epochs": 2, "batch_size": 2},
            keep=mask,
        )
        runs.append(
            {
                w: [
                    torch.cat(part)
                    for part in zip(*(s[1:] for s in seen if s[0] == w), strict=True)
                ]
                for w in "ab"
            }
        )
    whole, without = runs
    for w in "ab":
        stays = torch.cat([epoch_order(64, 0, epoch) != 11 for epoch in range(2)])
        for one, other in zip(whole[w], without[w], strict=True):
            # 63 images make 31 batches of 2: in each epoch the last of them drops out
            kept = torch.cat(
                [part[stay][:62] for part, stay in zip(one.split(64), stays.split(64), strict=True)]
            )
            assert torch.equal(other, kept) and len(other) == 124


def test_with_gaps_the_other_batches_stay_as_they_were() -> None:
    images = issl.load("scenes", n=64)
    batches: list[list[int]] = []

    class Spy(View):
        def __call__(self, pixels, u, size=None):
            keys = [int(p.double().sum() * 1e6) for p in pixels]
            batches.append(keys)
            return super().__call__(pixels, u, size)

    base = recipe("simclr", "short")
    base = base.model_copy(update={"view_a": Spy(**asdict(base.view_a))})
    keep = torch.ones(64, dtype=torch.bool)
    keep[11] = False
    runs = []
    for mask in (None, keep):
        batches.clear()
        pretrain(images, base, **SMALL, keep=mask, gaps=True)
        runs.append([list(b) for b in batches])
    out = int((images.pixels[11].float() / 255).double().sum() * 1e6)
    assert len(runs[0]) == len(runs[1]) == 8
    assert runs[1] == [[k for k in batch if k != out] for batch in runs[0]]
    few = torch.ones(64, dtype=torch.bool)
    few[epoch_order(64, 0, 0)[:16]] = False  # the whole of the first batch
    with pytest.raises(issl.IsslError, match="0 image of a batch is left"):
        pretrain(images, base, **SMALL, keep=few, gaps=True)


def test_seeds_are_separate() -> None:
    """Other seeds of order or views: the same initial weights; the same seeds given by name: the
    same run."""
    images = issl.load("scenes", n=64)

    def weights(**seeds) -> torch.Tensor:
        encoder, _ = pretrain(images, recipe("simclr", "short"), **{**SMALL, "epochs": 1}, **seeds)
        return torch.cat([p.detach().flatten() for p in encoder.parameters()])

    base = weights(seed=3)
    assert torch.equal(base, weights(seed=3, order_seed=3, view_seed=3))
    others = [weights(seed=4), weights(seed=3, order_seed=4), weights(seed=3, view_seed=4)]
    assert all(not torch.equal(base, other) for other in others)
    start = [pretrain(images, **{**SMALL, "epochs": 0}, seed=3, order_seed=k)[0] for k in (3, 4)]
    assert torch.equal(start[0].backbone[1].weight, start[1].backbone[1].weight)


def test_seeds_and_epochs_differ() -> None:
    assert not torch.equal(epoch_order(50, 0, 0), epoch_order(50, 0, 1))
    assert not torch.equal(epoch_uniforms(5, 0, 0), epoch_uniforms(5, 1, 0))
    state = torch.random.get_rng_state()
    a, b = new_encoder(2, Head(), 0), new_encoder(2, Head(), 1)
    assert torch.equal(state, torch.random.get_rng_state())  # the global generator is left alone
    assert not torch.equal(a.backbone[1].weight, b.backbone[1].weight)


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss(method: str) -> None:
    settings = {**SMALL, "width": 4, "epochs": 6, "batch_size": 64}
    encoder, history = pretrain(issl.load("scenes", n=256), recipe(method, "short"), **settings)
    assert history["loss"].iloc[-1] < 0.98 * history["loss"].iloc[0]
    assert len(history) == 6 and (history["feature_std"] > 0.02).all() and not encoder.training
    assert history["lr"].iloc[-1] == 0 and history["lr"].max() <= recipe(method, "short").lr / 4


def test_numbers_returned_after_an_epoch_join_the_history() -> None:
    modes = []

    def after_epoch(done: int, learner: Learner) -> dict[str, float] | None:
        modes.append(learner.training)
        learner.eval()
        return None if done == 1 else {"number": done / 2}

    images = issl.load("scenes", n=64)
    encoder, history = pretrain(images, BYOL, **{**SMALL, "epochs": 3}, after_epoch=after_epoch)
    assert history["number"].tolist()[1:] == [1.0, 1.5] and np.isnan(history["number"][0])
    assert modes == [True, True, True]  # training continues in training mode, whatever the hook did
    plain, _ = pretrain(images, BYOL, **{**SMALL, "epochs": 3})
    same_weights(encoder, plain)


def test_knn_watch_measures_every_so_often_and_at_the_end() -> None:
    images, test = issl.load("scenes", n=64), issl.load("scenes", "test", n=32)
    watch = knn_watch(images, test, torch.device("cpu"), epochs=3, every=2)
    encoder, history = pretrain(images, SIMCLR, **{**SMALL, "epochs": 3}, after_epoch=watch)
    assert history["knn_accuracy"].notna().tolist() == [False, True, True]
    hits = knn_hits(
        embed(encoder.backbone, images),
        images.require_labels(),
        embed(encoder.backbone, test),
        test.require_labels(),
    )
    assert history["knn_accuracy"].iloc[-1] == hits.mean()


def test_encoder_files(tmp_path: Path) -> None:
    encoder, path = new_encoder(2, Head(hidden=8, out=4), 0).eval(), tmp_path / "e.safetensors"
    save_encoder(path, encoder, {"note": 1})
    x = torch.rand(3, 3, 32, 32)
    assert torch.equal(load_encoder(path)(x), encoder.backbone(x))
    assert torch.equal(load_encoder(path, output="projector")(x), encoder(x))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(issl.IsslError, match="damaged"):
        load_encoder(path)
    with pytest.raises(issl.IsslError, match="does not exist"):
        load_encoder(tmp_path / "none")


@pytest.mark.parametrize(
    ("how", "arguments", "message"),
    [
        (SIMCLR, {"batch_size": 65}, "batch_size=65: need 2 to 64"),
        (SIMCLR, {"width": 0}, "width=0"),
        (SIMCLR, {"keep": torch.ones(3, dtype=torch.bool)}, "keep has 3 entries for 64 images"),
        (
            SIMCLR.model_copy(update={"lr": 1e20, "warmup": 0}),
            {"epochs": 3},
            "diverged in epoch .*lower the",
        ),
        (
            BYOL.model_copy(update={"weight_decay": 60.0, "lr": 0.4, "momentum": 0.0}),
            {"epochs": 30},
            "collapsed in epoch .*lower weight_decay=60, or let the target follow more slowly",
        ),
    ],
)
def test_bad_settings(how, arguments: dict, message: str) -> None:
    with pytest.raises(issl.IsslError, match=message):
        pretrain(issl.load("scenes", n=64), how, **{**SMALL, **arguments})


def test_supervised_needs_labels() -> None:
    images = issl.load("scenes", n=64)
    unlabelled = issl.Images(images.pixels, None, images.attributes[["index"]], "photos")
    with pytest.raises(issl.IsslError, match="'photos' have no labels"):
        pretrain(unlabelled, SUPERVISED, **SMALL)


def test_the_time_budget_ends_with_a_checkpoint_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, path, settings = (
        issl.load("scenes", n=64),
        tmp_path / "c.safetensors",
        {**SMALL, "epochs": 4},
    )
    whole, _ = pretrain(images, BYOL, **settings)
    now = 0.0

    def monotonic() -> float:
        nonlocal now
        now += 0.01
        return now

    monkeypatch.setattr("issl.pretraining.loop.time", SimpleNamespace(monotonic=monotonic))
    with pytest.raises(
        OutOfTime, match="stopped after 0 of 4 epochs, the time budget is spent; the same command"
    ):
        pretrain(images, BYOL, **settings, checkpoint=Checkpoint(path, deadline=-1.0))

    def ten_seconds(done: int, learner: Learner) -> None:
        nonlocal now
        now += 10

    with pytest.raises(OutOfTime, match=r"stopped after 2 of 4 epochs"):  # a third would end at 30
        pretrain(
            images,
            BYOL,
            **settings,
            checkpoint=Checkpoint(path, deadline=25.0),
            after_epoch=ten_seconds,
        )
    resumed, history = pretrain(images, BYOL, **settings, checkpoint=Checkpoint(path))
    assert len(history) == 4
    same_weights(whole, resumed)
    with pytest.raises(OutOfTime, match="give a checkpoint file"):
        pretrain(images, BYOL, **SMALL, checkpoint=Checkpoint(deadline=-1.0))


KINDS = [
    ("simclr", "short"),
    ("byol", "published"),
    ("barlow_twins", "short"),
    ("supervised", "short"),
]


def gradients(method: str, variant: str, shards: Shards) -> list[np.ndarray]:
    """In double: the loss of 24 images on all processes, its gradient, and the BatchNorm statistics
    after."""
    torch.set_num_threads(1)
    learner = Learner(recipe(method, variant), 2, 10, 0).double().train()
    x = (
        torch.rand(2, 24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        .double()
        .chunk(shards.world, 1)[shards.rank]
    )
    labels = (torch.arange(24) % 10).chunk(shards.world)[shards.rank]
    with batchnorm_over_all(learner, shards):
        loss, _ = learner(x[0], None if method == "supervised" else x[1], labels, "fp32", shards)
        loss.backward()
    sum_gradients(learner, shards)
    grads = [p.grad for p in learner.parameters() if p.grad is not None]
    return [v.detach().double().numpy() for v in [loss, *grads, *learner.buffers()]]


def on(shards: Shards) -> dict[str, Execution]:
    return {"execution": Execution(precision="fp32", shards=shards, progress=False)}


def knn_accuracy(done: int, learner: Learner) -> dict[str, float] | None:
    few = issl.load("scenes", n=40)
    return knn_watch(few, few, torch.device("cpu"), epochs=2)(done, learner)


def epochs(method: str, variant: str, shards: Shards) -> list[np.ndarray]:
    """The losses of two epochs, and the weights after them."""
    torch.set_num_threads(1)
    encoder, history = pretrain(
        issl.load("scenes", n=48),
        recipe(method, variant),
        **{**SMALL, **on(shards)},
        after_epoch=knn_accuracy,
    )
    return [history["loss"].to_numpy(), *(v.float().numpy() for v in encoder.state_dict().values())]


@pytest.mark.parametrize(("method", "variant"), KINDS)
def test_two_processes_have_the_gradient_of_one(method: str, variant: str) -> None:
    alone = gradients(method, variant, Shards())
    scale = max(float(np.abs(g).max()) for g in alone)
    for got in forked.on_processes(2, partial(gradients, method, variant)):
        assert not isinstance(got, str), got
        assert len(got) == len(alone) > 60
        for a, b in zip(got, alone, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-10 * scale)


def test_two_processes_train_as_one() -> None:
    """In fp32 rounding grows from step to step, so the weights agree as vectors, to a hundredth."""
    alone = epochs("byol", "short", Shards())
    for got in forked.on_processes(2, partial(epochs, "byol", "short")):
        assert not isinstance(got, str), got
        np.testing.assert_allclose(got[0], alone[0], rtol=2e-3)
        a, b = (np.concatenate([v.ravel() for v in values[1:]]) for values in (got, alone))
        assert np.linalg.norm(a - b) < 1e-2 * np.linalg.norm(b)


def uneven(shards: Shards) -> None:
    pretrain(issl.load("scenes", n=64), **{**SMALL, "batch_size": 17, **on(shards)})


def test_a_batch_must_share_out() -> None:
    for got in forked.on_processes(2, uneven):
        assert "batch_size=17 on 2 processes: need a multiple of it" in got


STAGE = Pretrain(data=Data(name="scenes", n=256), recipe=BYOL, width=1, epochs=5, batch_size=32)


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    def make(root: str) -> Path:
        return Artifacts(tmp_path / root, checkpoint_seconds=0.0).get(STAGE)

    process = forked.context.Process(target=forked.make, args=(tmp_path / "killed", STAGE))
    process.start()
    deadline = time.monotonic() + 900
    while not (found := list((tmp_path / "killed").glob("pretrain/*.part/checkpoint.safetensors"))):
        assert time.monotonic() < deadline and process.is_alive(), "ended before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and found[0].exists()
    assert not list((tmp_path / "killed").glob("pretrain/*/manifest.json"))  # truly half way
    whole, resumed = make("whole"), make("killed")
    a, b = (read_safetensors(f / "encoder.safetensors", "encoder")[1] for f in (whole, resumed))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


SNAPSHOTS = STAGE.model_copy(update={"data": Data(name="scenes", n=96), "snapshots": (1, 3)})


@pytest.mark.parametrize("method", ["simclr", "byol"])
def test_snapshots_hold_the_whole_learner_in_half_precision(method: str, tmp_path: Path) -> None:
    stage = SNAPSHOTS.model_copy(update={"recipe": recipe(method, "short")})
    folder = Artifacts(tmp_path).get(stage)
    learners = ["encoder-0001.safetensors", "encoder-0003.safetensors", "encoder.safetensors"]
    assert sorted(p.name for p in folder.iterdir()) == [*learners, "history.csv", "manifest.json"]
    assert stage.key != stage.model_copy(update={"snapshots": None}).key
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = []
    for name in learners:
        header, tensors = read_safetensors(folder / name, "learner")
        kinds = {"backbone", "projector", *(("predictor", "target") if method == "byol" else ())}
        assert {k.split(".")[0] for k in tensors} == kinds
        assert all(v.dtype == (torch.float16 if v.ndim > 1 else v.dtype) for v in tensors.values())
        assert all(v.dtype != torch.float16 for v in tensors.values() if v.ndim <= 1)
        assert json.loads(header["issl"])["config"] == stage.model_dump(mode="json")
        features.append(load_encoder(folder / name)(x))
        torch.testing.assert_close(
            load_learner(folder / name).eval().encoder.backbone(x), features[-1]
        )
    assert (
        json.loads(read_safetensors(folder / learners[1], "learner")[0]["issl"])["epochs_done"] == 3
    )
    assert not torch.equal(features[0], features[1]) and not torch.equal(features[1], features[2])
    # the last one is the encoder that a run without snapshots leaves, up to half precision
    plain = stage.model_copy(update={"snapshots": None}).encoder(Artifacts(tmp_path))(x)
    torch.testing.assert_close(features[2], plain, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("epochs_done", [1, 2, 3, 5])
def test_snapshots_of_a_killed_and_resumed_run_are_the_same(
    epochs_done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the snapshot of an epoch, before its checkpoint."""
    whole = Artifacts(tmp_path / "whole").get(SNAPSHOTS)

    class Killed(BaseException):
        pass

    def save(
        self: Checkpoint, learner: Learner, optimizer: object, identity: object, history: list
    ) -> None:
        if len(history) == epochs_done:
            raise Killed
        original(self, learner, optimizer, identity, history)

    original = Checkpoint.save
    artifacts = Artifacts(tmp_path / "killed", checkpoint_seconds=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save)
        with pytest.raises(Killed):
            artifacts.get(SNAPSHOTS)
    resumed = artifacts.get(SNAPSHOTS)
    assert len(artifacts.computed) == 1
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (resumed / file.name).read_bytes()
    assert len(list(whole.glob("*.safetensors"))) == len(list(resumed.glob("*.safetensors"))) == 3
    names = ["epoch", "loss", "feature_std", "lr"]
    pd.testing.assert_frame_equal(
        *(pd.read_csv(f / "history.csv")[names] for f in (whole, resumed))
    )


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path, images = tmp_path / "c.safetensors", issl.load("scenes", n=64)
    pretrain(images, **SMALL, checkpoint=Checkpoint(path, seconds=0.0))
    with pytest.raises(issl.IsslError, match="belongs to another run: seed differ"):
        pretrain(images, **SMALL, checkpoint=Checkpoint(path), seed=1)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(issl.IsslError, match="is damaged"):
        pretrain(images, **SMALL, checkpoint=Checkpoint(path))


def test_basic_block_equals_torchvisions() -> None:
    from torchvision.models.resnet import BasicBlock as Theirs

    for inside, outside, stride in ((4, 4, 1), (4, 8, 2)):
        down = None
        if inside != outside:
            down = torch.nn.Sequential(
                torch.nn.Conv2d(inside, outside, 1, stride, bias=False),
                torch.nn.BatchNorm2d(outside),
            )
        theirs, ours = Theirs(inside, outside, stride, down), BasicBlock(inside, outside, stride)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(3, inside, 8, 8, generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            torch.testing.assert_close(ours(x.clone()), theirs(x.clone()), rtol=0, atol=0)
            ours.eval(), theirs.eval()
