"""The laws of the loop: order, views and masks, resume, snapshots, divergence; and `issl
pretrain`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from nets import same_weights

import issl
from issl import cli
from issl.audit.cache import Artifacts
from issl.audit.settings import Data
from issl.audit.stages import Pretrain
from issl.pretraining.checkpoint import Checkpoint
from issl.pretraining.encoder import BasicBlock, load_encoder, read_encoder
from issl.pretraining.learner import Learner, load_learner
from issl.pretraining.loop import Course, Execution, _generator, epoch_order, pretrain
from issl.pretraining.recipes import recipe

SMALL = {"width": 2, "epochs": 2, "batch_size": 16, "execution": Execution(progress=False)}
SUPERVISED, BYOL, SIMCLR = (recipe(m, "short") for m in ("supervised", "byol", "simclr"))
# mean loss of each of two epochs, in fp32, as the released encoders were trained
NUMBERS = Path(__file__).parent / "goldens_pretraining.json"

# weight gradients of learners in single precision and in double (without oneDNN)
GRADIENTS = """
import copy, torch
from issl.pretraining.learner import Learner
from issl.pretraining.recipes import recipe
views = torch.rand(2, 32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
for width in (4, 8):
    single = Learner(recipe("simclr", "short"), width, None, 0)
    double, found = copy.deepcopy(single).double(), []
    for learner, x in ((single.for_training(), views), (double, views.double())):
        loss, _ = learner(*x, None, "fp32")
        found.append(torch.autograd.grad(loss, list(learner.encoder.parameters())))
    for ours, exact in zip(*found):
        atol = 1e-3 * float(exact.abs().max())
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=atol)
"""


@pytest.mark.parametrize("kind", json.loads(NUMBERS.read_text()))
def test_the_losses_are_those_of_the_released_encoders(kind: str) -> None:
    how = {**SMALL, "seed": 3, "execution": Execution(precision="fp32", progress=False)}
    encoder, history = pretrain(issl.load("scenes", n=64), recipe(*kind.split()), **how)
    assert history["lr"].iloc[-1] == 0 and not encoder.training
    want = json.loads(NUMBERS.read_text())[kind]
    np.testing.assert_allclose(history["loss"][0], want[0], rtol=5e-4)
    # another processor rounds differently, which a second epoch makes 1.2% of
    np.testing.assert_allclose(history["loss"][1], want[1], rtol=3e-2)


def test_every_seed_has_an_order_of_its_own() -> None:
    """torch reads 32 bits of a seed; 2,000 epochs of 2,048 seeds, of two kinds, fit into them."""
    seeds = [
        _generator(seed, epoch, what).initial_seed()
        for seed in (0, 1, 1024, 2047)
        for epoch in (0, 1, 1999)
        for what in (0, 1)
    ]
    assert len({seed % 2**32 for seed in seeds}) == len(seeds) == 24


def test_leaving_an_image_out_changes_nothing_else() -> None:
    """Order and views of the others are drawn over the whole set, whatever is left out."""
    images, how = issl.load("scenes", n=64), replace(BYOL, small=0.0)
    mask, runs = torch.arange(64) != 11, []
    for keep in (None, mask):
        course = Course(images, how, epochs=2, batch_size=2, seed=0, keep=keep)
        steps = [course.step(k) for k in range(course.steps)]
        runs.append([torch.cat([s.xa for s in steps]), torch.cat([s.xb for s in steps])])
    stays = [epoch_order(64, 0, epoch) != 11 for epoch in range(2)]
    for one, other in zip(*runs, strict=True):
        # 63 images make 31 batches of 2: in each epoch the last of them drops out
        epochs = zip(one.split(64), stays, strict=True)
        kept = torch.cat([views[stay][:62] for views, stay in epochs])
        assert torch.equal(other, kept) and len(other) == 124
    # with gaps no image moves to another batch; here there is one
    course = Course(images, how, epochs=2, batch_size=64, seed=0, keep=mask, gaps=True)
    for epoch, stay in enumerate(stays):
        assert torch.equal(course.step(epoch).rows, epoch_order(64, 0, epoch)[stay])


def test_numbers_returned_after_an_epoch_join_the_history_and_disturb_nothing() -> None:
    def after_epoch(done: int, learner: Learner) -> dict[str, float] | None:
        assert learner.training
        learner.eval()
        return None if done == 1 else {"number": done / 2}

    images, how = issl.load("scenes", n=64), {**SMALL, "epochs": 3}
    encoder, history = pretrain(images, BYOL, **how, after_epoch=after_epoch)
    np.testing.assert_array_equal(history["number"], [np.nan, 1.0, 1.5])
    plain, _ = pretrain(images, BYOL, **how)
    same_weights(encoder, plain)


def test_bad_settings() -> None:
    images, out = replace(issl.load("scenes", n=64), labels=None), torch.ones(64, dtype=torch.bool)
    out[epoch_order(64, 0, 0)[:16]] = False  # the whole of the first batch
    heavy = replace(BYOL, weight_decay=60.0, momentum=0.0)
    for how, arguments, named in [
        (SIMCLR, {"keep": out[:3]}, "keep has 3"),
        (SIMCLR, {"keep": out, "gaps": True}, "0 image of a batch is left"),
        (SUPERVISED, {}, "'scenes' have no labels"),
        (SIMCLR, {"seed": 2048}, "seed up to 2047"),
        (replace(SIMCLR, lr=1e20, warmup=0), {"epochs": 3}, "diverged in epoch"),
        (heavy, {"epochs": 30}, r"collapsed in epoch .*weight_decay=60.*tau=0.97"),
    ]:
        with pytest.raises(issl.IsslError, match=named):
            pretrain(images, how, **SMALL | arguments)


def test_snapshots_hold_the_whole_learner_in_half_precision(tmp_path: Path) -> None:
    data = Data(name="scenes", n=96)
    plain = Pretrain(data=data, recipe=BYOL, width=1, epochs=5, batch_size=32)
    artifacts, x = Artifacts(tmp_path), torch.rand(4, 3, 32, 32)
    want = plain.encoder(artifacts)(x)
    stage = plain.model_copy(update={"snapshots": (1, 3)})
    folder, features = artifacts.get(stage), []
    for name, epochs in {"encoder-0001": 1, "encoder-0003": 3, "encoder": 5}.items():
        header, tensors = read_encoder(folder / f"{name}.safetensors")
        assert header["config"] == stage.model_dump(mode="json")
        assert header.get("epochs_done", 5) == epochs
        parts = {"backbone", "projector", "predictor", "target"}
        assert {k.split(".")[0] for k in tensors} == parts
        assert all((v.dtype == torch.float16) == (v.ndim > 1) for v in tensors.values())
        features.append(load_encoder(folder / f"{name}.safetensors")(x))
    assert not torch.equal(features[0], features[1]) and not torch.equal(features[1], features[2])
    # the last one is the encoder that a run without snapshots leaves, up to half precision
    assert plain.key != stage.key
    torch.testing.assert_close(features[2], want, rtol=2e-3, atol=2e-3)


def test_a_checkpoint_serves_its_own_run_in_any_precision_and_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = issl.load("scenes", n=64)
    bf16, fp32 = (Execution(precision=p, progress=False) for p in ("bf16", "fp32"))
    how = {**SMALL, "checkpoint": Checkpoint(tmp_path / "c.safetensors", seconds=0.0)}
    one, _ = pretrain(images, **{**how, "execution": bf16})
    went_on, history = pretrain(images, **{**how, "execution": fp32})
    assert "bf16" in capsys.readouterr().err and len(history) == 2
    same_weights(one, went_on)  # no epoch was left
    with pytest.raises(issl.IsslError, match="seed differ"):
        pretrain(images, **how, seed=1)
    with pytest.raises(issl.IsslError, match="images differ"):
        pretrain(images.subset(range(63, -1, -1)), **how)


@pytest.mark.parametrize(("inside", "outside", "stride"), [(4, 4, 1), (4, 8, 2)])
def test_basic_block_equals_torchvisions(inside: int, outside: int, stride: int) -> None:
    from torchvision.models.resnet import BasicBlock as Theirs

    ours = BasicBlock(inside, outside, stride)
    theirs = Theirs(inside, outside, stride, ours.downsample)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, inside, 8, 8, generator=torch.Generator().manual_seed(0))
    for mode in (True, False):
        assert torch.equal(ours.train(mode)(x.clone()), theirs.train(mode)(x.clone()))


def test_an_encoder_with_its_history(tmp_path: Path) -> None:
    """`issl pretrain`."""
    out = tmp_path / "new" / "byol.safetensors"
    sizes = "--n 64 --width 2 --batch-size 16 --epochs 3"
    command = f"pretrain --data scenes --method byol --recipe short {sizes} --out".split()
    assert cli.main([*command, str(out)]) == 0
    assert sorted(p.name for p in out.parent.iterdir()) == ["byol.csv", "byol.safetensors"]
    assert len(pd.read_csv(out.with_suffix(".csv"))) == 3
    want, _ = pretrain(issl.load("scenes", n=64), BYOL, **{**SMALL, "epochs": 3})
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(issl.load_encoder(out)(x), want.backbone(x))
    assert torch.equal(issl.load_encoder(out, output="projector")(x), want(x))
    assert load_learner(out).recipe == BYOL


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_is_the_same() -> None:
    images, how = issl.load("scenes", n=64), {**SMALL, "epochs": 1, "batch_size": 32}
    losses = [
        pretrain(images, SIMCLR, **how | {"execution": Execution(precision="fp32", compiled=c)})[1]
        for c in ("off", "on")
    ]
    pd.testing.assert_series_equal(losses[0]["loss"], losses[1]["loss"], rtol=1e-3)


def test_gradients_are_right_on_a_processor_without_avx_512() -> None:
    """Most laptops have none: a narrow network crashed there."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", GRADIENTS], env=environment, check=True, timeout=600)
