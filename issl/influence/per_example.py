"""Per-example gradients of the stability loss, layer by layer, from one backward pass per batch.

Take one call of a layer whose weight, as a matrix, is c_out × d_in. Let a_t be the input (patch) at
position t, and d_t the gradient of the loss with respect to the output there. The image's weight
gradient is then Σ_t d_t a_tᵀ, where both views count as positions of the same image. What is kept
of it, its *sketch*, is

    Σ_t (P_out d_t)(P_in a_t)ᵀ ∈ R^{k_out × k_in}, where P = None stands for the identity, or
    ‖Σ_t d_t a_tᵀ‖, from its square Σ_{t,t'} (d_t·d_t')(a_t·a_t') where that is cheaper.

A convolution's P_in a_t, for all t at once, is itself a convolution with P_in as its kernel, so it
needs no patches. P_out is applied once per image, after the sum; so is P_in if it has so many rows
that this is cheaper. The groups of a grouped convolution share P_in, and P_out sums over their
rows. Sources: LoGra, Choe et al. 2024, arXiv 2405.13954, §3.1; the norm identity, Goodfellow 2015,
arXiv 1510.01799.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from issl.errors import IsslError
from issl.influence.following import (
    Convolution,
    by_image,
    count_rows,
    followed,
    read_inputs,
    read_outputs,
)
from issl.influence.frozen_encoder import requiring_grad
from issl.influence.layers import Layer, weight_shape
from issl.influence.losses import Loss, stability_loss

# the cost, in multiplications, to form, write and read one number of a convolution's patches:
# about 45 on a CPU core with AVX-512, and more on a GPU, whose memory is slower relative to its
# arithmetic
PATCHES = 40


@dataclass(frozen=True)
class Sketch:
    """What is kept of each image's gradient Σ d aᵀ in a layer: P_out (Σ d aᵀ) P_inᵀ, flattened,
    where None stands for the identity; or only the gradient's norm, one number."""

    p_in: Float[Tensor, "k_in d_in"] | None = None
    p_out: Float[Tensor, "k_out c_out"] | None = None
    norm: bool = False

    def sides(self, layer: Layer) -> tuple[int, int]:
        """(k_out, k_in): the rows of P_out and P_in."""
        c_out, d_in = weight_shape(layer)
        return (
            c_out if self.p_out is None else len(self.p_out),
            d_in if self.p_in is None else len(self.p_in),
        )

    def width(self, layer: Layer) -> int:
        """How many numbers are kept of each image."""
        return 1 if self.norm else math.prod(self.sides(layer))


@dataclass(frozen=True)
class Moments:
    """A layer's second moments Σ a aᵀ and Σ d dᵀ, in double precision, summed over positions (of
    both views) and images."""

    inputs: Float[Tensor, "d_in d_in"]
    outputs: Float[Tensor, "c_out c_out"]

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.inputs + other.inputs, self.outputs + other.outputs)


@dataclass(frozen=True)
class Followed:
    """An encoder whose gradients are followed."""

    model: nn.Module  # from `issl.influence.frozen_encoder.frozen`
    layers: Mapping[str, Layer]  # the scored ones
    layout: torch.memory_format = torch.channels_last  # of the pixels given to it
    # layers whose rows are not grouped by image, from `issl.influence.following.examine`
    token_major: Set[str] = frozenset()

    def __call__(self, x: Tensor) -> Tensor:
        """The encoder's output, not yet checked."""
        return self.model(x.contiguous(memory_format=self.layout))


def per_example(
    encoder: Followed,
    sketches: Mapping[str, Sketch],
    x: Float[Tensor, "b 3 h w"],
    perturbed: Float[Tensor, "b 3 h w"],
    index: Int64[Tensor, " b"],
    loss: Loss = stability_loss,
    bf16: bool = False,
) -> tuple[Float[Tensor, " b"], dict[str, Float[Tensor, "b r"]]]:
    """The losses of a batch and, per layer, the sketch of each image's gradient.

    Args:
        x: Pixels in [0, 1].
        index: Names the images in errors.
        bf16: Compute the features under autocast.
    """
    taps = {
        name: _Tap(name, layer, name in encoder.token_major, len(x), sketches[name])
        for name, layer in encoder.layers.items()
    }
    losses = _backward(encoder, taps, x, perturbed, index, loss, bf16)
    return losses, {name: tap.result(losses) for name, tap in taps.items()}


def second_moments(
    encoder: Followed,
    x: Float[Tensor, "b 3 h w"],
    perturbed: Float[Tensor, "b 3 h w"],
    index: Int64[Tensor, " b"],
    loss: Loss = stability_loss,
) -> dict[str, Moments]:
    """Each layer's second moments over a batch; arguments as in `per_example`. The groups
    of a convolution share the inputs' moment."""
    taps = {
        name: _MomentTap(name, layer, name in encoder.token_major, len(x))
        for name, layer in encoder.layers.items()
    }
    _backward(encoder, taps, x, perturbed, index, loss, bf16=False)
    return {name: tap.moments for name, tap in taps.items()}


def _backward(
    encoder: Followed,
    taps: Mapping[str, _Tap],
    x: Tensor,
    perturbed: Tensor,
    index: Tensor,
    loss: Loss,
    bf16: bool,
) -> Tensor:
    """One forward and backward pass with the taps in place; returns the losses."""
    b, products = len(x), {id(tap.layer.weight): tap.on_product for tap in taps.values()}
    with requiring_grad(encoder.model.parameters(), False), torch.enable_grad():
        autocast = torch.autocast(x.device.type, torch.bfloat16, enabled=bf16)
        with autocast, followed(products):
            features = encoder(torch.cat([x, perturbed]))
        check_shape(features, 2 * b)
        finite, nonzero = torch.isfinite(features).all(1), features.any(1)
        good = (finite & nonzero).view(2, b).all(0)
        if not bool(good.all()):
            raise IsslError(
                f"encoder gives all-zero, NaN or infinite features for {named(index, ~good)}: the "
                "cosine is undefined there; leave such images out"
            )
        features = features.to(x.dtype)
        losses = loss(features[:b], features[b:])
        if not isinstance(losses, Tensor) or losses.shape != (b,):
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise IsslError(f"loss gives {shape} for {b} images; it must give one loss per image")
        if not losses.requires_grad:
            raise IsslError(
                "loss does not depend on the encoder's features; remove detach or no_grad from it"
            )
        losses.sum().backward()
    for tap in taps.values():
        if tap.calls == 0:
            raise IsslError(
                f"encoder: layer {tap.name} was called for some images and not for others; leave "
                f"it out with skip=['{tap.name}']"
            )
    return losses.detach()


def check_shape(features: object, rows: int) -> None:
    """Raises IsslError unless an encoder's output has shape (rows, d)."""
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != rows:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise IsslError(
            f"encoder gives {shape} for {rows} images; it must give features of shape ({rows}, d)"
        )


def named(index: Int64[Tensor, " b"], bad: Bool[Tensor, " b"]) -> str:
    """The first five bad images, for an error message."""
    return f"image index {', '.join(map(str, index[bad.cpu()][:5].tolist()))}"


# --- taps, which gather a layer's sketches ---


@dataclass
class _Tap:
    """Gathers the sketch of one layer over all its calls in one forward and backward pass."""

    name: str
    layer: Layer
    token_major: bool
    examples: int
    sketch: Sketch = Sketch()
    calls: int = 0
    total: Tensor | None = None
    pair: tuple[Tensor, Tensor] | None = None  # of inputs and output gradients, for the norm

    def on_product(
        self, x: Tensor, how: Convolution | None, multiply: Callable[[Tensor], Tensor]
    ) -> Tensor:
        views, rows = 2 * self.examples, count_rows(how, x)
        if rows % views:
            raise IsslError(
                f"encoder: layer {self.name} sees {rows} rows for {views} views; each view must "
                f"have the same number. Leave the layer out with skip=['{self.name}']"
            )
        regroup = partial(by_image, n=views, token_major=self.token_major)
        self.calls += 1
        output = multiply(x)
        early, late = self.sketch.p_in, None
        if not self.projects_first(how, output):
            early, late = late, early
        inputs = regroup(read_inputs(self.layer.weight, how, x.detach(), early))
        if not output.requires_grad:
            # no earlier layer needs a gradient, so the backward pass may end here; the clone is for
            # later in-place operations, which must not change a leaf
            output = output.detach().requires_grad_().clone()
        output.register_hook(
            lambda gradient: self.add(inputs, late, regroup(read_outputs(how, gradient)))
        )
        return output

    def projects_first(self, how: Convolution | None, output: Tensor) -> bool:
        """Whether it costs less, in multiplications per view, to project the inputs before the sum
        over positions."""
        (c_out, d_in), (k_out, k_in) = weight_shape(self.layer), self.sketch.sides(self.layer)
        groups, forming = (1, 0) if how is None else (how.groups, PATCHES * how.groups)
        positions = output.numel() // (2 * self.examples * c_out)
        first = positions * k_in * (groups * d_in + c_out)
        return first <= positions * d_in * (c_out + forming) + k_out * d_in * (c_out + k_in)

    @torch.no_grad()
    def add(self, inputs: Tensor, p_in: Tensor | None, outputs: Tensor) -> None:
        """Add the views' inputs (2b, g, k, t), which `p_in` may still have to project, and their
        output gradients (2b, g, o, t)."""
        # under autocast both are bf16, but sums over positions must not be
        outputs, inputs = outputs.to(self.layer.weight.dtype), inputs.to(self.layer.weight.dtype)
        if self.sketch.norm and self.calls == 1 and _gram_is_cheaper(inputs, outputs):
            self.pair = inputs, outputs
            return
        both = (outputs @ inputs.mT).flatten(1, 2)  # Σ_t d_t (P_in a_t)ᵀ
        sums = both.unflatten(0, (2, self.examples)).sum(0)
        if self.sketch.p_out is not None:
            sums = self.sketch.p_out @ sums
        if p_in is not None:
            sums = sums @ p_in.T
        self.total = sums if self.total is None else self.total + sums

    @torch.no_grad()
    def result(self, like: Tensor) -> Float[Tensor, "b r"]:
        """The finished sketch of each example."""
        if self.pair is not None:
            return _gram_norm(*self.pair, self.examples)[:, None]
        if self.total is None:  # the loss does not depend on this layer
            return like.new_zeros(self.examples, self.sketch.width(self.layer))
        if self.sketch.norm:
            return self.total.square().sum((1, 2)).sqrt()[:, None]
        return self.total.flatten(1)


@dataclass
class _MomentTap(_Tap):
    """Sums the layer's second moments instead of its examples' gradients."""

    moments: Moments = field(init=False)

    def __post_init__(self) -> None:
        zeros = partial(self.layer.weight.new_zeros, dtype=torch.float64)
        outputs, inputs = (zeros(d, d) for d in weight_shape(self.layer))
        self.moments = Moments(inputs, outputs)

    @torch.no_grad()
    def add(self, inputs: Tensor, p_in: Tensor | None, outputs: Tensor) -> None:
        outputs = outputs.flatten(1, 2)
        a, d = inputs.permute(2, 0, 1, 3).flatten(1), outputs.transpose(0, 1).flatten(1)
        self.moments += Moments((a @ a.T).double(), (d @ d.T).double())


def _gram_is_cheaper(inputs: Tensor, outputs: Tensor) -> bool:
    positions, d_in, c_out = 2 * inputs.shape[-1], inputs.shape[-2], outputs.shape[-2]
    return positions * (d_in + c_out) < d_in * c_out


def _gram_norm(inputs: Tensor, outputs: Tensor, examples: int) -> Float[Tensor, " b"]:
    """(Σ_{t,t'} (d_t·d_t')(a_t·a_t'))^½, the positions of both views of an example side by side."""
    a, d = (torch.cat(v.split(examples), dim=-1) for v in (inputs, outputs))
    return ((a.mT @ a) * (d.mT @ d)).sum((1, 2, 3)).clamp(min=0).sqrt()
