"""The closed forms of linear encoders against automatic differentiation and retraining."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.functional import hessian

import issl
from issl.audit.stats import linear_theory


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """W₀ (3, 5) and δ (30, 5)."""
    generator = torch.Generator().manual_seed(seed)
    start, delta = (torch.randn(rows, 5, generator=generator).double() for rows in (3, 30))
    return start, delta


def test_the_fit_is_a_minimum_and_influence_is_what_autograd_says() -> None:
    start, delta = problem()
    weight = linear_theory.fit(start, delta, 0.1).requires_grad_()

    def objective(w: torch.Tensor) -> torch.Tensor:
        return (delta @ w.T).square().sum() / 2 / 30 + 0.1 / 2 * (w - start).square().sum()

    (slope,) = torch.autograd.grad(objective(weight), weight)
    assert float(slope.abs().max()) < 1e-12
    bend = hessian(objective, weight).reshape(15, 15)
    want = []
    for row in delta:
        (g,) = torch.autograd.grad((weight @ row).square().sum() / 2, weight)
        want.append(g.flatten() @ torch.linalg.solve(bend, g.flatten()))
    got = linear_theory.influence(weight.detach(), delta, 0.1)
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-10, atol=0)
    assert bool((linear_theory.leverage(delta, 0.1) < 30).all())
    with pytest.raises(issl.IsslError, match=r"anchor=0\.0"):
        linear_theory.fit(start, delta, 0.0)


@pytest.mark.parametrize("out", [[], [0], [29], list(range(0, 30, 2))])
def test_without_points_is_training_without_them(out: list[int]) -> None:
    """To 1e-6 of what it changes."""
    start, delta = problem(1)
    weight = linear_theory.fit(start, delta, 0.1)
    retrained = linear_theory.retrained(start, delta, 0.1, out)
    error = linear_theory.fit_without(weight, delta, 0.1, out) - retrained
    assert float(error.norm()) <= 1e-6 * float((retrained - weight).norm()) + 1e-9


def test_influence_is_the_slope_of_the_loss_as_an_image_is_taken_out_of_the_mean() -> None:
    """d ℓ_q(W*(ε)) / dε at 0, where image i counts 1 − nε times, by central differences."""
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
