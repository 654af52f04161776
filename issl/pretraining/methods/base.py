"""A pretraining method: a recipe of numbers, and a class with the method's name and its loss.

Every loss takes a weight for each image of the batch. Without weights it is the usual loss. With
them, an image of weight 0 counts as absent: it is no anchor, positive, negative or part of a batch
statistic. Losses are twice differentiable, also in the weights, because influence through training
is a derivative with respect to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from issl.data.views import View
from issl.errors import IsslError, number_or_nan

Rows = Float[Tensor, "b p"]
Weights = Float[Tensor, " b"]
Loss = Float[Tensor, ""]
Outputs = tuple[Tensor, ...]
State = Mapping[str, Tensor]  # by name

_RANGES = {  # of a recipe's numbers
    "above 0": ("lr trust hidden out temperature scale", lambda v: 0 < v < float("inf")),
    "0 or more": ("weight_decay warmup off_diagonal", lambda v: 0 <= v < float("inf")),
    "from 0 to 1": ("small momentum tau", lambda v: 0 <= v <= 1),
    "1 or more": ("layers", lambda v: v >= 1),
}


@dataclass(frozen=True)
class Recipe:
    """How an encoder is trained; the defaults are shared by all recipes.

    Attributes:
        method: The name of a method, such as `simclr`.
        optimizer: `lars` or `sgd`.
        lr: Learning rate at the end of the warm-up, for a batch of 256 (scaled linearly with it).
        weight_decay: Weight decay of matrices and kernels.
        view_a: The random augmentation that makes the first view of an image.
        view_b: The same for the second view.
        warmup: Epochs of warm-up, limited to a tenth of the run or to one epoch if that is longer.
        small: The fraction of the run, from its start, in which views have half the side (a
            quarter of the cost).
        momentum: Momentum of the optimizer.
        trust: The trust coefficient of LARS.
        clip: LARS never raises a layer's rate above the learning rate (LARC).
        hidden: Width of the projector's hidden layers, in multiples of the feature dimension (512
            for ResNet-18 of width 64).
        out: Width of the projector's output, likewise.
        layers: How many linear layers the projector has.
        norm: Whether BatchNorm follows all of these layers but the last.
        temperature: SimCLR's temperature.
        tau: For BYOL: the moving average's momentum at the start; it ends at 1.
        off_diagonal: For Barlow Twins: the weight of the off-diagonal terms.
        scale: For Barlow Twins: a factor of the whole loss.
    """

    # for recipes that are a field of a stage's settings
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    method: str
    optimizer: str
    lr: float
    weight_decay: float
    view_a: View
    view_b: View
    warmup: int = 10
    small: float = 0.0
    momentum: float = 0.9
    trust: float = 0.02
    clip: bool = True
    hidden: float = 4.0
    out: float = 0.5
    layers: int = 2
    norm: bool = False
    temperature: float = 0.2
    tau: float = 0.99
    off_diagonal: float = 0.0051
    scale: float = 0.1

    def __post_init__(self) -> None:
        if self.optimizer not in ("lars", "sgd"):
            raise IsslError(f"Recipe(optimizer={self.optimizer!r}): choose lars or sgd")
        for words, (names, holds) in _RANGES.items():
            for name in names.split():
                if not holds(number_or_nan(getattr(self, name))):
                    raise IsslError(f"Recipe({name}={getattr(self, name)!r}): must be {words}")


@dataclass(frozen=True)
class Batch:
    """What a loss needs to know about its batch, and the means over its images.

    Attributes:
        labels: Labels of the images, for a method that is `labelled`.
        weights: Weights of the images; None: all equal, by the usual formulas.
    """

    recipe: Recipe
    labels: Int64[Tensor, " b"] | None = None
    weights: Weights | None = None

    def mean(self, rows: Float[Tensor, "b *d"]) -> Float[Tensor, "*d"]:
        """Σ_i w_i r_i / Σ_i w_i."""
        if self.weights is None:
            return rows.mean(0)
        return torch.tensordot(self.weights.to(rows.dtype), rows, 1) / self.weights.sum()

    def variance(self, rows: Rows, correction: int = 0) -> Float[Tensor, " p"]:
        """The weighted variance; `correction=1` divides by Σw − 1."""
        if self.weights is None:
            return rows.var(0, correction=correction)
        squares = self.mean((rows - self.mean(rows)).square())
        return squares * (self.weights.sum() / (self.weights.sum() - correction))

    def products(self, a: Rows, b: Rows, correction: int = 0) -> Float[Tensor, "p p"]:
        """Σ_i w_i a_i b_iᵀ / (Σ_i w_i − correction)."""
        if self.weights is None:
            return a.T @ b / (len(a) - correction)
        return (a * self.weights[:, None].to(a.dtype)).T @ b / (self.weights.sum() - correction)


class LearningMethod:
    """A way to train an encoder. A subclass in a file of this package is a method.

    Attributes:
        name: The name in recipes and commands.
        label: The name in figures and tables.
        labelled: Whether it learns from labels, and from a single view.
        advice: What else to try if all features come to point the same way; a format string with
            the recipe's fields.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    labelled: ClassVar[bool] = False
    advice: ClassVar[str] = ""

    def beside(self, encoder: nn.Module, seed: int) -> dict[str, nn.Module]:
        """The modules that a learner has beside its encoder, by name; its file holds them too."""
        return {}

    def outputs(self, learner: Any, views: Tensor, z: Tensor) -> Outputs:
        """What the loss compares, from both views of each image (2b) and their projections `z`."""
        return (z,)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """The loss of a batch, from what `outputs` gave in fp32 or wider: rows of the first views,
        then those of the second."""
        raise NotImplementedError

    def followed(self, recipe: Recipe, state: State, done: float) -> State:
        """The new values, by name, of parameters that follow the others after each step and that no
        gradient trains. `state` holds all of the learner's parameters after the step; `done` is the
        fraction of the run before it. Differentiable."""
        return {}
