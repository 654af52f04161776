"""Self-influence: how strongly each training image's stability loss pulls on the encoder's weights.

    influence_i = Σ_l g_iᵀ (H_l + λ_l I)⁻¹ g_i ≥ 0,   g_i = ∇ ℓ_i,   ℓ_i = 1 − cos(f(x_i), f(x̂_i))

The paper (arXiv 2412.17170, §3) defines I = −g_iᵀH⁻¹g_i; we store the magnitude, so "high" is
large. The same in a few slow lines: `issl.influence.reference`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from issl.data.images import Images
from issl.devices import full_precision
from issl.errors import IsslError, number_or_nan
from issl.influence.computing import Computing
from issl.influence.curvature import Curvature, LoGra, Whitening
from issl.influence.losses import CrossEntropy, Loss, stability_loss
from issl.influence.measurement import Measurement, Run, prepare
from issl.influence.perturbation import GaussianNoise, Perturb, Perturbation, describe

EQUAL = 1e-6  # the relative spread below which scores are called equal


def self_influence(
    encoder: nn.Module,
    images: Images | Tensor,
    perturbation: Perturbation | Perturb = GaussianNoise(0.05, 0.2),
    curvature: Curvature = LoGra(rank=16, damping=0.1),
    seed: int = 0,
    *,
    draws: int = 1,
    average: Literal["gradients", "scores"] = "gradients",
    sweep: Sequence[float] = (),
    loss: Loss | CrossEntropy = stability_loss,
    fisher: Loss | CrossEntropy | None = None,
    skip: Sequence[str] = (),
    untrained: bool = False,
    computing: Computing = Computing(),
) -> pd.DataFrame:
    """The influence of each image on the encoder, one row per image, in the order given.

    The formula, one image at a time by plain autograd, is
    `issl.influence.reference.self_influence`.

    encoder       any nn.Module, eval mode, from float pixels in [0, 1] to features (n, d); left
                  untouched
    images        `issl.Images`, or a uint8 tensor (n, 3, H, W), indexed 0 … n−1
    perturbation  GaussianNoise, Augmentation, or a callable (pixels, index) → pixels that treats
                  each image by itself
    curvature     LoGra, EKFAC, Diagonal, Exact or Identity
    seed          of the perturbation; an image's draw depends only on (seed, its index)
    draws         K perturbation draws per image; draw k of seed s is that of seed s + k·2³²
    average       "gradients": g_i is the mean gradient over the draws; "scores": the influence is
                  the mean of the draws' scores, H the mean over images and draws
    sweep         further damping values: one column `influence@VALUE` each
    loss          whose gradients are scored: a per-example loss (features, perturbed features) →
                  (b,), or CrossEntropy() for the influence on a supervised model (the images need
                  labels)
    fisher        such a loss, from whose gradients H is made; default: `loss` itself
    skip          names of layers or parameters to leave out of the score
    untrained     score an encoder as initialised, as a control; else BatchNorm that was never
                  trained is an error
    computing     device, batch size, precision, memory, processes: see `issl.Computing`

    Columns: index; influence (dimensionless, ≥ 0, sum over layers); stability_loss (in [0, 2], mean
    over draws; named `loss` for any other loss);
    grad_norm (‖g_i‖ over all scored weights; for random LoGra below full rank the unbiased estimate
    from the projection, NaN for PCA); standard_error (of the influence, from the spread of the
    draws; K ≥ 2 only). `.attrs` holds the effective damping per layer and the settings.

    Raises IsslError for an encoder that cannot be scored, bad images or settings, NaN.
    """
    what = Measurement(perturbation, curvature, seed, draws, average, loss, fisher, skip, untrained)
    if not isinstance(sweep, Sequence | np.ndarray):
        raise IsslError(f"sweep={sweep!r}: give a list of dampings, such as [0.01, 1.0]")
    for value in sweep:
        if not 0 < number_or_nan(value) < np.inf:
            raise IsslError(f"sweep: damping {value!r} must be a finite number > 0")
    with full_precision():
        run = prepare(encoder, images, what, computing, norms_only=norms_suffice(what))
        return scores(run, run.whitenings([curvature.damping, *sweep]), sweep)


def norms_suffice(what: Measurement) -> bool:
    """Whether a self-influence never multiplies two different gradients."""
    return what.draws == 1 or what.pooled


def scores(
    run: Run, whitenings: dict[str, list[Whitening]], sweep: Sequence[float] = ()
) -> pd.DataFrame:
    """The table of `self_influence`: each image of `run` under these inverse curvatures, one for
    each damping."""
    what, shards = run.what, run.computing.shards
    curvature, draws, n = what.curvature, what.draws, len(run.data)
    losses, squares = np.zeros(n), np.zeros(n)
    values, draw_scores = np.zeros((1 + len(sweep), n)), np.zeros((n, draws))
    for positions, rows in run.rows():
        losses[positions] = rows("loss").double()
        for name, layer in run.probe.layers.items():
            g = rows(f"layer.{name}").to(run.probe.device)  # (b, draws, r)
            scale = curvature.norm_scale(layer)
            size = g.double().square().mean(1) if what.pooled else g.double().mean(1).square()
            squares[positions] += np.nan if scale is None else (size.sum(1) * scale).cpu().numpy()
            for k, whitening in enumerate(whitenings[name]):
                w = whitening.whiten(g.flatten(0, 1)).unflatten(0, g.shape[:2])
                center = w.mean(1)
                # "scores": each draw's own; "gradients": its share in ‖w̄‖², whose mean over draws
                # is ‖w̄‖²
                each = w.square().sum(2) if what.pooled else (w * center[:, None]).sum(2)
                values[k, positions] += each.mean(1).cpu().numpy()
                if k == 0:
                    draw_scores[positions] += each.cpu().numpy()
    losses, squares, values, draw_scores = shards.gather([losses, squares, values, draw_scores])
    rounding = 32 * torch.finfo(run.probe.dtype).eps if what.loss is stability_loss else 0.0
    if (word := says_nothing(values[0], losses, rounding)) is not None:
        warnings.warn(word, stacklevel=3)
    columns = {
        "index": run.data.index.numpy(),
        "influence": values[0],
        "stability_loss" if what.loss is stability_loss else "loss": losses,
        "grad_norm": np.sqrt(squares),
    }
    if draws > 1:
        # ‖w̄‖² is quadratic in the mean, so its error is twice that of the linear share (delta
        # method)
        factor = 1 if what.pooled else 2
        columns["standard_error"] = factor * draw_scores.std(1, ddof=1) / np.sqrt(draws)
    columns |= {f"influence@{value:g}": values[k + 1] for k, value in enumerate(sweep)}
    result = pd.DataFrame(columns)
    result.attrs = {
        "curvature": repr(curvature),
        "perturbation": describe(what.perturbation),
        "seed": what.seed,
        "images": run.data.name,
        "n": n,
        "damping": {name: w[0].damping for name, w in whitenings.items()},
        "skip": list(what.skip),
        "untrained": what.untrained,
        "draws": draws,
        "average": what.average,
        "precision": run.computing.precision,
        "memory": run.computing.memory,
    }
    return result


def says_nothing(influence: np.ndarray, losses: np.ndarray, rounding: float = 0.0) -> str | None:
    """Why these scores rank no image before another, in words; None where they do.

    rounding    losses up to this are rounding errors
    """
    if not losses.any():
        return (
            "every influence is 0: the perturbation does not move the features; use a stronger one"
        )
    if losses.max() <= rounding:
        return (
            f"every stability loss is below {rounding:.1g}, which is rounding: the perturbation hardly moves the "
            "features (do they differ between images at all?), so the ranking is noise"
        )
    low, high = influence.min(), influence.max()
    if high == 0:
        return "every influence is 0: no gradient is left, or the damping is too large; check `damping` and `skip`"
    if len(influence) > 1 and high - low <= EQUAL * high:
        return (
            f"every influence is {high:.6g}: there are fewer images than directions, so that a curvature with so "
            "little damping sets all alike; score more images, raise the damping or lower the rank"
        )
    return None
