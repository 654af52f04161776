"""What a frozen encoder computes from images: features and stability losses."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from issl.data.images import Images
from issl.devices import Batches, full_precision
from issl.influence.losses import stability_loss
from issl.influence.perturbation import Perturb, Perturbation, keyed_draws

CPU = torch.device("cpu")


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
