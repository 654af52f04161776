"""Scores: self-influence, cross-influence, and the highest cross-influences of each query.

    influence_i = Σ_l g_iᵀ (H_l + λ_l I)⁻¹ g_i ≥ 0     g_i = ∇ℓ_i,  ℓ_i = 1 − cos(f(x_i), f(x̂_i))
    I(i → j)    = Σ_l g_jᵀ (H_l + λ_l I)⁻¹ g_i         H_l: mean over the training images

The paper (arXiv 2412.17170, §3) defines I = −g_iᵀH⁻¹g_i; we store the magnitude, so high
means large. I(i → j) is positive where a step that makes training image i more stable also makes
query j more stable (Koh & Liang 2017, arXiv 1703.04730); the self-influence is its diagonal.
`issl.influence.reference` computes the same in a few slow lines.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from issl.data.images import Images
from issl.devices import full_precision
from issl.errors import IsslError, is_whole, number_or_nan
from issl.influence.curvature import NO_CURVATURE, Accumulator, Curvature, LoGra, Whitening
from issl.influence.losses import CrossEntropy, Loss, stability_loss
from issl.influence.perturbation import GaussianNoise, Perturb, Perturbation, describe
from issl.influence.scorer import Computing, Measurement, Pass, Rows, as_images, open_scorer

EQUAL = 1e-6  # the relative spread below which scores are called equal
QUERIES = 1 << 40  # more than any index of a numbered set; a folder's images have 62-bit hashes
Sums = Mapping[str, Accumulator | None]  # of each layer


def self_influence(
    encoder: nn.Module,
    images: Images | Tensor,
    perturbation: Perturbation | Perturb = GaussianNoise(0.05, 0.2),
    curvature: Curvature = LoGra(rank=16, damping=0.1),
    seed: int = 0,
    *,
    draws: int = 1,
    sweep: Sequence[float] = (),
    loss: Loss | CrossEntropy = stability_loss,
    skip: Sequence[str] = (),
    untrained: bool = False,
    computing: Computing = Computing(),
) -> pd.DataFrame:
    """The influence of each image on the encoder (arXiv 2412.17170, §3).

    Args:
        encoder: Any nn.Module in eval mode that maps float pixels in [0, 1] to features (n, d). It
            is left unchanged.
        images: `issl.Images`, or a uint8 tensor (n, 3, H, W), indexed 0 … n−1.
        perturbation: GaussianNoise, Augmentation, or a callable (pixels, index) → pixels that
            treats each image by itself.
        curvature: LoGra, EKFAC, Diagonal, Exact, Identity or RandomProjection.
        seed: Seed of the perturbation; an image's draw depends only on (seed, its index).
        draws: K perturbation draws per image, whose mean gradient is g_i; draw k of seed s uses
            seed s + k·2³².
        sweep: Further damping values, with one column `influence@VALUE` each.
        loss: The loss whose gradients are scored: (features, perturbed features) → (b,), one per
            image, or CrossEntropy() for a supervised model, which needs images with labels.
        skip: Names of layers or parameters to leave out of the score.
        untrained: Score an encoder as initialised, as a control; otherwise BatchNorm that was never
            trained is an error.
        computing: Device, batch size, precision, memory.

    Returns:
        One row per image, in the order given: index; influence (dimensionless, ≥ 0, sum over
        layers); stability_loss (in [0, 2], mean over draws; named `loss` for any other loss);
        grad_norm (‖g_i‖ over all scored weights; for random LoGra below full rank, from the
        projection's unbiased estimate of ‖g_i‖²; NaN for PCA); standard_error (of the influence,
        from the spread of the draws; K ≥ 2 only). `.attrs` holds the effective damping per layer
        and the settings.

    Raises:
        IsslError: For an encoder that cannot be scored, for bad images or settings, and for NaN.
    """
    what = Measurement(perturbation, curvature, seed, draws, loss, skip, untrained)
    check_sweep(sweep)
    with full_precision():
        rows = prepare(encoder, images, what, computing, norms_only=draws == 1)
        return score(rows, rows.accumulate(gram=True), sweep)


def cross_influence(
    encoder: nn.Module,
    train: Images | Tensor,
    query: Images | Tensor,
    perturbation: Perturbation | Perturb = GaussianNoise(0.05, 0.2),
    curvature: Curvature = LoGra(rank=16, damping=0.1),
    seed: int = 0,
    *,
    draws: int = 1,
    loss: Loss | CrossEntropy = stability_loss,
    skip: Sequence[str] = (),
    untrained: bool = False,
    computing: Computing = Computing(),
) -> Float[Tensor, "q n"]:
    """I(i → j) of every training image i (column) on every query j (row).

    For large sets `top_influences` needs less memory.

    Args:
        encoder: As in `issl.self_influence`, as are all arguments not listed here.
        train: The images over which the curvature is averaged.
        query: Images of the same size. A query has the noise of the training image with the same
            index, so re-index new images (`issl.influence.scores.as_queries`).

    Returns:
        Scores in double precision on the CPU.

    Raises:
        IsslError: As in `issl.self_influence`, and for images of different sizes.
    """
    what = Measurement(perturbation, curvature, seed, draws, loss, skip, untrained)
    images, queries = train_and_queries(train, query)
    with full_precision():
        rows = prepare(encoder, images, what, computing)
        return every_score(rows, rows.accumulate(gram=True), queries)


def top_influences(
    encoder: nn.Module,
    train: Images | Tensor,
    query: Images | Tensor,
    k: int = 10,
    perturbation: Perturbation | Perturb = GaussianNoise(0.05, 0.2),
    curvature: Curvature = LoGra(rank=16, damping=0.1),
    seed: int = 0,
    *,
    draws: int = 1,
    loss: Loss | CrossEntropy = stability_loss,
    skip: Sequence[str] = (),
    untrained: bool = False,
    computing: Computing = Computing(),
) -> pd.DataFrame:
    """The k training images with the highest (most positive) influence on each query, without
    holding q × n scores.

    Args:
        encoder: As in `issl.cross_influence`, as are all arguments not listed here.
        k: How many images per query.

    Returns:
        One row per query and rank: query (its index), rank (1 is the highest), index (the training
        image's), influence.

    Raises:
        IsslError: As in `issl.cross_influence`.
    """
    what = Measurement(perturbation, curvature, seed, draws, loss, skip, untrained)
    images, queries = train_and_queries(train, query, k)
    with full_precision():
        rows = prepare(encoder, images, what, computing)
        return highest_scores(rows, rows.accumulate(gram=True), queries, k)


def as_queries(images: Images) -> Images:
    """The same images, re-indexed so that a query never has the noise of the training image with
    the same index."""
    index = images.attributes["index"] + QUERIES
    return replace(images, attributes=images.attributes.assign(index=index))


# --- from gradients and curvature to scores ---


def prepare(
    encoder: nn.Module,
    images: Images | Tensor,
    what: Measurement,
    computing: Computing,
    norms_only: bool = False,
) -> Pass:
    """The pass over the training images, after every check; see `Scorer.sketched` for
    `norms_only`."""
    data = as_images(images)
    scorer = open_scorer(encoder, what, data, computing.device)
    return Pass(scorer.sketched(data, norms_only), data, computing)


def train_and_queries(
    train: Images | Tensor, query: Images | Tensor, k: int = 1
) -> tuple[Images, Images]:
    """Both as `Images`. Raises IsslError unless they have the same size and k is a valid count."""
    images, queries = as_images(train), as_images(query, "query images")
    sizes = [tuple(some.pixels.shape[2:]) for some in (queries, images)]
    if sizes[0] != sizes[1]:
        raise IsslError(
            f"query images are {sizes[0]} px, the training images {sizes[1]}; load both at one size"
        )
    if not is_whole(k, 1):
        raise IsslError(f"k={k!r}: must be a whole number, 1 or more")
    return images, queries


def check_sweep(sweep: Sequence[float]) -> None:
    """Raises IsslError unless all of these are valid dampings."""
    if not isinstance(sweep, Sequence | np.ndarray):
        raise IsslError(f"sweep={sweep!r}: give a list of dampings, such as [0.01, 1.0]")
    for value in sweep:
        if not 0 < number_or_nan(value) < np.inf:
            raise IsslError(f"sweep: damping {value!r} must be a finite number > 0")


def whitenings(sums: Sums, damping: float) -> dict[str, Whitening]:
    """Each layer's inverse curvature at this damping."""
    return {
        name: NO_CURVATURE if total is None else total.whitening(damping)
        for name, total in sums.items()
    }


def score(rows: Pass, sums: Sums, sweep: Sequence[float] = ()) -> pd.DataFrame:
    """The table of `self_influence`: each image of the pass under the curvature of these sums."""
    scorer, what, n = rows.scorer, rows.scorer.what, len(rows.images)
    inverses = [whitenings(sums, damping) for damping in (what.curvature.damping, *sweep)]
    losses, squares, shares = np.zeros(n), np.zeros(n), np.zeros((len(inverses), n, what.draws))
    for positions, chunk in rows:
        losses[positions] = chunk["loss"].double()
        for name, layer in scorer.layers.items():
            g = chunk[f"layer.{name}"].to(scorer.device)  # (b, draws, r)
            scale = what.curvature.norm_scale(layer)
            size = g.double().mean(1).square().sum(1)
            squares[positions] += np.nan if scale is None else (size * scale).cpu().numpy()
            for k, inverse in enumerate(inverses):
                w = inverse[name].whiten(g.flatten(0, 1)).unflatten(0, g.shape[:2])
                # each draw's share of ‖w̄‖²; the mean of these shares over draws is ‖w̄‖²
                shares[k, positions] += (w * w.mean(1, keepdim=True)).sum(2).cpu().numpy()
    values = shares.mean(2)
    own = what.loss is stability_loss
    rounding = 32 * torch.finfo(scorer.dtype).eps if own else 0.0
    if (word := says_nothing(values[0], losses, rounding)) is not None:
        warnings.warn(word, stacklevel=3)
    columns = {
        "index": rows.images.index.numpy(),
        "influence": values[0],
        "stability_loss" if own else "loss": losses,
        "grad_norm": np.sqrt(squares),
    }
    if what.draws > 1:
        # ‖w̄‖² is quadratic in the mean, so its error is twice that of the linear share (delta
        # method)
        columns["standard_error"] = 2 * shares[0].std(1, ddof=1) / np.sqrt(what.draws)
    columns |= {f"influence@{value:g}": values[k + 1] for k, value in enumerate(sweep)}
    table = pd.DataFrame(columns)
    table.attrs = {
        "curvature": repr(what.curvature),
        "perturbation": describe(what.perturbation),
        "seed": what.seed,
        "images": rows.images.name,
        "n": n,
        "damping": {name: w.damping for name, w in inverses[0].items()},
        "skip": list(what.skip),
        "untrained": what.untrained,
        "draws": what.draws,
        "precision": rows.computing.precision,
        "memory": rows.computing.memory,
    }
    return table


def every_score(rows: Pass, sums: Sums, queries: Images) -> Float[Tensor, "q n"]:
    """The scores of `cross_influence` under the curvature of these sums."""
    scores = torch.zeros(len(queries), len(rows.images), dtype=torch.float64)
    for positions, block in _blocks(rows, sums, queries):
        scores[:, positions] = block.cpu()
    return scores


def highest_scores(rows: Pass, sums: Sums, queries: Images, k: int) -> pd.DataFrame:
    """The table of `top_influences` under the curvature of these sums."""
    values = torch.empty(len(queries), 0, dtype=torch.float64)
    places = torch.empty(len(queries), 0, dtype=torch.int64)
    for positions, block in _blocks(rows, sums, queries):
        here = torch.arange(positions.start, positions.stop).expand(len(queries), -1)
        values, places = torch.cat([values, block.cpu()], 1), torch.cat([places, here], 1)
        values, columns = values.topk(min(k, values.shape[1]), dim=1)
        places = places.gather(1, columns)
    kept = values.shape[1]
    return pd.DataFrame(
        {
            "query": queries.index.repeat_interleave(kept).numpy(),
            "rank": torch.arange(1, kept + 1).repeat(len(queries)).numpy(),
            "index": rows.images.index[places.flatten()].numpy(),
            "influence": values.flatten().numpy(),
        }
    )


def _blocks(
    rows: Pass, sums: Sums, queries: Images
) -> Iterator[tuple[slice, Float[Tensor, "q b"]]]:
    """The scores of each chunk of training images."""
    scorer = rows.scorer
    inverse = whitenings(sums, scorer.what.curvature.damping)

    def whitened(chunk: Rows) -> Float[Tensor, "b m"]:
        """All layers' whitened rows side by side, so that one product sums over layers."""
        means = {
            name: chunk[f"layer.{name}"].to(scorer.device).double().mean(1) for name in inverse
        }
        return torch.cat([w.whiten(means[name]) for name, w in inverse.items()], 1)

    once = replace(rows.computing, memory="recomputed", progress=False)
    asked = torch.cat([whitened(chunk) for _, chunk in Pass(scorer, queries, once)])
    for positions, chunk in rows:
        yield positions, asked @ whitened(chunk).T


def says_nothing(influence: np.ndarray, losses: np.ndarray, rounding: float = 0.0) -> str | None:
    """Why these scores cannot rank the images, in words; None if they can. Losses up to `rounding`
    count as rounding errors."""
    low, high = influence.min(), influence.max()
    if (largest := np.abs(losses).max()) <= rounding:
        return (
            f"no loss is above {largest:.1g}, which is rounding: the perturbation hardly moves the "
            "features (do they differ between images at all?), so the ranking is noise; use a "
            "stronger one"
        )
    if high == 0 or (len(influence) > 1 and high - low <= EQUAL * high):
        return (
            f"every influence is {high:.6g}: no gradient is left (see `skip`), or there are fewer "
            "images than directions, which a curvature with so little damping sets all alike; "
            "score more images, raise the damping or lower the rank"
        )
    return None
