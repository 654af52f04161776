"""Recipes: every constant of pretraining, in one table.

`published` holds solo-learn's recipes for CIFAR and ResNet-18, made for 1000 epochs at batch 256
(da Costa et al. 2022, arXiv 2106.01775; its scripts/pretrain/cifar); supervised is ours. `short` is
ours, for up to 200 epochs and for narrow encoders on a CPU: SGD with Nesterov momentum, smaller
heads, crops of at least 20% of the area, and views of half the side in the first 85% of the run.
BYOL's views stay small, because at the end its target hardly moves and teaches what it learned on
small views (10,000 CIFAR-10 images, width 8, 60 epochs: kNN 40.5% before the full-size views, 38.6%
after). `long` is `short` for about 100 epochs on tens of thousands of images, with a lower
temperature. That needs more negatives than a small set has (50,000 CIFAR-10 images, width 16, 10
epochs: kNN 55.6% at 0.2, 53.1% at 0.5).
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any, Literal

from issl.data.views import View
from issl.errors import IsslError
from issl.pretraining.methods import METHODS, SSL, method_named
from issl.pretraining.methods.base import Recipe

__all__ = ["NAMES", "RECIPES", "SSL", "Method", "Recipe", "Variant", "from_plain", "recipe"]

Variant = Literal["published", "short", "long"]
if TYPE_CHECKING:
    Method = str
else:  # the names of all methods, so that settings are checked against them
    Method = Literal[tuple(METHODS)]
NAMES = {name: method.label for name, method in METHODS.items()}

_CHANCES: dict[str, Any] = {"flip": 0.5, "jitter": 0.8, "grayscale": 0.2}
_STRONG: dict[str, Any] = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
_MILD: dict[str, Any] = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
STRONG = View(min_area=0.08, **_CHANCES, **_STRONG)
MILD = View(min_area=0.08, **_CHANCES, **_MILD)
SOLARIZED = View(min_area=0.08, **_CHANCES, **_MILD, solarize=0.2)
LARGER = View(min_area=0.2, **_CHANCES, **_MILD, solarize=0.1)
# the strength of SimCLR's CIFAR experiments (Chen et al. 2020, B.9); at least a fifth of the area,
# because a short run of a narrow encoder learns little from the smallest crops
SHORT = View(min_area=0.2, **_CHANCES, **_MILD | {"saturation": 0.4})
CROPPED = View(min_area=0.5, flip=0.5)


_WIDE: dict[str, Any] = {"out": 4.0, "layers": 3, "norm": True}
PUBLISHED = (
    Recipe("simclr", "lars", 0.4, 1e-4, STRONG, STRONG),
    Recipe("byol", "lars", 1.0, 1e-5, MILD, SOLARIZED, hidden=8.0, norm=True),
    Recipe("barlow_twins", "lars", 0.3, 1e-4, MILD, SOLARIZED, **_WIDE),
    Recipe("vicreg", "lars", 0.3, 1e-4, LARGER, LARGER, **_WIDE),
    # not solo-learn's: the usual SGD of supervised CIFAR training
    Recipe("supervised", "sgd", 0.2, 5e-4, CROPPED, CROPPED, layers=1),
)
_SMALL: dict[str, Any] = {"small": 0.85, "hidden": 2.0, "norm": True}
SHORT_RUNS = (
    Recipe(
        "simclr", "sgd", 0.8, 1e-4, SHORT, SHORT, small=0.85, hidden=1.0, out=1.0, temperature=0.5
    ),
    Recipe("byol", "sgd", 0.4, 1e-4, SHORT, SHORT, out=1.0, tau=0.97, **_SMALL | {"small": 1.0}),
    Recipe("barlow_twins", "sgd", 0.2, 1e-4, SHORT, SHORT, out=2.0, off_diagonal=0.02, **_SMALL),
    Recipe("vicreg", "sgd", 0.05, 1e-4, SHORT, SHORT, out=2.0, **_SMALL),
    Recipe("supervised", "sgd", 0.4, 5e-4, CROPPED, CROPPED, layers=1, small=0.85),
)
_of_short = {row.method: row for row in SHORT_RUNS}
RECIPES: dict[str, dict[str, Recipe]] = {
    "published": {row.method: row for row in PUBLISHED},
    "short": _of_short,
    "long": _of_short | {"simclr": dataclasses.replace(_of_short["simclr"], temperature=0.2)},
}


def recipe(method: str, variant: str = "published") -> Recipe:
    """A row of the table; `variant`: `published`, `short` or `long`."""
    method_named(method)
    if variant not in RECIPES:
        raise IsslError(f"recipe {variant!r}: known are {', '.join(RECIPES)}")
    table = RECIPES[variant]
    if method not in table:
        raise IsslError(f"method {method!r} has no {variant} recipe; there are {', '.join(table)}")
    return table[method]


def plain(how: Recipe) -> dict[str, Any]:
    """A recipe as JSON values."""
    settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(how)))
    return settings


def _view(settings: dict[str, Any]) -> View:
    return View(**settings | {"blur_sigma": tuple(settings["blur_sigma"])})  # JSON has lists


def from_plain(settings: dict[str, Any]) -> Recipe:
    """The recipe that `plain` wrote; raises IsslError for settings that make no recipe."""
    try:
        return Recipe(**settings | {k: _view(settings[k]) for k in ("view_a", "view_b")})
    except (KeyError, TypeError) as error:
        raise IsslError(f"these settings are not a recipe ({error}): {settings}") from error
