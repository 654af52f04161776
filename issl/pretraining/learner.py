"""The learner: the encoder and all that its method trains along with it; its loss, and its
files."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from issl.data.image_operations import Pixels
from issl.devices import computes_bf16
from issl.errors import IsslError
from issl.pretraining import objectives
from issl.pretraining.data_parallel import full, gather
from issl.pretraining.encoder import BESIDE, Encoder, Head, new_encoder, read_encoder, save_encoder
from issl.pretraining.recipes import Recipe
from issl.shards import ONE, Shards

Precision = Literal["auto", "fp32", "bf16"]


class Learner(nn.Module):
    """`encoder`; for BYOL also a `predictor` and a `target`, the encoder's moving average. Calling
    it gives the loss.

    start   an encoder that gives its weights, or a learner that gives its predictor and target too
    """

    def __init__(
        self,
        recipe: Recipe,
        width: int,
        classes: int | None,
        seed: int,
        start: Encoder | Learner | None = None,
    ):
        super().__init__()
        self.recipe = recipe
        features = 8 * width
        out = max(2, round(recipe.out * features))
        if recipe.method == "supervised":
            assert classes is not None  # the caller has the labels
            out = classes
        head = Head(
            hidden=max(2, round(recipe.hidden * features)),
            out=out,
            layers=recipe.layers,
            norm=recipe.norm,
        )
        self.encoder = new_encoder(width, head, seed)
        first = start.encoder if isinstance(start, Learner) else start
        if first is not None:
            if (first.width, first.head) != (width, head):
                raise IsslError(
                    f"start: an encoder of width {first.width} with {first.head}; this run trains width {width} with "
                    f"{head}; take the same width and method"
                )
            self.encoder.load_state_dict(first.state_dict())
        self.predictor: nn.Module | None = None
        self.target: nn.Module | None = None
        if recipe.method == "byol":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + 1)
                self.predictor = head.build(out)
            self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        if isinstance(start, Learner):
            self.load_state_dict(start.state_dict())

    def forward(
        self,
        xa: Pixels,
        xb: Pixels | None,
        labels: Int64[Tensor, " b"] | None,
        precision: Precision = "auto",
        shards: Shards = ONE,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "v d"]]:
        """The loss of the batch (of all processes' batches) and the features of its views, without
        gradient.

        Both views pass together, so BatchNorm sees them as one batch. The networks run in bf16 if
        `precision` says so, the loss in fp32 or wider.
        """
        recipe, encoder = self.recipe, self.encoder
        both = (xa if xb is None else torch.cat([xa, xb])).contiguous(
            memory_format=torch.channels_last
        )
        device = both.device
        # bf16 convolutions in NHWC: 3 to 4 times faster than plain fp32 on CPUs that have them, and
        # on GPUs
        with torch.autocast(device.type, torch.bfloat16, enabled=computes_bf16(device, precision)):
            features = encoder.backbone(both)
            z = encoder.projector(features)
            p = None if self.predictor is None else self.predictor(z)
            with torch.no_grad():
                t = None if self.target is None else self.target(both)

        def halves(rows: Tensor) -> tuple[Tensor, Tensor]:
            a, b = full(rows).chunk(2)
            return gather(a, shards), gather(b, shards)

        with torch.autocast(device.type, enabled=False):
            if recipe.method == "supervised":
                assert labels is not None
                loss = objectives.supervised(gather(full(z), shards), gather(labels, shards))
            elif recipe.method == "byol":
                assert p is not None and t is not None
                loss = objectives.byol(*halves(p), *halves(t))
            elif recipe.method == "barlow_twins":
                loss = objectives.barlow_twins(*halves(z), recipe.off_diagonal, recipe.scale)
            else:
                loss = objectives.simclr(*halves(z), recipe.temperature)
            return loss, gather(full(features.detach()), shards)

    def follow(self, done: float) -> None:
        """Move the target towards the encoder: target ← τ · target + (1 − τ) · encoder, with
        τ = 1 − (1 − τ₀)(cos(π · done) + 1)/2, `done` the part of the run that is over (Grill et al.
        2020, §3)."""
        if self.target is None:
            return
        tau = 1 - (1 - self.recipe.tau) * (math.cos(math.pi * done) + 1) / 2
        torch._foreach_lerp_(
            list(self.target.parameters()), [p.detach() for p in self.encoder.parameters()], 1 - tau
        )


def save_learner(path: Path, learner: Learner, about: dict[str, Any], half: bool = True) -> None:
    """The encoder's file with BYOL's predictor and target: all that the training gradient depends
    on at this moment.

    half   in half precision, see `save_encoder`
    """
    beside = {k: v for k, v in learner.state_dict().items() if k.startswith(BESIDE)}
    save_encoder(path, learner.encoder, about, beside, half)


def load_learner(path: str | Path, recipe: Recipe | None = None) -> Learner:
    """The learner that `save_learner` wrote, in float32 and in training mode, as it was.

    Width and recipe come from the file's header; `recipe` is for files that do not say it. Raises
    IsslError for a missing or damaged file, and for one without a whole learner: BYOL's predictor
    and target are missing from what `save_encoder` wrote by default.
    """
    header, tensors = read_encoder(path)
    settings = header.get("recipe") or header.get("config", {}).get("recipe")
    if settings is None and recipe is None:
        raise IsslError(
            f"{path} does not say how it was trained: give the recipe, such as recipe('simclr')"
        )
    settings = settings or recipe.model_dump()  # type: ignore[union-attr]  # one of the two is there
    recipe, head = Recipe(**settings), Head(**header["head"])
    learner = Learner(
        recipe, header["width"], head.out if recipe.method == "supervised" else None, seed=0
    )
    state = {k if k.startswith(BESIDE) else f"encoder.{k}": v for k, v in tensors.items()}
    missing = sorted({name.split(".")[0] for name in learner.state_dict().keys() - state.keys()})
    if missing:
        raise IsslError(
            f"{path} holds no {recipe.method} learner: {' and '.join(missing)} are not in it; a Pretrain stage with "
            "`snapshots` saves whole learners"
        )
    learner.load_state_dict(state)
    return learner


def as_learner(trained: Learner | Encoder | str | Path, recipe: Recipe | None = None) -> Learner:
    """The learner itself; that of a file; or one around an Encoder and its recipe. Raises IsslError
    where a BYOL predictor and target are missing."""
    if isinstance(trained, Learner):
        return trained
    if isinstance(trained, str | Path):
        return load_learner(trained, recipe)
    if not isinstance(trained, Encoder):
        raise IsslError(
            f"{type(trained).__name__}: need the file of an encoder, an Encoder or a Learner"
        )
    if recipe is None:
        raise IsslError(
            "an Encoder does not say how it was trained: give its recipe, such as recipe('simclr')"
        )
    if recipe.method == "byol":
        raise IsslError(
            "a BYOL Encoder lacks its predictor and target: give the Learner, or the file of one"
        )
    return Learner(recipe, trained.width, trained.head.out, seed=0, start=trained)


def spread(features: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """√d times the mean standard deviation of the components of unit features: 1 if they point
    everywhere, 0 if all are the same (Chen & He 2021, arXiv 2011.10566, §4.1)."""
    unit = nn.functional.normalize(features, dim=1)
    return unit.std(0).mean() * math.sqrt(features.shape[1])
