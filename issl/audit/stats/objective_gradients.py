"""The matrix that each objective computes from a batch of projections, and its gradients.

Projections of b images are z (2b, p): the first views, then the second views. Let u = z / ‖z‖.
For each view, ẑ are the components standardised over the batch, z̄ the components minus their mean,
and s their standard deviations:

    SimCLR        P = softmax(U Uᵀ / t), without the diagonal
                  ∂L/∂U = ((P − Y) + (P − Y)ᵀ) U / 2bt
    BYOL          u_i · u_i'
                  ∂L/∂u_i = −2 u_i' / b
    Barlow Twins  C = ẑ_aᵀ ẑ_b / b, D = ∂L/∂C
                  ∂L/∂ẑ_a = ẑ_b Dᵀ / b, ∂L/∂ẑ_b = ẑ_a D / b
    VICReg        S = z̄ᵀ z̄ / (b − 1), of each view
                  ∂L/∂z = 2 α (z − z') / bp − β [s < 1] z̄ / 2ps(b − 1) + 4 γ z̄ S° / p(b − 1)

Y has a 1 at the other view of the same image, and ' denotes the other view. BYOL has no predictor
here, and its target no gradient. S° is S without its diagonal, and α, β, γ weight VICReg's terms.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize, softmax

from issl.data.images import Images
from issl.data.views import VIEW_UNIFORMS
from issl.errors import IsslError
from issl.influence.perturbation import GaussianNoise
from issl.keyed_random import uniform
from issl.measures import stability_measures
from issl.pretraining import recipes
from issl.pretraining.learner import Learner
from issl.pretraining.methods import method_named
from issl.pretraining.methods.base import Batch, Recipe
from issl.pretraining.methods.vicreg import COVARIANCE, INVARIANCE, VARIANCE

Projections = Float[Tensor, "v p"]  # v = 2b
WeightsGradient = Float[Tensor, " w"]  # of the backbone, in double precision
STABILITY = "stability"  # the name of the stability loss among the objectives


@dataclass(frozen=True)
class ByHand:
    """The formulas above applied to a batch: the matrix that an objective depends on (NaN where it
    ignores an entry), and its gradient with respect to the projections."""

    sees: Float[Tensor, "k k"]
    gradient: Projections


def loss(z: Projections, recipe: Recipe) -> Float[Tensor, ""]:
    """The objective of a recipe at these projections; a copy of them is BYOL's target."""
    return method_named(recipe.method).loss((z, z.detach()), Batch(recipe))


def gradient(z: Projections, recipe: Recipe) -> Projections:
    """∂L/∂z by automatic differentiation."""
    z = z.clone().requires_grad_()
    return torch.autograd.grad(loss(z, recipe), z)[0]


def simclr(z: Projections, recipe: Recipe) -> ByHand:
    units, b, t = normalize(z, dim=1), len(z) // 2, recipe.temperature
    picks = softmax((units @ units.T / t).fill_diagonal_(-torch.inf), dim=1)  # P
    apart = picks - torch.eye(2 * b, dtype=z.dtype).roll(b, 1)  # P − Y
    return ByHand(picks, _through_unit((apart + apart.T) @ units / (2 * b * t), z))


def byol(z: Projections, recipe: Recipe) -> ByHand:
    units, b = normalize(z, dim=1), len(z) // 2
    cosines = (units[:b] * units[b:]).sum(1)
    sees = torch.full((b, b), torch.nan, dtype=z.dtype).diagonal_scatter(cosines)
    return ByHand(sees, _through_unit(-2 / b * units.roll(b, 0), z))


def barlow_twins(z: Projections, recipe: Recipe) -> ByHand:
    views, b = z.chunk(2), len(z) // 2
    scales = [(v.var(0, correction=0) + 1e-5).rsqrt() for v in views]
    sa, sb = ((v - v.mean(0)) * s for v, s in zip(views, scales, strict=True))
    correlations = sa.T @ sb / b  # C
    identity = torch.eye(len(correlations), dtype=z.dtype)
    weights = torch.where(identity > 0, 1.0, recipe.off_diagonal)
    slope = 2 * recipe.scale * weights * (correlations - identity)  # D
    pulls = (sb @ slope.T / b, sa @ slope / b)
    back = [
        _through_standard(g, s, scale) for g, s, scale in zip(pulls, (sa, sb), scales, strict=True)
    ]
    return ByHand(correlations, torch.cat(back))


def vicreg(z: Projections, recipe: Recipe) -> ByHand:
    b, p = len(z) // 2, z.shape[1]
    apart = 2 * INVARIANCE * (z - z.roll(b, 0)) / (b * p)
    sees, pulls = [], []
    for view in z.chunk(2):
        centred = view - view.mean(0)
        covariances = centred.T @ centred / (b - 1)  # S
        std = (covariances.diagonal() + 1e-4).sqrt()
        varied = VARIANCE * (std < 1) * centred / (2 * p * std * (b - 1))
        others = covariances - covariances.diagonal().diag()
        sees.append(covariances)
        pulls.append(4 * COVARIANCE * centred @ others / (p * (b - 1)) - varied)
    return ByHand((sees[0] + sees[1]) / 2, apart + torch.cat(pulls))


_FORMULAS: dict[str, Callable[[Projections, Recipe], ByHand]] = {
    "simclr": simclr,
    "byol": byol,
    "barlow_twins": barlow_twins,
    "vicreg": vicreg,
}


def by_hand(z: Projections, recipe: Recipe) -> ByHand:
    """The formulas for a recipe's objective; raises IsslError for a method without formulas."""
    if recipe.method not in _FORMULAS:
        raise IsslError(
            f"method {recipe.method!r}: there is no formula for its gradient; choose among "
            f"{', '.join(_FORMULAS)}, or add it to issl.audit.stats.objective_gradients"
        )
    return _FORMULAS[recipe.method](z, recipe)


def _through_unit(g: Projections, z: Projections) -> Projections:
    """Back through u = z / ‖z‖: the part along u drops out."""
    unit = normalize(z, dim=1)
    return (g - (g * unit).sum(1, keepdim=True) * unit) / z.norm(dim=1, keepdim=True)


def _through_standard(
    g: Float[Tensor, "b p"], s: Float[Tensor, "b p"], scale: Float[Tensor, " p"]
) -> Float[Tensor, "b p"]:
    """Back through the standardised columns s = (z − mean) · scale."""
    return scale * (g - g.mean(0) - s * (g * s).mean(0))


def cosines(z: Projections) -> Float[Tensor, "b b"]:
    """Cosines of each image's first view (row) and each image's second view (column)."""
    za, zb = z.chunk(2)
    return cosine_similarity(za[:, None], zb[None], dim=2)


# --- the gradients of the weights ---


def weight_cosines(
    learner: Learner,
    losses: Sequence[str],
    images: Images,
    *,
    variant: recipes.Variant,
    batch_size: int,
    draws: int,
    seed: int,
    noise: GaussianNoise,
    noise_seed: int,
) -> pd.DataFrame:
    """Cosines between the gradients of losses with respect to the backbone's weights.

    Args:
        learner: Gives the weights, and the projections for objectives of other methods.
        losses: Names of methods, and STABILITY: the stability loss of the same images.
        variant: The variant of the other methods' recipes.
        draws: The number of batches.
        seed: Seed of the batches and views.

    Returns:
        Columns draw, loss, other, value. Two different losses are compared on one batch; a loss is
        compared with itself between this batch and the next draw's.
    """
    model, found = measuring_copy(learner), []
    for draw in range(draws):
        rows = some_batch(images, batch_size, seed, draw)
        views = two_views(model, images, rows, seed, draw)
        of_draw = {}
        for name in losses:
            if name == STABILITY:
                some = images.subset(rows)
                of_draw[name] = _stability_gradient(model, some, noise, noise_seed + draw)
            else:
                of_draw[name] = _batch_gradient(_as_objective(model, name, variant), *views)
        found.append(of_draw)
    return pd.DataFrame(
        [
            (k, a, b, float(cosine_similarity(one[a], (following if a == b else one)[b], dim=0)))
            for k, (one, following) in enumerate(zip(found, found[1:] + found[:1], strict=True))
            for a, b in itertools.product(losses, losses)
        ],
        columns=["draw", "loss", "other", "value"],
    )


def _as_objective(model: Learner, name: str, variant: recipes.Variant) -> Learner:
    """A learner with this objective at the weights of `model`; BYOL without a predictor."""
    if model.recipe.method == name:
        return model
    head = {field: getattr(model.recipe, field) for field in ("hidden", "out", "layers", "norm")}
    recipe = replace(recipes.recipe(name, variant), **head)
    found = Learner(recipe, model.encoder.width, None, 0, model.encoder)
    if name == "byol":
        found.predictor = torch.nn.Identity()
    return measuring_copy(found)


def _stability_gradient(
    model: Learner, images: Images, noise: GaussianNoise, seed: int
) -> WeightsGradient:
    """The gradient of the images' mean stability loss; BatchNorm uses its running statistics."""
    backbone = model.encoder.backbone.eval()
    losses = torch.cat([measure(backbone) for measure in stability_measures(images, noise, seed)])
    found = _flat(torch.autograd.grad(losses.mean(), list(backbone.parameters())))
    backbone.train()
    return found


def _batch_gradient(model: Learner, xa: Tensor, xb: Tensor) -> WeightsGradient:
    """The gradient of the training loss."""
    loss, _ = model(xa, xb, None, "fp32")
    return _flat(torch.autograd.grad(loss, list(model.encoder.backbone.parameters())))


def _flat(gradients: Sequence[Tensor]) -> WeightsGradient:
    return torch.cat([part.flatten() for part in gradients]).double()


def measuring_copy(learner: Learner) -> Learner:
    """A copy in train mode, so BatchNorm normalises by the batch; its running statistics stay
    unchanged."""
    model = copy.deepcopy(learner).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    return model


def some_batch(images: Images, batch_size: int, seed: int, draw: int) -> Int64[Tensor, " b"]:
    """Positions of a random batch. Each image's index gives it a random sort key, so the order of
    the set does not matter."""
    key = uniform(seed + (draw << 32), images.index, (1,)).squeeze(1)
    return torch.argsort(key, stable=True)[:batch_size]


def two_views(
    learner: Learner, images: Images, rows: Int64[Tensor, " b"], seed: int, draw: int
) -> tuple[Tensor, Tensor]:
    """The two views of each of these images in this draw, keyed by its index."""
    x = images.pixels[rows].float() / 255
    u = uniform(seed + (draw << 32) + (1 << 62), images.index[rows], (2, VIEW_UNIFORMS))
    return learner.recipe.view_a(x, u[:, 0]), learner.recipe.view_b(x, u[:, 1])
