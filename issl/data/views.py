"""Views: the random augmentations of pretraining, as settings and a function of pixels and uniform
numbers.

The caller draws the numbers. Pretraining draws a table per epoch over the whole data set, so
leaving one image out does not change the views of the others; perturbations key the numbers by the
image's index. An image's view depends only on its pixels and its own row, and shapes never depend
on values, so nothing waits for a GPU. Pixels are float in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from issl.errors import IsslError, number_or_nan

VIEW_UNIFORMS = 18  # how many uniform numbers one view consumes
ON_CPU = 32  # images at once on a CPU, so that the data stays in its cache
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the parts of colour jitter

Pixels = Float[Tensor, "b 3 h w"]
PerImage = Float[Tensor, " b"]
Which = Bool[Tensor, " b"]


@dataclass(frozen=True)
class View:
    """Random resized crop, flip, colour jitter, grayscale, blur, solarise, in this order.

    As in Chen et al. 2020, arXiv 2002.05709, App. A; solarise: Grill et al. 2020, arXiv 2006.07733,
    App. B. The defaults change nothing.

    Attributes:
        min_area: The smallest fraction of the image's area that a crop keeps.
        flip, jitter, grayscale, blur, solarize: Probability of each operation.
        brightness, contrast, saturation: Factors are uniform in [1 − s, 1 + s], not below 0.
        hue: The shift is uniform in ± this fraction of the circle, at most 0.5.
        blur_sigma: The standard deviation is uniform in this range, in px.
    """

    min_area: float = 1.0
    flip: float = 0.0
    jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "blur_sigma":
                continue
            most = {"hue": 0.5, "brightness": inf, "contrast": inf, "saturation": inf}.get(name, 1)
            if not 0 <= number_or_nan(value) <= most or (name == "min_area" and value == 0):
                raise IsslError(f"View({name}={value!r}): give a number from 0 to {most:g}")
        low, high = self.blur_sigma
        if not 0 < number_or_nan(low) <= number_or_nan(high):
            raise IsslError(
                f"View(blur_sigma={self.blur_sigma!r}): give two rising numbers above 0"
            )

    def __call__(
        self, x: Pixels, u: Float[Tensor, "b 18"], size: tuple[int, int] | None = None
    ) -> Float[Tensor, "b 3 h2 w2"]:
        """One view of each image, determined by its row of uniform numbers. `size` defaults to the
        image's."""
        if x.device.type != "cpu":
            return self._view(x, u, size)
        parts = zip(x.split(ON_CPU), u.split(ON_CPU), strict=True)
        return torch.cat([self._view(xs, us, size) for xs, us in parts])

    def _view(self, x: Tensor, u: Tensor, size: tuple[int, int] | None) -> Tensor:
        # what is turned off is skipped; the rest is computed for all and chosen per image
        mirror = u[:, 4] < self.flip
        if self.min_area < 1 or size is not None:
            x = crop(x, crop_boxes(u[:, :4], self.min_area), mirror, size)
        elif self.flip > 0:
            x = torch.where(_wide(mirror), x.flip(3), x)
        if self.jitter > 0:
            # one column at a time: a tensor made from Python numbers would wait for the GPU
            blends, around = (self.brightness, self.contrast, self.saturation), 2 * u[:, 5:9] - 1
            factors = [(1 + s * around[:, k]).clamp(min=0) for k, s in enumerate(blends)]
            settings = torch.stack([*factors, self.hue * around[:, 3]], 1)
            x = jitter(x, settings, u[:, 9:13].argsort(1), u[:, 13] < self.jitter)
        if self.grayscale > 0:
            x = torch.where(_wide(u[:, 14] < self.grayscale), luma(x), x)
        if self.blur > 0:
            low, high = self.blur_sigma
            x = blur(x, low + (high - low) * u[:, 16], u[:, 15] < self.blur)
        if self.solarize > 0:
            x = torch.where(_wide(u[:, 17] < self.solarize) & (x >= 0.5), 1 - x, x)
        return x


def crop_boxes(u: Float[Tensor, "b 4"], min_area: float) -> Float[Tensor, "b 4"]:
    """Random-resized-crop boxes: area uniform in [min_area, 1], log aspect uniform in ±log 4/3, any
    place.

    torchvision redraws a box that does not fit; here its longer side is cut to the image, so every
    image needs the same number of uniforms.
    """
    area = min_area + (1 - min_area) * u[:, 0]
    aspect = torch.exp((2 * u[:, 1] - 1) * log(4 / 3))
    h, w = (area / aspect).sqrt().clamp(max=1), (area * aspect).sqrt().clamp(max=1)
    cy, cx = h / 2 + u[:, 2] * (1 - h), w / 2 + u[:, 3] * (1 - w)
    return torch.stack([cy, cx, h, w], 1)


# --- operations: each equals torchvision's functional one with the same parameters ---


def crop(
    x: Pixels, box: Float[Tensor, "b 4"], mirror: Which, size: tuple[int, int] | None = None
) -> Float[Tensor, "b 3 h2 w2"]:
    """Resize each image's own box to `size` (default: the image's), bilinear; mirrored where
    `mirror`.

    box = (centre_y, centre_x, height, width), as fractions of the image. One affine grid does both,
    and samples like torchvision's `resized_crop` without antialiasing.
    """
    cy, cx, h, w = box.unbind(1)
    theta = x.new_zeros(len(x), 2, 3)
    theta[:, 0, 0] = torch.where(mirror, -w, w)
    theta[:, 0, 2] = 2 * cx - 1
    theta[:, 1, 1], theta[:, 1, 2] = h, 2 * cy - 1
    grid = F.affine_grid(theta, [len(x), 3, *(size or x.shape[2:])], align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def luma(x: Pixels) -> Float[Tensor, "b 1 h w"]:
    """ITU-R BT.601 grey, PIL's weights (torchvision's tensor operations round the first to
    0.2989)."""
    r, g, b = x.split(1, 1)
    return 0.299 * r + 0.587 * g + 0.114 * b


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
    """Blend with black, the mean grey or the grey copy: brightness, contrast or saturation."""
    factor = torch.where(active, factors.gather(1, which[:, None]).squeeze(1), 1)
    grey = luma(x)
    mean = grey.mean((2, 3), keepdim=True)
    base = torch.where(
        _wide(which == SATURATION), grey, torch.where(_wide(which == CONTRAST), mean, 0)
    )
    return torch.lerp(base, x, _wide(factor)).clamp_(0, 1)


def blur(x: Pixels, sigma: PerImage, yes: Which) -> Pixels:
    """Gaussian blur with each image's own standard deviation (in px, > 0), where `yes`; edges
    mirrored. The kernel spans 10% of the side (Chen et al. 2020, App. A)."""
    h, w = x.shape[-2:]
    radius = max(1, round(0.05 * w))
    at = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    weight = torch.exp(-0.5 * (at / sigma[:, None]) ** 2)
    weight = weight / weight.sum(1, keepdim=True)
    padded = F.pad(x, (radius, radius, radius, radius), mode="reflect")
    for dim, length in ((2, h), (3, w)):
        taps = [_wide(weight[:, k]) * padded.narrow(dim, k, length) for k in range(2 * radius + 1)]
        padded = torch.stack(taps).sum(0)
    return torch.where(_wide(yes), padded, x)


def _wide(per_image: Tensor) -> Tensor:
    return per_image[:, None, None, None]
