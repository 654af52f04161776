"""Measures of an encoder: differentiable functions of its backbone, one number for each query; and
the features and stability losses of whole sets.

The backbone is in eval mode. A measure split into a list of several, for a few queries each, holds
fewer activations at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from issl.data.images import Images
from issl.devices import Batches, full_precision
from issl.errors import IsslError
from issl.influence.losses import stability_loss
from issl.influence.perturbation import GaussianNoise, Perturb, Perturbation, keyed_draws

Measure = Callable[[nn.Module], Float[Tensor, " q"]]
CPU = torch.device("cpu")
TOGETHER = 8  # queries in one forward pass: each one's gradient goes back through all of them


def stability_measures(
    query: Images,
    perturbation: Perturbation | Perturb = GaussianNoise(0.05, 0.2),
    seed: int = 0,
    draws: int = 1,
    together: int = TOGETHER,
) -> list[Measure]:
    """The stability loss of each query, averaged over the draws; one measure for every few queries.
    Draw k of seed s uses the seed s + k·2³². With the training views as the perturbation, it is the
    alignment term of the SSL losses."""
    perturbs = keyed_draws(perturbation, seed, draws)

    def of(positions: slice) -> Measure:
        x, index = query.pixels[positions].float() / 255, query.index[positions]
        views = [perturb(x, index) for perturb in perturbs]

        def measure(backbone: nn.Module) -> Float[Tensor, " q"]:
            features = backbone(like(backbone, x))
            losses = [stability_loss(features, backbone(like(backbone, v))) for v in views]
            return torch.stack(losses).mean(0)

        return measure

    return [of(slice(k, k + together)) for k in range(0, len(query), together)]


def knn_margins(
    query: Images,
    bank: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    temperature: float = 0.1,
    together: int = TOGETHER,
) -> list[Measure]:
    """The margin by which a vote finds each query's class: the share of votes for its own class
    minus that for the best other class, from -1 to 1.

    The features in `bank` are held fixed. Each votes for its label with weight
    exp(cosine/temperature), as in Wu et al. 2018, arXiv 1805.01978, §3.4, with all images, not k.

    Raises:
        IsslError: For queries without labels, a query's class that is not in the bank, and a
            bank of one class.
    """
    truth, classes = query.require_labels(), labels.unique()
    if len(classes) < 2 or not torch.isin(truth, classes).all():
        raise IsslError(
            f"knn_margins: the bank has the classes {classes.tolist()}, the queries "
            f"{truth.unique().tolist()}; give a bank with all of these, and two or more"
        )
    unit = normalize(bank, dim=1)
    votes = nn.functional.one_hot(labels)

    def of(positions: slice) -> Measure:
        x, own = query.pixels[positions].float() / 255, truth[positions, None]

        def measure(backbone: nn.Module) -> Float[Tensor, " q"]:
            features = normalize(backbone(like(backbone, x)), dim=1)
            weights = (features @ like(backbone, unit).T / temperature).softmax(1)
            shares, mine = weights @ like(backbone, votes), own.to(weights.device)
            others = shares.scatter(1, mine, -1).amax(1)
            return shares.gather(1, mine).squeeze(1) - others

        return measure

    return [of(slice(k, k + together)) for k in range(0, len(query), together)]


def mean_of(measures: Sequence[Measure]) -> Measure:
    """The mean over all queries of these measures, as one measure with one number. Activations are
    held for one measure at a time, and recomputed in the backward pass."""

    def measure(backbone: nn.Module) -> Float[Tensor, " 1"]:
        parts = [checkpoint(part, backbone, use_reentrant=False) for part in measures]
        return torch.cat(parts).mean()[None]

    return measure


def like(backbone: nn.Module, x: Tensor) -> Tensor:
    """`x` on the backbone's device, in its precision."""
    weight = next(backbone.parameters())
    return x.to(weight.device, weight.dtype)


@torch.no_grad()
def embed(encoder: nn.Module, images: Images, device: torch.device = CPU) -> Float[Tensor, "n d"]:
    """Features of all images, on the CPU; the encoder is moved to `device`."""
    encoder, batch = encoder.to(device), 128 if device.type == "cpu" else 1024

    def features(part: slice) -> Tensor:
        return encoder(images.pixels[part].to(device).float() / 255).float().cpu()

    with full_precision():
        return torch.cat(list(Batches(batch)(slice(0, len(images)), features)))


@torch.no_grad()
def stability_losses(
    encoder: nn.Module,
    images: Images,
    perturbation: Perturbation | Perturb,
    seed: int = 0,
    draws: int = 1,
    device: torch.device = CPU,
) -> np.ndarray:
    """ℓ_i = 1 − cos(f(x_i), f(x̂_i)) of each image, in [0, 2], averaged over the draws. Needs only
    a forward pass, no gradient. Draw k of seed s uses the seed s + k·2³², as in
    `issl.self_influence`."""
    encoder, batch = encoder.to(device), 128 if device.type == "cpu" else 1024
    perturbs = keyed_draws(perturbation, seed, draws)
    index = images.index

    def losses(part: slice) -> Tensor:
        x = images.pixels[part].to(device).float() / 255
        plain = encoder(x)
        each = [stability_loss(plain, encoder(p(x, index[part]))) for p in perturbs]
        return torch.stack(each).double().mean(0).cpu()

    with full_precision():
        return torch.cat(list(Batches(batch)(slice(0, len(images)), losses))).numpy()
