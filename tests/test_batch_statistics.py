"""BatchNorm's statistics apart from the weights: copied, estimated, and measured with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import issl
from issl.audit.cache import Artifacts
from issl.audit.plans_paper import SeedCorrelation
from issl.audit.settings import Data
from issl.audit.stages import Draw, Embed, Influence, Pretrain, Stability
from issl.data.views import View
from issl.pretraining.batchnorm import copy_statistics, estimate_statistics
from issl.pretraining.learner import load_learner
from issl.pretraining.loop import pretrain
from issl.pretraining.recipes import recipe

DATA = Data(name="scenes", n=48)
QUERY = Data(name="scenes", split="test", n=6)
SIZES = {"width": 1, "batch_size": 16}
FIRST = Pretrain(data=DATA, recipe=recipe("byol", "short"), **SIZES, epochs=2, snapshots=(1,))
LEFT_OUT = Draw(data=DATA, share=0.5)
HALF = Pretrain(
    **SIZES, data=DATA, recipe=FIRST.recipe, epochs=1, seed=7, start=FIRST, without=LEFT_OUT
)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return Artifacts(tmp_path_factory.mktemp("artifacts"))


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
    with pytest.raises(issl.IsslError, match="BatchNorm layers"):
        copy_statistics(nn.Sequential(nn.BatchNorm2d(3)), first)


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
    with pytest.raises(issl.IsslError, match="was never trained"):
        Influence(pretrain=raw, data=DATA).read(artifacts)
    assert Influence(pretrain=ready, data=DATA).read(artifacts)["influence"].median() > 0
    plan = SeedCorrelation(n=48, width=1, snapshots=1)  # one untrained network for all methods
    fresh = {plan.untrained(plan.pretrain(method)).key for method in plan.methods}
    assert len(fresh) == 1 and plan.untrained(plan.pretrain(number=1)).key not in fresh
