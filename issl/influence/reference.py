"""The score, computed directly from its formula: plain autograd, one image at a time, and dense
inverses. It is slow, and meant for checking.

    loss of image i             ℓ_i = 1 − cos(f(x_i), f(x̂_i))
    its gradient in layer l     G_i = ∂ℓ_i / ∂W_l,   g_i = vec G_i                      `gradients`
    LoGra keeps instead         P_out G_i P_inᵀ                                         `project`
    curvature and damping       H_l = mean_i g_i g_iᵀ,   λ_l = 0.1 · mean diagonal of H_l
    self-influence of i         Σ_l g_iᵀ (H_l + λ_l I)⁻¹ g_i                     `self_influence`
    cross-influence of i on j   Σ_l g_jᵀ (H_l + λ_l I)⁻¹ g_i                    `cross_influence`

The score is from arXiv 2412.17170, §3, without its minus sign (the paper writes −gᵀH⁻¹g). LoGra is
from arXiv 2405.13954, §3.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from issl.data.images import Images
from issl.influence.layers import Layer
from issl.influence.losses import Loss
from issl.influence.perturbation import Perturb

# layer name → one gradient matrix per image, (n, c_out, d_in)
Gradients = Mapping[str, Float[Tensor, "_ _ _"]]


def cosine_loss(
    features: Float[Tensor, "1 d"], perturbed: Float[Tensor, "1 d"]
) -> Float[Tensor, " 1"]:
    """ℓ = 1 − cos(f(x), f(x̂))."""
    return 1 - F.cosine_similarity(features, perturbed)


def gradients(
    encoder: nn.Module, images: Images, perturb: Perturb, loss: Loss = cosine_loss
) -> tuple[Float[Tensor, " n"], Gradients]:
    """Each image's loss, and the gradient of that loss with respect to every Linear and Conv2d
    weight, as a c_out × d_in matrix."""
    weights = {
        name: layer.weight for name, layer in encoder.named_modules() if isinstance(layer, Layer)
    }
    losses: list[Tensor] = []
    found: list[list[Tensor]] = []
    for i in range(len(images)):
        x = images.pixels[i : i + 1].to(next(encoder.parameters())) / 255
        ell = loss(encoder(x), encoder(perturb(x, images.index[i : i + 1]))).squeeze()
        found.append([g.flatten(1) for g in torch.autograd.grad(ell, list(weights.values()))])
        losses.append(ell.detach())
    return torch.stack(losses), {
        name: torch.stack([g[k] for g in found]) for k, name in enumerate(weights)
    }


def project(g: Gradients, projections: Mapping[str, tuple[Tensor, Tensor]]) -> Gradients:
    """LoGra: P_out G_i P_inᵀ for every image and layer, given each layer's (P_out, P_in)."""
    return {name: p_out @ g[name] @ p_in.T for name, (p_out, p_in) in projections.items()}


def self_influence(
    g: Gradients, damping: float = 0.1, diagonal: bool = False
) -> Float[Tensor, " n"]:
    """Σ_l g_iᵀ (H_l + λ_l I)⁻¹ g_i for every image i; arguments as in `cross_influence`."""
    return cross_influence(g, g, damping, diagonal).diagonal()


def cross_influence(
    train: Gradients, query: Gradients, damping: float = 0.1, diagonal: bool = False
) -> Float[Tensor, "q n"]:
    """Σ_l g_jᵀ (H_l + λ_l I)⁻¹ g_i for every training image i (column) and every query j (row).

    diagonal    keep only H's diagonal
    """
    scores = torch.tensor(0.0, dtype=torch.float64)
    for name in train:
        g_i, g_j = train[name].flatten(1).double(), query[name].flatten(1).double()
        h = g_i.T @ g_i / len(g_i)  # mean_i g_i g_iᵀ
        h = h.diagonal().diag() if diagonal else h
        lam = damping * h.diagonal().mean()
        scores = scores + g_j @ torch.linalg.inv(h + lam * torch.eye(len(h)).double()) @ g_i.T
    return scores
