"""The learner: the encoder and all that its method trains along with it, its loss and its files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from issl.data.views import Pixels
from issl.devices import computes_bf16
from issl.errors import IsslError
from issl.pretraining.batchnorm import full, weighted_batches
from issl.pretraining.encoder import OWN, Encoder, Head, new_encoder, read_encoder, save_encoder
from issl.pretraining.methods import method_named
from issl.pretraining.methods.base import Batch, Weights
from issl.pretraining.recipes import Recipe, from_plain

Precision = Literal["auto", "fp32", "bf16"]


class Learner(nn.Module):
    """`encoder`, and what its method trains beside it, such as BYOL's `predictor` and `target`.
    Calling it gives the loss."""

    def __init__(
        self,
        recipe: Recipe,
        width: int,
        classes: int | None,
        seed: int,
        start: Encoder | Learner | None = None,
    ):
        """A learner with fresh weights or those of `start`: an encoder, or a learner, whose modules
        beside the encoder are used too."""
        super().__init__()
        self.recipe, self.method = recipe, method_named(recipe.method)
        hidden, out = (max(2, round(share * 8 * width)) for share in (recipe.hidden, recipe.out))
        if self.method.labelled:
            assert classes is not None  # the caller has the labels
            out = classes
        head = Head(hidden, out, recipe.layers, recipe.norm)
        self.encoder = new_encoder(width, head, seed)
        first = start.encoder if isinstance(start, Learner) else start
        if first is not None:
            if (first.width, first.head) != (width, head):
                raise IsslError(
                    f"start: an encoder of width {first.width} with {first.head}; this run trains "
                    f"width {width} with {head}; take the same width and method"
                )
            self.encoder.load_state_dict(first.state_dict())
        for name, module in self.method.beside(self.encoder, seed).items():
            self.add_module(name, module)
        if isinstance(start, Learner):
            self.load_state_dict(start.state_dict())

    def forward(
        self,
        xa: Pixels,
        xb: Pixels | None,
        labels: Int64[Tensor, " b"] | None,
        precision: Precision = "auto",
        weights: Weights | None = None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "v d"]]:
        """The loss of a batch, and the features of its views without gradient.

        Both views pass together, so BatchNorm sees them as one batch.

        Args:
            xa: The first view of each image, pixels in [0, 1].
            xb: The second; None for a supervised method.
            precision: Precision of the networks; the loss is computed in fp32 or wider.
            weights: Weights of the images (`issl.pretraining.methods.base`), also for BatchNorm's
                statistics; None: all equal, by the usual and faster formulas.
        """
        both = (xa if xb is None else torch.cat([xa, xb])).to(next(self.parameters()).dtype)
        both, device = both.contiguous(memory_format=self.layout), both.device
        # bf16 convolutions in NHWC: 3 to 4 times faster than plain fp32 on CPUs that have them, and
        # on GPUs
        bf16 = torch.autocast(device.type, torch.bfloat16, enabled=computes_bf16(device, precision))
        with bf16, weighted_batches(self, weights):
            features = self.encoder.backbone(both)
            z = self.encoder.projector(features)
            outputs = self.method.outputs(self, both, z)
        with torch.autocast(device.type, enabled=False):
            rows = tuple(full(part) for part in outputs)
            loss = self.method.loss(rows, Batch(self.recipe, labels, weights))
            return loss, full(features.detach())

    @property
    def layout(self) -> torch.memory_format:
        """The layout of pixels and kernels: NHWC, the faster one, except for narrow networks on any
        CPU. In NHWC without AVX-512, the weight gradient of a strided 1×1 convolution of fewer than
        8 channels writes past its memory (oneDNN issue 6035): a crash, or wrong numbers."""
        safe = self.encoder.width >= 8 or next(self.parameters()).device.type != "cpu"
        return torch.channels_last if safe else torch.contiguous_format

    def for_training(self) -> Learner:
        """This learner, in train mode and in that layout."""
        return self.to(memory_format=self.layout).train()

    def follow(self, done: float) -> None:
        """Move the parameters that follow a step; `done` is the fraction of the run before it."""
        weights = dict(self.named_parameters())
        with torch.no_grad():
            moved = self.method.followed(self.recipe, weights, done)
            if moved:
                torch._foreach_copy_([weights[name] for name in moved], list(moved.values()))


def save_learner(path: Path, learner: Learner, about: dict[str, Any], half: bool = True) -> None:
    """Write the encoder's file with all that its method trains beside it: what the training
    gradient depends on at this moment. `half`: in half precision, see `save_encoder`."""
    state = learner.state_dict().items()
    beside = {name: value for name, value in state if not name.startswith("encoder.")}
    save_encoder(path, learner.encoder, about, beside, half)


def load_learner(path: str | Path, recipe: Recipe | None = None) -> Learner:
    """The learner that `save_learner` wrote, in float32 and in training mode, as it was. `recipe`
    is used for files that do not state it."""
    header, tensors = read_encoder(path)
    settings = header.get("recipe") or header.get("config", {}).get("recipe")
    recipe = recipe if settings is None else from_plain(settings)
    if recipe is None:
        raise IsslError(
            f"{path} does not say how it was trained: give the recipe, such as recipe('simclr')"
        )
    learner = Learner(recipe, header["width"], header["head"]["out"], seed=0)
    state = {f"encoder.{k}" if k.startswith(OWN) else k: v for k, v in tensors.items()}
    missing = {name.split(".")[0] for name in learner.state_dict().keys() - state.keys()}
    if missing:
        raise IsslError(
            f"{path} holds no {recipe.method} learner: {' and '.join(sorted(missing))} are not in "
            "it; a Pretrain stage with `snapshots` saves whole learners"
        )
    learner.load_state_dict(state)
    return learner


def spread(features: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """√d times the mean standard deviation of the components of unit features: 1 if they point
    everywhere, 0 if all are the same (Chen & He 2021, arXiv 2011.10566, §4.1)."""
    unit = nn.functional.normalize(features, dim=1)
    return unit.std(0).mean() * math.sqrt(features.shape[1])
