"""Training-aware influence: what training on an image does to a query, to first order.

The paper sets the query's gradient against the *stability* gradient of a training image, which no SSL method descends
(arXiv 2412.17170, §3). What a step of training does to a query depends on the gradient that training follows. In a
batch B, an image's marginal effect on that gradient is

    τ_i = ∇L_B − ∇L_{B∖i},

through every way in which it takes part: as anchor, positive and negative, through the cross-correlation, and through
the batch statistics of BatchNorm. One step of size η on B rather than on B∖i changes the measure m_q of a query by
−η ∇m_q · τ_i, so

    I(i → q) = Σ_c η_c ∇m_q(θ_c)ᵀ E[τ_i(θ_c)],        positive: training on image i lowers the query's measure,

summed over states c of the run (as in TracIn, Pruthi et al. 2020, arXiv 2002.08484, eq. 4); the mean is over batch
mates and views. Gradients are those of the backbone's weights, BatchNorm's own parameters included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from tqdm import tqdm

from issl.data.images import Images
from issl.data.views import VIEW_UNIFORMS
from issl.errors import IsslError
from issl.influence.losses import stability_loss
from issl.influence.perturbation import GaussianNoise, Perturb, Perturbation, keyed_draws
from issl.keyed_random import uniform
from issl.pretraining.learner import Learner

Measure = Callable[[nn.Module], Float[Tensor, " q"]]  # of a backbone in eval mode: one differentiable number per query
Share = Literal["marginal", "own"]
Gradient = Float[Tensor, " p"]  # of all the backbone's weights, one after another


def training_influence(
    learners: Sequence[Learner],
    train: Images,
    measure: Measure,
    *,
    rates: Sequence[float] | None = None,
    share: Share = "marginal",
    batch_size: int = 64,
    draws: int = 1,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Float[Tensor, "q n"]:
    """I(i → q) of every training image i (column) on every query q (row), in double precision.

    learners    states of one run, see `issl.pretraining.learner.load_learner`; left untouched
    measure     what is asked of each query, see `stability_measure`
    rates       η_c, the learning rate at each state; default: 1 for all
    share       "marginal": τ_i as above, a forward and backward pass over the batch for each of its images;
                "own": the part of ∇L_B that enters through the image's own two views
    batch_size  of the batches in which the effect is measured: image i's mates and views are keyed by (seed, draw, i)
    size        side of the views in px; default: the images' own
    Raises IsslError for settings that do not fit.
    """
    rates = [1.0] * len(learners) if rates is None else list(rates)
    if not learners or len(rates) != len(learners):
        raise IsslError(f"training_influence: {len(learners)} learners and {len(rates)} rates; give one for each")
    if not 3 <= batch_size <= len(train):
        raise IsslError(f"batch_size={batch_size}: need 3 to {len(train)}, the number of training images")
    if share not in ("marginal", "own"):
        raise IsslError(f"share={share!r}: choose marginal or own")
    effects = marginal_effects if share == "marginal" else own_effects
    total: Tensor | None = None
    with tqdm(total=len(learners) * draws * len(train), unit="img", desc="training", disable=not progress) as bar:
        for learner, rate in zip(learners, rates, strict=True):
            model = measuring_copy(learner)
            asked = query_gradients(model.encoder.backbone, measure)
            if total is None:
                total = torch.zeros(len(asked), len(train), dtype=torch.float64)
            for draw in range(draws):
                for rows in batches(train, batch_size, seed, draw):
                    xa, xb = two_views(model, train, rows, seed, draw, size)
                    for i, effect in zip(rows.tolist(), effects(model, xa, xb), strict=True):
                        total[:, i] += rate / draws * (asked @ effect).double()
                        bar.update()
    assert total is not None  # there is a learner
    return total


def stability_measure(
    query: Images, perturbation: Perturbation | Perturb = GaussianNoise(0.05, 0.2), seed: int = 0, draws: int = 1
) -> Measure:
    """The stability loss of each query, mean over the draws; draw k of seed s is that of seed s + k·2³²."""
    x = query.pixels.float() / 255
    views = [perturb(x, query.index) for perturb in keyed_draws(perturbation, seed, draws)]

    def measure(backbone: nn.Module) -> Float[Tensor, " q"]:
        features = backbone(x)
        return torch.stack([stability_loss(features, backbone(view)) for view in views]).mean(0)

    return measure


def measuring_copy(learner: Learner) -> Learner:
    """A copy in train mode, so BatchNorm normalises by the batch, whose running statistics stay as they are."""
    model = copy.deepcopy(learner).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    return model


def batches(train: Images, batch_size: int, seed: int, draw: int) -> list[Int64[Tensor, " b"]]:
    """All images in batches of one draw. The order is by a number of each image's own, so it does not depend on the
    order of the set; what is left over joins the last batch."""
    key = uniform(seed + (draw << 32), train.index, (1,)).squeeze(1)
    order = torch.argsort(key, stable=True)
    whole = max(1, len(order) // batch_size)
    return list(order.tensor_split([batch_size * k for k in range(1, whole)]))


def two_views(
    learner: Learner, train: Images, rows: Tensor, seed: int, draw: int, size: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """The two views of each image in this draw, keyed by its index."""
    x = train.pixels[rows].float() / 255
    u = uniform(seed + (draw << 32) + (1 << 62), train.index[rows], (2, VIEW_UNIFORMS))
    return learner.recipe.view_a(x, u[:, 0], size), learner.recipe.view_b(x, u[:, 1], size)


def batch_gradient(learner: Learner, xa: Tensor, xb: Tensor) -> Gradient:
    """∇L_B with respect to the backbone's weights."""
    loss, _ = learner(xa, xb, None, "fp32")
    return _flat(torch.autograd.grad(loss, list(learner.encoder.backbone.parameters())))


def marginal_effects(learner: Learner, xa: Tensor, xb: Tensor) -> Iterator[Gradient]:
    """τ_i = ∇L_B − ∇L_{B∖i} of each image of the batch, by leaving it out: exact, at the cost of b + 1 passes."""
    whole = batch_gradient(learner, xa, xb)
    for i in range(len(xa)):
        others = torch.arange(len(xa)) != i
        yield whole - batch_gradient(learner, xa[others], xb[others])


def own_effects(learner: Learner, xa: Tensor, xb: Tensor) -> Iterator[Gradient]:
    """The part of ∇L_B that enters through the features of the image's own views; over the batch they sum to ∇L_B."""
    backbone, b = learner.encoder.backbone, len(xa)
    kept: list[Tensor] = []
    handle = backbone.register_forward_hook(lambda *call: kept.append(call[2]))
    try:
        loss, _ = learner(xa, xb, None, "fp32")
    finally:
        handle.remove()
    features = kept[0]
    (pull,) = torch.autograd.grad(loss, features, retain_graph=True)
    weights = list(backbone.parameters())
    for i in range(b):
        rows = [i, i + b]
        yield _flat(torch.autograd.grad(features[rows], weights, pull[rows], retain_graph=i + 1 < b))


def query_gradients(backbone: nn.Module, measure: Measure) -> Float[Tensor, "q p"]:
    """∇m_q of each query, the backbone in eval mode."""
    training = backbone.training
    backbone.eval()
    weights = list(backbone.parameters())
    try:
        values = measure(backbone)
        rows = [_flat(torch.autograd.grad(v, weights, retain_graph=True)) for v in values]
    finally:
        backbone.train(training)
    return torch.stack(rows)


def _flat(gradients: Sequence[Tensor]) -> Gradient:
    return torch.cat([g.flatten() for g in gradients])
