"""The closed forms of linear encoders against automatic differentiation and retraining."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.functional import hessian, jacobian

import issl
from issl.audit.stats import linear_theory


def problem(
    seed: int = 0, n: int = 30, d: int = 5, k: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start, delta = (torch.randn(rows, d, generator=generator).double() for rows in (k, n))
    return start, delta


def objective(
    weight: torch.Tensor, start: torch.Tensor, delta: torch.Tensor, anchor: float, n: int
) -> torch.Tensor:
    return (delta @ weight.T).square().sum() / 2 / n + anchor / 2 * (weight - start).square().sum()


def test_the_fit_is_a_minimum_and_influence_is_what_autograd_says() -> None:
    start, delta = problem()
    weight = linear_theory.fit(start, delta, 0.1).requires_grad_()
    (slope,) = torch.autograd.grad(objective(weight, start, delta, 0.1, 30), weight)
    assert float(slope.abs().max()) < 1e-12
    bend = hessian(lambda w: objective(w, start, delta, 0.1, 30), weight).reshape(15, 15)
    want = []
    for row in delta:
        (g,) = torch.autograd.grad((weight @ row).square().sum() / 2, weight)
        want.append(g.flatten() @ torch.linalg.solve(bend, g.flatten()))
    got = linear_theory.influence(weight.detach(), delta, 0.1)
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-10, atol=0)
    with pytest.raises(issl.IsslError, match=r"anchor=0\.0: must be > 0"):
        linear_theory.fit(start, delta, 0.0)


def test_without_a_point_is_training_without_it() -> None:
    start, delta = problem(1)
    weight = linear_theory.fit(start, delta, 0.1)
    for out in ([0], [7], [29], list(range(0, 30, 2))):
        rest = delta[[i for i in range(30) if i not in out]]
        # the objective is a square, so one step of Newton's, by autograd, is its minimum
        at = (lambda w: objective(w, start, rest, 0.1, 30), torch.zeros_like(start))  # noqa: B023
        slope = jacobian(*at).flatten()
        bend = hessian(*at).reshape(len(slope), -1)
        retrained = -torch.linalg.solve(bend, slope).reshape(start.shape)
        by_formula = linear_theory.fit_without(weight, delta, 0.1, out)
        torch.testing.assert_close(by_formula, retrained, rtol=1e-7, atol=1e-9)
        by_steps = linear_theory.retrained(start, delta, 0.1, out)
        torch.testing.assert_close(by_steps, retrained, rtol=1e-7, atol=1e-9)
        # to 1e-6 of the change itself
        assert float((by_formula - retrained).norm() / (retrained - weight).norm()) < 1e-6


def test_influence_is_the_slope_of_the_loss_as_an_image_is_taken_out_of_the_mean() -> None:
    """d ℓ_q(W*(ε)) / dε at 0, where image i counts 1 − nε times: influence(i → q), by central
    differences."""
    start, delta = problem(4)
    weight, i, eps = linear_theory.fit(start, delta, 0.1), 5, 1e-6
    cross = linear_theory.cross_influence(weight, delta, delta, 0.1)
    own = linear_theory.influence(weight, delta, 0.1)
    torch.testing.assert_close(cross.diagonal(), own, rtol=1e-12, atol=0)
    losses = []
    for sign in (1, -1):
        counts = torch.ones(30, dtype=torch.float64)
        counts[i] -= sign * 30 * eps
        # an image that counts c times is the image scaled by √c
        w = linear_theory.fit(start, delta * counts.sqrt()[:, None], 0.1)
        losses.append((delta @ w.T).square().sum(1) / 2)
    slope = (losses[0] - losses[1]) / (2 * eps)
    torch.testing.assert_close(slope, cross[:, i], rtol=1e-6, atol=1e-8)


def test_the_library_agrees_where_its_curvature_is_the_hessian() -> None:
    """With one output that every δ moves by as much, the empirical Fisher is A without its anchor,
    which is damping."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (24, 3, 2, 2), generator=generator).to(torch.uint8)
    layers = torch.nn.Flatten(), torch.nn.Linear(12, 1, bias=False)
    net = torch.nn.Sequential(*layers).double().eval()
    shift = torch.randn(24, 3, 2, 2, generator=generator).double()
    weight = net[1].weight.detach()
    # each δ scaled so that |W δ_i| = 1: then ∇ℓ_i = ± δ_i, and the Fisher is mean δδᵀ
    shift = shift / (shift.flatten(1) @ weight.T).abs()[:, :, None, None]
    mean = float(shift.square().mean())
    got = issl.self_influence(
        net,
        pixels,
        lambda x, index: x + shift[index],
        issl.Exact(damping=0.3 / mean),  # so that λ is 0.3
        loss=lambda a, b: (a - b).square().sum(1) / 2,
    )
    want = linear_theory.influence(weight, shift.flatten(1), 0.3)
    np.testing.assert_allclose(got["influence"], want, rtol=1e-8)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 10), st.permutations(range(30)))
def test_laws(seed: int, scale: float, order: list[int]) -> None:
    start, delta = problem(seed)
    one = linear_theory.influence(start, delta, 0.1)
    torch.testing.assert_close(linear_theory.influence(start, delta[order], 0.1), one[order])
    # units: δ → s δ and a → s² a leave the leverage, and multiply the sensitivity by s²
    torch.testing.assert_close(
        linear_theory.influence(start, scale * delta, 0.1 * scale**2), scale**2 * one
    )
    assert bool((linear_theory.leverage(delta, 0.1) < 30).all())
