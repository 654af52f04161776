"""What a method of pretraining is: a recipe of numbers, and a class with its name and its loss.

Every loss takes a weight for each image of the batch. Without weights it is the usual loss; with
them, an image of weight 0 is not there, neither as anchor nor as positive, negative or member of
a batch statistic. Losses are twice differentiable, in the weights too: influence on a training is
a derivative with respect to them.
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
        weight_decay: Of matrices and kernels.
        view_a: The random augmentation that makes the first view of an image.
        view_b: That of the second view.
        warmup: Epochs; at most a tenth of the run, and at least one.
        small: The part at the start of the run in which views have half the side (a quarter of
            the cost).
        momentum: Of the optimizer.
        trust: The coefficient of LARS.
        hidden: Width of the projector's hidden layers, in multiples of the feature dimension (512
            for ResNet-18 of width 64).
        out: Width of its output, likewise.
        layers: How many linear layers it has.
        norm: BatchNorm after all of them but the last.
        temperature: Of SimCLR.
        tau: Of BYOL: the moving average's momentum at the start; it ends at 1.
        off_diagonal: Of Barlow Twins: the weight of the off-diagonal terms.
        scale: Of Barlow Twins: a factor of the whole loss.
    """

    # where it is a field of a stage's settings
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
    """What a loss needs to know of its batch, and the means over its images.

    Attributes:
        labels: Of the images, for a method that is `labelled`.
        weights: Of the images; None: all the same, by the usual formulas.
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
        name: By which recipes and commands name it.
        label: How figures and tables show it.
        labelled: Whether it learns from labels, and from one view alone.
        advice: What else to try where all features come to point the same way; a format string
            of the recipe's fields.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    labelled: ClassVar[bool] = False
    advice: ClassVar[str] = ""

    def beside(self, encoder: nn.Module, seed: int) -> dict[str, nn.Module]:
        """What is trained beside the encoder, by name; it is kept in the learner's file."""
        return {}

    def outputs(self, learner: Any, views: Tensor, z: Tensor) -> Outputs:
        """What the loss compares, from the views of both kinds (2b) and their projections `z`."""
        return (z,)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """The loss of a batch, from what `outputs` gave in fp32 or wider: rows of the first views,
        then those of the second."""
        raise NotImplementedError

    def followed(self, recipe: Recipe, state: State, done: float) -> State:
        """The parameters that no gradient trains but that follow after each step, by name, from
        all parameters of the learner after it; the part `done` of the run was over before it.
        Differentiable."""
        return {}
