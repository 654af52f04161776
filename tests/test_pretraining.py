"""Views against torchvision's operations, losses, LARS and the schedule against lightly's and their
formulas; the laws of the loop; `issl pretrain`."""

import copy
import itertools
import json
import math
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
import torchvision.transforms.v2.functional as TF
from nets import same_weights
from torch import Tensor, nn

import issl
from issl import cli
from issl.audit.cache import Artifacts
from issl.audit.settings import Data
from issl.audit.stages import Pretrain
from issl.audit.stats import objective_gradients
from issl.data import views
from issl.data.views import ON_CPU, VIEW_UNIFORMS, View, crop_boxes
from issl.influence.perturbation import Augmentation
from issl.pretraining.checkpoint import Checkpoint
from issl.pretraining.encoder import BasicBlock, load_encoder, read_encoder, save_encoder
from issl.pretraining.learner import Learner, load_learner, save_learner, spread
from issl.pretraining.loop import Course, Execution, _generator, epoch_order, pretrain
from issl.pretraining.methods import METHODS
from issl.pretraining.methods.base import Batch
from issl.pretraining.optimizer import LARS, groups, learning_rate
from issl.pretraining.recipes import NAMES, RECIPES, SSL, plain, recipe

CHAIN = replace(Augmentation("chain").view, solarize=0.3)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return issl.load("scenes", n=24).pixels.float() / 255


def uniforms(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, VIEW_UNIFORMS, generator=torch.Generator().manual_seed(seed))


def test_jitter_applies_each_order(x: torch.Tensor) -> None:
    factors = uniforms(len(x))[:, :4] * torch.tensor([1.6, 1.6, 1.6, 0.9])
    factors += torch.tensor([0.2, 0.2, 0.2, -0.45])
    jitters = ("brightness", "contrast", "saturation", "hue")  # as `order` numbers them
    orders = [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]]
    order, yes = torch.tensor(orders * 6), torch.arange(len(x)) % 3 > 0
    got = views.jitter(x, factors, order, yes)
    for k in range(len(x)):
        want = x[k]
        for which in order[k].tolist() if yes[k] else []:
            want = getattr(TF, f"adjust_{jitters[which]}")(want, float(factors[k, which]))
        # grey: 0.299 here, 0.2989 there
        torch.testing.assert_close(got[k], want, rtol=0, atol=2e-3 if yes[k] else 0)


def test_certain_operations_equal_torchvisions(x: torch.Tensor) -> None:
    for view, want in (
        (View(flip=1.0), TF.horizontal_flip(x)),
        (View(grayscale=1.0), TF.rgb_to_grayscale(x, 3)),
        (View(solarize=1.0), TF.solarize(x, 0.5)),
    ):
        torch.testing.assert_close(view(x, uniforms(len(x))), want, rtol=0, atol=1e-3)


def test_each_image_is_blurred_by_its_own_sigma(x: torch.Tensor) -> None:
    sigma, yes = torch.linspace(0.1, 2.0, len(x)), torch.arange(len(x)) % 4 > 0
    got = views.blur(x, sigma, yes)
    for k in range(len(x)):
        want = TF.gaussian_blur(x[k], [5, 5], [float(sigma[k])] * 2) if yes[k] else x[k]
        torch.testing.assert_close(got[k], want, rtol=0, atol=1e-5)


def test_crop_equals_torchvisions(x: torch.Tensor) -> None:
    mirror = torch.arange(len(x)) % 2 > 0
    for top, left, h, w in [(0, 0, 32, 32), (4, 6, 16, 20), (10, 2, 8, 30)]:
        box = torch.tensor([[(top + h / 2) / 32, (left + w / 2) / 32, h / 32, w / 32]])
        got = views.crop(x, box.expand(len(x), 4), mirror)[:, :, 4:-4, 4:-4]
        want = TF.resized_crop(x, top, left, h, w, [32, 32], antialias=False)
        want[mirror] = TF.horizontal_flip(want[mirror])
        # torchvision resizes the box alone, so it differs where weights reach over its edge
        torch.testing.assert_close(got, want[:, :, 4:-4, 4:-4], rtol=0, atol=1e-4)


def test_crop_boxes_lie_inside_and_have_their_area() -> None:
    cy, cx, h, w = crop_boxes(uniforms(4000)[:, :4], 0.2).unbind(1)
    for centre, size in ((cy, h), (cx, w)):
        assert float((centre - size / 2).min()) > -1e-6
        assert float((centre + size / 2).max()) < 1 + 1e-6
    area = h * w
    assert float(area.min()) > 0.19 and float(area.max()) <= 1 and 0.55 < float(area.mean()) < 0.62


@pytest.mark.parametrize(
    "view", [CHAIN, *{r.view_b for v in RECIPES.values() for r in v.values()}], ids=hash
)
def test_a_view_depends_on_its_own_numbers_alone(view: View) -> None:
    x = issl.load("scenes", n=ON_CPU + 9).pixels.float() / 255
    u = uniforms(len(x))
    together = view(x, u)
    for k in (0, 5, ON_CPU, len(x) - 1):
        alone = view(x[k : k + 1], u[k : k + 1])
        torch.testing.assert_close(together[k : k + 1], alone, rtol=0, atol=1e-6)
    assert float(together.min()) >= -1e-6 and float(together.max()) <= 1 + 1e-6
    assert not torch.equal(together, x)


def test_probabilities_are_kept() -> None:
    """Each operation happens as often as its setting says, and the off ones never."""
    x = issl.load("scenes", n=1).pixels.float().div(255).expand(400, 3, 32, 32).contiguous()
    u = uniforms(400, 1)
    assert torch.equal(View()(x, u), x)
    colours = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
    for name, more in {"flip": {}, "grayscale": {}, "solarize": {}, "jitter": colours}.items():
        changed = (View(**{name: 0.3}, **more)(x, u) != x).flatten(1).any(1).float().mean()
        assert 0.22 < float(changed) < 0.38, name


@pytest.mark.parametrize("kind", "crop flip jitter grayscale blur solarize chain".split())
def test_augmentations_as_perturbations(kind: str, x: torch.Tensor) -> None:
    index = torch.arange(100, 100 + len(x))
    strong, weak = (Augmentation(kind, s).keyed(7) for s in (1.0, 0.25))
    got = strong(x, index)
    assert torch.equal(got, strong(x, index))
    if kind not in ("flip", "grayscale", "solarize"):  # these leave nothing to chance
        assert not torch.equal(got, Augmentation(kind).keyed(8)(x, index))
    back = torch.arange(len(x)).flip(0)
    torch.testing.assert_close(strong(x[back], index[back])[back], got, rtol=0, atol=1e-6)
    size = [float((f(x, index) - x).square().mean()) for f in (weak, strong)]
    assert 0 < size[0] < size[1]


def test_a_smaller_view_is_the_same_crop_at_half_the_side(x: torch.Tensor) -> None:
    u, half = uniforms(len(x), 2), torch.nn.functional.avg_pool2d(x, 2)
    box, yes = crop_boxes(u[:, :4], 0.3), torch.arange(len(x)) > 9
    small = views.crop(x, box, yes, (16, 16))
    assert small.shape == View(flip=0.5)(x, u, (16, 16)).shape == (len(x), 3, 16, 16)
    # exactly half the side of the whole image is the mean of its 2 × 2 blocks
    whole, no = torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(len(x), 4), torch.zeros_like(yes)
    torch.testing.assert_close(views.crop(x, whole, no, (16, 16)), half)
    full = views.crop(x, box, yes)
    assert float((torch.nn.functional.avg_pool2d(full, 2) - small).abs().mean()) < 0.03


def rows(n: int = 24, d: int = 7, count: int = 2) -> tuple[Tensor, ...]:
    return torch.randn(count, n, d, generator=torch.Generator().manual_seed(0)).unbind()


@pytest.mark.parametrize("method", [*SSL, "vicreg"])
def test_losses_are_lightlys(method: str) -> None:
    from lightly import loss

    za, zb, ta, tb = rows(count=4)
    both, cosine = torch.cat([za, zb]), loss.NegativeCosineSimilarity()
    outputs, want = {
        "simclr": ((both,), loss.NTXentLoss(0.2)(za, zb)),
        "byol": ((both, torch.cat([ta, tb])), 4 + 2 * cosine(za, tb) + 2 * cosine(zb, ta)),
        "barlow_twins": ((both,), 0.1 * loss.BarlowTwinsLoss(0.0051)(za, zb)),
        "vicreg": ((both,), loss.VICRegLoss()(za, zb)),
    }[method]
    got = METHODS[method].loss(outputs, Batch(recipe(method)))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", [*SSL, "vicreg"])
def test_gradients_by_hand_are_those_of_the_losses(method: str) -> None:
    """Standard deviations lie on both sides of VICReg's hinge."""
    z = torch.cat(rows(12, 5)).double() * torch.tensor([0.2, 0.5, 1.0, 2.0, 3.0])
    short = recipe(method, "short")
    found = objective_gradients.by_hand(z, short).gradient
    torch.testing.assert_close(found, objective_gradients.gradient(z, short), rtol=1e-6, atol=1e-8)


def test_lars_is_lightlys() -> None:
    from lightly.utils.lars import LARS as Theirs

    found = []
    for kind, how in ((LARS, {"trust": 0.02}), (Theirs, {"trust_coefficient": 0.02})):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
        optimizer = kind(groups(model.append(nn.Linear(36, 5)), 1e-2), lr=0.5, momentum=0.9, **how)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(8, 3, 5, 5)).square().mean().backward()
            optimizer.step()
        found.append(list(model.parameters()))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_lars_by_hand_with_clip() -> None:
    """r = min(trust ‖p‖ / (‖g‖ + wd ‖p‖) / lr, 1) in a step; zero weights take a plain step."""
    weights = [torch.tensor(w) for w in ([[3.0, 4.0]], [[300.0, 400.0]], [[0.0, 0.0]], [1.0, 2.0])]
    slopes = [torch.tensor([[0.6, 0.8]])] * 3 + [torch.tensor([0.6, 0.8])]
    params = [nn.Parameter(w.clone()) for w in weights]
    for p, g in zip(params, slopes, strict=True):
        p.grad = g.clone()
    LARS(groups(nn.ParameterList(params), 0.1), lr=0.5, trust=0.02, clip=True).step()
    for k, (p, w, g) in enumerate(zip(params, weights, slopes, strict=True)):
        ratio = min(0.02 * float(w.norm()) / (1 + 0.1 * float(w.norm())) / 0.5, 1) if k < 2 else 1
        want = w - 0.5 * ratio * (g + (0.1 if k < 2 else 0) * w)
        torch.testing.assert_close(p.detach(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("warmup", [0, 10])
def test_schedule_is_lightlys(warmup: int) -> None:
    from lightly.utils.scheduler import CosineWarmupScheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=2.0)
    theirs = CosineWarmupScheduler(optimizer, warmup, 100, end_value=0.0)
    for k in range(100):
        want = pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-5, abs=1e-9)
        assert learning_rate(k, 100, warmup, 2.0) == want
        optimizer.step(), theirs.step()


def some_batch(method: str, n: int) -> tuple:
    """What a learner takes, at random."""
    xa, xb = torch.rand(2, n, 3, 32, 32, generator=torch.Generator().manual_seed(0)).unbind()
    return xa, None if method == "supervised" else xb, torch.arange(n) % 10, "fp32"


@pytest.mark.parametrize("method", NAMES)
def test_the_loss_of_a_learner_is_that_of_its_method(method: str) -> None:
    """Both views pass together; a supervised method sees one."""
    learner = Learner(recipe(method, "short"), 2, 10, 0).train()
    xa, xb, labels, _ = batch = some_batch(method, 8)
    apart = copy.deepcopy(learner)
    loss, features = learner(*batch)
    both = xa if xb is None else torch.cat([xa, xb])
    z = apart.encoder(both)
    outputs = (apart.predictor(z), apart.target(both)) if method == "byol" else (z,)
    want = METHODS[method].loss(outputs, Batch(learner.recipe, labels))
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    assert len(features) == len(both) and not features.requires_grad


def test_byols_target_follows_and_gets_no_gradient() -> None:
    learner = Learner(recipe("byol", "short"), 1, None, 0).train()
    learner(*some_batch("byol", 4))[0].backward()
    target = list(learner.target.parameters())
    start = [p.clone() for p in target]
    with torch.no_grad():
        for p in learner.encoder.parameters():
            p.add_(1)
    learner.follow(0.5)
    tau = 1 - (1 - learner.recipe.tau) * 0.5
    for p, was in zip(target, start, strict=True):
        torch.testing.assert_close(p.detach(), was + (1 - tau))
        assert p.grad is None and not p.requires_grad
    before = [p.clone() for p in target]
    learner.follow(1.0)  # τ = 1 at the end
    assert all(torch.equal(p, q) for p, q in zip(target, before, strict=True))


@pytest.mark.parametrize("method", NAMES)
def test_a_reloaded_learner_is_the_same_but_for_half_precision(method: str, tmp_path: Path) -> None:
    """Equal up to its rounding, 2^-11 of each weight."""
    how, path = recipe(method, "short"), tmp_path / "learner.safetensors"
    learner = Learner(how, 2, 10, 3).train()
    with torch.no_grad():
        # as after some training: target and encoder differ, BatchNorm has statistics
        for p in learner.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    learner(*some_batch(method, 16))
    save_learner(path, learner, {"config": {"recipe": plain(how)}})
    loaded = load_learner(path)
    assert loaded.recipe == how and loaded.training
    saved, state = loaded.state_dict(), learner.state_dict()
    assert saved.keys() == state.keys()
    for name, p in saved.items():
        rtol, atol = (2**-11, 2**-25) if p.ndim > 1 else (0, 0)
        torch.testing.assert_close(p, state[name], rtol=rtol, atol=atol)


def test_a_file_without_the_whole_learner_is_refused(tmp_path: Path) -> None:
    how, path = recipe("byol", "short"), tmp_path / "encoder.safetensors"
    save_encoder(path, Learner(how, 1, None, 0).encoder, {"recipe": plain(how)})
    with pytest.raises(issl.IsslError, match="predictor and target"):
        load_learner(path)


def test_spread_is_one_for_all_directions_and_zero_for_one() -> None:
    z = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    assert float(spread(z)) == pytest.approx(1, abs=0.02)
    assert float(spread(z[:1].expand(50, 16))) < 1e-6
    assert math.isnan(float(spread(z * torch.nan)))


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


@pytest.mark.parametrize(("kind", "want"), json.loads(NUMBERS.read_text()).items())
def test_the_losses_are_those_of_the_released_encoders(kind: str, want: list[float]) -> None:
    how = {**SMALL, "seed": 3, "execution": Execution(precision="fp32", progress=False)}
    encoder, history = pretrain(issl.load("scenes", n=64), recipe(*kind.split()), **how)
    assert history["lr"].iloc[-1] == 0 and not encoder.training
    np.testing.assert_allclose(history["loss"][0], want[0], rtol=5e-4)
    # another processor rounds differently, which a second epoch makes 1.2% of
    np.testing.assert_allclose(history["loss"][1], want[1], rtol=3e-2)


def test_every_seed_has_an_order_of_its_own() -> None:
    """torch reads 32 bits of a seed; 2,000 epochs of 2,048 seeds, of two kinds, fit into them."""
    each = itertools.product((0, 1, 1024, 2047), (0, 1, 1999), (0, 1))
    assert len({_generator(*one).initial_seed() % 2**32 for one in each}) == 24


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


def test_what_is_done_after_an_epoch_disturbs_nothing() -> None:
    def after_epoch(done: int, learner: Learner) -> None:
        assert learner.training
        learner.eval()

    images, how = issl.load("scenes", n=64), {**SMALL, "epochs": 3}
    encoder, _ = pretrain(images, BYOL, **how, after_epoch=after_epoch)
    plain, _ = pretrain(images, BYOL, **how)
    same_weights(encoder, plain)


def test_bad_settings() -> None:
    images, out = replace(issl.load("scenes", n=64), labels=None), torch.ones(64, dtype=torch.bool)
    out[epoch_order(64, 0, 0)[:16]] = False  # the whole of the first batch
    heavy = replace(BYOL, weight_decay=60.0, momentum=0.0)
    for how, arguments, named in [
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


def test_a_checkpoint_serves_its_own_run_in_any_precision_and_no_other(tmp_path, capsys) -> None:
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
