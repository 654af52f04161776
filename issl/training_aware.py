"""Training-aware influence: what training on an image does to a query, to first order.

The paper sets the query's gradient against the *stability* gradient of a training image, which no
SSL method descends (arXiv 2412.17170, §3). What a step of training does to a query depends on the
gradient that training follows. In a batch B, an image's marginal effect on that gradient is

    τ_i = ∇L_B − ∇L_{B∖i},

through every way in which it takes part: as anchor, positive and negative, through the
cross-correlation, and through the batch statistics of BatchNorm. One step of size η on B rather
than on B∖i changes the measure m_q of a query by −η ∇m_q · τ_i, so

    I(i → q) = ∇m_qᵀ E[τ_i]

(as in TracIn, Pruthi et al. 2020, arXiv 2002.08484, eq. 4, at one state). Positive: training on
image i lowers the query's measure. The mean is over batch mates and views. Gradients are those of
the backbone's weights, BatchNorm's own parameters included. It is one step's answer, and cheap; a
whole training's is `issl.influence_through_training`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from tqdm import tqdm

from issl.data.images import Images
from issl.data.views import VIEW_UNIFORMS
from issl.devices import full_precision
from issl.errors import IsslError
from issl.influence.passes import Computing
from issl.influence.perturbation import GaussianNoise, Perturb, Perturbation
from issl.influence.scorer import as_images
from issl.keyed_random import uniform
from issl.measures import Measure, like, stability_measures
from issl.pretraining.encoder import Encoder
from issl.pretraining.learner import Learner, as_learner
from issl.pretraining.recipes import Recipe

Trained = Learner | Encoder | str | Path
Gradients = list[Tensor]  # one for each weight of the backbone, in its shape
CHUNK = 8  # effects that are held whole at a time


def training_influence(
    encoder: Trained,
    train: Images | Tensor,
    query: Images | Tensor | Measure,
    recipe: Recipe | None = None,
    *,
    perturbation: Perturbation | Perturb = GaussianNoise(0.05, 0.2),
    seed: int = 0,
    draws: int = 4,
    batch_size: int = 32,
    view_seed: int = 0,
    view_draws: int = 1,
    size: tuple[int, int] | None = None,
    computing: Computing = Computing(),
) -> Float[Tensor, "q n"]:
    """I(i → q) of every training image i (column) on every query q (row).

    Args:
        encoder: What was trained: an encoder's file (with its recipe in the header), a learner, or
            an Encoder with its projector. Left untouched.
        train: The images that it was trained on.
        query: Images, whose stability loss is the measure; or a function of the backbone that gives
            one differentiable number for each query, such as `margins`.
        recipe: Of the training; needed where `encoder` does not say it.
        perturbation: Of the stability loss of the queries.
        seed: Of the perturbation.
        draws: Of the perturbation, averaged.
        batch_size: Of the batches in which the effect is measured, best that of the training. Image
            i's mates and views are keyed by (view_seed, draw, i).
        view_seed: See there.
        view_draws: How many draws of mates and views the mean is over.
        size: (h, w) of the views in px; default: the images' own.
        computing: Device and progress; its other settings do not apply here.

    Returns:
        Scores in double precision on the CPU.

    Raises:
        IsslError: For settings that do not fit, and for a BYOL encoder without its predictor and
            target.
    """
    state, train = as_learner(encoder, recipe), as_images(train)
    if state.recipe.method == "supervised":
        raise IsslError(
            "training_influence: for self-supervised methods; a supervised loss needs no batch, "
            "see the loss `CrossEntropy` of issl.cross_influence"
        )
    if not 3 <= batch_size <= len(train):
        raise IsslError(
            f"batch_size={batch_size}: need 3 to {len(train)}, the number of training images"
        )
    if view_draws < 1:
        raise IsslError(f"view_draws={view_draws}: must be 1 or more")
    if callable(query) and not isinstance(query, Tensor):
        measures: list[Measure] = [query]
    else:
        measures = stability_measures(as_images(query), perturbation, seed, draws)
    model, total = measuring_copy(state, computing.device), len(train) * view_draws
    backbone = model.encoder.backbone
    with (
        full_precision(),
        tqdm(total=total, unit="img", desc="training", disable=not computing.progress) as bar,
    ):
        asked = torch.cat([side_by_side(query_gradients(backbone, m)) for m in measures])
        scores = torch.zeros(len(asked), len(train), dtype=torch.float64)
        for draw in range(view_draws):
            for rows in batches(train, batch_size, view_seed, draw):
                views = two_views(model, train, rows, view_seed, draw, size)
                found = marginal_effects(model, *views)
                for some in rows.split(CHUNK):
                    each = zip(*(next(found) for _ in some), strict=True)
                    effects = side_by_side([torch.stack(g) for g in each])
                    scores[:, some] += (asked @ effects.T).double().cpu()
                    bar.update(len(some))
    return scores / view_draws


def side_by_side(gradients: Gradients) -> Float[Tensor, "b p"]:
    """Gradients (b, …) of each weight as one row each."""
    return torch.cat([g.flatten(1) for g in gradients], 1)


# --- what training follows ---


def measuring_copy(learner: Learner, device: str | torch.device | None = None) -> Learner:
    """A copy in train mode, so BatchNorm normalises by the batch, whose running statistics stay as
    they are."""
    model = copy.deepcopy(learner).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    return model.to(device) if device is not None else model


def batches(train: Images, batch_size: int, seed: int, draw: int) -> list[Int64[Tensor, " b"]]:
    """All images in batches of one draw. The order is by a number of each image's own, so it does
    not depend on the order of the set; what is left over joins the last batch."""
    key = uniform(seed + (draw << 32), train.index, (1,)).squeeze(1)
    order = torch.argsort(key, stable=True)
    whole = max(1, len(order) // batch_size)
    return list(order.tensor_split([batch_size * k for k in range(1, whole)]))


def two_views(
    learner: Learner,
    train: Images,
    rows: Tensor,
    seed: int,
    draw: int,
    size: tuple[int, int] | None,
) -> tuple[Tensor, Tensor]:
    """The two views of each image in this draw, keyed by its index."""
    device = next(learner.parameters()).device
    x = train.pixels[rows].to(device).float() / 255
    u = uniform(seed + (draw << 32) + (1 << 62), train.index[rows], (2, VIEW_UNIFORMS)).to(device)
    return learner.recipe.view_a(x, u[:, 0], size), learner.recipe.view_b(x, u[:, 1], size)


def batch_gradient(learner: Learner, xa: Tensor, xb: Tensor) -> Gradients:
    """∇L_B with respect to the backbone's weights."""
    loss, _ = learner(xa, xb, None, "fp32")
    return list(torch.autograd.grad(loss, list(learner.encoder.backbone.parameters())))


def marginal_effects(learner: Learner, xa: Tensor, xb: Tensor) -> Iterator[Gradients]:
    """τ_i = ∇L_B − ∇L_{B∖i} of each image of the batch, by leaving it out: exact, at the cost of b
    + 1 passes."""
    whole = batch_gradient(learner, xa, xb)
    for i in range(len(xa)):
        others = torch.arange(len(xa)) != i
        without = batch_gradient(learner, xa[others], xb[others])
        yield [a - b for a, b in zip(whole, without, strict=True)]


# --- what is asked of a query ---


def query_gradients(backbone: nn.Module, measure: Measure) -> Gradients:
    """∇m_q with respect to each weight that may change, one row for each query, the backbone in
    eval mode."""
    training = backbone.training
    backbone.eval()
    weights = [w for w in backbone.parameters() if w.requires_grad]
    try:
        values = measure(backbone)
        rows = [torch.autograd.grad(v, weights, retain_graph=True) for v in values]
    finally:
        backbone.train(training)
    return [torch.stack(g) for g in zip(*rows, strict=True)]


def margins(query: Images, weight: Float[Tensor, "c d"], bias: Float[Tensor, " c"]) -> Measure:
    """How far each query is on the wrong side of a linear probe that is held fixed: the best other
    class's score less its own's."""
    x, labels = query.tensor().float() / 255, query.require_labels()

    def measure(backbone: nn.Module) -> Float[Tensor, " q"]:
        features = backbone(like(backbone, x))
        scores = nn.functional.linear(features, like(backbone, weight), like(backbone, bias))
        own: Int64[Tensor, "q 1"] = labels.to(scores.device)[:, None]
        others = scores.scatter(1, own, -torch.inf).amax(1)
        return others - scores.gather(1, own).squeeze(1)

    return measure
