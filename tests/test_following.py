"""Encoders that treat their weights in unusual ways: scored as autograd says, or refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from threading import Event, Thread
from typing import Any

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, StdConv2d
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint

import issl
from issl.influence import reference
from issl.influence.following import followed
from issl.influence.layers import find_layers


class Base(nn.Module):
    """A picture's patches as 9 tokens of 8 numbers, and two layers, used as told; `plain`: in a
    way that autograd follows."""

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
