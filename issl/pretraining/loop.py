"""Pretraining: one plain loop for every method.

All randomness is a function of (seed, epoch): the order of the images and a table of uniform
numbers, one row per image and view, both drawn over the whole data set. So a run that is killed and
resumed takes the same steps, and leaving an image out (`keep`) changes neither the order nor the
views of the others.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from tqdm import tqdm

from issl.data.images import Images
from issl.data.views import VIEW_UNIFORMS, Pixels
from issl.devices import computes_bf16
from issl.errors import IsslError, is_whole
from issl.pretraining.checkpoint import Checkpoint, weights_digest
from issl.pretraining.encoder import Encoder
from issl.pretraining.learner import Learner, Precision, spread
from issl.pretraining.methods import method_named
from issl.pretraining.methods.base import Weights
from issl.pretraining.optimizer import LARS, groups, learning_rate
from issl.pretraining.recipes import Recipe, plain
from issl.pretraining.recipes import recipe as published

# feature_std below this: all features point the same way (a random encoder has 0.1 or more)
COLLAPSED = 0.02
LARGEST_SEED = (1 << 11) - 1  # see `_generator`
CPU = torch.device("cpu")
WORTH_COMPILING = 2_000_000  # images seen by a run, above which a minute of compilation pays off
VERSIONS = 128  # of a function that torch compiles, in one process
SIMCLR = published("simclr")
COLUMNS = ("epoch", "loss", "feature_std", "lr", "images_per_second")  # of the history
AfterEpoch = Callable[[int, Learner], None]


@dataclass(frozen=True)
class Execution:
    """How a run is computed. Nothing here changes the steps that are taken, but each may change
    their rounding.

    Attributes:
        device: Where to compute.
        precision: Precision of the networks; auto: bf16 if the device computes it natively.
        compiled: Use torch.compile; auto: on a GPU, if the run is long enough for it to pay off.
        progress: Whether a bar is shown.
    """

    device: str | torch.device = "cpu"
    precision: Precision = "auto"
    compiled: Literal["auto", "on", "off"] = "auto"
    progress: bool = True

    def maybe_compiled(
        self, images_seen: int, *functions: Callable[..., Any]
    ) -> Sequence[Callable[..., Any]]:
        """These functions, compiled if that pays off in a run that sees this many images."""
        pays = torch.device(self.device).type == "cuda" and images_seen >= WORTH_COMPILING
        if self.compiled == "off" or (self.compiled == "auto" and not pays):
            return functions
        if (lacking := lacking_for_compilation()) is None:
            from torch._dynamo import config  # slow to import

            # torch counts the versions of a function over all networks of a process (widths, batch
            # and view sizes, recipes), and after eight versions silently runs it eagerly
            config.recompile_limit = max(config.recompile_limit, VERSIONS)
            return [torch.compile(f, dynamic=False) for f in functions]
        if self.compiled == "on":
            raise IsslError(
                f"compiled='on': torch.compile needs {lacking}; install it, or choose auto or off"
            )
        said = f"training without torch.compile, which needs {lacking}: slower, the same otherwise"
        print(said, file=sys.stderr)
        return functions


def lacking_for_compilation() -> str | None:
    """What torch.compile needs for a GPU and does not find; None if nothing is missing."""
    named = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([named] if named else ["cc", "gcc", "clang"])):
        return f"the C compiler {named} (of $CC)" if named else "a C compiler (gcc or clang)"
    return None if find_spec("triton") else "the package triton"


def epoch_order(n: int, seed: int, epoch: int) -> Int64[Tensor, " n"]:
    """The order of all n images in this epoch."""
    return torch.randperm(n, generator=_generator(seed, epoch, 0))


def epoch_uniforms(n: int, seed: int, epoch: int) -> Float[Tensor, "n 2 u"]:
    """The uniform numbers of both views of all n images in this epoch."""
    return torch.rand(n, 2, VIEW_UNIFORMS, generator=_generator(seed, epoch, 1))


def _generator(seed: int, epoch: int, what: int) -> torch.Generator:
    # packs three numbers into the 32 bits that torch reads of a seed: seed < 2^11, epoch < 2^20
    return torch.Generator().manual_seed(seed << 21 | epoch << 1 | what)


def epoch_batches(
    keep: Bool[Tensor, " n"], seed: int, epoch: int, batch_size: int, gaps: bool
) -> list[Tensor]:
    """The positions of the images in each batch of this epoch, on the device of `keep`.

    Images that are left out are skipped or, with `gaps`, leave their place empty. The last images,
    too few to fill a batch, are dropped.
    """
    order = epoch_order(len(keep), seed, epoch).to(keep.device)
    order = order if gaps else order[keep[order]]
    batches = list(order.split(batch_size)[: len(order) // batch_size])
    if gaps:
        batches = [rows[keep[rows]] for rows in batches]
        if (smallest := min(map(len, batches))) < 2:
            raise IsslError(
                f"gaps=True: {smallest} image of a batch is left; leave out fewer, or use a "
                "larger batch_size"
            )
    return batches


@dataclass(frozen=True)
class Step:
    """A step of a run: its number from 0, the fraction of the run before it, its learning rate, the
    positions of its images, and the inputs of the learner."""

    number: int
    done: float
    lr: float
    rows: Int64[Tensor, " b"]
    xa: Pixels
    xb: Pixels | None
    labels: Int64[Tensor, " b"] | None


class Course:
    """The steps of a run, each a function of the run's settings alone.

    The arguments are those of `pretrain`.
    """

    def __init__(
        self,
        images: Images,
        recipe: Recipe,
        epochs: int,
        batch_size: int,
        seed: int,
        keep: Bool[Tensor, " n"] | None = None,
        gaps: bool = False,
        device: torch.device = CPU,
    ):
        n = len(images)
        keep = torch.ones(n, dtype=torch.bool) if keep is None else keep
        _check(n, keep, epochs, batch_size, seed, gaps)
        self.recipe, self.epochs, self.batch_size, self.seed = recipe, epochs, batch_size, seed
        self.gaps, self.kept = gaps, int(keep.sum())
        labelled = method_named(recipe.method).labelled
        self.labels = images.require_labels().to(device) if labelled else None
        self.pixels, self.index = images.tensor().to(device), images.index
        self.keep = keep.to(device)
        self.of_epoch = (n if gaps else self.kept) // batch_size  # steps
        self.steps = epochs * self.of_epoch
        self.warmup = min(recipe.warmup, max(1, epochs // 10)) * self.of_epoch
        self.view_a, self.view_b = recipe.view_a.__call__, recipe.view_b.__call__
        self._drawn: tuple[int, Tensor, list[Tensor]] = (-1, self.pixels, [])

    @property
    def classes(self) -> int | None:
        """How many classes, for a supervised method."""
        return None if self.labels is None else int(self.labels.max()) + 1

    def images_digest(self) -> str:
        """The hash of the images' pixels, indices and labels, sixteen hex digits."""
        digest = hashlib.sha256()
        for values in (self.pixels, self.index, self.labels):
            if values is not None:
                digest.update(values.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def step(self, number: int) -> Step:
        """Step `number`. Consecutive steps of one epoch share its random draws."""
        epoch, k = divmod(number, self.of_epoch)
        if self._drawn[0] != epoch:
            uniforms = epoch_uniforms(len(self.keep), self.seed, epoch).to(self.keep.device)
            batches = epoch_batches(self.keep, self.seed, epoch, self.batch_size, self.gaps)
            self._drawn = epoch, uniforms, batches
        rows = self._drawn[2][k]
        peak = self.recipe.lr * self.batch_size / 256
        lr = learning_rate(number, self.steps, self.warmup, peak)
        x, u = self.pixels[rows].float().div_(255), self._drawn[1][rows]
        height, width = x.shape[2:]
        size = (height // 2, width // 2) if number < self.recipe.small * self.steps else None
        xa = self.view_a(x, u[:, 0], size)
        xb = self.view_b(x, u[:, 1], size) if self.labels is None else None
        y = None if self.labels is None else self.labels[rows]
        return Step(number, number / self.steps, lr, rows, xa, xb, y)


def take(
    step: Step,
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    precision: Precision = "auto",
    weights: Weights | None = None,
    call: Callable[..., Any] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "v d"]]:
    """Take a step, with these weights of its images. Returns the loss before it and the features.
    `call` is the learner's compiled call."""
    for group in optimizer.param_groups:
        group["lr"] = step.lr
    loss, features = (call or learner)(step.xa, step.xb, step.labels, precision, weights)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    learner.follow(step.done)
    return loss.detach(), features


def pretrain(
    images: Images,
    recipe: Recipe = SIMCLR,
    *,
    width: int = 64,
    epochs: int = 200,
    batch_size: int = 256,
    seed: int = 0,
    keep: Bool[Tensor, " n"] | None = None,
    gaps: bool = False,
    start: Encoder | Learner | None = None,
    execution: Execution = Execution(),
    checkpoint: Checkpoint = Checkpoint(),
    after_epoch: AfterEpoch | None = None,
) -> tuple[Encoder, pd.DataFrame]:
    """Train an encoder on `images`.

    Args:
        images: The training images; only a supervised method uses their labels.
        recipe: How to train; default: SimCLR's published one, see `issl.pretraining.recipes`.
        width: Width of ResNet-18's first stage.
        batch_size: Images per step.
        epochs: How many passes over the images; 0 gives the encoder as initialised.
        seed: Seed of the initial weights, of the order and of the views.
        keep: False leaves an image out, which changes neither order nor views of the others.
        gaps: Leave its place in its batch empty, so that the other batches do not change either
            (the smallest possible change); default: the next images move up.
        start: An encoder, or a whole learner, to continue from instead of fresh weights. It is not
            modified.
        execution: Device, precision and compilation.
        checkpoint: Where the run is saved, so that it can be continued.
        after_epoch: Called after each epoch with the number of epochs done and the learner, before
            that epoch's checkpoint is written, so the files that it writes exist when a run
            resumes.

    Returns:
        The encoder (on the CPU, in eval mode), and its history, one row per epoch: epoch, loss,
        feature_std (see `issl.pretraining.learner.spread`; near 0 = collapse), lr,
        images_per_second.
    """
    n, device = len(images), torch.device(execution.device)
    course = Course(images, recipe, epochs, batch_size, seed, keep, gaps, device)
    learner = Learner(recipe, width, course.classes, seed, start)
    learner = learner.to(device).for_training()
    optimizer = optimizer_of(learner, batch_size)
    identity = {
        "recipe": plain(recipe),
        "width": width,
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
        "n": n,
        "images": course.images_digest(),
        "left_out": (~course.keep).nonzero().squeeze(1).tolist(),
        "bf16": computes_bf16(device, execution.precision),
        "gaps": gaps,
        "start": None if start is None else weights_digest(start),
    }
    history = checkpoint.resume(learner, optimizer, identity)
    steps = course.of_epoch
    course.view_a, course.view_b, call = execution.maybe_compiled(
        epochs * course.kept, course.view_a, course.view_b, learner.__call__
    )
    saved_at = time.monotonic()
    with tqdm(
        total=epochs * steps * batch_size,
        initial=len(history) * steps * batch_size,
        unit="img",
        unit_scale=True,
        desc=f"pretrain {recipe.method} seed {seed}",
        disable=not execution.progress,
    ) as bar:
        for epoch in range(len(history), epochs):
            began = time.monotonic()
            losses, spreads = [], []
            for number in range(epoch * steps, (epoch + 1) * steps):
                step = course.step(number)
                loss, features = take(step, learner, optimizer, execution.precision, call=call)
                losses.append(loss)
                spreads.append(spread(features))
                bar.update(batch_size)
            # the only wait for the device in an epoch
            mean_loss, std = float(torch.stack(losses).mean()), float(torch.stack(spreads).mean())
            speed = steps * batch_size / (time.monotonic() - began)
            _check_health(learner, epoch, mean_loss, std, batch_size)
            history.append(dict(zip(COLUMNS, (epoch, mean_loss, std, step.lr, speed), strict=True)))
            if after_epoch is not None:
                after_epoch(epoch + 1, learner)
                learner.train()
            bar.set_postfix(loss=f"{mean_loss:.3f}")
            if time.monotonic() - saved_at >= checkpoint.seconds:
                checkpoint.save(learner, optimizer, identity, history)
                saved_at = time.monotonic()
    encoder = learner.encoder.to("cpu").to(memory_format=torch.contiguous_format)
    return encoder.eval(), pd.DataFrame(history, columns=None if history else list(COLUMNS))


def _check(n: int, keep: Tensor, epochs: int, batch_size: int, seed: int, gaps: bool) -> None:
    if not is_whole(epochs) or not is_whole(seed, 0, LARGEST_SEED):
        raise IsslError(
            f"epochs={epochs!r}, seed={seed!r}: give whole numbers, 0 or more, and a seed up to "
            f"{LARGEST_SEED}"
        )
    if len(keep) != n:
        raise IsslError(f"keep has {len(keep)} entries for {n} images")
    places = n if gaps else int(keep.sum())
    if not is_whole(batch_size, 2, places):
        raise IsslError(
            f"batch_size={batch_size}: need 2 to {places}, the number of images trained on"
        )


def optimizer_of(learner: Learner, batch_size: int) -> torch.optim.Optimizer:
    """The optimizer of the learner's recipe."""
    recipe = learner.recipe
    parts, peak = groups(learner, recipe.weight_decay), recipe.lr * batch_size / 256
    if recipe.optimizer == "lars":
        return LARS(parts, lr=peak, momentum=recipe.momentum, trust=recipe.trust, clip=recipe.clip)
    return torch.optim.SGD(
        parts, lr=peak, momentum=recipe.momentum, nesterov=recipe.momentum > 0, foreach=True
    )


def _check_health(learner: Learner, epoch: int, loss: float, std: float, batch_size: int) -> None:
    """Raises IsslError if the run diverged or collapsed."""
    recipe = learner.recipe
    advice = (
        f"lower the recipe's lr={recipe.lr:g} (for a batch of 256; {batch_size} here) or lengthen "
        "its warm-up"
    )
    if not math.isfinite(loss) or not math.isfinite(std):
        raise IsslError(f"pretraining diverged in epoch {epoch}: loss is {loss}; {advice}")
    if std < COLLAPSED:
        raise IsslError(
            f"pretraining collapsed in epoch {epoch}: all features point the same way (spread "
            f"{std:.4f}, below {COLLAPSED}); lower weight_decay={recipe.weight_decay:g}"
            f"{learner.method.advice.format(**vars(recipe))}, or {advice}"
        )
