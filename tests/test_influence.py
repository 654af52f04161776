"""Scores against `issl.influence.reference`, the laws that they obey, memory, precision; encoders
that treat their weights in unusual ways."""

import copy
from collections.abc import Callable, Sequence
from functools import cache, partial
from threading import Event, Thread
from typing import Any

import nets
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from nets import BUILDS, make, pictures, projections, same_weights
from timm.layers import Conv2dSame, StdConv2d
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint

import issl
from issl import EKFAC, ClippedNoise, Computing, Diagonal, Exact, GaussianNoise, Identity, LoGra
from issl.files import REPOSITORY
from issl.influence import reference
from issl.influence.curvature import draw_images
from issl.influence.following import followed
from issl.influence.layers import find_layers, scored_layers
from issl.influence.losses import stability_loss
from issl.influence.scores import self_influence
from issl.keyed_random import uniform
from issl.pretraining.encoder import PIXEL_STD, Normalize

NOISE = GaussianNoise()
TRAINED = REPOSITORY / "released/encoders/cifar10-simclr-w16-1.safetensors"


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
    curvature: issl.Curvature,
    name: str,
    n: int,
    rtol: float = 1e-8,
    kept: dict[str, tuple[Tensor, Tensor]] | None = None,
    diagonal: bool = False,
) -> pd.DataFrame:
    """Self-influence at two dampings and cross-influence; `kept` as in `reference.project`."""
    net, images, query = make(name), pictures(n), pictures(5, seed=9)
    g, q = gradients(name, n)[1], gradients(name, 5, 9)[1]
    if kept is not None:
        g, q = (reference.project(some, kept) for some in (g, q))
    how = {"seed": 3, "computing": Computing(batch_size=32)}
    scores = self_influence(net, images, NOISE, curvature, **how, sweep=[2.0])
    for column, damping in (("influence", curvature.damping), ("influence@2", 2.0)):
        want = reference.self_influence(g, damping, diagonal)
        np.testing.assert_allclose(scores[column], want, rtol=rtol)
    want = reference.cross_influence(g, q, curvature.damping, diagonal)
    got = issl.cross_influence(net, images, query, NOISE, curvature, **how)
    atol = rtol / 10 * float(want.abs().max())
    torch.testing.assert_close(got, want, rtol=10 * rtol, atol=atol)
    return scores


# fewer rows than columns in every layer, and more than in some
@pytest.mark.parametrize("n", [9, 70])
@pytest.mark.parametrize("name", BUILDS)
def test_scores_equal_the_reference(name: str, n: int) -> None:
    """Of LoGra under the projections that it draws."""
    net, images = make(name), pictures(n)
    exact = equals_the_reference(Exact(), name, n)
    full = equals_the_reference(LoGra(rank=1000), name, n)
    equals_the_reference(Diagonal(0.3), name, n, 1e-9, diagonal=True)
    few = LoGra(rank=4, seed=5)
    equals_the_reference(few, name, n, kept=projections(few, scored_layers(net)))
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
    got = issl.cross_influence(net, images, pictures(5, seed=9), NOISE, Identity(), seed=3)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12 * float(want.abs().max()))


@pytest.mark.parametrize("name", ["stride", "batchnorm", "tokens"])
def test_ekfac_and_pca_equal_brute_force(name: str) -> None:
    moments = brute_moments(make(name), pictures(20), NOISE.keyed(3))
    rotations, leading = {}, {}
    for layer, (a, d) in moments.items():
        rotations[layer] = tuple(torch.linalg.eigh(m).eigenvectors.T for m in (d, a))
        leading[layer] = tuple(rows[-3:] for rows in rotations[layer])
    ekfac = equals_the_reference(EKFAC(), name, 20, 1e-7, rotations, diagonal=True)
    plain = self_influence(make(name), pictures(20), NOISE, Identity(), 3)
    np.testing.assert_allclose(ekfac["grad_norm"], plain["grad_norm"])
    pca = equals_the_reference(LoGra(3, projection="pca"), name, 20, 1e-7, leading)
    assert pca["grad_norm"].isna().all()
    equals_the_reference(LoGra(10_000, projection="pca"), name, 20, 1e-7)


@pytest.mark.parametrize("curvature", [LoGra(2), EKFAC(), Identity()], ids=repr)
@pytest.mark.parametrize("k", [4, 50])
def test_top_influences_are_the_highest(curvature, k: int, monkeypatch) -> None:
    monkeypatch.setattr("issl.influence.scorer.CHUNK", 7)
    net, images, query = make("stride"), pictures(40), pictures(9, seed=1).subset([3, 7])
    images = images.subset(range(39, -1, -1))  # an index is no position
    each = min(k, 40)
    highest, places = issl.cross_influence(net, images, query, NOISE, curvature).topk(each)
    top = issl.top_influences(net, images, query, k, NOISE, curvature)
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
def test_neither_batches_nor_memory_nor_order_change_a_score(curvature, monkeypatch) -> None:
    monkeypatch.setattr("issl.influence.scorer.CHUNK", 16)
    net, images = make("batchnorm"), pictures(40)
    base = self_influence(net, images, NOISE, curvature)["influence"]
    shuffled = images.subset(torch.randperm(40, generator=torch.Generator().manual_seed(0)))
    for some, size, way in ((images, 7, "ram"), (images, 64, "recomputed"), (shuffled, 13, "ram")):
        how = Computing(batch_size=size, memory=way)
        found = self_influence(net, some, NOISE, curvature, computing=how)
        assert found.attrs["memory"] == way and found["index"].tolist() == some.index.tolist()
        np.testing.assert_allclose(found.sort_values("index")["influence"], base, rtol=1e-8)
    for free, way in ((10**9, "ram"), (0, "recomputed")):
        monkeypatch.setattr("issl.influence.scorer.free_memory", lambda free=free: free)
        assert self_influence(net, images, NOISE, curvature).attrs["memory"] == way


def test_bf16_ranks_as_fp32_does() -> None:
    net, images = issl.load_encoder(TRAINED), issl.load("scenes", n=60)
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


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_scaling_the_features_scales_nothing(scale: float) -> None:
    """The cosine ignores the features' length, relative damping a layer's scale."""
    images, net = pictures(12), make("stride")
    a = self_influence(net, images)
    with torch.no_grad():
        for p in net[-1].parameters():
            p.mul_(scale)
    b = self_influence(net, images)
    np.testing.assert_allclose(a["influence"], b["influence"], rtol=1e-6)


def test_noise_belongs_to_seed_and_index() -> None:
    x, index = torch.zeros(4, 3, 5, 5), torch.tensor([3, 1, 8, 1_000_000])
    a = NOISE.keyed(0)(x, index)
    torch.testing.assert_close(a[[2, 0]], NOISE.keyed(0)(x[:2], index[[2, 0]]), rtol=0, atol=0)
    assert (a != NOISE.keyed(1)(x, index)).any(1).all()
    many = NOISE.keyed(7)(torch.zeros(400, 3, 16, 16), torch.arange(400))
    assert float(many.mean()) == pytest.approx(0.05, abs=0.002)
    assert float(many.std()) == pytest.approx(0.2, abs=0.002)
    # of normalised pixels: added after the normalisation
    x, index, normalise = pictures(4).pixels / 255, torch.arange(4), Normalize()
    noisy = GaussianNoise.of_normalised(PIXEL_STD, 0.05, 0.2).keyed(2)(x, index)
    wanted = GaussianNoise(0.05, 0.2).keyed(2)(normalise(x), index)
    torch.testing.assert_close(normalise(noisy), wanted, rtol=0, atol=1e-5)
    # clipped: as in an image file
    clipped = ClippedNoise.of_normalised(PIXEL_STD).keyed(2)(x, index)
    torch.testing.assert_close(clipped, noisy.clip(0, 1), rtol=0, atol=0)
    assert (clipped != noisy).any()


def test_the_encoder_is_left_as_it_was() -> None:
    net = make("batchnorm")
    net[0].weight.requires_grad_(False)
    net.register_forward_hook(lambda *_: None)  # so it is scored itself, and not a copy

    def state() -> tuple[list, list]:
        modules = [(m.training, len(m._forward_hooks)) for m in net.modules()]
        return modules, [(p.requires_grad, p.grad) for p in net.parameters()]

    before, weights = state(), copy.deepcopy(net)
    self_influence(net, pictures(5))
    with pytest.raises(issl.IsslError):
        self_influence(net, pictures(5), lambda x, index: x * float("nan"))
    assert state() == before
    same_weights(net, weights)


def test_images_for_moments_are_not_those_of_extreme_views() -> None:
    """Both are drawn by the index of an image under one seed, and must not be the same draw."""
    index = torch.arange(4000)
    chosen = draw_images(index, 100, seed=0)
    first = uniform(0, index[chosen], (1,))  # of a view: the area of its crop
    assert len(set(chosen.tolist())) == 100 and 0.35 < float(first.mean()) < 0.65


class Base(nn.Module):
    """9 patches as tokens of 8 numbers, and two layers; `plain`: so that autograd follows."""

    plain = False

    def __init__(self, how: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.p, self.f1, self.f2 = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 12), nn.Linear(12, 8)
        self.how = how

    def tokens(self, x: Tensor) -> Tensor:
        return self.p(x).flatten(2).mT

    def mlp(self, t: Tensor) -> Tensor:
        return t + self.f2(F.gelu(self.f1(t)))

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


def tokens_first(net: Base, x: Tensor) -> Tensor:
    """(T, B, C), as nn.Transformer has it by default."""
    return net.mlp(net.tokens(x).transpose(0, 1)).mean(0)


def by_function(net: Base, x: Tensor) -> Tensor:
    """A layer's weight is used by F.linear, too."""
    t = F.relu(net.f1(net.tokens(x)))
    again = F.linear(F.linear(t, net.f2.weight), net.f1.weight, bias=net.f1.bias)
    return net.f2(t + again).mean(1)


def in_place(net: Base, x: Tensor) -> Tensor:
    """What a layer has read is changed afterwards."""
    t = net.tokens(x).contiguous()
    y = net.f1(t.clone() if net.plain else t)  # autograd itself refuses the second
    t.mul_(2).add_(1)
    return net.f2(y).mean(1) + t.mean(1)


def checkpointed(net: Base, x: Tensor, reentrant: bool) -> Tensor:
    if net.plain:  # a reentrant one gives autograd.grad nothing
        return net.mlp(net.tokens(x)).mean(1)
    return checkpoint(net.mlp, net.tokens(x), use_reentrant=reentrant).mean(1)


def attention() -> nn.Module:
    """torch's own. Its first layer sees (T, B, C), the next (T · B, C), where the rows of one image
    are far apart, and the last two (B, T, C)."""
    layer = nn.TransformerEncoderLayer(9, 3, 12, batch_first=True)
    return nn.Sequential(nn.Conv2d(3, 9, 4, 4), nn.Flatten(2), layer, nn.Flatten())


def pads_itself() -> nn.Module:
    return nn.Sequential(Conv2dSame(3, 8, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(288, 8))


KINDS: dict[str, Callable[[], nn.Module]] = {
    **{how.__name__: partial(Base, how) for how in (tokens_first, by_function, in_place)},
    "attention": attention,
    "pads itself": pads_itself,
    "reentrant checkpoint": lambda: Base(partial(checkpointed, reentrant=True)),
    "checkpoint": lambda: Base(partial(checkpointed, reentrant=False)),
}


def brute(encoder: nn.Module, images: issl.Images, skip: Sequence = ()) -> tuple[Tensor, Tensor]:
    """LoGra's scores and squared gradient norms by plain autograd, one image at a time."""
    layers, _ = find_layers(encoder, skip)
    encoder.plain = True  # type: ignore[assignment]
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    weights, rows = [layer.weight for layer in layers.values()], []
    noise = issl.GaussianNoise().keyed(0)
    for i in range(len(images)):
        x, index = images.pixels[i : i + 1].double() / 255, images.index[i : i + 1]
        loss = reference.cosine_loss(encoder(x), encoder(noise(x, index))).squeeze()
        rows.append([g.flatten(1) for g in torch.autograd.grad(loss, weights)])
    gradients = {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(layers)}
    norms = torch.stack([g.square().sum((1, 2)) for g in gradients.values()]).sum(0)
    kept = reference.project(gradients, nets.projections(issl.LoGra(4), layers))
    return reference.self_influence(kept), norms


@pytest.mark.parametrize("batch", [3, 9])  # 9: as many as tokens
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_scored_as_autograd_says(kind: str, batch: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = KINDS[kind]().double().eval()
    images, how = nets.pictures(18), {"computing": issl.Computing(batch_size=batch)}
    found = issl.self_influence(encoder, images, curvature=issl.LoGra(4), **how)["influence"]
    norms = issl.self_influence(encoder, images, curvature=issl.Identity(), **how)["influence"]
    scores, squares = brute(encoder, images)
    np.testing.assert_allclose(found, scores, rtol=1e-5)
    np.testing.assert_allclose(norms, squares, rtol=1e-5)


class Refused(Base):
    """One fault of each kind, and two layers without any."""

    def __init__(self) -> None:
        super().__init__()
        self.s, self.frozen, self.head = StdConv2d(3, 8, 4, 4, 0), nn.Linear(8, 8), nn.Linear(8, 3)
        self.position, self.mixes = nn.Parameter(torch.rand(1, 9, 8)), nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        t = self.tokens(x) + self.position + self.s(x).flatten(2).mT
        with torch.no_grad():
            extra = self.frozen(t)
        constant = self.mixes(torch.ones(1, 1, dtype=x.dtype)).sum()
        t = self.f2(F.relu(self.f1(t + extra)))
        return (t + constant).mean(1) + t.mean(1) @ self.f2.weight @ self.f2.weight.mT


def test_all_that_cannot_be_scored_is_named_at_once_and_the_rest_is_scored() -> None:
    encoder, images = Refused().double().eval(), nets.pictures(6)
    encoder.tokens = lambda x: Base.tokens(encoder, x)  # type: ignore[method-assign]
    with pytest.raises(issl.IsslError, match="cannot be scored") as refused:
        issl.self_influence(encoder, images)
    faulty = ["position", "s", "frozen", "head", "mixes", "f2"]
    said = str(refused.value)
    assert all(f"{name} (" in said for name in faulty) and "6 of 8" in said
    skip = eval(said.split("skip=")[1].split("]")[0] + "]")
    assert sorted(skip) == sorted(faulty)
    found = issl.self_influence(encoder, images, curvature=issl.Identity(), skip=skip)
    np.testing.assert_allclose(found["influence"], brute(encoder, images, skip)[1], rtol=1e-5)


def test_two_threads_never_follow_at_once() -> None:
    """What is patched is the whole process's: who came second would leave it patched."""
    inside = Event()

    def second() -> None:
        with followed({}):
            inside.set()

    thread = Thread(target=second)
    with followed({}):
        thread.start()
        assert not inside.wait(0.1)
    thread.join()
    assert inside.is_set() and CheckpointFunction.apply.__name__ == "apply"  # torch's own again
