"""Losses, LARS and the schedule against lightly's and against their formulas; the learner of each
method."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import issl
from issl.audit.stats import objective_gradients
from issl.devices import computes_bf16
from issl.pretraining.encoder import save_encoder
from issl.pretraining.learner import Learner, load_learner, save_learner, spread
from issl.pretraining.methods import METHODS
from issl.pretraining.methods.base import Batch
from issl.pretraining.optimizer import LARS, groups, learning_rate
from issl.pretraining.recipes import NAMES, SSL, Recipe, from_plain, plain, recipe


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
    """r = min(trust ‖p‖ / (‖g‖ + wd ‖p‖) / lr, 1): one step, against the formula; zero weights take
    a plain step."""
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
    for about, named in (({"recipe": plain(how)}, "predictor and target"), ({}, "give the recipe")):
        save_encoder(path, Learner(how, 1, None, 0).encoder, about)
        with pytest.raises(issl.IsslError, match=named):
            load_learner(path)


def test_spread_is_one_for_all_directions_and_zero_for_one() -> None:
    z = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    assert float(spread(z)) == pytest.approx(1, abs=0.02)
    assert float(spread(z[:1].expand(50, 16))) < 1e-6
    assert math.isnan(float(spread(z * torch.nan)))


def test_bad_names_and_numbers() -> None:
    how = recipe("byol", "short")
    for bad, named in [
        (lambda: recipe("moco"), "'moco'.*simclr, byol"),
        (lambda: Recipe(**vars(how) | {"tau": math.nan}), "tau=nan"),
        (lambda: Recipe(**vars(how) | {"optimizer": "adam"}), "'adam'"),
        (lambda: from_plain(plain(how) | {"typo": 1}), "typo"),
        (lambda: computes_bf16(torch.device("cpu"), "fp8"), "'fp8'"),
        (lambda: objective_gradients.by_hand(rows()[0], recipe("supervised", "short")), "simclr"),
    ]:
        with pytest.raises(issl.IsslError, match=named):
            bad()
