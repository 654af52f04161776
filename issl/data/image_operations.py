"""Image operations: batched, on the device of the pixels, their parameters one per image as
tensors.

So an image's result is a function of its own parameters alone, and shapes never depend on values
(which suits a compiler, and no operation waits for the device). Pixels are float in [0, 1]. Each
operation equals torchvision's functional one with the same parameters (tested).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Pixels = Float[Tensor, "b 3 h w"]
PerImage = Float[Tensor, " b"]
Which = Bool[Tensor, " b"]

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(
    4
)  # the parts of colour jitter, as `order` names them


def crop(
    x: Pixels,
    box: Float[Tensor, "b 4"],
    mirror: Which | None = None,
    size: tuple[int, int] | None = None,
) -> Float[Tensor, "b 3 h2 w2"]:
    """Resize each image's own box to `size` (default: the image's), bilinear; mirrored where
    `mirror`.

    box = (centre_y, centre_x, height, width), as fractions of the image. One affine grid for both,
    the sampling of torchvision's `resized_crop` without antialiasing.
    """
    cy, cx, h, w = box.unbind(1)
    theta = x.new_zeros(len(x), 2, 3)
    theta[:, 0, 0] = w if mirror is None else torch.where(mirror, -w, w)
    theta[:, 0, 2] = 2 * cx - 1
    theta[:, 1, 1], theta[:, 1, 2] = h, 2 * cy - 1
    grid = F.affine_grid(theta, [len(x), 3, *(size or x.shape[2:])], align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def flip(x: Pixels, yes: Which) -> Pixels:
    """Mirror the images left to right where `yes`."""
    return torch.where(_wide(yes), x.flip(3), x)


def luma(x: Pixels) -> Float[Tensor, "b 1 h w"]:
    """ITU-R BT.601 grey, PIL's weights (torchvision's tensor operations round the first to
    0.2989)."""
    r, g, b = x.split(1, 1)
    return 0.299 * r + 0.587 * g + 0.114 * b


def brightness(x: Pixels, factor: PerImage) -> Pixels:
    """x · factor."""
    return (x * _wide(factor)).clamp(0, 1)


def contrast(x: Pixels, factor: PerImage) -> Pixels:
    """Blend with the image's mean grey: mean + factor · (x − mean)."""
    mean = luma(x).mean((2, 3), keepdim=True)
    return torch.lerp(mean, x, _wide(factor)).clamp(0, 1)


def saturation(x: Pixels, factor: PerImage) -> Pixels:
    """Blend with the image's grey copy: grey + factor · (x − grey)."""
    return torch.lerp(luma(x), x, _wide(factor)).clamp(0, 1)


def hue(x: Pixels, shift: PerImage) -> Pixels:
    """Rotate the hue in HSV space by `shift` of a full circle, in [−0.5, 0.5]."""
    value, _ = x.max(1)
    chroma = value - x.min(1).values
    r, g, b = x.unbind(1)
    safe = torch.where(chroma > 0, chroma, 1)
    sector = torch.where(
        value == r,
        ((g - b) / safe) % 6,
        torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4),
    )
    turned = sector + 6 * shift[:, None, None]
    offsets = torch.arange(5, 0, -2, device=x.device, dtype=x.dtype)  # of red, green, blue: 5, 3, 1
    k = (turned[:, None] + offsets[:, None, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def jitter(
    x: Pixels, factors: Float[Tensor, "b 4"], order: Int[Tensor, "b 4"], yes: Which
) -> Pixels:
    """Colour jitter: the four parts with each image's own factors, in its own order, where `yes`.

    Brightness, contrast and saturation are blends with a grey; hue is not. So every order is: up to
    three blends, hue, up to three blends. Where it is not a blend's turn, its factor is 1 and it
    changes nothing.
    """
    hue_at = order.eq(HUE).int().argmax(1)
    for step in range(3):
        x = _blend(x, factors, order[:, step], yes & (step < hue_at))
    x = torch.where(_wide(yes), hue(x, factors[:, HUE]), x)
    for step in range(1, 4):
        x = _blend(x, factors, order[:, step], yes & (step > hue_at))
    return x


def _blend(x: Pixels, factors: Tensor, which: Int[Tensor, " b"], active: Which) -> Pixels:
    """Brightness, contrast or saturation, as `which` says for the image; no change where not
    `active`."""
    factor = torch.where(active, factors.gather(1, which[:, None]).squeeze(1), 1)
    grey = luma(x)
    mean = grey.mean((2, 3), keepdim=True)
    base = torch.where(
        _wide(which == SATURATION), grey, torch.where(_wide(which == CONTRAST), mean, 0)
    )
    return torch.lerp(base, x, _wide(factor)).clamp_(0, 1)


def grayscale(x: Pixels, yes: Which) -> Pixels:
    """Grey copies of the images where `yes`."""
    return torch.where(_wide(yes), luma(x), x)


def blur(x: Pixels, sigma: PerImage, yes: Which, radius: int | None = None) -> Pixels:
    """Gaussian blur with each image's own standard deviation (in pixels, > 0), where `yes`; edges
    mirrored.

    radius   of the kernel; default: 5% of the side, so that it spans 10% of it (Chen et al. 2020,
             App. A)
    """
    h, w = x.shape[-2:]
    radius = max(1, round(0.05 * w)) if radius is None else radius
    at = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    weight = torch.exp(-0.5 * (at / sigma[:, None]) ** 2)
    weight = weight / weight.sum(1, keepdim=True)
    padded = F.pad(x, (radius, radius, radius, radius), mode="reflect")
    for dim, length in ((2, h), (3, w)):
        taps = [_wide(weight[:, k]) * padded.narrow(dim, k, length) for k in range(2 * radius + 1)]
        padded = torch.stack(taps).sum(0)
    return torch.where(_wide(yes), padded, x)


def solarize(x: Pixels, yes: Which, threshold: float = 0.5) -> Pixels:
    """Invert the values from `threshold` up, in the images where `yes`."""
    return torch.where(_wide(yes) & (x >= threshold), 1 - x, x)


def _wide(per_image: Tensor) -> Tensor:
    return per_image[:, None, None, None]
