"""Training-aware influence: what training on an image does to a query, to first order.

The paper sets the query's gradient against the *stability* gradient of a training image, which no
SSL method descends (arXiv 2412.17170, §3). What a step of training does to a query depends on the
gradient that training follows. In a batch B, an image's marginal effect on that gradient is

    τ_i = ∇L_B − ∇L_{B∖i},

through every way in which it takes part: as anchor, positive and negative, through the
cross-correlation, and through the batch statistics of BatchNorm. One step of size η on B rather
than on B∖i changes the measure m_q of a query by −η ∇m_q · τ_i, so

    I(i → q) = Σ_c η_c ∇m_q(θ_c)ᵀ H_c⁻¹ E[τ_i(θ_c)],

summed over states c of the run (as in TracIn, Pruthi et al. 2020, arXiv 2002.08484, eq. 4).
Positive: training on image i lowers the query's measure. The mean is over batch mates and views. H
is the identity, or the damped curvature of the training gradients, mean_i τ_i τ_iᵀ. Gradients are
those of the backbone's weights, BatchNorm's own parameters included.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from tqdm import tqdm

from issl.data.images import Images
from issl.data.views import VIEW_UNIFORMS
from issl.devices import full_precision
from issl.errors import IsslError
from issl.influence.curvature import Curvature, Identity
from issl.influence.layers import Layer
from issl.influence.passes import Computing
from issl.influence.per_example import Sketch
from issl.influence.perturbation import GaussianNoise, Perturb, Perturbation
from issl.influence.scorer import as_images
from issl.keyed_random import uniform
from issl.measures import Measure, like, stability_measures
from issl.pretraining.encoder import Encoder
from issl.pretraining.learner import Learner, as_learner
from issl.pretraining.recipes import Recipe

Trained = Learner | Encoder | str | Path
Share = Literal["marginal", "own"]
Gradients = list[Tensor]  # one for each weight of the backbone, in its shape
CHUNK = 8  # effects that are held whole at a time


def training_influence(
    encoder: Trained | Sequence[Trained],
    train: Images | Tensor,
    query: Images | Tensor | Measure,
    recipe: Recipe | None = None,
    *,
    perturbation: Perturbation | Perturb = GaussianNoise(0.05, 0.2),
    seed: int = 0,
    draws: int = 4,
    rates: Sequence[float] | None = None,
    share: Share = "marginal",
    batch_size: int = 32,
    view_seed: int = 0,
    view_draws: int = 1,
    size: tuple[int, int] | None = None,
    curvature: Curvature = Identity(),
    computing: Computing = Computing(),
) -> Float[Tensor, "q n"]:
    """I(i → q) of every training image i (column) on every query q (row).

    Args:
        encoder: What was trained: an encoder's file (with its recipe in the header), a learner, or
            an Encoder with its projector; or several, the states of one run. Left untouched.
        train: The images that it was trained on.
        query: Images, whose stability loss is the measure; or a function of the backbone that gives
            one differentiable number for each query, such as `margins`.
        recipe: Of the training; needed where `encoder` does not say it.
        perturbation: Of the stability loss of the queries.
        seed: Of the perturbation.
        draws: Of the perturbation, averaged.
        rates: η_c, the learning rate at each state; default: 1 for all.
        share: "marginal": τ_i as above, a forward and backward pass over the batch for each of its
            images. "own": the part of ∇L_B that enters through the image's own two views.
        batch_size: Of the batches in which the effect is measured, best that of the training. Image
            i's mates and views are keyed by (view_seed, draw, i).
        view_seed: See there.
        view_draws: How many draws of mates and views the mean is over.
        size: (h, w) of the views in px; default: the images' own.
        curvature: H. Identity needs q × p numbers for p weights; RandomProjection and LoGra keep a
            few thousand of p.
        computing: Device and progress; its other settings do not apply here.

    Returns:
        Scores in double precision on the CPU.

    Raises:
        IsslError: For settings that do not fit, and for a BYOL encoder without its predictor and
            target.
    """
    given: Sequence[Trained] = [encoder] if isinstance(encoder, Trained) else encoder
    states = [as_learner(state, recipe) for state in given]
    train = as_images(train)
    rates = [1.0] * len(states) if rates is None else list(rates)
    if not states or len(rates) != len(states):
        raise IsslError(
            f"training_influence: {len(states)} states and {len(rates)} rates; give one for each"
        )
    if any(state.recipe.method == "supervised" for state in states):
        raise IsslError(
            "training_influence: for self-supervised methods; a supervised loss needs no batch, "
            "see the loss `CrossEntropy` of issl.cross_influence"
        )
    if not 3 <= batch_size <= len(train):
        raise IsslError(
            f"batch_size={batch_size}: need 3 to {len(train)}, the number of training images"
        )
    if share not in ("marginal", "own"):
        raise IsslError(f"share={share!r}: choose marginal or own")
    if view_draws < 1:
        raise IsslError(f"view_draws={view_draws}: must be 1 or more")
    if callable(query) and not isinstance(query, Tensor):
        measures: list[Measure] = [query]
    else:
        measures = stability_measures(as_images(query), perturbation, seed, draws)
    steps = [
        (draw, rows)
        for draw in range(view_draws)
        for rows in batches(train, batch_size, view_seed, draw)
    ]
    of_batch = marginal_effects if share == "marginal" else own_effects
    total = len(states) * len(train) * view_draws
    scores: Tensor | float = 0.0
    with (
        full_precision(),
        tqdm(total=total, unit="img", desc="training", disable=not computing.progress) as bar,
    ):
        for state, rate in zip(states, rates, strict=True):
            model = measuring_copy(state, computing.device)

            def effects(model: Learner = model) -> Iterator[tuple[Tensor, Gradients]]:
                """Positions of some images, and their effects, one row each."""
                for draw, rows in steps:
                    views = two_views(model, train, rows, view_seed, draw, size)
                    found = of_batch(model, *views)
                    for some in rows.split(CHUNK):
                        each = zip(*(next(found) for _ in some), strict=True)
                        yield some, [torch.stack(g) for g in each]
                        bar.update(len(some))

            part = _scores(model, measures, effects(), len(train), curvature)
            scores = scores + rate / view_draws * part
    assert isinstance(scores, Tensor)  # there are states
    return scores


def subset_effects(
    encoder: Trained,
    train: Images,
    query: Images,
    subsets: Sequence[Sequence[int]],
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
) -> Float[Tensor, "q m"]:
    """∇m_q · ∇L_S, with L_S the mean loss of the subset's batches: what a first-order score can
    know of a training on each of m subsets (positions in `train`). The other arguments are those of
    `training_influence`."""
    model = measuring_copy(as_learner(encoder, recipe), computing.device)
    backbone, found = model.encoder.backbone, []
    with full_precision():
        sketch = GradientSketch(backbone, Identity())
        measures = stability_measures(query, perturbation, seed, draws)
        asked = torch.cat([sketch(query_gradients(backbone, measure)) for measure in measures])
        for subset in tqdm(subsets, unit="subset", desc="subsets", disable=not computing.progress):
            chosen, rows = train.subset(torch.as_tensor(subset)), []
            for draw in range(view_draws):
                for batch in batches(chosen, batch_size, view_seed, draw):
                    views = two_views(model, chosen, batch, view_seed, draw, size)
                    rows.append(sketch([g.unsqueeze(0) for g in batch_gradient(model, *views)]))
            found.append((asked @ torch.cat(rows).mean(0)).double().cpu())
    return torch.stack(found, 1)


class GradientSketch:
    """What is kept of a whole network's gradient, weight by weight.

    A batch's gradient is no sum over independent images, so it is projected after it was made:
    kernels as the curvature keeps them, vectors (BatchNorm's weights, biases) whole, side by side.
    """

    def __init__(self, backbone: nn.Module, curvature: Curvature):
        if curvature.moment_images(torch.arange(2)) is not None:
            raise IsslError(
                f"training_influence: {curvature} needs second moments of single images, which "
                "gradients of batches do not have; choose Identity, RandomProjection, LoGra "
                "(random), Diagonal or Exact"
            )
        layers = [m for m in backbone.modules() if isinstance(m, Layer)]
        found = {id(layer.weight): curvature.sketch(layer, k) for k, layer in enumerate(layers)}
        self.curvature = curvature
        self.sketches = [found.get(id(w), Sketch()) for w in backbone.parameters()]

    def parts(self, gradients: Gradients) -> list[Float[Tensor, "b _"]]:
        """Of gradients (b, …) of each weight, what is kept of each."""
        rows = []
        for gradient, sketch in zip(gradients, self.sketches, strict=True):
            g = gradient.flatten(2) if gradient.ndim > 2 else gradient.unsqueeze(-1)
            g = g if sketch.p_out is None else sketch.p_out.to(g) @ g
            g = g if sketch.p_in is None else g @ sketch.p_in.to(g).T
            rows.append(g.flatten(1))
        return rows

    def __call__(self, gradients: Gradients) -> Float[Tensor, "b k"]:
        """All of it, side by side."""
        return torch.cat(self.parts(gradients), 1)


def _scores(
    model: Learner,
    measures: list[Measure],
    effects: Iterator[tuple[Tensor, Gradients]],
    n: int,
    curvature: Curvature,
) -> Float[Tensor, "q n"]:
    """Σ ∇m_qᵀ H⁻¹ τ over these effects."""
    backbone = model.encoder.backbone
    sketch = GradientSketch(backbone, curvature)
    parts = [sketch.parts(query_gradients(backbone, measure)) for measure in measures]
    asked = [torch.cat(part) for part in zip(*parts, strict=True)]  # by weight
    if curvature.accumulator() is None:  # no effect is needed twice
        side_by_side = torch.cat(asked, 1)
        scores = torch.zeros(len(side_by_side), n, dtype=torch.float64)
        for positions, effect in effects:
            scores[:, positions] += (side_by_side @ sketch(effect).T).double().cpu()
        return scores
    kept = [torch.zeros(n, g.shape[1]) for g in asked]
    for positions, effect in effects:
        for rows, part in zip(kept, sketch.parts(effect), strict=True):
            rows[positions] += part.cpu()
    scores = torch.zeros(len(asked[0]), n, dtype=torch.float64)
    for rows, g in zip(kept, asked, strict=True):
        total = curvature.accumulator()
        assert total is not None
        total.add(rows)
        whiten = total.whitening(curvature.damping).whiten
        scores += whiten(g.cpu()) @ whiten(rows).T
    return scores


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


def own_effects(learner: Learner, xa: Tensor, xb: Tensor) -> Iterator[Gradients]:
    """The part of ∇L_B that enters through the features of the image's own views; over the batch
    they sum to ∇L_B."""
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
        yield list(torch.autograd.grad(features[rows], weights, pull[rows], retain_graph=i + 1 < b))


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
