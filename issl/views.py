"""Views of an image: the random augmentations of pretraining and the perturbations of the stability loss.

Every operation is batched, runs where the pixels are, and takes its parameters one per image as tensors,
so that an image's view is a function of its own parameters alone. Pixels are float in [0, 1].
Parameters come from uniform numbers: `issl.pretrain` draws a table of them per epoch over the whole data
set, so that leaving one image out changes the views of no other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from issl.errors import IsslError
from issl.keyed import normal

Pixels = Float[Tensor, "b 3 h w"]
PerImage = Float[Tensor, " b"]


# --- operations ----------------------------------------------------------------------------------------


def crop(x: Pixels, box: Float[Tensor, "b 4"]) -> Pixels:
    """Resize each image's own box to the full size, bilinear. box = (centre_y, centre_x, height, width),
    as fractions of the image; torchvision's `resized_crop` without antialiasing."""
    cy, cx, h, w = box.unbind(1)
    theta = x.new_zeros(len(x), 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = w, 2 * cx - 1
    theta[:, 1, 1], theta[:, 1, 2] = h, 2 * cy - 1
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def flip(x: Pixels, yes: Bool[Tensor, " b"]) -> Pixels:
    """Mirror left and right the images where `yes`."""
    return torch.where(yes[:, None, None, None], x.flip(3), x)


def luma(x: Pixels) -> Float[Tensor, "b 1 h w"]:
    """ITU-R BT.601 grey, PIL's weights (torchvision's tensor operations round the first to 0.2989)."""
    return (x * x.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def brightness(x: Pixels, factor: PerImage) -> Pixels:
    """x · factor."""
    return (x * factor[:, None, None, None]).clamp(0, 1)


def contrast(x: Pixels, factor: PerImage) -> Pixels:
    """Blend with the image's mean grey: mean + factor · (x − mean)."""
    mean = luma(x).mean((2, 3), keepdim=True)
    return torch.lerp(mean.expand_as(x), x, factor[:, None, None, None]).clamp(0, 1)


def saturation(x: Pixels, factor: PerImage) -> Pixels:
    """Blend with the image's grey copy: grey + factor · (x − grey)."""
    return torch.lerp(luma(x).expand_as(x), x, factor[:, None, None, None]).clamp(0, 1)


def hue(x: Pixels, shift: PerImage) -> Pixels:
    """Turn the hue in HSV space by `shift` of a full circle, in [−0.5, 0.5]."""
    value, _ = x.max(1)
    chroma = value - x.min(1).values
    r, g, b = x.unbind(1)
    safe = torch.where(chroma > 0, chroma, 1)
    sector = torch.where(
        value == r, ((g - b) / safe) % 6, torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)
    )
    turned = sector + 6 * shift[:, None, None]
    k = (turned[:, None] + x.new_tensor([5, 3, 1])[:, None, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def grayscale(x: Pixels, yes: Bool[Tensor, " b"]) -> Pixels:
    """Grey copies of the images where `yes`."""
    return torch.where(yes[:, None, None, None], luma(x).expand_as(x), x)


JITTERS = (brightness, contrast, saturation, hue)


def jitter(x: Pixels, factors: Float[Tensor, "b 4"], order: Int[Tensor, "b 4"], yes: Bool[Tensor, " b"]) -> Pixels:
    """Colour jitter: the four JITTERS with each image's own factors in its own order, where `yes`."""
    out = x.clone()
    for step in range(4):
        for which, operation in enumerate(JITTERS):
            rows = (yes & (order[:, step] == which)).nonzero().squeeze(1)
            out[rows] = operation(out[rows], factors[rows, which])
    return out


# --- the random view of SimCLR -------------------------------------------------------------------------

VIEW_UNIFORMS = 15  # how many uniform numbers one view consumes


@dataclass(frozen=True)
class SimCLRView:
    """The SimCLR augmentation for small images (Chen et al. 2020, arXiv 2002.05709, App. A and B.9: crop,
    flip, colour jitter of strength 0.5, grayscale; no blur on CIFAR)."""

    min_area: float = 0.2
    jitter: float = 0.5
    jitter_probability: float = 0.8
    grayscale_probability: float = 0.2

    def __call__(self, x: Pixels, u: Float[Tensor, "b 15"]) -> Pixels:
        """One view of each image, its randomness given by its row of uniform numbers."""
        x = flip(crop(x, crop_boxes(u[:, :4], self.min_area)), u[:, 4] < 0.5)
        s = self.jitter
        spread = x.new_tensor([0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s])
        centre = x.new_tensor([1.0, 1.0, 1.0, 0.0])
        factors = centre + spread * (2 * u[:, 5:9] - 1)
        x = jitter(x, factors, u[:, 9:13].argsort(1), u[:, 13] < self.jitter_probability)
        return grayscale(x, u[:, 14] < self.grayscale_probability)


def crop_boxes(u: Float[Tensor, "b 4"], min_area: float) -> Float[Tensor, "b 4"]:
    """Random-resized-crop boxes: area uniform in [min_area, 1], log aspect uniform in ±log 4/3, any place.

    torchvision redraws a box that does not fit; here its longer side is cut to the image, which keeps
    one fixed number of uniforms per image.
    """
    area = min_area + (1 - min_area) * u[:, 0]
    aspect = torch.exp((2 * u[:, 1] - 1) * torch.log(u.new_tensor(4 / 3)))
    h, w = (area / aspect).sqrt().clamp(max=1), (area * aspect).sqrt().clamp(max=1)
    cy, cx = h / 2 + u[:, 2] * (1 - h), w / 2 + u[:, 3] * (1 - w)
    return torch.stack([cy, cx, h, w], 1)


# --- perturbations of the stability loss ---------------------------------------------------------------

Perturb = Callable[[Pixels, Int[Tensor, " b"]], Pixels]


@runtime_checkable
class Perturbation(Protocol):
    """A perturbation with randomness: `keyed(seed)` fixes it to a function of pixels and image index."""

    def keyed(self, seed: int) -> Perturb: ...


@dataclass(frozen=True)
class GaussianNoise:
    """x̂ = x + ε, ε ~ N(mean, std²) for each pixel and channel, not clipped (arXiv 2412.17170, §3)."""

    mean: float = 0.05
    std: float = 0.2

    def __post_init__(self) -> None:
        if not self.std >= 0:
            raise IsslError(f"GaussianNoise(std={self.std}): the standard deviation must be ≥ 0")

    def keyed(self, seed: int) -> Perturb:
        """The noise of image `index` is a function of (seed, index) and the image's size alone."""

        def perturb(x: Pixels, index: Int[Tensor, " b"]) -> Pixels:
            noise = normal(seed, index, x.shape[1:]).to(x.device, x.dtype)
            return x + self.mean + self.std * noise

        return perturb


def describe(perturbation: Perturbation | Perturb) -> str:
    """The same text in every process: a perturbation's settings, or a function's name."""
    name = getattr(perturbation, "__qualname__", None)
    return repr(perturbation) if name is None else f"{getattr(perturbation, '__module__', '')}.{name}"


def as_perturb(perturbation: Perturbation | Perturb, seed: int) -> Perturb:
    """What the influence pass calls: a keyed perturbation, or the user's plain (pixels, index) → pixels."""
    if isinstance(perturbation, Perturbation) and not isinstance(perturbation, type):
        return perturbation.keyed(seed)
    if callable(perturbation) and not isinstance(perturbation, type):
        return perturbation
    raise IsslError(
        f"perturbation {perturbation!r}: need an object with .keyed(seed), such as GaussianNoise(), or a "
        "callable (pixels in [0, 1], index) -> pixels"
    )
