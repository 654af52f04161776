"""Fast scores against `issl.influence.reference`, and the laws that a score obeys."""

from __future__ import annotations

import copy
from collections.abc import Callable

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import make, pictures
from torch import nn

import issl
from issl import (
    EKFAC,
    Augmentation,
    Computing,
    Exact,
    GaussianNoise,
    Identity,
    LoGra,
    self_influence,
)
from issl.pretraining.encoder import PIXEL_STD, Normalize, resnet18

NOISE = GaussianNoise()


def test_projected_norm_is_unbiased() -> None:
    net, images = make("batchnorm"), pictures(6)
    true = self_influence(net, images, NOISE, Identity())["grad_norm"] ** 2
    draws = [
        self_influence(net, images, NOISE, LoGra(3, seed=s))["grad_norm"] ** 2 for s in range(150)
    ]
    error = (np.mean(draws, axis=0) - true) / (np.std(draws, axis=0) / np.sqrt(150))
    assert np.abs(error).max() < 4.5


def resnet(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = resnet18(8).to(dtype).train()
        with torch.no_grad():
            for _ in range(10):
                net(torch.rand(32, 3, 32, 32, dtype=dtype))
    return net.eval()


@pytest.mark.parametrize("curvature", [LoGra(4), Identity()], ids=["logra", "identity"])
def test_batch_size_order_and_memory_change_nothing(curvature) -> None:
    net, images = resnet(), issl.load("scenes", n=30)

    def scores(images: issl.Images, **how: object) -> pd.DataFrame:
        return self_influence(net, images, curvature=curvature, computing=Computing(**how))

    base = scores(images, batch_size=30)["influence"].to_numpy()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    other = scores(images.subset(order), batch_size=13)
    assert other["index"].tolist() == order.tolist()
    np.testing.assert_allclose(other["influence"], base[order], rtol=1e-5)
    for how in ({"batch_size": 7}, {"batch_size": 64}, {"memory": "recomputed"}):
        np.testing.assert_allclose(scores(images, **how)["influence"], base, rtol=1e-5)


@settings(max_examples=10, deadline=None)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 2**20))
def test_scaling_the_features_scales_nothing(scale: float, seed: int) -> None:
    """The cosine ignores the length of the features; relative damping ignores the gradients'
    scale."""

    class Scaled(nn.Module):
        def __init__(self, net: nn.Module):
            super().__init__()
            self.net = net

        def forward(self, x):
            return scale * self.net(x)

    images = pictures(12)
    a = self_influence(make("stride"), images, seed=seed)
    b = self_influence(Scaled(make("stride")).eval(), images, seed=seed)
    np.testing.assert_allclose(a["influence"], b["influence"], rtol=1e-6)


def test_noise_belongs_to_seed_and_index() -> None:
    x, index = torch.zeros(4, 3, 5, 5), torch.tensor([3, 1, 8, 1_000_000])
    a = NOISE.keyed(0)(x, index)
    torch.testing.assert_close(a[[2, 0]], NOISE.keyed(0)(x[:2], index[[2, 0]]), rtol=0, atol=0)
    assert (a != NOISE.keyed(1)(x, index)).any(1).all()
    many = NOISE.keyed(7)(torch.zeros(400, 3, 16, 16), torch.arange(400))
    assert float(many.mean()) == pytest.approx(0.05, abs=0.002)
    assert float(many.std()) == pytest.approx(0.2, abs=0.002)


def test_noise_of_normalised_pixels_is_added_after_the_normalisation() -> None:
    x, index, normalise = pictures(4).pixels / 255, torch.arange(4), Normalize()
    noisy = GaussianNoise.of_normalised(PIXEL_STD, 0.05, 0.2).keyed(2)(x, index)
    wanted = GaussianNoise(0.05, 0.2).keyed(2)(normalise(x), index)
    torch.testing.assert_close(normalise(noisy), wanted, rtol=0, atol=1e-5)


def test_a_plain_callable_is_a_perturbation() -> None:
    net, images = make("stride"), pictures(8)
    by_object = self_influence(net, images, NOISE, seed=4)
    by_function = self_influence(net, images, NOISE.keyed(4))
    np.testing.assert_array_equal(by_object["influence"], by_function["influence"])
    still = self_influence(net, images, lambda x, index: x)
    assert (still[["influence", "stability_loss", "grad_norm"]].to_numpy() == 0).all()


def test_the_encoder_is_left_as_it_was() -> None:
    net = make("batchnorm")
    net[0].weight.requires_grad_(False)
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    before, flags = copy.deepcopy(net.state_dict()), [p.requires_grad for p in net.parameters()]
    hooks = [len(m._forward_hooks) + len(m._backward_hooks) for m in net.modules()]
    self_influence(net, pictures(5))
    with pytest.raises(issl.IsslError):
        self_influence(net, pictures(5), lambda x, index: x * float("nan"))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert flags == [p.requires_grad for p in net.parameters()]
    assert hooks == [len(m._forward_hooks) + len(m._backward_hooks) for m in net.modules()]
    assert not any(m.training for m in net.modules()) and all(
        p.grad is None for p in net.parameters()
    )


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("rank", lambda: LoGra(1.5)),
        ("projection", lambda: LoGra(projection="svd")),
        ("damping", lambda: Exact(float("nan"))),
        ("seed", lambda: LoGra(seed=-1)),
        ("fit", lambda: EKFAC(fit=2.5)),
        ("std", lambda: GaussianNoise(0.0, (1.0, -1.0, 1.0))),
        ("mean", lambda: GaussianNoise((0.1, 0.2))),
        ("strength", lambda: Augmentation("crop", "1")),
    ],
)
def test_bad_settings(
    name: str, build: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as without beartype
    with pytest.raises(issl.IsslError, match=f"{name}="):
        build()
