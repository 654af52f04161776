"""The figures of notebook 00: one image on its way to its score, and what a projection keeps of the
exact ranking."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cosine_similarity

from issl.audit import figures
from issl.audit.plans_paper import MethodLesson
from issl.data.images import Images
from issl.influence.losses import stability_loss

LAYERS = "layer, from the pixels to the features"


def two_views(
    plan: MethodLesson,
    data: Images,
    noisy: Float[Tensor, "3 h w"],
    before: Float[Tensor, " d"],
    after: Float[Tensor, " d"],
) -> Figure:
    """Step 1: image number `plan.one`, its noisy copy, and the features (d,) of both."""
    x = data.pixels[plan.one].float() / 255
    cosine = cosine_similarity(before, after, dim=0)
    angle = float(torch.rad2deg(torch.arccos(cosine.clamp(-1, 1))))
    loss = float(stability_loss(before[None], after[None]))
    figure = plt.figure(figsize=(figures.PAGE, 2.3))
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1, 1.5])[0]
    pictures = {"x": x, "x̂ = x + ε": noisy, "ε (grey: 0)": 0.5 + (noisy - x)}
    for ax, (title, pixels) in zip(left.subplots(1, 3), pictures.items(), strict=True):
        ax.imshow(pixels.clamp(0, 1).permute(1, 2, 0), interpolation="nearest")
        ax.set_title(title)
        ax.set_axis_off()
    ax, order = right.subplots(), before.argsort(descending=True)
    ax.bar(range(len(order)), before[order], width=1, color="0.75", label="f(x), sorted")
    colour = figures.COLOURS[plan.method]
    ax.plot(range(len(order)), after[order], color=colour, lw=1.2, label="f(x̂), in the same order")
    ax.set(xlabel="feature", ylabel="value")
    ax.legend(frameon=False)
    ax.set_title(f"cos = {cosine:.4f}, an angle of {angle:.1f}°: ℓ = {loss:.4f}", loc="left")
    title = f"Step 1: image {int(data.index[plan.one])}, its noisy copy, and what the encoder makes of both"
    figure.suptitle(title, fontsize=9)
    return figure


def gradient(
    norms: Mapping[str, float],
    checked: str,
    whole: Float[Tensor, "c_out d_in"],
    kept: Float[Tensor, "k_out k_in"],
) -> Figure:
    """Step 2: the norm of one image's gradient in each layer, and its matrix in one layer, whole
    and projected."""
    figure, (bars, left, right) = plt.subplots(
        1, 3, figsize=(figures.PAGE, 2.5), width_ratios=[1.5, 1.3, 1]
    )
    _by_layer(bars, norms, checked)
    bars.set(ylabel="‖∂ℓ/∂W‖")
    bars.set_title("the pull on each layer", loc="left")
    _matrix(left, whole, f"the orange layer's: {whole.shape[0]} × {whole.shape[1]}", "inputs")
    _matrix(right, kept, f"projected: {kept.shape[0]} × {kept.shape[1]}", "projected inputs")
    ratio, size = kept.numel() / whole.numel(), float(kept.square().sum() / whole.square().sum())
    figure.suptitle(
        f"Step 2: the image's gradient, kept as {ratio:.0%} of its numbers in this layer "
        f"(‖G‖² is {size:.0%} of ‖∂ℓ/∂W‖²; expected for random projections: {ratio:.0%})",
        fontsize=8.5,
    )
    return figure


def score(
    eigenvalues: Float[Tensor, " r"],
    lam: float,
    by_layer: Mapping[str, float],
    checked: str,
    influence: Float[np.ndarray, " n"],
    followed: int,
) -> Figure:
    """Step 3: one layer's eigenvalues with their damping λ, the image's score by layer, and its
    place among all."""
    figure, (eigen, parts, among) = plt.subplots(
        1, 3, figsize=(figures.PAGE, 2.4), width_ratios=[1.2, 1.2, 1]
    )
    smallest = 1e-6 * float(eigenvalues[0])
    eigen.semilogy(range(1, len(eigenvalues) + 1), eigenvalues.clamp(min=smallest), color="C1")
    eigen.axhline(lam, color="grey", lw=0.8, ls="--")
    eigen.set(xlabel="eigenvalue, by size", ylabel="of H (orange layer)")
    eigen.set_title(f"above λ: {int((eigenvalues > lam).sum())} of {len(eigenvalues)}", loc="left")
    _by_layer(parts, by_layer, checked)
    parts.set(ylabel="gᵀ(H+λ)⁻¹g")
    parts.set_title("its score, layer by layer", loc="left")
    among.hist(np.log10(influence), bins=15, color="0.75")
    among.axvline(np.log10(influence[followed]), color="C1", lw=1.5)
    among.set(xlabel="log₁₀ influence", ylabel="images")
    place = int((influence > influence[followed]).sum()) + 1
    among.set_title(f"rank {place} of {len(influence)}", loc="left")
    figure.suptitle(
        f"Step 3: curvature, damping, score. Influence {influence[followed]:.0f} = the sum of the {len(by_layer)} bars "
        "in the middle",
        fontsize=9,
    )
    return figure


def ranks(
    data: Images,
    noisy: Float[Tensor, "n 3 h w"],
    order: np.ndarray,
    by_rank: pd.DataFrame,
    difference: float,
) -> Figure:
    """Images of highest and lowest influence, their noisy copies, and how much of the exact ranking
    low rank keeps.

    order       (n,) positions, lowest influence first
    by_rank     rank, spearman: with the exact score
    difference  the largest relative one at full rank
    """
    figure = plt.figure(figsize=(figures.PAGE, 2.7))
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.5, 1])[0]
    picked = [*order[-8:][::-1], *order[:8]]  # one row each
    top, bottom = left.subplots(2, 1)
    figures.gallery(
        top, data.subset(picked), f"first row: highest influence of {len(data)}; second row: lowest"
    )
    pixels = (noisy[picked].clamp(0, 1) * 255).round().byte()
    copies = Images(pixels, None, data.attributes.iloc[picked], "noisy")
    figures.gallery(bottom, copies, "their noisy views (μ = 0.05, σ = 0.2)")
    ax = right.subplots()
    ax.plot(by_rank["rank"], by_rank["spearman"], marker="o")
    ax.set(
        xscale="log",
        xlabel="LoGra rank per side",
        ylabel="Spearman ρ with the exact score",
        ylim=(None, 1.02),
    )
    ax.set_xticks(by_rank["rank"], by_rank["rank"].astype(str))
    ax.minorticks_off()
    ax.axhline(1, color="grey", lw=0.7, ls=":")
    at16 = by_rank.set_index("rank")["spearman"][16]
    ax.set_title(f"Rank 16: ρ = {at16:.3f}; full rank: equal to {difference:.0e}", loc="left")
    return figure


def _by_layer(ax: Axes, values: Mapping[str, float], checked: str) -> None:
    colours = ["C1" if name == checked else "0.7" for name in values]
    ax.bar(range(len(values)), list(values.values()), color=colours)
    ax.set_xlabel(LAYERS)


def _matrix(ax: Axes, matrix: Float[Tensor, "a b"], title: str, inputs: str) -> None:
    extreme = float(matrix.abs().max())
    ax.imshow(
        matrix.numpy(),
        cmap="RdBu_r",
        vmin=-extreme,
        vmax=extreme,
        aspect="auto",
        interpolation="nearest",
    )
    ax.set_title(title, loc="left")
    ax.set(xticks=[], yticks=[], xlabel=inputs, ylabel="outputs")
