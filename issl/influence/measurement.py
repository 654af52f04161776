"""What is measured, and the pass over the images that measures it: shared by self- and
cross-influence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from issl.data.images import Images
from issl.devices import is_out_of_memory, no_memory, pick_device
from issl.errors import IsslError, is_whole
from issl.influence.batch_size import choose_batch_size
from issl.influence.computing import Computing
from issl.influence.curvature import (
    Curvature,
    Moments,
    Sketch,
    Statistic,
    Whitening,
    kept_width,
    no_moments,
)
from issl.influence.following import examine
from issl.influence.frozen_encoder import frozen
from issl.influence.gradient_store import Pass, RowsOf, choose_memory, make_pass, split
from issl.influence.layers import Layer, find_layers, unscored
from issl.influence.losses import CrossEntropy, Loss, stability_loss
from issl.influence.per_example import (
    Followed,
    check_features,
    check_shape,
    per_example,
    second_moments,
)
from issl.influence.perturbation import Perturb, Perturbation, describe, keyed_draws
from issl.keyed_random import uniform
from issl.shards import Shards

LARGEST_SEED = 1 << 62  # a key of 64 bits, of which queries set one of their own
MOMENT_BATCH = 64  # fixed, so that bases from moments do not depend on the caller's batch size


@dataclass(frozen=True)
class Measurement:
    """What is measured; the fields are explained in `issl.self_influence`."""

    perturbation: Perturbation | Perturb
    curvature: Curvature
    seed: int = 0
    draws: int = 1
    average: Literal["gradients", "scores"] = "gradients"
    loss: Loss | CrossEntropy = stability_loss
    fisher: Loss | CrossEntropy | None = None
    skip: Sequence[str] = ()
    untrained: bool = False

    def __post_init__(self) -> None:
        if self.average not in ("gradients", "scores"):
            raise IsslError(f"average={self.average!r}: choose gradients or scores")
        if not isinstance(self.curvature, Curvature) or isinstance(self.curvature, type):
            raise IsslError(f"curvature {self.curvature!r}: need an object such as LoGra(rank=16)")
        if not is_whole(self.seed, 0, LARGEST_SEED - 1):
            raise IsslError(f"seed={self.seed!r}: give a whole number from 0 to 2⁶² − 1")
        for name, loss in (("loss", self.loss), ("fisher", self.fisher)):
            if not (
                callable(loss)
                or isinstance(loss, CrossEntropy)
                or (name == "fisher" and loss is None)
            ):
                raise IsslError(
                    f"{name}={loss!r}: need a function (features, perturbed features) -> one loss per image, or "
                    "CrossEntropy()"
                )
        if not is_whole(self.draws, 1):
            raise IsslError(f"draws={self.draws!r}: must be a whole number, 1 or more")
        for name in ("seed", "draws"):  # numpy's are none to JSON
            object.__setattr__(self, name, int(getattr(self, name)))
        if self.draws > 1 and (
            not isinstance(self.perturbation, Perturbation) or self.seed >= 2**32
        ):
            raise IsslError(
                f"draws={self.draws}: several draws need a perturbation with .keyed(seed), such as GaussianNoise(), "
                f"and a seed below 2³² (got {describe(self.perturbation)}, seed {self.seed})"
            )

    @property
    def pooled(self) -> bool:
        """Whether H is the mean over images and draws, instead of that over each image's mean
        gradient."""
        return self.average == "scores"

    def perturbs(self) -> list[Perturb]:
        """One for each draw."""
        return keyed_draws(self.perturbation, self.seed, self.draws)


@dataclass(frozen=True)
class Probe:
    """The frozen encoder, and the views of images that it is shown."""

    encoder: Followed
    what: Measurement
    perturbs: list[Perturb]
    device: torch.device
    dtype: torch.dtype
    others: Mapping[str, str]  # the weights that cannot be scored, by what they are

    @property
    def layers(self) -> Mapping[str, Layer]:
        """Those that are scored."""
        return self.encoder.layers

    def checked(self, images: Images, shards: Shards) -> Probe:
        """The same, after a look at how the encoder treats images: the first three of this
        process's share.

        Raises IsslError for an encoder that mixes the images of a batch, and for weights that
        cannot be scored.
        """
        share = shards.share(len(images))
        positions = torch.arange(share.start, min(share.start + 3, share.stop))
        some = self.pixels(images, positions)
        x = torch.cat([some, *(some[:1].flip(-1 - k) for k in range(3 - len(some)))])
        try:
            encoder, together = self.running(x)
            check_features(
                check_shape(together, len(x))[: len(some)], len(some), images.index[positions]
            )
            _check_independent(encoder, x, together)
            uses, problems = examine(encoder.model, encoder.layers, lambda: encoder(x))
        except (RuntimeError, MemoryError) as error:
            raise _fails(x, error) from error
        problems = dict(self.others) | problems
        if problems:
            raise unscored(problems, encoder.layers)
        return replace(self, encoder=replace(encoder, uses=uses))

    def running(self, x: Tensor) -> tuple[Followed, Tensor]:
        """The encoder in a layout of pixels that it can read, and the features of these. IsslError
        if there is none."""
        encoder = self.encoder
        try:
            return encoder, _run(encoder, x)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            # a .view of features asks for the plain layout
            model = frozen(encoder.model, self.device, torch.contiguous_format)
            plain, _ = _followed(model, self.what, torch.contiguous_format)
            return plain, _run(plain, x)

    def pixels(self, images: Images, positions: slice | Tensor) -> Tensor:
        return images.pixels[positions].to(self.device).to(self.dtype) / 255

    def views(
        self, images: Images, positions: slice | Tensor, perturb: Perturb
    ) -> tuple[Tensor, Tensor]:
        """The images at these positions, and their perturbed views, checked."""
        x = self.pixels(images, positions)
        try:
            shaken = perturb(
                x.clone(), images.index[positions]
            )  # one that works in place must not change the image
        except Exception as error:
            if is_out_of_memory(error):
                raise  # the batch will be halved
            raise IsslError(
                f"perturbation {describe(self.what.perturbation)} fails ({type(error).__name__}: {error}); it is "
                "called with pixels (b, 3, h, w) in [0, 1] and the images' index (b,)"
            ) from error
        _check_view(shaken, x, images.index[positions])
        return x, shaken.to(x.dtype)

    @torch.no_grad()
    def computes(self, size: Sequence[int]) -> list[float]:
        """What this encoder makes of two fixed images of that size, with the perturbation and the
        losses: numbers by which another forward or function of the same name is noticed."""
        index = torch.arange(2)
        x = uniform(0, index, (3, *size)).to(self.device, self.dtype)
        shaken = self.perturbs[0](x.clone(), index).to(x.dtype)
        features, moved = self.encoder(x), self.encoder(shaken)
        direction = uniform(1, index[:1], features.shape[1:]).to(features)[0] - 0.5
        found = [features.norm(dim=1), features @ direction]
        for loss in (self.what.loss, self.what.fisher or self.what.loss):
            bound = (
                loss.on(torch.zeros(2, dtype=torch.int64, device=x.device))
                if isinstance(loss, CrossEntropy)
                else loss
            )
            found.append(bound(features, moved))
        return [round(v, 8) for v in torch.cat(found).tolist()]

    def moments(self, images: Images, computing: Computing) -> dict[str, Moments | None]:
        """Each layer's second moments over the images that the curvature chooses, if it needs
        any."""
        positions = self.what.curvature.moment_images(images.index)
        if positions is None:
            return dict.fromkeys(self.layers)
        sums = {name: no_moments(layer) for name, layer in self.layers.items()}
        shards = computing.shards
        for batch in positions.split(MOMENT_BATCH)[shards.rank :: shards.world]:
            loss = _bound(self.what.fisher or self.what.loss, images, batch)
            views = self.views(images, batch, self.perturbs[0])
            found = second_moments(self.encoder, *views, images.index[batch], loss)
            sums = {name: sums[name] + found[name] for name in sums}
        return {
            name: Moments(shards.sum(m.inputs), shards.sum(m.outputs)) for name, m in sums.items()
        }

    def choose_batch(
        self, images: Images, sketches: dict[str, Sketch], computing: Computing
    ) -> Computing:
        """The same settings with `batch_size` decided, by a trial on the first images of this
        process's share."""
        if computing.batch_size != "auto":
            return computing
        rows_of, start = (
            self.rows_of(images, sketches, self.what.loss, computing),
            computing.shards.share(len(images)).start,
        )
        size = choose_batch_size(
            lambda count: rows_of(slice(start, min(start + count, len(images)))), self.device
        )
        return replace(computing, batch_size=size)

    def sketches(self, moments: dict[str, Moments | None], norms_only: bool) -> dict[str, Sketch]:
        """What is kept of each image's gradient, by layer."""
        return {
            name: self.what.curvature.sketch(layer, k, moments[name], norms_only)
            for k, (name, layer) in enumerate(self.layers.items())
        }

    def row_bytes(self, sketches: dict[str, Sketch]) -> int:
        """Of one image's rows."""
        width = sum(kept_width(layer, sketches[name]) for name, layer in self.layers.items())
        return self.dtype.itemsize * self.what.draws * width

    def rows_of(
        self,
        images: Images,
        sketches: dict[str, Sketch],
        loss: Loss | CrossEntropy,
        computing: Computing,
    ) -> RowsOf:
        """Losses (b,), mean over draws, and each layer's sketched gradients (b, draws, r), of
        slices of `images`."""

        def rows_of(positions: slice) -> dict[str, Tensor]:
            bound, losses, draws = _bound(loss, images, positions), [], []
            for perturb in self.perturbs:
                x, shaken = self.views(images, positions, perturb)
                index, bf16 = images.index[positions], computing.precision == "bf16"
                ell, kept = per_example(self.encoder, sketches, x, shaken, index, bound, bf16)
                _check_finite({"loss": ell, **kept}, images.index[positions])
                losses.append(ell)
                draws.append(kept)
            gradients = {
                f"layer.{name}": torch.stack([d[name] for d in draws], 1) for name in self.layers
            }
            return {"loss": torch.stack(losses).mean(0), **gradients}

        return rows_of


@dataclass(frozen=True)
class Run:
    """A measurement that is ready: the rows of the images, and how to compute those of others."""

    data: Images
    what: Measurement
    computing: Computing  # `memory` is decided
    probe: Probe
    sketches: dict[str, Sketch]
    rows: Pass  # of the images
    fisher_rows: Pass | None  # the same for the loss that makes H, if that is another

    def rows_of_others(self, images: Images) -> Pass:
        """The rows of other images, under the same encoder and projections; computed, not
        stored."""
        computing = replace(self.computing, memory="recomputed", store=None, progress=False)
        rows_of = self.probe.rows_of(images, self.sketches, self.what.loss, computing)
        return make_pass(
            rows_of, split(slice(0, len(images)), self.probe.row_bytes(self.sketches)), computing
        )

    def sums(self, foreign: bool) -> dict[str, Statistic]:
        """What each layer's curvature is made from, over all images and processes.

        foreign     rows other than those that are summed will be whitened
        """
        count = len(self.data) * (self.what.draws if self.what.pooled else 1)
        sums = {
            name: self.what.curvature.statistic(
                kept_width(layer, self.sketches[name]), count, foreign
            )
            for name, layer in self.probe.layers.items()
        }
        for _, rows in (self.fisher_rows or self.rows)():
            for name, statistic in sums.items():
                g = rows(f"layer.{name}").to(self.probe.device)
                statistic.add(g.flatten(0, 1) if self.what.pooled else g.mean(1))
        self.computing.shards.reduce(list(sums.values()))
        return sums

    def whitenings(self, dampings: Sequence[float]) -> dict[str, list[Whitening]]:
        """Each layer's inverse curvature at each damping, over all images and processes."""
        return whitenings(
            self.sums(foreign=self.fisher_rows is not None), self.what.curvature, dampings
        )


def whitenings(
    sums: dict[str, Statistic], curvature: Curvature, dampings: Sequence[float]
) -> dict[str, list[Whitening]]:
    """Each layer's inverse curvature at each damping."""
    return {name: [sums[name].whitening(d, curvature.absolute) for d in dampings] for name in sums}


def open_probe(encoder: nn.Module, what: Measurement, computing: Computing) -> Probe:
    """The frozen encoder, after every check that needs no image."""
    if torch.is_inference_mode_enabled():
        raise IsslError("scores need gradients: call this outside of torch.inference_mode()")
    perturbs = what.perturbs()
    find_layers(encoder, what.skip, what.untrained)  # before any work
    first = next(encoder.parameters())
    device = first.device if computing.device is None else torch.device(computing.device)
    if device.type == "cuda":
        pick_device("cuda")  # says why there is none
    try:
        torch.empty(1, device=device)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise IsslError(
            f"device={str(device)!r} cannot be used here ({str(error).split('. ')[0]}); try cpu"
        ) from error
    followed, others = _followed(
        frozen(encoder, device, torch.channels_last), what, torch.channels_last
    )
    return Probe(followed, what, perturbs, device, first.dtype, others)


def _followed(
    model: nn.Module, what: Measurement, layout: torch.memory_format
) -> tuple[Followed, dict[str, str]]:
    """An encoder with the layers that are scored, and the weights that cannot be."""
    layers, others = find_layers(model, what.skip, what.untrained)
    return Followed(model, layers, layout), others


@torch.no_grad()
def with_features(
    encoder: nn.Module, images: Images, what: Measurement, computing: Computing
) -> Images:
    """The images of which every view has features that are finite and not zero, by a forward pass;
    the others are named in `broken`."""
    probe = open_probe(encoder, what, computing)
    x = probe.pixels(images, slice(0, 1))
    try:
        run, _ = probe.running(x)
    except RuntimeError as error:
        raise _fails(x, error) from error
    good = torch.ones(len(images), dtype=torch.bool)
    for positions in torch.arange(len(images)).split(MOMENT_BATCH):
        for perturb in probe.perturbs:
            for view in probe.views(images, positions, perturb):
                features = run(view)
                good[positions] &= (torch.isfinite(features).all(1) & features.any(1)).cpu()
    if good.all():
        return images
    names = images.attributes["path" if "path" in images.attributes else "index"].astype(str)
    broken = [
        (name, "no features under this encoder: all zero, or not finite")
        for name in names[~good.numpy()]
    ]
    return replace(images.subset(good), broken=(*images.broken, *broken))


def prepare(
    encoder: nn.Module,
    images: Images | Tensor,
    what: Measurement,
    computing: Computing,
    norms_only: bool = False,
) -> Run:
    """Check everything that can be wrong, and set up the pass over the training images.

    norms_only  gradients of two images will never be multiplied
    """
    data = not_empty(images)
    probe = open_probe(encoder, what, computing).checked(data, computing.shards)
    return set_up(
        probe,
        data,
        probe.sketches(probe.moments(data, computing), norms_only),
        computing,
        norms_only,
    )


def set_up(
    probe: Probe,
    images: Images | Tensor,
    sketches: dict[str, Sketch],
    computing: Computing,
    norms_only: bool = False,
) -> Run:
    """The pass over some images, where it is known what is kept of each gradient."""
    data, what = not_empty(images), probe.what
    share, row_bytes = computing.shards.share(len(data)), probe.row_bytes(sketches)
    computing = choose_memory(computing, row_bytes * (share.stop - share.start))
    computing = probe.choose_batch(data, sketches, computing)

    def rows(loss: Loss | CrossEntropy) -> Pass:
        return make_pass(
            probe.rows_of(data, sketches, loss, computing), split(share, row_bytes), computing
        )

    fisher_rows = None if what.fisher is None else rows(what.fisher)
    return Run(data, what, computing, probe, sketches, rows(what.loss), fisher_rows)


def describe_loss(loss: Loss | CrossEntropy) -> str:
    """A text that is the same in every process: a function's name, or a loss's settings."""
    return getattr(loss, "__qualname__", repr(loss))


def not_empty(images: Images | Tensor, what: str = "images") -> Images:
    """`as_images`, with at least one image; `what` they are, for the error."""
    data = as_images(images)
    if len(data) == 0:
        raise IsslError(f"{what} {data.name!r}: the set is empty")
    return data


def as_images(images: Images | Tensor) -> Images:
    """A bare tensor as `Images`, indexed 0 … n−1."""
    if isinstance(images, Images):
        return images
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise IsslError(f"images: got {shape}, need issl.Images or a tensor (n, 3, H, W)")
    if images.dtype != torch.uint8:
        raise IsslError(
            f"images: pixels are {images.dtype}; give uint8, 0 to 255 (for floats: (255 * x).round().byte())"
        )
    if images.is_meta or 0 in images.shape[1:]:
        raise IsslError(
            f"images: {tuple(images.shape)} on {images.device} holds no pixels; give images with values"
        )
    return Images(images.cpu(), None, pd.DataFrame({"index": range(len(images))}), "tensor")


def _bound(loss: Loss | CrossEntropy, images: Images, positions: slice | Tensor) -> Loss:
    return loss.on(images.require_labels()[positions]) if isinstance(loss, CrossEntropy) else loss


def _check_finite(values: dict[str, Tensor], index: Int64[Tensor, " b"]) -> None:
    if bool(torch.stack([torch.isfinite(value).all() for value in values.values()]).all()):
        return  # one question a batch: each answer is a wait for the GPU
    for name, value in values.items():
        if not bool(torch.isfinite(value).all()):
            good = (
                torch.isfinite(value.flatten(1) if value.ndim > 1 else value[:, None]).all(1).cpu()
            )
            raise IsslError(f"{name} is not finite for image index {index[~good][:5].tolist()}")


def _check_view(shaken: Tensor, x: Tensor, index: Int64[Tensor, " b"]) -> None:
    if not isinstance(shaken, Tensor) or shaken.shape != x.shape:
        shape = tuple(shaken.shape) if isinstance(shaken, Tensor) else type(shaken).__name__
        raise IsslError(
            f"perturbation gives {shape} for pixels {tuple(x.shape)}; it must keep the shape"
        )
    if not shaken.is_floating_point():
        raise IsslError(
            f"perturbation gives {shaken.dtype} for pixels in [0, 1]; return floats in that range"
        )
    finite = torch.isfinite(shaken).flatten(1).all(1).cpu()  # then the rest is asked on the CPU
    if not bool(finite.all()):
        raise IsslError(
            f"perturbation gives NaN or infinite pixels for image index {index[~finite][:5].tolist()}"
        )


@torch.no_grad()
def _run(encoder: Followed, x: Tensor) -> Tensor:
    """The encoder's features. Raises IsslError where it fails, or a RuntimeError, which may be
    about the layout."""
    try:
        return encoder(x)
    except (IsslError, RuntimeError):
        raise
    except Exception as error:
        raise _fails(x, error) from error


def _fails(x: Tensor, error: Exception) -> Exception:
    if is_out_of_memory(error):
        return no_memory(error)
    said = (str(error).splitlines() or [""])[0]
    return IsslError(
        f"encoder fails on pixels of shape {tuple(x.shape)} ({type(error).__name__}: {said}); give images of the size "
        "that it was made for (size=, --size), and remove hooks that are left over"
    )


def _check_independent(encoder: Followed, x: Tensor, together: Tensor) -> None:
    """The loss must be per example: an image's features may not depend on its neighbours in the
    batch."""
    with torch.enable_grad():
        alone = encoder(x[:1].clone().requires_grad_())
    check_features(alone, 1)
    if not alone.requires_grad:
        raise IsslError(
            "encoder cuts its features off from their gradient; remove no_grad or detach in its forward"
        )
    if not torch.allclose(
        together[:1], alone, rtol=1e-2, atol=1e-3 * float(alone.detach().abs().max())
    ):
        raise IsslError(
            "encoder gives an image other features alone than in a batch, so its loss is not per example; remove what "
            "mixes the batch"
        )
