"""Self-influence: how strongly each training image's stability loss pulls on the encoder's weights.

    influence_i = Σ_l g_iᵀ (H_l + λ_l I)⁻¹ g_i ≥ 0,   g_i = ∇ ℓ_i,   ℓ_i = 1 − cos(f(x_i), f(x̂_i))

The paper (arXiv 2412.17170, §3) defines I = −g_iᵀH⁻¹g_i; we store the magnitude, so "high" is large.
Cross-influence of image i on query j: Σ_l g_jᵀ (H_l + λ_l I)⁻¹ g_i, H that of the training images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from issl import keyed_random
from issl.data.images import Images
from issl.devices import full_precision
from issl.errors import IsslError
from issl.influence.curvature import Curvature, LoGra, Statistic, Weighing, needs_moments
from issl.influence.frozen_encoder import fold_batchnorm, frozen_copy
from issl.influence.gradient_store import Measure, Memory, Pass, choose_memory, fingerprint, make_pass, split
from issl.influence.layers import Layer, scored_layers, weight_shape
from issl.influence.losses import CrossEntropy, Loss, stability_loss
from issl.influence.per_example import Moments, Sketch, check_features, kept_width, per_example, second_moments
from issl.influence.perturbation import GaussianNoise, Perturb, Perturbation, as_perturb, describe
from issl.shards import ONE, Shards

FIT_BATCH = 64  # fixed, so that the bases taken from moments do not depend on the caller's batch size


def self_influence(
    encoder: nn.Module,
    images: Images | Tensor,
    perturbation: Perturbation | Perturb = GaussianNoise(0.05, 0.2),
    curvature: Curvature = LoGra(rank=16, damping=0.1),
    seed: int = 0,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    *,
    draws: int = 1,
    average: Literal["gradients", "scores"] = "gradients",
    sweep: Sequence[float] = (),
    loss: Loss | CrossEntropy = stability_loss,
    fisher: Loss | CrossEntropy | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    memory: Memory = "auto",
    memory_gb: float | None = None,
    skip: Sequence[str] = (),
    store: str | Path | None = None,
    shards: Shards = ONE,
    progress: bool = False,
) -> pd.DataFrame:
    """The influence of each image on the encoder; one row an image, in the order given.

    encoder       any nn.Module, eval mode, from float pixels in [0, 1] to features (n, d); left untouched
    images        `issl.Images`, or a uint8 tensor (n, 3, H, W), indexed 0 … n−1
    perturbation  GaussianNoise, or a callable (pixels, index) → pixels that treats each image by itself
    curvature     LoGra, EKFAC, Diagonal, Exact or Identity
    seed          of the perturbation; an image's draw depends on (seed, its index) and nothing else
    device        where to compute; default: where the encoder is
    draws         K perturbation draws an image; draw k of seed s is that of seed s + k·2³²
    average       "gradients": g_i is the mean gradient over the draws; "scores": the influence is the mean of the
                  draws' scores, H the mean over images and draws
    sweep         further damping values: one column `influence@VALUE` each
    loss          whose gradients are weighed: a per-example loss (features, perturbed features) → (b,), or
                  CrossEntropy() for the influence on a supervised model (the images need labels)
    fisher        such a loss whose gradients make H; default: `loss` itself
    precision     "bf16" computes the features under autocast; sums and curvature stay as they are
    memory        how the projected gradients are had twice: "ram", "mapped" (files), "recomputed"; "auto" takes the
                  first that fits `memory_gb` (default: half of the free memory) or the free disk
    skip          names of layers or parameters to leave out of the score
    store         a folder for the projected gradients: an interrupted call resumes from it
    shards        this process's share of the images, see `issl.shards`; every process returns all scores

    Columns: index; influence (dimensionless, ≥ 0, sum over layers); stability_loss (in [0, 2], mean over draws;
    `loss` where it is another);
    grad_norm (‖g_i‖ over all scored weights; for random LoGra below full rank the unbiased estimate from the
    projection, NaN for PCA); standard_error (of the influence, from the spread of the draws; K ≥ 2 only).
    `.attrs` holds the effective damping per layer and the settings.

    Raises IsslError for an encoder that cannot be scored, bad images or settings, NaN.
    """
    if average not in ("gradients", "scores"):
        raise IsslError(f"average={average!r}: choose gradients or scores")
    for value in sweep:
        if not value > 0:
            raise IsslError(f"sweep: damping {value} must be > 0")
    with full_precision():
        run = prepare(
            encoder, images, perturbation, curvature, seed, batch_size, device, draws=draws, loss=loss, fisher=fisher,
            precision=precision, memory=memory, memory_gb=memory_gb, skip=skip, store=store, shards=shards,
            progress=progress, norms_only=draws == 1 or average == "scores", pooled=average == "scores",
        )  # fmt: skip
        dampings = [curvature.damping, *sweep]
        weighings = run.weighings(dampings)
        n = len(run.data)
        losses, squares = np.zeros(n), np.zeros(n)
        scores, draw_scores = np.zeros((len(dampings), n)), np.zeros((n, draws))
        for positions, rows in run.rows():
            losses[positions] = rows("loss").double()
            for name, layer in run.layers.items():
                g = rows(f"layer.{name}").to(run.device)  # (b, draws, r)
                scale = curvature.norm_scale(layer)
                size = g.double().square().mean(1) if run.pooled else g.double().mean(1).square()
                squares[positions] += np.nan if scale is None else (size.sum(1) * scale).cpu().numpy()
                for k, weighing in enumerate(weighings[name]):
                    w = weighing.whiten(g.flatten(0, 1)).unflatten(0, g.shape[:2])
                    center = w.mean(1)
                    # "scores": each draw's own; "gradients": its share in ‖w̄‖², whose mean over draws is ‖w̄‖²
                    each = w.square().sum(2) if average == "scores" else (w * center[:, None]).sum(2)
                    scores[k, positions] += each.mean(1).cpu().numpy()
                    if k == 0:
                        draw_scores[positions] += each.cpu().numpy()
        losses, squares, scores, draw_scores = shards.gather([losses, squares, scores, draw_scores])
    columns = {
        "index": run.data.index.numpy(), "influence": scores[0],
        "stability_loss" if loss is stability_loss else "loss": losses, "grad_norm": np.sqrt(squares),
    }  # fmt: skip
    if draws > 1:
        # ‖w̄‖² is quadratic in the mean, so its error is twice that of the linear share (delta method)
        factor = 1 if average == "scores" else 2
        columns["standard_error"] = factor * draw_scores.std(1, ddof=1) / np.sqrt(draws)
    columns |= {f"influence@{value:g}": scores[k + 1] for k, value in enumerate(sweep)}
    result = pd.DataFrame(columns)
    result.attrs = {
        "curvature": repr(curvature), "perturbation": describe(perturbation), "seed": seed, "images": run.data.name,
        "n": n, "damping": {name: w[0].damping for name, w in weighings.items()}, "skip": list(skip), "draws": draws,
        "average": average, "precision": precision, "memory": run.memory,
    }  # fmt: skip
    return result


@dataclass(frozen=True)
class Run:
    """All that one measurement needs, prepared: model, layers, bases, and the pass over the training images."""

    data: Images
    device: torch.device
    layers: dict[str, Layer]
    curvature: Curvature
    draws: int
    pooled: bool
    memory: Memory
    row_bytes: int  # of one image
    shards: Shards
    rows: Pass  # of the training images
    fisher_rows: Pass | None  # of the loss that makes H, where it is another
    measure: Callable[[Images], Measure]  # of any images, under the same model and bases

    def weighings(self, dampings: Sequence[float]) -> dict[str, list[Weighing]]:
        """Each layer's inverse curvature at each damping, over all images and processes."""
        sums: dict[str, Statistic] = {}
        count = len(self.data) * (self.draws if self.pooled else 1)
        for _, rows in (self.fisher_rows or self.rows)():
            for name in self.layers:
                g = rows(f"layer.{name}").to(self.device)
                g = g.flatten(0, 1) if self.pooled else g.mean(1)
                if name not in sums:
                    sums[name] = self.curvature.statistic(g.shape[1], count, self.fisher_rows is not None)
                sums[name].add(g)
        self.shards.reduce([sums[name] for name in self.layers])
        absolute = self.curvature.absolute
        return {name: [sums[name].weigh(d, absolute) for d in dampings] for name in self.layers}


def prepare(
    encoder: nn.Module,
    images: Images | Tensor,
    perturbation: Perturbation | Perturb,
    curvature: Curvature,
    seed: int,
    batch_size: int,
    device: str | torch.device | None,
    *,
    draws: int = 1,
    loss: Loss | CrossEntropy = stability_loss,
    fisher: Loss | CrossEntropy | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    memory: Memory = "auto",
    memory_gb: float | None = None,
    skip: Sequence[str] = (),
    store: str | Path | None = None,
    shards: Shards = ONE,
    progress: bool = False,
    norms_only: bool = False,
    pooled: bool = False,
) -> Run:
    """Check everything that can be wrong, and set up the pass over `images`; the arguments are those of
    `self_influence`. norms_only: no other gradient will be set against an image's."""
    data = images if isinstance(images, Images) else as_images(images)
    if len(data) == 0:
        raise IsslError(f"images {data.name!r}: the set is empty")
    if batch_size < 1:
        raise IsslError(f"batch_size={batch_size}: must be 1 or more")
    if precision not in ("fp32", "bf16"):
        raise IsslError(f"precision={precision!r}: choose fp32 or bf16")
    perturbs = _draws(perturbation, seed, draws)
    scored_layers(encoder, skip)  # before any work
    first = next(encoder.parameters())
    target = torch.device(device) if device is not None else first.device
    model = frozen_copy(encoder, target)
    layers = scored_layers(model, skip)
    _check_independent(model, data, target, first.dtype)
    fold_batchnorm(model, data.pixels[:4].to(target).to(first.dtype) / 255)

    def views(source: Images, rows: slice | Tensor, perturb: Perturb) -> tuple[Tensor, Tensor]:
        x = source.pixels[rows].to(target).to(first.dtype) / 255
        shaken = perturb(x, source.index[rows])
        _check_view(shaken, x, source.index[rows])
        return x, shaken

    def bound(loss: Loss | CrossEntropy, source: Images, rows: slice | Tensor) -> Loss:
        return loss.on(source.require_labels()[rows]) if isinstance(loss, CrossEntropy) else loss

    def measure_with(loss: Loss | CrossEntropy) -> Callable[[Images], Measure]:
        def of(source: Images) -> Measure:
            def measure(rows: slice) -> dict[str, Tensor]:
                found = []
                of_rows = bound(loss, source, rows)
                for perturb in perturbs:
                    losses, kept = per_example(
                        model, layers, sketches, *views(source, rows, perturb), of_rows, precision == "bf16"
                    )
                    _check_finite({"loss": losses, **kept}, source.index[rows])
                    found.append((losses, kept))
                gradients = {f"layer.{k}": torch.stack([kept[k] for _, kept in found], 1) for k in layers}
                return {"loss": torch.stack([ell for ell, _ in found]).mean(0), **gradients}

            return measure

        return of

    moments: dict[str, Moments | None] = dict.fromkeys(layers)
    if needs_moments(curvature):
        fitted = _fit_rows(data, curvature.fit, getattr(curvature, "seed", 0))
        batches = [fitted[k : k + FIT_BATCH] for k in range(0, len(fitted), FIT_BATCH)]
        for batch in batches[shards.rank :: shards.world]:
            weigh = bound(fisher or loss, data, batch)
            found = second_moments(model, layers, *views(data, batch, perturbs[0]), weigh)
            for name, new in found.items():
                old = moments[name]
                moments[name] = new if old is None else Moments(old.inputs + new.inputs, old.outputs + new.outputs)
        moments = _summed(moments, layers, shards)
    sketches: dict[str, Sketch] = {
        name: curvature.sketch(layer, k, moments[name], norms_only) for k, (name, layer) in enumerate(layers.items())
    }
    share = shards.share(len(data))
    wide = sum(kept_width(layer, sketches[name]) for name, layer in layers.items())
    row_bytes = first.element_size() * wide * draws
    way = choose_memory(
        memory, memory_gb, row_bytes * (share.stop - share.start), None if store is None else Path(store)
    )
    settings = (describe(perturbation), curvature, seed, list(skip), draws, precision, norms_only)

    def make(loss: Loss | CrossEntropy, folder: str) -> Pass:
        place = None if store is None else Path(store) / folder
        return make_pass(
            measure_with(loss)(data), split(share, row_bytes), batch_size, way, place,
            lambda: fingerprint(model, data, *settings, getattr(loss, "__qualname__", repr(loss))), progress,
        )  # fmt: skip

    return Run(
        data, target, layers, curvature, draws, pooled, way, row_bytes, shards, make(loss, ""),
        None if fisher is None else make(fisher, "fisher"), measure_with(loss),
    )  # fmt: skip


def _draws(perturbation: Perturbation | Perturb, seed: int, draws: int) -> list[Perturb]:
    if draws < 1:
        raise IsslError(f"draws={draws}: must be 1 or more")
    if draws > 1 and (not isinstance(perturbation, Perturbation) or seed >= 2**32):
        raise IsslError(
            f"draws={draws}: several draws need a perturbation with .keyed(seed), such as GaussianNoise(), and a seed "
            f"below 2³² (got {describe(perturbation)}, seed {seed})"
        )
    return [as_perturb(perturbation, seed + (k << 32)) for k in range(draws)]


def _fit_rows(data: Images, fit: int | None, seed: int) -> Int64[Tensor, " m"]:
    """Positions of the images that the moments are taken over, in the order of their index: those whose index
    draws the smallest numbers, so neither the order of the images nor the batch size decides."""
    order = data.index.argsort()
    if fit is None or fit >= len(data):
        return order
    drawn = keyed_random.uniform(seed, data.index[order], (1,)).squeeze(1)
    return order[drawn.argsort(stable=True)[:fit].sort()[0]]


def _summed(moments: dict[str, Moments | None], layers: dict[str, Layer], shards: Shards) -> dict[str, Moments | None]:
    """Over all processes; one without a batch brings zeros."""
    done: dict[str, Moments | None] = {}
    for name, layer in layers.items():
        out, inside = weight_shape(layer)
        own = moments[name]
        zeros = torch.zeros(0, dtype=torch.float64, device=layer.weight.device)
        a = zeros.new_zeros(inside, inside) if own is None else own.inputs
        d = zeros.new_zeros(out, out) if own is None else own.outputs
        done[name] = Moments(shards.sum(a), shards.sum(d))
    return done


def _check_finite(values: dict[str, Tensor], index: Int64[Tensor, " b"]) -> None:
    for name, value in values.items():
        if not bool(torch.isfinite(value).all()):
            good = torch.isfinite(value.flatten(1) if value.ndim > 1 else value[:, None]).all(1).cpu()
            raise IsslError(f"{name} is not finite for image index {index[~good][:5].tolist()}")


def as_images(pixels: Tensor) -> Images:
    """A bare tensor as `Images`, indexed 0 … n−1."""
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[1] != 3:
        shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise IsslError(f"images: got {shape}, need issl.Images or a tensor (n, 3, H, W)")
    if pixels.dtype != torch.uint8:
        raise IsslError(
            f"images: pixels are {pixels.dtype}; give uint8, 0 to 255 (for floats: (255 * x).round().byte())"
        )
    return Images(pixels.cpu(), None, pd.DataFrame({"index": range(len(pixels))}), "tensor")


def _check_view(shaken: Tensor, x: Tensor, index: Int64[Tensor, " b"]) -> None:
    if not isinstance(shaken, Tensor) or shaken.shape != x.shape:
        shape = tuple(shaken.shape) if isinstance(shaken, Tensor) else type(shaken).__name__
        raise IsslError(f"perturbation gives {shape} for pixels {tuple(x.shape)}; it must keep the shape")
    finite = torch.isfinite(shaken).flatten(1).all(1).cpu()
    if not bool(finite.all()):
        raise IsslError(f"perturbation gives NaN or infinite pixels for image index {index[~finite][:5].tolist()}")


@torch.no_grad()
def _check_independent(model: nn.Module, data: Images, device: torch.device, dtype: torch.dtype) -> None:
    """The loss must be per example: an image's features may not depend on its neighbours in the batch."""
    x = data.pixels[:4].to(device).to(dtype) / 255
    together = model(x)
    check_features(together, len(x))
    alone = model(x[:1])
    check_features(alone, 1)
    if not torch.allclose(together[:1], alone, rtol=1e-2, atol=1e-3 * float(alone.abs().max())):
        raise IsslError(
            "encoder gives an image other features alone than in a batch, so its loss is not per example; remove what "
            "mixes the batch"
        )
