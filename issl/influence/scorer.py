"""What is measured, and the encoder that it is measured on: views, checks, per-image gradients;
and passes over images.

The rows of all images (what is kept of their gradients) are needed twice: for the curvature, then
for the scores. So a `Pass` can be repeated: from memory ("ram"), or by another forward and backward
pass ("recomputed"), which gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from issl.data.images import Images
from issl.devices import (
    Batches,
    free_memory,
    full_precision,
    is_out_of_memory,
    no_memory,
    pick_device,
)
from issl.errors import IsslError, is_whole
from issl.influence.curvature import Accumulator, Curvature
from issl.influence.following import examine
from issl.influence.frozen_encoder import frozen
from issl.influence.layers import Layer, find_layers, unscored
from issl.influence.losses import CrossEntropy, Loss, stability_loss
from issl.influence.per_example import (
    Followed,
    Moments,
    Sketch,
    check_shape,
    named,
    per_example,
    second_moments,
)
from issl.influence.perturbation import Perturb, Perturbation, describe, keyed_draws
from issl.keyed_random import uniform

Memory = Literal["auto", "ram", "recomputed"]
Rows = Mapping[str, Tensor]  # those of a chunk, on the CPU: see `Scorer.rows`
CHUNK = 512  # the most images whose rows are computed together;
CHUNK_BYTES = 2**30  # fewer if their rows would take more than this
LARGEST_SEED = 1 << 62  # well within the 64 bits of a key
MOMENT_BATCH = 64  # fixed, so that bases from moments do not depend on the caller's batch size


@dataclass(frozen=True)
class Measurement:
    """What is measured; the fields are explained in `issl.self_influence`."""

    perturbation: Perturbation | Perturb
    curvature: Curvature
    seed: int = 0
    draws: int = 1
    loss: Loss | CrossEntropy = stability_loss
    skip: Sequence[str] = ()
    untrained: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.curvature, Curvature) or isinstance(self.curvature, type):
            raise IsslError(f"curvature {self.curvature!r}: need an object such as LoGra(rank=16)")
        if not is_whole(self.seed, 0, LARGEST_SEED - 1):
            raise IsslError(f"seed={self.seed!r}: give a whole number from 0 to 2⁶² − 1")
        if not callable(self.loss) and not isinstance(self.loss, CrossEntropy):
            raise IsslError(
                f"loss={self.loss!r}: need a function (features, perturbed features) -> one loss "
                "per image, or CrossEntropy()"
            )
        if not is_whole(self.draws, 1):
            raise IsslError(f"draws={self.draws!r}: must be a whole number, 1 or more")
        for name in ("seed", "draws"):  # JSON cannot hold numpy's integers
            object.__setattr__(self, name, int(getattr(self, name)))
        keyed = isinstance(self.perturbation, Perturbation) and self.seed < 2**32
        if self.draws > 1 and not keyed:
            raise IsslError(
                f"draws={self.draws}: several draws need a perturbation with .keyed(seed), such as "
                f"GaussianNoise(), and a seed below 2³² (got {describe(self.perturbation)}, seed "
                f"{self.seed})"
            )
        self.perturbs()  # is it a perturbation?

    def perturbs(self) -> list[Perturb]:
        """One perturbation for each draw."""
        return keyed_draws(self.perturbation, self.seed, self.draws)


@dataclass(frozen=True)
class Scorer:
    """An encoder that is scored: its frozen copy, and what is measured; see `open_scorer`."""

    encoder: Followed
    what: Measurement
    device: torch.device
    sketches: Mapping[str, Sketch]  # by layer, once `sketched`

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The layers that are scored."""
        return self.encoder.layers

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.encoder.model.parameters()).dtype

    @property
    def widths(self) -> dict[str, int]:
        """How many numbers are kept of each image's gradient, by layer."""
        return {name: self.sketches[name].width(layer) for name, layer in self.layers.items()}

    def sketched(self, images: Images, norms_only: bool = False) -> Scorer:
        """The same scorer with its sketches: what is kept of each gradient. Some curvatures need a
        pass over some training images for that. If there is no curvature, and the gradients of two
        images will never be multiplied (`norms_only`), their norms are enough."""
        curvature = self.what.curvature
        norms_only = norms_only and curvature.accumulator() is None
        moments = self._moments(images, curvature.moment_images(images.index))
        sketches = {}
        for k, (name, layer) in enumerate(self.layers.items()):
            sketch = curvature.sketch(layer, k, moments.get(name))
            whole = sketch.p_in is None and sketch.p_out is None
            sketches[name] = Sketch(norm=True) if whole and norms_only else sketch
        return replace(self, sketches=sketches)

    def _moments(self, images: Images, positions: Tensor | None) -> dict[str, Moments]:
        """Each layer's second moments over the images at `positions`; empty if that is None."""
        sums: dict[str, Moments] = {}
        for batch in () if positions is None else positions.split(MOMENT_BATCH):
            x, shaken = self.views(images, batch, self.what.perturbs()[0])
            loss = self._loss(images, batch)
            found = second_moments(self.encoder, x, shaken, images.index[batch], loss)
            sums = {name: sums[name] + m if sums else m for name, m in found.items()}
        return sums

    def views(
        self, images: Images, positions: slice | Tensor, perturb: Perturb
    ) -> tuple[Tensor, Tensor]:
        """The images at these positions, in [0, 1], and their perturbed views, checked."""
        x = images.pixels[positions].to(self.device).to(self.dtype) / 255
        index = images.index[positions]
        shaken = perturb(x.clone(), index)  # it may work in place, so it gets a copy
        same = isinstance(shaken, Tensor) and shaken.shape == x.shape
        if not same or not shaken.is_floating_point():
            got = [shaken.dtype, *shaken.shape] if isinstance(shaken, Tensor) else type(shaken)
            raise IsslError(
                f"perturbation gives {got} for pixels {tuple(x.shape)}; it must keep the shape, "
                "and return floats"
            )
        finite = torch.isfinite(shaken).flatten(1).all(1)
        if not bool(finite.all()):
            raise IsslError(
                f"perturbation gives NaN or infinite pixels for {named(index, ~finite)}"
            )
        return x, shaken.to(x.dtype)

    def rows(self, images: Images, positions: slice, bf16: bool = False) -> dict[str, Tensor]:
        """For the images at these positions: "loss" (b,), the mean over the draws, and for each
        layer "layer.NAME", the sketched gradients (b, draws, r)."""
        loss, index = self._loss(images, positions), images.index[positions]
        losses, draws = [], []
        for perturb in self.what.perturbs():
            x, shaken = self.views(images, positions, perturb)
            ell, kept = per_example(self.encoder, self.sketches, x, shaken, index, loss, bf16)
            losses.append(ell)
            draws.append(kept)
        rows = {f"layer.{name}": torch.stack([kept[name] for kept in draws], 1) for name in kept}
        rows["loss"] = torch.stack(losses).mean(0)
        # one check per batch, because each check waits for the GPU
        if not bool(torch.stack([torch.isfinite(value).all() for value in rows.values()]).all()):
            for name, value in rows.items():
                if bool((bad := ~torch.isfinite(value.reshape(len(index), -1)).all(1)).any()):
                    raise IsslError(f"{name} is not finite for {named(index, bad)}")
        return rows

    @torch.no_grad()
    def computes(self, size: Sequence[int]) -> list[float]:
        """What the encoder, the perturbation and the loss give for two fixed images of that size.
        These numbers reveal another forward, or another function of the same name."""
        index = torch.arange(2)
        x = uniform(0, index, (3, *size)).to(self.device, self.dtype)
        shaken = self.what.perturbs()[0](x.clone(), index).to(x.dtype)
        features, moved = self.encoder(x), self.encoder(shaken)
        direction = uniform(1, index[:1], features.shape[1:]).to(features)[0] - 0.5
        loss = self.what.loss
        if isinstance(loss, CrossEntropy):
            loss = loss.on(torch.zeros(2, dtype=torch.int64, device=x.device))
        found = [features.norm(dim=1), features @ direction, loss(features, moved)]
        return [round(v, 8) for v in torch.cat(found).tolist()]

    def _loss(self, images: Images, positions: slice | Tensor) -> Loss:
        loss = self.what.loss
        if isinstance(loss, CrossEntropy):
            return loss.on(images.require_labels()[positions])
        return loss


# --- opening and checking an encoder ---


@full_precision()
def open_scorer(
    encoder: nn.Module, what: Measurement, images: Images, device: str | torch.device | None = None
) -> Scorer:
    """The frozen encoder, after every check and a trial run on the first three images."""
    if torch.is_inference_mode_enabled():
        raise IsslError("scores need gradients: call this outside of torch.inference_mode()")
    find_layers(encoder, what.skip, what.untrained)  # before any work
    first = next(encoder.parameters())
    try:
        place = first.device if device is None else torch.device(device)
        if place.type == "cuda":
            pick_device("cuda")  # says why there is none
        torch.zeros(1, device=place).item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        said = str(error).split(". ")[0]
        raise IsslError(f"device={str(device)!r} cannot be used here ({said}); try cpu") from error
    some = images.pixels[: min(3, len(images))].to(place).to(first.dtype) / 255
    x = torch.cat([some, *(some[:1].flip(-1 - k) for k in range(3 - len(some)))])
    try:
        try:
            followed, others = _copied(encoder, what, place, x, torch.channels_last)
        except RuntimeError:  # a `.view` of features needs the plain layout
            followed, others = _copied(encoder, what, place, x, torch.contiguous_format)
        _check_independent(followed, x)
        token_major, problems = examine(followed.layers, lambda: followed(x))
    except IsslError:
        raise
    except Exception as error:
        raise _fails(x, error) from error
    if problems := others | problems:
        raise unscored(problems, followed.layers)
    return Scorer(replace(followed, token_major=token_major), what, place, {})


@torch.no_grad()
def _copied(
    encoder: nn.Module,
    what: Measurement,
    device: torch.device,
    x: Tensor,
    layout: torch.memory_format,
) -> tuple[Followed, dict[str, str]]:
    """A frozen copy that reads pixels in this layout, and its weights that cannot be scored."""
    model = frozen(encoder, device, layout)
    layers, others = find_layers(model, what.skip, what.untrained)
    followed = Followed(model, layers, layout)
    check_shape(followed(x), len(x))
    return followed, others


def _fails(x: Tensor, error: Exception) -> Exception:
    if is_out_of_memory(error):
        return no_memory(error)
    said = (str(error).splitlines() or [""])[0]
    return IsslError(
        f"encoder fails on pixels of shape {tuple(x.shape)} ({type(error).__name__}: {said}); give "
        "images of the size that it was made for (size=, --size), and remove hooks that are left "
        "over"
    )


def _check_independent(encoder: Followed, x: Tensor) -> None:
    """Raises IsslError if an image's features have no gradient, or depend on its neighbours."""
    with torch.enable_grad():
        together, alone = encoder(x)[:1], encoder(x[:1].clone().requires_grad_())
    if not alone.requires_grad:
        raise IsslError(
            "encoder cuts its features off from their gradient; remove no_grad or detach in its "
            "forward"
        )
    near = {"rtol": 1e-2, "atol": 1e-3 * float(alone.detach().abs().max())}
    if not torch.allclose(together, alone, equal_nan=True, **near):
        raise IsslError(
            "encoder gives an image other features alone than in a batch, so its loss is not per "
            "example; remove what mixes the batch"
        )


def as_images(images: Images | Tensor, what: str = "images") -> Images:
    """The images, at least one; a bare tensor becomes `Images`, indexed 0 … n−1. `what` names them
    in errors."""
    if isinstance(images, Tensor):
        index = pd.DataFrame({"index": range(len(images))})
        images = Images(images.cpu(), None, index, "tensor")
    if not isinstance(images, Images):
        raise IsslError(
            f"{what}: got {type(images).__name__}, need issl.Images or a tensor (n, 3, H, W)"
        )
    if 0 in images.pixels.shape:
        raise IsslError(f"{what} {images.name!r}: the set is empty, or holds no pixels")
    return images


@dataclass(frozen=True)
class Computing:
    """How scores are computed. No setting here changes them beyond rounding.

    Args:
        device: Where to compute; default: where the encoder is.
        batch_size: Images per forward and backward pass. It is halved if memory runs out.
        precision: "bf16" computes the features under autocast, which rounds to 3 digits; curvature
            and sums do not change.
        memory: Where the projected gradients are kept between their two uses: "ram", or nowhere if
            "recomputed". "auto" keeps them in memory if they take at most half of what is free.
        progress: Show a progress bar.

    Raises:
        IsslError: For settings that make no sense.
    """

    device: str | torch.device | None = None
    batch_size: int = 256
    precision: Literal["fp32", "bf16"] = "fp32"
    memory: Memory = "auto"
    progress: bool = False

    def __post_init__(self) -> None:
        if not is_whole(self.batch_size, 1):
            raise IsslError(f"batch_size={self.batch_size!r}: must be a whole number, 1 or more")
        if self.precision not in ("fp32", "bf16"):
            raise IsslError(f"precision={self.precision!r}: choose fp32 or bf16")
        if self.memory not in ("auto", "ram", "recomputed"):
            raise IsslError(f"memory={self.memory!r}: choose auto, ram or recomputed")


class Pass:
    """The rows of some images under a scorer, chunk by chunk, as often as they are needed.

    Iterating gives, for each chunk, its positions and its rows by name. Rows that are kept live as
    long as this object. If `memory` is "auto", the choice is made when this object is created.
    """

    def __init__(self, scorer: Scorer, images: Images, computing: Computing):
        self.scorer, self.images, self.computing = scorer, images, computing
        row_bytes = scorer.dtype.itemsize * scorer.what.draws * sum(scorer.widths.values())
        step, n = max(1, min(CHUNK, CHUNK_BYTES // row_bytes)), len(images)
        self.chunks = [slice(k, min(k + step, n)) for k in range(0, n, step)]
        if computing.memory == "auto":
            self.computing = replace(computing, memory=choose_memory(row_bytes * n))
        self._in_batches, self._kept = Batches(computing.batch_size), dict[int, Rows]()

    def __iter__(self) -> Iterator[tuple[slice, Rows]]:
        n, shown = len(self.images), self.computing.progress and len(self._kept) < len(self.chunks)
        with tqdm(total=n, unit="img", desc="influence", disable=not shown) as bar:
            for k, chunk in enumerate(self.chunks):
                rows = self._kept.get(k) or self._computed(chunk)
                if self.computing.memory == "ram":
                    self._kept[k] = rows
                bar.update(chunk.stop - chunk.start)
                yield chunk, rows

    def accumulate(self, gram: bool = False) -> dict[str, Accumulator | None]:
        """Each layer's sum over these images, from which its curvature is made; for `gram` see
        `Curvature.accumulator`."""
        curvature, n = self.scorer.what.curvature, len(self.images)
        sums = {
            name: curvature.accumulator(gram and width > n)
            for name, width in self.scorer.widths.items()
        }
        if not any(sums.values()):
            return sums  # no curvature, so no pass
        for _, rows in self:
            for name, total in sums.items():
                if total is not None:
                    total.add(rows[f"layer.{name}"].to(self.scorer.device).mean(1))
        return sums

    def _computed(self, chunk: slice) -> Rows:
        def run(batch: slice) -> Rows:
            rows = self.scorer.rows(self.images, batch, self.computing.precision == "bf16")
            return {name: value.cpu() for name, value in rows.items()}

        parts = list(self._in_batches(chunk, run))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def choose_memory(need: int) -> Memory:
    """Where rows that take `need` bytes are kept."""
    return "ram" if need <= 0.5 * free_memory() else "recomputed"
