"""Cross-influence: which training images taught the encoder about this one.

    I(i → j) = Σ_l g_jᵀ (H_l + λ_l I)⁻¹ g_i,   H_l = mean over the training images

Positive: a step that makes training image i more stable makes query j more stable, too; negative: less. The
self-influence of a training image is the diagonal (arXiv 2412.17170, §3, and Koh & Liang 2017, arXiv 1703.04730).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from issl.data.images import Images
from issl.devices import full_precision
from issl.errors import IsslError
from issl.influence.curvature import Curvature, LoGra, Weighing
from issl.influence.gradient_store import make_pass, split
from issl.influence.perturbation import GaussianNoise, Perturb, Perturbation
from issl.influence.self_influence import Run, as_images, prepare

QUERIES = 1 << 40  # more than any index of a training image


def as_queries(images: Images) -> Images:
    """The same images with an index of their own, so that no query has the noise of the training image that has its
    number in another set."""
    return replace(images, attributes=images.attributes.assign(index=images.attributes["index"] + QUERIES))


def cross_influence(
    encoder: nn.Module,
    train: Images | Tensor,
    query: Images | Tensor,
    perturbation: Perturbation | Perturb = GaussianNoise(0.05, 0.2),
    curvature: Curvature = LoGra(rank=16, damping=0.1),
    seed: int = 0,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    **options: Any,
) -> Float[Tensor, "q n"]:
    """I(i → j) of every training image i (column) on every query j (row), in double precision on the CPU.

    The arguments are those of `issl.self_influence`; options: draws (the gradients are means over them), fisher,
    precision, memory, memory_gb, skip, store, shards, progress. For large sets `top_influences` needs less memory.
    Raises IsslError as `self_influence` does.
    """
    with full_precision():
        run, blocks = _blocks(encoder, train, query, perturbation, curvature, seed, batch_size, device, options)
        scores: Tensor | None = None
        for positions, block in blocks:
            if scores is None:
                scores = torch.zeros(len(block), len(run.data), dtype=torch.float64)
            scores[:, positions] = block.cpu()
    assert scores is not None  # every process has a share
    return run.shards.sum(scores)


def top_influences(
    encoder: nn.Module,
    train: Images | Tensor,
    query: Images | Tensor,
    k: int = 10,
    perturbation: Perturbation | Perturb = GaussianNoise(0.05, 0.2),
    curvature: Curvature = LoGra(rank=16, damping=0.1),
    seed: int = 0,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    **options: Any,
) -> pd.DataFrame:
    """The k training images of the highest (most positive) influence on each query; never holds q × n scores.

    One row a query and rank: query (its index), rank (1 is the highest), index (the training image's), influence.
    The other arguments are those of `cross_influence`.
    """
    if k < 1:
        raise IsslError(f"k={k}: must be 1 or more")
    queries = query if isinstance(query, Images) else as_images(query)
    with full_precision():
        run, blocks = _blocks(encoder, train, queries, perturbation, curvature, seed, batch_size, device, options)
        best = (torch.empty(len(queries), 0, dtype=torch.float64), torch.empty(len(queries), 0, dtype=torch.int64))
        for positions, block in blocks:
            places = torch.arange(positions.start, positions.stop).expand(len(queries), -1)
            best = _best(k, (best[0], block.cpu()), (best[1], places))
    parts = run.shards.objects(best)
    values, places = _best(k, [p[0] for p in parts], [p[1] for p in parts])
    kept = values.shape[1]
    return pd.DataFrame(
        {
            "query": queries.index.repeat_interleave(kept).numpy(),
            "rank": torch.arange(1, kept + 1).repeat(len(queries)).numpy(),
            "index": run.data.index[places.flatten()].numpy(), "influence": values.flatten().numpy(),
        }
    )  # fmt: skip


def _best(k: int, values: Any, places: Any) -> tuple[Tensor, Tensor]:
    """The k highest of the values side by side, and their places."""
    v, p = torch.cat(list(values), 1), torch.cat(list(places), 1)
    best, columns = v.topk(min(k, v.shape[1]), dim=1)
    return best, p.gather(1, columns)


def _blocks(
    encoder: nn.Module, train: Images | Tensor, query: Images | Tensor, perturbation: Perturbation | Perturb,
    curvature: Curvature, seed: int, batch_size: int, device: str | torch.device | None, options: dict[str, Any],
) -> tuple[Run, Iterator[tuple[slice, Tensor]]]:  # fmt: skip
    """The scores (q, b) of each chunk of training images."""
    queries = query if isinstance(query, Images) else as_images(query)
    if len(queries) == 0:
        raise IsslError(f"query {queries.name!r}: the set is empty")
    run = prepare(encoder, train, perturbation, curvature, seed, batch_size, device, **options)
    if queries.pixels.shape[2:] != run.data.pixels.shape[2:]:
        raise IsslError(
            f"query images are {tuple(queries.pixels.shape[2:])} px, the training images "
            f"{tuple(run.data.pixels.shape[2:])}; load both at one size"
        )
    weighings = {name: w[0] for name, w in run.weighings([curvature.damping]).items()}
    chunks = split(slice(0, len(queries)), run.row_bytes)
    asked = make_pass(run.measure(queries), chunks, batch_size, "recomputed", None, identity=str, progress=False)
    whitened = torch.cat([_whitened(weighings, rows, run.device) for _, rows in asked()])

    def blocks() -> Iterator[tuple[slice, Tensor]]:
        for positions, rows in run.rows():
            yield positions, whitened @ _whitened(weighings, rows, run.device).T

    return run, blocks()


def _whitened(weighings: dict[str, Weighing], rows: Any, device: torch.device) -> Float[Tensor, "b m"]:
    """All layers' weighed rows side by side, so that one product sums over layers."""
    return torch.cat([w.whiten(rows(f"layer.{name}").to(device).double().mean(1)) for name, w in weighings.items()], 1)
