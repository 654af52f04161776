"""Cross-influence: which training images taught the encoder about this one.

    I(i → j) = Σ_l g_jᵀ (H_l + λ_l I)⁻¹ g_i,   H_l = mean over the training images

Positive: a step that makes training image i more stable also makes query j more stable; negative:
less stable. The self-influence of a training image is the diagonal (arXiv 2412.17170, §3, and Koh &
Liang 2017, arXiv 1703.04730). The same in a few slow lines: `issl.influence.reference`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from issl.data.images import Images
from issl.devices import full_precision
from issl.errors import IsslError, is_whole
from issl.influence.computing import Computing
from issl.influence.curvature import Curvature, LoGra, Whitening
from issl.influence.losses import CrossEntropy, Loss, stability_loss
from issl.influence.measurement import Measurement, Run, not_empty, prepare
from issl.influence.perturbation import GaussianNoise, Perturb, Perturbation

QUERIES = 1 << 40  # more than any index of a training image


def as_queries(images: Images) -> Images:
    """The same images, re-indexed so that a query never has the noise of the training image with
    the same index."""
    return replace(
        images, attributes=images.attributes.assign(index=images.attributes["index"] + QUERIES)
    )


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
    fisher: Loss | CrossEntropy | None = None,
    skip: Sequence[str] = (),
    untrained: bool = False,
    computing: Computing = Computing(),
) -> Float[Tensor, "q n"]:
    """I(i → j) of every training image i (column) on every query j (row), in double precision on
    the CPU.

    The arguments are those of `issl.self_influence`; gradients are means over the draws. For large
    sets `top_influences` needs less memory. Raises IsslError as `self_influence` does.
    """
    what = Measurement(
        perturbation,
        curvature,
        seed,
        draws,
        loss=loss,
        fisher=fisher,
        skip=skip,
        untrained=untrained,
    )
    queries = not_empty(query, "query images")
    with full_precision():
        run = prepare(encoder, train, what, computing)
        check_sizes(run.data, queries)  # before the pass
        return every_score(run, run.whitenings([curvature.damping]), queries)


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
    fisher: Loss | CrossEntropy | None = None,
    skip: Sequence[str] = (),
    untrained: bool = False,
    computing: Computing = Computing(),
) -> pd.DataFrame:
    """The k training images of the highest (most positive) influence on each query, without holding
    q × n scores.

    One row per query and rank: query (its index), rank (1 is the highest), index (the training
    image's), influence. The other arguments are those of `cross_influence`.
    """
    _check_k(k)
    what = Measurement(
        perturbation,
        curvature,
        seed,
        draws,
        loss=loss,
        fisher=fisher,
        skip=skip,
        untrained=untrained,
    )
    queries = not_empty(query, "query images")
    with full_precision():
        run = prepare(encoder, train, what, computing)
        check_sizes(run.data, queries)  # before the pass
        return highest_scores(run, run.whitenings([curvature.damping]), queries, k)


def every_score(
    run: Run, whitenings: dict[str, list[Whitening]], query: Images | Tensor
) -> Float[Tensor, "q n"]:
    """The scores of `cross_influence` under the first of these inverse curvatures."""
    queries = not_empty(query, "query images")
    scores = torch.zeros(len(queries), len(run.data), dtype=torch.float64)
    for positions, block in _blocks(run, whitenings, queries):
        scores[:, positions] = block.cpu()
    return run.computing.shards.sum(scores)


def highest_scores(
    run: Run, whitenings: dict[str, list[Whitening]], query: Images | Tensor, k: int
) -> pd.DataFrame:
    """The table of `top_influences` under the first of these inverse curvatures."""
    _check_k(k)
    queries = not_empty(query, "query images")
    best = (
        torch.empty(len(queries), 0, dtype=torch.float64),
        torch.empty(len(queries), 0, dtype=torch.int64),
    )
    for positions, block in _blocks(run, whitenings, queries):
        places = torch.arange(positions.start, positions.stop).expand(len(queries), -1)
        best = _best(k, (best[0], block.cpu()), (best[1], places))
    parts = run.computing.shards.objects(best)
    values, places = _best(k, [p[0] for p in parts], [p[1] for p in parts])
    kept = values.shape[1]
    return pd.DataFrame(
        {
            "query": queries.index.repeat_interleave(kept).numpy(),
            "rank": torch.arange(1, kept + 1).repeat(len(queries)).numpy(),
            "index": run.data.index[places.flatten()].numpy(),
            "influence": values.flatten().numpy(),
        }
    )


def check_sizes(train: Images, queries: Images) -> None:
    """Both must have the same height and width."""
    if queries.pixels.shape[2:] != train.pixels.shape[2:]:
        raise IsslError(
            f"query images are {tuple(queries.pixels.shape[2:])} px, the training images "
            f"{tuple(train.pixels.shape[2:])}; load both at one size"
        )


def _check_k(k: int) -> None:
    if not is_whole(k, 1):
        raise IsslError(f"k={k!r}: must be a whole number, 1 or more")


def _best(k: int, values: Any, places: Any) -> tuple[Tensor, Tensor]:
    """The k highest of the values side by side, and their places."""
    v, p = torch.cat(list(values), 1), torch.cat(list(places), 1)
    best, columns = v.topk(min(k, v.shape[1]), dim=1)
    return best, p.gather(1, columns)


def _blocks(
    run: Run, whitenings: dict[str, list[Whitening]], queries: Images
) -> Iterator[tuple[slice, Float[Tensor, "q b"]]]:
    """The scores of each chunk of training images."""
    first = {name: w[0] for name, w in whitenings.items()}
    whitened = torch.cat([_whitened(first, rows, run) for _, rows in run.rows_of_others(queries)()])
    for positions, rows in run.rows():
        yield positions, whitened @ _whitened(first, rows, run).T


def _whitened(whitenings: dict[str, Whitening], rows: Any, run: Run) -> Float[Tensor, "b m"]:
    """All layers' whitened rows side by side, so that one product sums over layers."""
    means = {
        name: rows(f"layer.{name}").to(run.probe.device).double().mean(1) for name in whitenings
    }
    return torch.cat([w.whiten(means[name]) for name, w in whitenings.items()], 1)
