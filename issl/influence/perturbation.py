"""Perturbations of the stability loss: what turns an image into its noisy copy x̂.

The paper uses Gaussian noise; its ablation uses the augmentations of pretraining, each with a
strength. Given a seed, a perturbation is a function of an image's pixels and index only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor

from issl.data.views import VIEW_UNIFORMS, Pixels, View
from issl.errors import IsslError, number_or_nan
from issl.keyed_random import normal, uniform

Perturb = Callable[[Pixels, Int[Tensor, " b"]], Pixels]
Channels = float | tuple[float, ...]  # one number, or one for each channel
KINDS = ("crop", "flip", "jitter", "grayscale", "blur", "solarize", "chain")


@runtime_checkable
class Perturbation(Protocol):
    """A random perturbation: `keyed(seed)` makes it a function of pixels and image index."""

    def keyed(self, seed: int) -> Perturb: ...


@dataclass(frozen=True)
class GaussianNoise:
    """x̂ = x + ε, ε ~ N(mean, std²) for each pixel and channel, not clipped (arXiv 2412.17170, §3).

    The paper does not say whether its 0.05 and 0.2 refer to the range of the pixels, which is the
    default, or to normalised pixels (`of_normalised`).

    Args:
        mean: Mean of ε, in units of pixels in [0, 1]: one number, or one for each channel.
        std: Standard deviation of ε, ≥ 0, in the same form.
    """

    mean: Channels = 0.05
    std: Channels = 0.2

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = getattr(self, name)
            numbers = value if isinstance(value, list | tuple) else [value]
            finite = all(math.isfinite(number_or_nan(v)) for v in numbers)
            if not finite or len(numbers) not in (1, 3) or (name == "std" and min(numbers) < 0):
                raise IsslError(
                    f"{type(self).__name__}({name}={value!r}): give a finite number, or one for "
                    f"each of three channels{' (0 or more)' if name == 'std' else ''}"
                )
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))

    @classmethod
    def of_normalised(
        cls, by: tuple[float, ...], mean: float = 0.05, std: float = 0.2
    ) -> GaussianNoise:
        """The noise that a transform after ToTensor and Normalize adds: `mean` and `std` are in
        units of pixels that were divided by `by`, one number for each channel."""
        return cls(tuple(mean * s for s in by), tuple(std * s for s in by))

    @property
    def by_channel(self) -> bool:
        """Whether the mean or the std is given for each channel."""
        return isinstance(self.mean, tuple) or isinstance(self.std, tuple)

    def keyed(self, seed: int) -> Perturb:
        """The noise of image `index` depends only on (seed, index) and the image's size."""

        def perturb(x: Pixels, index: Int[Tensor, " b"]) -> Pixels:
            noise = normal(seed, index, x.shape[1:]).to(x.device, x.dtype)
            mean, std = (
                x.new_tensor(value)[:, None, None] if isinstance(value, tuple) else value
                for value in (self.mean, self.std)
            )
            return x + mean + std * noise

        return perturb


@dataclass(frozen=True)
class ClippedNoise(GaussianNoise):
    """The same noise, but pixels that leave [0, 1] are moved to its ends, as in an image file."""

    def keyed(self, seed: int) -> Perturb:
        """As `GaussianNoise.keyed`."""
        noisy = super().keyed(seed)
        return lambda x, index: noisy(x, index).clamp(0, 1)


@dataclass(frozen=True)
class Augmentation:
    """x̂ = a random view of x, by one of pretraining's augmentations or by the whole chain of them.

    Args:
        kind: crop, flip, jitter, grayscale, blur, solarize or chain.
        strength: In (0, 1]. 1 is SimCLR's own range (crop from 8% of the area, jitter
            0.8/0.8/0.8/0.2, blur up to σ = 2 px); smaller values shrink the range. Used alone,
            operations without a range (flip, grayscale, solarize) have this probability.
    """

    kind: str
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise IsslError(f"Augmentation({self.kind!r}): the kinds are {', '.join(KINDS)}")
        if not 0 < number_or_nan(self.strength) <= 1:
            raise IsslError(f"Augmentation(strength={self.strength!r}): must lie in (0, 1]")

    @property
    def view(self) -> View:
        """The settings of the view, see `issl.data.views.View`."""
        s = self.strength
        crop = {"min_area": 1 - 0.92 * s}
        colours = {
            "brightness": 0.8 * s,
            "contrast": 0.8 * s,
            "saturation": 0.8 * s,
            "hue": 0.2 * s,
        }
        sigma = {"blur_sigma": (0.1, 0.1 + 1.9 * s)}
        chances = {"flip": 0.5 * s, "jitter": 0.8, "grayscale": 0.2 * s, "blur": 0.5 * s}
        settings: dict[str, dict[str, Any]] = {
            "crop": crop,
            "flip": {"flip": s},
            "jitter": {"jitter": 1.0, **colours},
            "grayscale": {"grayscale": s},
            "blur": {"blur": 1.0, **sigma},
            "solarize": {"solarize": s},
            "chain": {**crop, **colours, **sigma, **chances},
        }
        return View(**settings[self.kind])

    def keyed(self, seed: int) -> Perturb:
        """The view of image `index` depends only on (seed, index)."""
        view = self.view

        def perturb(x: Pixels, index: Int[Tensor, " b"]) -> Pixels:
            return view(x, uniform(seed, index, (VIEW_UNIFORMS,)).to(x.device, x.dtype))

        return perturb


def describe(value: object) -> str:
    """A text that is the same in every process: an object's settings, or a function's name."""
    name = getattr(value, "__qualname__", None)
    return repr(value) if name is None else f"{getattr(value, '__module__', '')}.{name}"


def keyed_draws(perturbation: Perturbation | Perturb, seed: int, draws: int) -> list[Perturb]:
    """The perturbation drawn several times; draw k of seed s uses seed s + k·2³²."""
    if isinstance(perturbation, Perturbation) and not isinstance(perturbation, type):
        return [perturbation.keyed(seed + (k << 32)) for k in range(draws)]
    if callable(perturbation) and not isinstance(perturbation, type):
        return [perturbation] * draws
    raise IsslError(
        f"perturbation {perturbation!r}: need an object with .keyed(seed), such as "
        "GaussianNoise(), or a callable (pixels in [0, 1], index) -> pixels"
    )
