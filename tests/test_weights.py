"""Weights of images in the loss of every method: none, ones, zeros, and the derivatives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from issl.pretraining.learner import Learner
from issl.pretraining.recipes import NAMES, recipe

B = 6
OFF = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)


def learner(method: str) -> Learner:
    """A small one in float64, after some noise: weights, momenta and statistics are of no special
    value."""
    made = Learner(recipe(method, "short"), 1, 3, 0).double().train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return made


def batch(method: str, rows: Tensor | slice = slice(None)) -> tuple:
    generator = torch.Generator().manual_seed(0)
    xa, xb = torch.rand(2, B, 3, 16, 16, generator=generator, dtype=torch.float64)
    labels = torch.arange(B) % 3
    return (xa[rows], None if method == "supervised" else xb[rows], labels[rows], "fp32")


def parts(made: Learner, arguments: tuple, weights: Tensor | None) -> dict[str, Tensor]:
    """The loss, every gradient, and every buffer after the step."""
    loss, _ = made(*arguments, weights=weights)
    loss.backward()
    found = {"loss": loss.detach()}
    found |= {k: p.grad for k, p in made.named_parameters() if p.grad is not None}
    return found | {k: v for k, v in made.named_buffers() if v.is_floating_point()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float) -> None:
    scale = max(float(v.abs().max()) for v in wanted.values())
    assert found.keys() == wanted.keys() and len(wanted) > 60
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=rtol * scale, msg=name)


@pytest.mark.parametrize("method", NAMES)
def test_ones_are_no_weights_and_an_image_of_weight_zero_is_not_there(method: str) -> None:
    made = learner(method)
    ones, other = torch.ones(B, dtype=torch.float64), batch(method)
    plain = parts(copy.deepcopy(made), batch(method), None)
    same(parts(copy.deepcopy(made), batch(method), ones), plain, 1e-9)
    without = parts(copy.deepcopy(made), batch(method, OFF.bool()), None)
    same(parts(copy.deepcopy(made), batch(method), OFF), without, 1e-9)
    other[0][2] = 0.9  # whatever it shows
    same(parts(made, other, OFF), without, 1e-9)
    assert all("forward" not in vars(module) for module in made.modules())


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("at", ["ones", "zero"])
def test_the_derivative_with_respect_to_weights(method: str, at: str) -> None:
    """Of the loss, of its gradient in a direction, and of a running variance: finite differences of
    four points."""
    made = learner(method)
    state = {**dict(made.named_parameters()), **dict(made.named_buffers())}
    generator = torch.Generator().manual_seed(2)
    trained = {k: p for k, p in made.named_parameters() if p.requires_grad}
    along = {k: torch.randn(p.shape, generator=generator).double() for k, p in trained.items()}
    v = torch.randn(B, generator=generator).double()

    def values(w: Tensor) -> list[Tensor]:
        given = dict(state)  # functional_call leaves new buffers in it
        loss, _ = functional_call(made, given, batch(method), {"weights": w})
        slopes = torch.autograd.grad(loss, list(trained.values()), create_graph=True)
        slope = sum((g * d).sum() for g, d in zip(slopes, along.values(), strict=True))
        return [loss, slope, given["encoder.backbone.2.running_var"].sum()]

    w = (torch.ones(B) if at == "ones" else OFF).double().requires_grad_()
    h = 1e-6
    shifted = {
        k: [u.detach() for u in values((w + k * h * v).detach().requires_grad_())]
        for k in (-2, -1, 1, 2)
    }
    for which, value in enumerate(values(w)):
        (got,) = torch.autograd.grad(value, w, retain_graph=True)
        a, b, c, d = (shifted[k][which] for k in (-2, -1, 1, 2))
        want = (a - 8 * b + 8 * c - d) / (12 * h)
        assert float(want.abs()) > 1e-9
        torch.testing.assert_close(got @ v, want, rtol=1e-5, atol=1e-7)
