"""Training-aware influence against brute force: autograd of L_B − L_{B∖i}, a real step, a linear
case."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nets import pictures
from torch import Tensor, nn

import issl
from issl.pretraining.encoder import save_encoder
from issl.pretraining.learner import Learner
from issl.pretraining.recipes import SSL, plain, recipe
from issl.training_aware import (
    batch_gradient,
    batches,
    marginal_effects,
    margins,
    measuring_copy,
    query_gradients,
    training_influence,
    two_views,
)


def learner(method: str, seed: int = 0) -> Learner:
    """Some steps from its start, where BYOL's target differs from the encoder; double precision."""
    made = Learner(recipe(method, "short"), 1, None, seed).double().train()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        step = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            loss, _ = made(
                torch.rand(12, 3, 12, 12).double(), torch.rand(12, 3, 12, 12).double(), None, "fp32"
            )
            step.zero_grad()
            loss.backward()
            step.step()
            made.follow(0.3)
    return made


def flat(gradients) -> Tensor:
    return torch.cat([g.flatten() for g in gradients])


def views(n: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return tuple(
        torch.rand(n, 3, 12, 12, generator=generator, dtype=torch.float64) for _ in range(2)
    )


def brightness_of_features(images: issl.Images):
    x = images.pixels.double() / 255

    def measure(backbone: nn.Module) -> Tensor:
        return backbone(x).square().sum(1)

    return measure


@pytest.mark.parametrize("method", SSL)
def test_the_marginal_effect_is_the_gradient_of_the_difference_of_two_losses(method: str) -> None:
    model, (xa, xb) = measuring_copy(learner(method)), views()
    weights = list(model.encoder.backbone.parameters())
    found = [flat(g) for g in marginal_effects(model, xa, xb)]
    for i in range(len(xa)):
        rows = [k for k in range(len(xa)) if k != i]
        difference = model(xa, xb, None, "fp32")[0] - model(xa[rows], xb[rows], None, "fp32")[0]
        want = flat(torch.autograd.grad(difference, weights))
        assert float((found[i] - want).norm() / want.norm()) < 1e-10


@pytest.mark.parametrize("method", SSL)
def test_a_step_with_the_image_and_one_without_it_differ_by_the_influence(method: str) -> None:
    trained, train, query = learner(method), pictures(6), pictures(3, seed=1)
    measure, rate = brightness_of_features(query), 1e-5
    found = rate * training_influence(trained, train, measure, batch_size=6)
    model = measuring_copy(trained)
    (rows,) = batches(train, 6, 0, 0)
    xa, xb = two_views(model, train, rows, 0, 0, None)

    def after_a_step(chosen: list[int]) -> Tensor:
        stepped = measuring_copy(trained)
        slope = flat(batch_gradient(stepped, xa[chosen].double(), xb[chosen].double()))
        nn.utils.vector_to_parameters(
            nn.utils.parameters_to_vector(stepped.encoder.backbone.parameters()) - rate * slope,
            stepped.encoder.backbone.parameters(),
        )
        with torch.no_grad():
            return measure(stepped.encoder.backbone.eval())

    whole = after_a_step(list(range(6)))
    for place, image in enumerate(rows.tolist()):
        without = after_a_step([k for k in range(6) if k != place])
        torch.testing.assert_close(
            found[:, image], without - whole, rtol=2e-2, atol=1e-3 * float(found.abs().max())
        )


def test_the_linear_case_is_the_closed_form() -> None:
    """f(x) = Wx, L_B = mean ‖W(a − b)‖²/2: ∇L_B = W C_B with C_B the views' second moment, τ_i = W
    (C_B − C_{B∖i})."""

    class Aligned(Learner):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.encoder = SimpleNamespace(
                backbone=nn.Sequential(nn.Flatten(), nn.Linear(27, 4, bias=False)).double()
            )

        def forward(
            self, xa: Tensor, xb: Tensor, labels: None, precision: str
        ) -> tuple[Tensor, Tensor]:
            a, b = (self.encoder.backbone(x) for x in (xa, xb))
            return (a - b).square().sum(1).mean() / 2, a

    model = Aligned()
    generator = torch.Generator().manual_seed(0)
    xa, xb = (torch.rand(5, 3, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    d, w = (xa - xb).flatten(1), model.encoder.backbone[1].weight.detach()
    for i, effect in enumerate(marginal_effects(model, xa, xb)):
        rest = torch.cat([d[:i], d[i + 1 :]])
        want = w @ (d.T @ d / 5 - rest.T @ rest / 4)
        torch.testing.assert_close(flat(effect), want.flatten(), rtol=1e-10, atol=1e-14)

    def measure(backbone: nn.Module) -> Tensor:
        return backbone(xa[:2]).sum(1)

    # it is linear in W, so a step of any size changes it by what its gradient says
    (asked,) = query_gradients(model.encoder.backbone, measure)
    slope = asked.flatten(1) @ flat(batch_gradient(model, xa, xb))
    before = measure(model.encoder.backbone)
    with torch.no_grad():
        model.encoder.backbone[1].weight -= 0.1 * (w @ (d.T @ d / 5))
    torch.testing.assert_close(
        before - measure(model.encoder.backbone), 0.1 * slope, rtol=1e-8, atol=1e-12
    )


def test_the_order_of_the_images_changes_nothing() -> None:
    trained, train = learner("simclr"), pictures(9)
    measure = brightness_of_features(pictures(2, seed=1))
    plain = training_influence(trained, train, measure, batch_size=4, view_draws=2)
    shuffled = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    other = training_influence(trained, train.subset(shuffled), measure, batch_size=4, view_draws=2)
    torch.testing.assert_close(other, plain[:, shuffled], rtol=1e-8, atol=1e-12)


def test_the_learner_is_left_as_it_was() -> None:
    first = learner("byol")
    before = {k: v.clone() for k, v in first.state_dict().items()}
    measure = brightness_of_features(pictures(2, seed=1))
    training_influence(first, pictures(6), measure, batch_size=6)
    assert first.training and all(torch.equal(v, before[k]) for k, v in first.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 2}, "batch_size=2: need 3 to 6"),
        ({"batch_size": 7}, "batch_size=7: need 3 to 6"),
    ],
)
def test_bad_settings_are_one_error(settings: dict, message: str) -> None:
    with pytest.raises(issl.IsslError, match=message):
        training_influence(
            learner("simclr"), pictures(6), brightness_of_features(pictures(2)), **settings
        )


def test_an_encoders_file_is_enough_where_it_says_how_it_was_trained(tmp_path: Path) -> None:
    trained, train, query = learner("barlow_twins").float(), pictures(6), pictures(3, seed=1)
    how = trained.recipe
    want = training_influence(trained, train, query, batch_size=6)
    assert want.shape == (3, 6)
    torch.testing.assert_close(
        training_influence(trained.encoder, train, query, how, batch_size=6), want
    )
    save_encoder(tmp_path / "a.safetensors", trained.encoder, {"recipe": plain(how)})
    torch.testing.assert_close(
        training_influence(tmp_path / "a.safetensors", train, query, batch_size=6), want
    )
    save_encoder(tmp_path / "b.safetensors", trained.encoder, {})
    torch.testing.assert_close(
        training_influence(str(tmp_path / "b.safetensors"), train, query, how, batch_size=6), want
    )
    with pytest.raises(issl.IsslError, match="does not say how it was trained"):
        training_influence(tmp_path / "b.safetensors", train, query)
    byol = learner("byol").float()
    save_encoder(tmp_path / "c.safetensors", byol.encoder, {"recipe": plain(byol.recipe)})
    with pytest.raises(issl.IsslError, match="predictor and target are not in it"):
        training_influence(tmp_path / "c.safetensors", train, query)
    with pytest.raises(issl.IsslError, match="lacks its predictor"):
        training_influence(byol.encoder, train, query, byol.recipe)


def test_the_margin_of_a_probe() -> None:
    query = replace(pictures(4), labels=torch.tensor([0, 1, 2, 0]))
    backbone = learner("simclr").float().encoder.backbone.eval()
    generator = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(3, 8, generator=generator), torch.randn(3, generator=generator)
    scores = backbone(query.pixels.float() / 255).detach() @ weight.T + bias
    for k, found in enumerate(margins(query, weight, bias)(backbone).detach()):
        own = int(query.labels[k])
        others = [float(scores[k, c] - scores[k, own]) for c in range(3) if c != own]
        assert float(found) == pytest.approx(max(others))
