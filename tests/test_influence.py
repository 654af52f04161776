"""Scores against `issl.influence.reference`, the laws that they obey, memory, precision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import NETS, make, pictures, projections
from torch import Tensor, nn

import issl
from issl import (
    EKFAC,
    Augmentation,
    Computing,
    Curvature,
    Diagonal,
    Exact,
    GaussianNoise,
    Identity,
    LoGra,
    cross_influence,
    self_influence,
    top_influences,
)
from issl.influence import reference
from issl.influence.curvature import draw_images
from issl.influence.layers import scored_layers
from issl.influence.losses import stability_loss
from issl.keyed_random import uniform
from issl.pretraining.encoder import PIXEL_STD, Normalize, resnet18

NOISE = GaussianNoise()


def brute_moments(net: nn.Module, images, perturb) -> dict[str, list[Tensor]]:
    """Σ a aᵀ and Σ d dᵀ by torch's own unfold and a retained graph."""
    layers, seen = scored_layers(net), []

    def note(m: nn.Module, a: tuple[Tensor], out: Tensor) -> Tensor:
        out.retain_grad()
        seen.append((m, a[0].detach().clone(), out))
        return out.clone()  # what an in-place ReLU changes

    for m in layers.values():
        m.register_forward_hook(note)
    x = images.pixels.double() / 255
    stability_loss(net(x), net(perturb(x, images.index))).sum().backward()
    found = {m: [0.0, 0.0] for m in layers.values()}
    for m, a, out in seen:
        sides = a, out.grad
        if isinstance(m, nn.Conv2d):
            patches = nn.functional.unfold(a, m.kernel_size, m.dilation, m.padding, m.stride)
            sides = patches.mT, out.grad.flatten(2).mT
        for side, values in enumerate(sides):
            rows = values.flatten(0, -2)
            found[m][side] += rows.T @ rows
    return {name: found[m] for name, m in layers.items()}


@cache
def gradients(name: str, n: int, seed: int = 0) -> tuple[Tensor, reference.Gradients]:
    """Each image's loss, and its gradient in each layer, by the reference."""
    return reference.gradients(make(name), pictures(n, seed), NOISE.keyed(3))


def equals_the_reference(
    curvature: Curvature,
    name: str,
    n: int,
    damping: float,
    rtol: float = 1e-8,
    kept: dict[str, tuple[Tensor, Tensor]] | None = None,
    diagonal: bool = False,
) -> pd.DataFrame:
    """Asserts it of self- and cross-influence; `kept` as in `reference.project`."""
    net, images, query = make(name), pictures(n), pictures(5, seed=9)
    g, q = gradients(name, n)[1], gradients(name, 5, 9)[1]
    if kept is not None:
        g, q = (reference.project(some, kept) for some in (g, q))
    how = {"seed": 3, "computing": Computing(batch_size=32)}
    scores = self_influence(net, images, NOISE, curvature, **how)
    want = reference.self_influence(g, damping, diagonal=diagonal)
    np.testing.assert_allclose(scores["influence"], want, rtol=rtol)
    want = reference.cross_influence(g, q, damping, diagonal=diagonal)
    got = cross_influence(net, images, query, NOISE, curvature, **how)
    atol = rtol / 10 * float(want.abs().max())
    torch.testing.assert_close(got, want, rtol=10 * rtol, atol=atol)
    return scores


# fewer rows than columns in every layer, and more than in some
@pytest.mark.parametrize("n", [9, 70])
@pytest.mark.parametrize("name", NETS)
def test_scores_equal_the_reference(name: str, n: int) -> None:
    """Of LoGra under the projections that it draws."""
    net, images = make(name), pictures(n)
    exact = equals_the_reference(Exact(0.1), name, n, 0.1)
    full = equals_the_reference(LoGra(rank=1000, damping=0.1), name, n, 0.1)
    equals_the_reference(Diagonal(0.3), name, n, 0.3, 1e-9, diagonal=True)
    few = LoGra(rank=4, damping=0.1, seed=5)
    equals_the_reference(few, name, n, 0.1, kept=projections(few, scored_layers(net)))
    (losses, g), (_, q) = gradients(name, n), gradients(name, 5, 9)
    squared = torch.stack([each.square().sum((1, 2)) for each in g.values()]).sum(0)
    plain = self_influence(net, images, NOISE, Identity(), 3)
    np.testing.assert_allclose(plain["influence"], squared, rtol=1e-9)
    for scores in (exact, full, plain):
        np.testing.assert_allclose(scores["grad_norm"], squared.sqrt(), rtol=1e-9)
    # the loop's own cancellation
    np.testing.assert_allclose(exact["stability_loss"], losses, rtol=1e-9, atol=1e-14)
    damping = {layer: 0.1 * float(each.square().mean()) for layer, each in g.items()}
    assert exact.attrs["damping"] == pytest.approx(damping, rel=1e-9)
    want = sum(q[layer].flatten(1) @ g[layer].flatten(1).T for layer in g)
    got = cross_influence(net, images, pictures(5, seed=9), NOISE, Identity(), seed=3)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12 * float(want.abs().max()))


@pytest.mark.parametrize("name", ["stride", "batchnorm", "tokens"])
def test_ekfac_and_pca_equal_brute_force(name: str) -> None:
    moments = brute_moments(make(name), pictures(20), NOISE.keyed(3))
    rotations, leading = {}, {}
    for layer, (a, d) in moments.items():
        rotations[layer] = tuple(torch.linalg.eigh(m).eigenvectors.T for m in (d, a))
        leading[layer] = tuple(rows[-3:] for rows in rotations[layer])
    ekfac = equals_the_reference(EKFAC(0.1), name, 20, 0.1, 1e-7, rotations, diagonal=True)
    plain = self_influence(make(name), pictures(20), NOISE, Identity(), 3)
    np.testing.assert_allclose(ekfac["grad_norm"], plain["grad_norm"])
    pca = equals_the_reference(LoGra(3, projection="pca"), name, 20, 0.1, 1e-7, leading)
    assert pca["grad_norm"].isna().all()
    equals_the_reference(LoGra(10_000, projection="pca"), name, 20, 0.1, 1e-7)


@pytest.mark.parametrize(
    "curvature", [Exact(), LoGra(3), Diagonal(), EKFAC()], ids=lambda c: type(c).__name__
)
def test_one_damping_rule(curvature) -> None:
    """λ is a fraction of the mean diagonal, in a curvature and in a sweep."""
    net, images = make("stride"), pictures(40)
    base = self_influence(net, images, NOISE, curvature, sweep=(0.01, 2.0))
    for value in (0.01, 2.0):
        alone = self_influence(net, images, NOISE, replace(curvature, damping=value))
        np.testing.assert_allclose(base[f"influence@{value:g}"], alone["influence"], rtol=1e-12)
        for layer, effective in alone.attrs["damping"].items():
            assert effective == pytest.approx(base.attrs["damping"][layer] * value / 0.1)


@pytest.mark.parametrize("curvature", [LoGra(2), EKFAC(), Identity()], ids=repr)
@pytest.mark.parametrize("k", [4, 50])
def test_top_influences_are_the_highest(
    curvature: Curvature, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("issl.influence.passes.CHUNK", 7)
    net, images, query = make("stride"), pictures(40), pictures(9, seed=1).subset([3, 7])
    images = images.subset(range(39, -1, -1))  # an index is no position
    each = min(k, 40)
    highest, places = cross_influence(net, images, query, NOISE, curvature).topk(each)
    top = top_influences(net, images, query, k, NOISE, curvature)
    np.testing.assert_allclose(top["influence"], highest.flatten())
    assert top["index"].tolist() == (39 - places.flatten()).tolist()
    assert top["query"].tolist() == [3] * each + [7] * each
    assert top["rank"].tolist() == [*range(1, each + 1)] * 2


def test_draws_and_another_loss() -> None:
    def squares(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().sum(1)

    net, images, k = make("batchnorm"), pictures(30), 5
    each = [reference.gradients(net, images, NOISE.keyed(3 + (d << 32)))[1] for d in range(k)]
    mean = {layer: torch.stack([e[layer] for e in each]).mean(0) for layer in each[0]}
    got = self_influence(net, images, NOISE, Exact(), seed=3, draws=k)
    np.testing.assert_allclose(got["influence"], reference.self_influence(mean, 0.1), rtol=1e-8)
    losses, g = reference.gradients(net, images, NOISE.keyed(0), squares)
    got = self_influence(net, images, NOISE, Exact(), loss=squares)
    np.testing.assert_allclose(got["influence"], reference.self_influence(g, 0.1), rtol=1e-6)
    np.testing.assert_allclose(got["loss"], losses, rtol=1e-9)
    assert "standard_error" not in got


def test_the_standard_error_is_the_spread_over_repeats() -> None:
    """Over whole measurements with other noise."""
    net, images, k = make("stride"), pictures(30), 12
    runs = [self_influence(net, images, NOISE, LoGra(2, 1.0), 100 * s, draws=k) for s in range(16)]
    spread = np.std([r["influence"] for r in runs], axis=0, ddof=1)
    promised = np.sqrt(np.mean([r["standard_error"] ** 2 for r in runs], axis=0))
    assert 0.6 < np.median(promised / spread) < 1.6  # H varies a little from run to run, too


@pytest.mark.parametrize("curvature", [LoGra(4), EKFAC(), Identity()], ids=repr)
def test_two_ways_to_remember_are_one_score(curvature, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("issl.influence.passes.CHUNK", 16)
    net, images, found = make("batchnorm"), pictures(40), []
    for way in ("ram", "recomputed"):
        how = Computing(batch_size=16, memory=way)
        found.append(self_influence(net, images, NOISE, curvature, computing=how))
        assert found[-1].attrs["memory"] == way
        np.testing.assert_allclose(found[-1]["influence"], found[0]["influence"], rtol=1e-6)
    for free, way in ((10**9, "ram"), (0, "recomputed")):
        monkeypatch.setattr("issl.influence.passes.free_memory", lambda free=free: free)
        assert self_influence(net, images, NOISE, curvature).attrs["memory"] == way


def test_bf16_ranks_as_fp32_does() -> None:
    net, images = resnet(), issl.load("scenes", n=60)
    exact, low = (
        self_influence(net, images, NOISE, computing=Computing(precision=p))["influence"]
        for p in ("fp32", "bf16")
    )
    assert not np.allclose(exact, low, rtol=1e-6) and exact.corr(low, method="spearman") > 0.95


def test_projected_norm_is_unbiased() -> None:
    net, images = make("batchnorm"), pictures(6)
    true = self_influence(net, images, NOISE, Identity())["grad_norm"] ** 2
    draws = [
        self_influence(net, images, NOISE, LoGra(3, seed=s))["grad_norm"] ** 2 for s in range(150)
    ]
    error = (np.mean(draws, axis=0) - true) / (np.std(draws, axis=0) / np.sqrt(150))
    assert np.abs(error).max() < 4.5


def resnet() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = resnet18(8).train()
        with torch.no_grad():
            for _ in range(10):
                net(torch.rand(32, 3, 32, 32))
    return net.eval()


@pytest.mark.parametrize("curvature", [LoGra(4), Identity()], ids=repr)
def test_batch_size_and_order_change_nothing(curvature: Curvature) -> None:
    net, images = resnet(), issl.load("scenes", n=30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    base, small, large, other = (
        self_influence(net, some, curvature=curvature, computing=Computing(batch_size=size))
        for some, size in ((images, 30), (images, 7), (images, 64), (images.subset(order), 13))
    )
    assert other["index"].tolist() == order.tolist()
    for found in (small, large, other.sort_values("index")):
        np.testing.assert_allclose(found["influence"], base["influence"], rtol=1e-5)


@settings(max_examples=10, deadline=None)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 2**20))
def test_scaling_the_features_scales_nothing(scale: float, seed: int) -> None:
    """The cosine ignores the features' length, relative damping a layer's scale."""
    images, net = pictures(12), make("stride")
    a = self_influence(net, images, seed=seed)
    with torch.no_grad():
        for p in net[-1].parameters():
            p.mul_(scale)
    b = self_influence(net, images, seed=seed)
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


def test_the_encoder_is_left_as_it_was() -> None:
    net = make("batchnorm")
    net[0].weight.requires_grad_(False)
    net.register_forward_hook(lambda *_: None)  # so it is scored itself, and not a copy
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


BAD_SETTINGS: dict[str, Callable[[], object]] = {
    "rank": lambda: LoGra(1.5),
    "projection": lambda: LoGra(projection="svd"),
    "damping": lambda: Exact(float("nan")),
    "seed": lambda: LoGra(seed=-1),
    "fit": lambda: EKFAC(fit=2.5),
    "std": lambda: GaussianNoise(0.0, (1.0, -1.0, 1.0)),
    "mean": lambda: GaussianNoise((0.1, 0.2)),
    "strength": lambda: Augmentation("crop", "1"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as without beartype
    with pytest.raises(issl.IsslError, match=f"{name}="):
        BAD_SETTINGS[name]()


def test_images_for_moments_are_not_those_of_extreme_views() -> None:
    """Both are drawn by the index of an image under one seed, and must not be the same draw."""
    index = torch.arange(4000)
    chosen = draw_images(index, 100, seed=0)
    first = uniform(0, index[chosen], (1,))  # of a view: the area of its crop
    assert len(set(chosen.tolist())) == 100 and 0.35 < float(first.mean()) < 0.65
