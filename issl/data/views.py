"""Views: the random augmentations of pretraining, as settings and a function of pixels and uniform
numbers.

The caller draws the uniform numbers. Pretraining draws a table per epoch over the whole data set,
so leaving one image out does not change the views of the others; perturbations key them by the
image's index. An image's view depends only on its pixels and its own row.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log

import torch
from jaxtyping import Float
from torch import Tensor

from issl.data.image_operations import Pixels, blur, crop, flip, grayscale, jitter, solarize
from issl.errors import IsslError, number_or_nan

VIEW_UNIFORMS = 18  # how many uniform numbers one view consumes
ON_CPU = 32  # images at once on a CPU, so that the data stays in its cache


@dataclass(frozen=True)
class View:
    """Random resized crop, flip, colour jitter, grayscale, blur, solarise, in this order.

    As in Chen et al. 2020, arXiv 2002.05709, App. A; solarise: Grill et al. 2020, arXiv 2006.07733,
    App. B. The defaults change nothing.

    Attributes:
        min_area: The smallest part of the image's area that a crop keeps.
        flip, jitter, grayscale, blur, solarize: Probability of each operation.
        brightness, contrast, saturation: Factors are uniform in [1 − s, 1 + s], not below 0.
        hue: Its shift is uniform in ± this part of the circle, at most 0.5.
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
        largest = dict.fromkeys(
            ("min_area", "flip", "jitter", "grayscale", "blur", "solarize"), 1.0
        )
        largest |= {"hue": 0.5} | dict.fromkeys(("brightness", "contrast", "saturation"), inf)
        for name, most in largest.items():
            value = getattr(self, name)
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
        """One view of each image; its row of uniform numbers decides it. `size` defaults to the
        image's."""
        if x.device.type != "cpu":
            return self._view(x, u, size)
        parts = zip(x.split(ON_CPU), u.split(ON_CPU), strict=True)
        return torch.cat([self._view(xs, us, size) for xs, us in parts])

    def _view(self, x: Tensor, u: Tensor, size: tuple[int, int] | None) -> Tensor:
        # what is turned off is skipped; what is left to chance is computed for all images and
        # chosen per image
        mirror = u[:, 4] < self.flip
        if self.min_area < 1 or size is not None:
            x = crop(x, crop_boxes(u[:, :4], self.min_area), mirror, size)
        elif self.flip > 0:
            x = flip(x, mirror)
        if self.jitter > 0:
            # one column each: for a tensor made from Python's numbers a GPU would be waited for
            blends, around = (self.brightness, self.contrast, self.saturation), 2 * u[:, 5:9] - 1
            factors = [(1 + s * around[:, k]).clamp(min=0) for k, s in enumerate(blends)]
            settings = torch.stack([*factors, self.hue * around[:, 3]], 1)
            x = jitter(x, settings, u[:, 9:13].argsort(1), u[:, 13] < self.jitter)
        if self.grayscale > 0:
            x = grayscale(x, u[:, 14] < self.grayscale)
        if self.blur > 0:
            low, high = self.blur_sigma
            x = blur(x, low + (high - low) * u[:, 16], u[:, 15] < self.blur)
        if self.solarize > 0:
            x = solarize(x, u[:, 17] < self.solarize)
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
