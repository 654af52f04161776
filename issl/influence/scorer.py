"""What is measured, and the encoder that it is measured on: views, checks, per-image gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from issl.data.images import Images
from issl.devices import is_out_of_memory, no_memory, pick_device
from issl.errors import IsslError, is_whole
from issl.influence.curvature import Curvature
from issl.influence.following import examine
from issl.influence.frozen_encoder import frozen
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
from issl.influence.projections import Moments, Sketch, kept_width, no_moments
from issl.keyed_random import uniform

LARGEST_SEED = 1 << 62  # a key of 64 bits, of which queries set one of their own
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
        for name in ("seed", "draws"):  # numpy's are none to JSON
            object.__setattr__(self, name, int(getattr(self, name)))
        keyed = isinstance(self.perturbation, Perturbation) and self.seed < 2**32
        if self.draws > 1 and not keyed:
            raise IsslError(
                f"draws={self.draws}: several draws need a perturbation with .keyed(seed), such as "
                f"GaussianNoise(), and a seed below 2³² (got {describe(self.perturbation)}, seed "
                f"{self.seed})"
            )

    def perturbs(self) -> list[Perturb]:
        """One for each draw."""
        return keyed_draws(self.perturbation, self.seed, self.draws)


@dataclass(frozen=True)
class Scorer:
    """An encoder that is scored: its frozen copy, and what is measured of it. From `open_scorer`.

    Attributes:
        encoder: The copy, with the layers that are scored.
        what: What is measured.
        device: Where it computes.
        others: The weights that cannot be scored, with what they are.
        sketches: What is kept of each image's gradient, by layer, once `sketched`.
    """

    encoder: Followed
    what: Measurement
    device: torch.device
    others: Mapping[str, str]
    sketches: Mapping[str, Sketch]

    @property
    def layers(self) -> Mapping[str, Layer]:
        """Those that are scored."""
        return self.encoder.layers

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.encoder.model.parameters()).dtype

    @property
    def widths(self) -> dict[str, int]:
        """How many numbers are kept of each image's gradient, by layer."""
        return {name: kept_width(layer, self.sketches[name]) for name, layer in self.layers.items()}

    def examined(self, images: Images) -> Scorer:
        """The same, after a look at how the encoder treats the first three images.

        Raises:
            IsslError: For an encoder that mixes the images of a batch, and for weights that cannot
                be scored.
        """
        positions = torch.arange(min(3, len(images)))
        some = self.pixels(images, positions)
        x = torch.cat([some, *(some[:1].flip(-1 - k) for k in range(3 - len(some)))])
        encoder, together = self.running(x)
        check_features(
            check_shape(together, len(x))[: len(some)], len(some), images.index[positions]
        )
        try:
            _check_independent(encoder, x, together)
            uses, problems = examine(encoder.model, encoder.layers, lambda: encoder(x))
        except (RuntimeError, MemoryError) as error:
            raise _fails(x, error) from error
        problems = dict(self.others) | problems
        if problems:
            raise unscored(problems, encoder.layers)
        return replace(self, encoder=replace(encoder, uses=uses))

    def sketched(self, images: Images, norms_only: bool = False) -> Scorer:
        """The same, with what is kept of each gradient; some curvatures need a pass over some of
        the images for that."""
        curvature = self.what.curvature
        positions = curvature.moment_images(images.index)
        moments: Mapping[str, Moments | None] = dict.fromkeys(self.layers)
        if positions is not None:
            moments = self._moments(images, positions)
        sketches = {
            name: curvature.sketch(layer, k, moments[name], norms_only)
            for k, (name, layer) in enumerate(self.layers.items())
        }
        return replace(self, sketches=sketches)

    def _moments(self, images: Images, positions: Tensor) -> dict[str, Moments]:
        """Each layer's second moments over these images."""
        sums = {name: no_moments(layer) for name, layer in self.layers.items()}
        perturb = self.what.perturbs()[0]
        for batch in positions.split(MOMENT_BATCH):
            x, shaken = self.views(images, batch, perturb)
            loss = self._loss(images, batch)
            found = second_moments(self.encoder, x, shaken, images.index[batch], loss)
            sums = {name: sums[name] + found[name] for name in sums}
        return sums

    def running(self, x: Tensor) -> tuple[Followed, Tensor]:
        """The encoder in a layout of pixels that it can read, and the features of these.

        Raises:
            IsslError: If there is none.
        """
        encoder = self.encoder
        try:
            try:
                return encoder, _run(encoder, x)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                # a .view of features asks for the plain layout
                model = frozen(encoder.model, self.device, torch.contiguous_format)
                layers, _ = find_layers(model, self.what.skip, self.what.untrained)
                plain = Followed(model, layers, torch.contiguous_format)
                return plain, _run(plain, x)
        except IsslError:
            raise
        except Exception as error:
            raise _fails(x, error) from error

    def pixels(self, images: Images, positions: slice | Tensor) -> Tensor:
        """In [0, 1], on the device, in the encoder's precision."""
        return images.pixels[positions].to(self.device).to(self.dtype) / 255

    def views(
        self, images: Images, positions: slice | Tensor, perturb: Perturb
    ) -> tuple[Tensor, Tensor]:
        """The images at these positions, and their perturbed views, checked."""
        x, index = self.pixels(images, positions), images.index[positions]
        try:
            shaken = perturb(x.clone(), index)  # one that works in place must not change the image
        except Exception as error:
            if is_out_of_memory(error):
                raise  # the batch will be halved
            raise IsslError(
                f"perturbation {describe(self.what.perturbation)} fails ({type(error).__name__}: "
                f"{error}); it is called with pixels (b, 3, h, w) in [0, 1] and the images' index "
                "(b,)"
            ) from error
        _check_view(shaken, x, index)
        return x, shaken.to(x.dtype)

    def rows(self, images: Images, positions: slice, bf16: bool = False) -> dict[str, Tensor]:
        """ "loss" (b,), mean over the draws, and for each layer "layer.NAME", the sketched
        gradients (b, draws, r), of the images at these positions."""
        loss, index = self._loss(images, positions), images.index[positions]
        losses, draws = [], []
        for perturb in self.what.perturbs():
            x, shaken = self.views(images, positions, perturb)
            ell, kept = per_example(self.encoder, self.sketches, x, shaken, index, loss, bf16)
            _check_finite({"loss": ell, **kept}, index)
            losses.append(ell)
            draws.append(kept)
        gradients = {
            f"layer.{name}": torch.stack([kept[name] for kept in draws], 1) for name in self.layers
        }
        return {"loss": torch.stack(losses).mean(0), **gradients}

    @torch.no_grad()
    def computes(self, size: Sequence[int]) -> list[float]:
        """What this encoder makes of two fixed images of that size, with the perturbation and the
        loss: numbers by which another forward or function of the same name is noticed."""
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


def open_scorer(
    encoder: nn.Module, what: Measurement, device: str | torch.device | None = None
) -> Scorer:
    """The frozen encoder, after every check that needs no image.

    Args:
        encoder: As in `issl.self_influence`.
        what: What is measured.
        device: Where to compute; default: where the encoder is.
    """
    if torch.is_inference_mode_enabled():
        raise IsslError("scores need gradients: call this outside of torch.inference_mode()")
    what.perturbs()  # is it one?
    find_layers(encoder, what.skip, what.untrained)  # before any work
    place = next(encoder.parameters()).device if device is None else torch.device(device)
    if place.type == "cuda":
        pick_device("cuda")  # says why there is none
    try:
        torch.empty(1, device=place)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise IsslError(
            f"device={str(place)!r} cannot be used here ({str(error).split('. ')[0]}); try cpu"
        ) from error
    model = frozen(encoder, place, torch.channels_last)
    layers, others = find_layers(model, what.skip, what.untrained)
    return Scorer(Followed(model, layers, torch.channels_last), what, place, others, {})


@torch.no_grad()
def with_features(
    encoder: nn.Module, images: Images, what: Measurement, device: str | torch.device | None = None
) -> Images:
    """The images of which every view has features that are finite and not zero, by a forward pass;
    the others are named in `broken`."""
    scorer = open_scorer(encoder, what, device)
    run, _ = scorer.running(scorer.pixels(images, slice(0, 1)))
    good = torch.ones(len(images), dtype=torch.bool)
    for positions in torch.arange(len(images)).split(MOMENT_BATCH):
        for perturb in what.perturbs():
            for view in scorer.views(images, positions, perturb):
                features = run(view)
                good[positions] &= (torch.isfinite(features).all(1) & features.any(1)).cpu()
    if good.all():
        return images
    names = images.attributes["path" if "path" in images.attributes else "index"].astype(str)
    why = "no features under this encoder: all zero, or not finite"
    broken = [(name, why) for name in names[~good.numpy()]]
    return replace(images.subset(good), broken=(*images.broken, *broken))


def as_images(images: Images | Tensor) -> Images:
    """A bare tensor as `Images`, indexed 0 … n−1."""
    if isinstance(images, Images):
        return images
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise IsslError(f"images: got {shape}, need issl.Images or a tensor (n, 3, H, W)")
    if images.dtype != torch.uint8:
        raise IsslError(
            f"images: pixels are {images.dtype}; give uint8, 0 to 255 (for floats: "
            "(255 * x).round().byte())"
        )
    if images.is_meta or 0 in images.shape[1:]:
        raise IsslError(
            f"images: {tuple(images.shape)} on {images.device} holds no pixels; give images with "
            "values"
        )
    return Images(images.cpu(), None, pd.DataFrame({"index": range(len(images))}), "tensor")


def not_empty(images: Images | Tensor, what: str = "images") -> Images:
    """`as_images`, with at least one image; `what` they are, for the error."""
    data = as_images(images)
    if len(data) == 0:
        raise IsslError(f"{what} {data.name!r}: the set is empty")
    return data


def _check_finite(values: dict[str, Tensor], index: Int64[Tensor, " b"]) -> None:
    if bool(torch.stack([torch.isfinite(value).all() for value in values.values()]).all()):
        return  # one question a batch: each answer is a wait for the GPU
    for name, value in values.items():
        good = torch.isfinite(value.reshape(len(value), -1)).all(1).cpu()
        if not bool(good.all()):
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
    finite = torch.isfinite(shaken).flatten(1).all(1).cpu()
    if not bool(finite.all()):
        raise IsslError(
            f"perturbation gives NaN or infinite pixels for image index "
            f"{index[~finite][:5].tolist()}"
        )


@torch.no_grad()
def _run(encoder: Followed, x: Tensor) -> Tensor:
    return encoder(x)


def _fails(x: Tensor, error: Exception) -> Exception:
    if is_out_of_memory(error):
        return no_memory(error)
    said = (str(error).splitlines() or [""])[0]
    return IsslError(
        f"encoder fails on pixels of shape {tuple(x.shape)} ({type(error).__name__}: {said}); give "
        "images of the size that it was made for (size=, --size), and remove hooks that are left "
        "over"
    )


def _check_independent(encoder: Followed, x: Tensor, together: Tensor) -> None:
    """The loss must be per image: its features may not depend on its neighbours in the batch."""
    with torch.enable_grad():
        alone = encoder(x[:1].clone().requires_grad_())
    check_features(alone, 1)
    if not alone.requires_grad:
        raise IsslError(
            "encoder cuts its features off from their gradient; remove no_grad or detach in its "
            "forward"
        )
    scale = float(alone.detach().abs().max())
    if not torch.allclose(together[:1], alone, rtol=1e-2, atol=1e-3 * scale):
        raise IsslError(
            "encoder gives an image other features alone than in a batch, so its loss is not per "
            "example; remove what mixes the batch"
        )
