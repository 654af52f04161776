"""Recipes: every constant of pretraining, in one table.

`published` are solo-learn's for CIFAR and ResNet-18 (da Costa et al. 2022, arXiv 2106.01775; its
scripts/pretrain/cifar), made for 1000 epochs of batch 256. `short` is ours, for runs of up to 200
epochs and for narrow encoders on a CPU: SGD with Nesterov momentum, smaller heads, crops of at
least 20% of the area, and views of half the side in the first 85% of the run. BYOL's views stay
small: at the end its target hardly moves and teaches what it learned on small views (10,000
CIFAR-10 images, width 8, 60 epochs: kNN 40.5% before the full-size views, 38.6% after). `long` is
`short` for about 100 epochs on tens of thousands of images: a lower temperature, which needs more
negatives than a small set has (50,000 CIFAR-10 images, width 16, 10 epochs: kNN 55.6% at 0.2, 53.1%
at 0.5).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from pydantic import Field

from issl.config import Config
from issl.data.views import View
from issl.errors import IsslError

Method = Literal["simclr", "byol", "barlow_twins", "supervised"]
Variant = Literal["published", "short", "long"]
NAMES: dict[str, str] = {
    "simclr": "SimCLR",
    "byol": "BYOL",
    "barlow_twins": "Barlow Twins",
    "supervised": "supervised",
}
SSL: tuple[Method, ...] = ("simclr", "byol", "barlow_twins")


class Recipe(Config):
    """How an encoder is trained; the defaults are shared by all recipes.

    lr              at the end of the warm-up, for a batch of 256 (scaled linearly with the batch
                    size)
    warmup          epochs; at most a tenth of the run
    small           the part at the start of the run in which views have half the side (a quarter of
                    the cost)
    trust, clip     of LARS: its coefficient, and whether it can only lower the learning rate
    hidden, out     of the projector, in multiples of the feature dimension (512 for ResNet-18 of
                    width 64)
    layers, norm    of the projector: number of linear layers, and BatchNorm after all but the last
    temperature     of SimCLR
    tau             of BYOL: the moving average's momentum at the start; it ends at 1
    off_diagonal, scale   of Barlow Twins: weight of the off-diagonal terms, factor of the whole
    """

    method: Method
    optimizer: Literal["lars", "sgd"]
    lr: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    view_a: View
    view_b: View
    warmup: int = Field(10, ge=0)
    small: float = Field(0.0, ge=0, le=1)
    momentum: float = Field(0.9, ge=0, lt=1)
    trust: float = Field(0.02, gt=0)
    clip: bool = True
    hidden: float = Field(4.0, gt=0)
    out: float = Field(0.5, gt=0)
    layers: int = Field(2, ge=1)
    norm: bool = False
    temperature: float = Field(0.2, gt=0)
    tau: float = Field(0.99, ge=0, le=1)
    off_diagonal: float = Field(0.0051, ge=0)
    scale: float = Field(0.1, gt=0)


STRONG = View(
    min_area=0.08,
    flip=0.5,
    jitter=0.8,
    brightness=0.8,
    contrast=0.8,
    saturation=0.8,
    hue=0.2,
    grayscale=0.2,
)
MILD = replace(STRONG, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
SOLARIZED = replace(MILD, solarize=0.2)
# the strength of SimCLR's CIFAR experiments (Chen et al. 2020, B.9); at least a fifth of the area,
# because a short run # of a narrow encoder learns little from the smallest crops
SHORT = View(
    min_area=0.2,
    flip=0.5,
    jitter=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    grayscale=0.2,
)
CROPPED = View(min_area=0.5, flip=0.5)

_PUBLISHED = (
    Recipe(
        method="simclr", optimizer="lars", lr=0.4, weight_decay=1e-4, view_a=STRONG, view_b=STRONG
    ),
    Recipe(
        method="byol",
        optimizer="lars",
        lr=1.0,
        weight_decay=1e-5,
        view_a=MILD,
        view_b=SOLARIZED,
        hidden=8.0,
        norm=True,
    ),
    Recipe(
        method="barlow_twins",
        optimizer="lars",
        lr=0.3,
        weight_decay=1e-4,
        view_a=MILD,
        view_b=SOLARIZED,
        out=4.0,
        layers=3,
        norm=True,
    ),
    # not solo-learn's: the usual SGD of supervised CIFAR training
    Recipe(
        method="supervised",
        optimizer="sgd",
        lr=0.2,
        weight_decay=5e-4,
        view_a=CROPPED,
        view_b=CROPPED,
        layers=1,
    ),
)

_SHORT = (
    Recipe(
        method="simclr",
        optimizer="sgd",
        lr=0.8,
        weight_decay=1e-4,
        view_a=SHORT,
        view_b=SHORT,
        small=0.85,
        hidden=1.0,
        out=1.0,
        temperature=0.5,
    ),
    Recipe(
        method="byol",
        optimizer="sgd",
        lr=0.4,
        weight_decay=1e-4,
        view_a=SHORT,
        view_b=SHORT,
        small=1.0,
        hidden=2.0,
        out=1.0,
        norm=True,
        tau=0.97,
    ),
    Recipe(
        method="barlow_twins",
        optimizer="sgd",
        lr=0.2,
        weight_decay=1e-4,
        view_a=SHORT,
        view_b=SHORT,
        small=0.85,
        hidden=2.0,
        out=2.0,
        norm=True,
        off_diagonal=0.02,
    ),
    Recipe(
        method="supervised",
        optimizer="sgd",
        lr=0.4,
        weight_decay=5e-4,
        view_a=CROPPED,
        view_b=CROPPED,
        small=0.85,
        layers=1,
    ),
)

RECIPES: dict[Variant, dict[Method, Recipe]] = {
    "published": {r.method: r for r in _PUBLISHED},
    "short": {r.method: r for r in _SHORT},
    "long": {
        r.method: r.model_copy(update={"temperature": 0.2}) if r.method == "simclr" else r
        for r in _SHORT
    },
}


def recipe(method: str, variant: str = "published") -> Recipe:
    """The entry of the table; raises IsslError for an unknown method or variant, and for a pair
    without an entry."""
    if method not in get_args(Method):
        raise IsslError(f"method {method!r}: known are {', '.join(get_args(Method))}")
    if variant not in get_args(Variant):
        raise IsslError(f"recipe {variant!r}: known are {', '.join(get_args(Variant))}")
    table = RECIPES[variant]  # type: ignore[index]
    if method not in table:
        raise IsslError(f"method {method!r} has no {variant} recipe; there are {', '.join(table)}")
    return table[method]
