"""Per-example gradients of the stability loss, layer by layer, without ever forming a weight gradient.

For one call of a layer with weight W (as a matrix c_out × d_in), let a_t be the input (patch) and d_t the
gradient of the loss with respect to the output at position t. Then the example's weight gradient is
Σ_t d_t a_tᵀ (both views are positions of the same example), and what is kept of it, its *sketch*, is

    G = Σ_t (P_out d_t)(P_in a_t)ᵀ ∈ R^{k_out × k_in}           (Projected; P = None stands for the identity)
    ‖Σ_t d_t a_tᵀ‖, from its square Σ_{t,t'} (d_t·d_t')(a_t·a_t') where that is cheaper            (Norm)

A convolution's P_in a_t, for all t at once, is itself a convolution with P_in as its kernel, so patches are never
formed. P_out is applied once per example, after the sum; so is P_in where it has so many rows that this is cheaper.
The groups of a grouped convolution share P_in, and P_out sums over their rows.
Source: LoGra, Choe et al. 2024, arXiv 2405.13954, §3.1; the norm identity, Goodfellow 2015, arXiv 1510.01799.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from issl.errors import IsslError
from issl.influence.curvature import Moments, Norm, Projected, Sketch, kept_width, no_moments
from issl.influence.layers import Layer, weight_shape
from issl.influence.losses import Loss, stability_loss

# what it costs to form, write and read one number of a convolution's patches, in multiplications: about 45 on a core of
# a CPU with AVX-512, more on a GPU, whose memory is slower beside its arithmetic
PATCHES = 40


@dataclass
class _Tap:
    """Gathers the sketch of one layer over all its calls in one forward and backward."""

    name: str
    layer: Layer
    sketch: Sketch
    examples: int = 0
    calls: int = 0
    total: Tensor | None = None
    pair: tuple[Tensor, Tensor] | None = None  # of inputs and output gradients, for the norm

    def on_forward(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if len(args[0]) != 2 * self.examples or output.ndim < 2:
            raise IsslError(
                f"encoder: layer {self.name} sees {len(args[0])} rows for {2 * self.examples} views; the first "
                f"dimension must be the example. Leave the layer out with skip=['{self.name}']"
            )
        self.calls += 1
        projects_first = isinstance(self.sketch, Projected) and _projects_first(self.layer, output, self.sketch)
        p_in = self.sketch.p_in if isinstance(self.sketch, Projected) else None
        inputs = read_inputs(self.layer, args[0].detach(), p_in if projects_first else None)
        if not output.requires_grad:
            # no earlier layer needs a gradient, so the backward pass may end here; the clone is there for later
            # in-place operations, which must not change a leaf
            output = output.detach().requires_grad_().clone()
        output.register_hook(partial(self.on_gradient, inputs, None if projects_first else p_in))
        return output

    @torch.no_grad()
    def on_gradient(self, inputs: Tensor, p_in: Tensor | None, gradient: Tensor) -> None:
        """p_in: the projection that still has to be applied to the inputs, if any."""
        # under autocast both are bf16, but sums over positions must not be
        outputs = read_outputs(self.layer, gradient).to(self.layer.weight.dtype)
        inputs = inputs.to(self.layer.weight.dtype)
        if isinstance(self.sketch, Norm) and self.calls == 1 and _gram_is_cheaper(inputs, outputs):
            self.pair = inputs, outputs
            return
        both = (outputs @ inputs.mT).flatten(1, 2)  # Σ_t d_t (P_in a_t)ᵀ
        sums = both.unflatten(0, (2, self.examples)).sum(0)
        if isinstance(self.sketch, Projected) and self.sketch.p_out is not None:
            sums = self.sketch.p_out @ sums
        if p_in is not None:
            sums = sums @ p_in.T
        self.total = sums if self.total is None else self.total + sums

    def check_called(self) -> None:
        if self.calls == 0:
            raise IsslError(
                f"encoder: layer {self.name} was never called in the forward pass, so it cannot be scored (is it a "
                f"head that is not used, or called by a function?). Leave it out with skip=['{self.name}']"
            )

    @torch.no_grad()
    def result(self, like: Tensor) -> Float[Tensor, "b r"]:
        """The finished sketch of each example."""
        self.check_called()
        if isinstance(self.sketch, Norm):
            if self.pair is not None:
                return _gram_norm(*self.pair, self.examples)[:, None]
            size = like.new_zeros(self.examples) if self.total is None else self.total.square().sum((1, 2)).sqrt()
            return size[:, None]
        if self.total is None:  # called, but the loss does not depend on it
            return like.new_zeros(self.examples, kept_width(self.layer, self.sketch))
        return self.total.flatten(1)


@dataclass
class _MomentTap(_Tap):
    """Sums the layer's second moments instead of its examples' gradients."""

    sums: Moments | None = None

    @torch.no_grad()
    def on_gradient(self, inputs: Tensor, p_in: Tensor | None, gradient: Tensor) -> None:
        outputs = read_outputs(self.layer, gradient).flatten(1, 2)
        a, d = inputs.permute(2, 0, 1, 3).flatten(1), outputs.transpose(0, 1).flatten(1)
        aa, dd = (a @ a.T).double(), (d @ d.T).double()
        self.sums = (self.sums or no_moments(self.layer)) + Moments(aa, dd)

    def moments(self) -> Moments:
        self.check_called()
        return self.sums or no_moments(self.layer)


def read_inputs(layer: Layer, x: Tensor, p: Tensor | None) -> Float[Tensor, "b g k t"]:
    """P a_t for every example, group and position t; the patches themselves if P is None."""
    if isinstance(layer, nn.Linear):
        x = x.flatten(1, -2) if x.ndim > 2 else x[:, None]
        return (x if p is None else x @ p.T.to(x.dtype)).mT[:, None]
    g, inside = layer.groups, layer.weight.shape[1:]
    padding: str | tuple[int, ...] = layer.padding
    if layer.padding_mode != "zeros" or (p is None and isinstance(padding, str)):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        padding = (0, 0)
    if p is None:
        assert not isinstance(padding, str)  # padded above
        patches = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
        return patches.unflatten(1, (g, inside.numel()))
    kernel = p.to(x.dtype).unflatten(1, tuple(inside)).repeat(g, 1, 1, 1)
    patches = F.conv2d(x, kernel, None, layer.stride, padding, layer.dilation, g)
    return patches.flatten(2).unflatten(1, (g, len(p)))


def read_outputs(layer: Layer, d: Tensor) -> Float[Tensor, "b g o t"]:
    """The output gradient d_t of every example, group and position t."""
    if isinstance(layer, nn.Linear):
        return (d.flatten(1, -2) if d.ndim > 2 else d[:, None]).mT[:, None]
    return d.flatten(2).unflatten(1, (layer.groups, -1))


def _projects_first(layer: Layer, output: Tensor, sketch: Projected) -> bool:
    """Whether it costs less, in multiplications per view, to project the inputs before the sum over positions."""
    if sketch.p_in is None:
        return True  # there is nothing to project
    (c_out, d_in), k_in = weight_shape(layer), len(sketch.p_in)
    k_out = c_out if sketch.p_out is None else len(sketch.p_out)
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    positions = output[0].numel() // c_out
    forming = PATCHES * groups if isinstance(layer, nn.Conv2d) else 0
    first = positions * k_in * (groups * d_in + c_out)
    return first <= positions * d_in * (c_out + forming) + k_out * d_in * (c_out + k_in)


def _gram_is_cheaper(inputs: Tensor, outputs: Tensor) -> bool:
    positions, d_in, c_out = 2 * inputs.shape[-1], inputs.shape[-2], outputs.shape[-2]
    return positions * (d_in + c_out) < d_in * c_out


def _gram_norm(inputs: Tensor, outputs: Tensor, examples: int) -> Float[Tensor, " b"]:
    """(Σ_{t,t'} (d_t·d_t')(a_t·a_t'))^½, the positions of both views of an example side by side."""
    a, d = (torch.cat(v.split(examples), dim=-1) for v in (inputs, outputs))
    return ((a.mT @ a) * (d.mT @ d)).sum((1, 2, 3)).clamp(min=0).sqrt()


def per_example(
    model: nn.Module,
    layers: Mapping[str, Layer],
    sketches: Mapping[str, Sketch],
    x: Float[Tensor, "b 3 h w"],
    perturbed: Float[Tensor, "b 3 h w"],
    loss: Loss = stability_loss,
    bf16: bool = False,
) -> tuple[Float[Tensor, " b"], dict[str, Float[Tensor, "b r"]]]:
    """The losses of a batch and, per layer, the sketch of each example's gradient.

    model   a `frozen_copy`, in eval mode; all hooks are removed afterwards
    Raises IsslError for features that are not (b, d), are zero or not finite, and for layers it cannot follow.
    """
    taps = {name: _Tap(name, layers[name], sketches[name], len(x)) for name in layers}
    losses = _backward(model, layers, taps, x, perturbed, loss, bf16)
    return losses, {name: tap.result(losses) for name, tap in taps.items()}


def second_moments(
    model: nn.Module,
    layers: Mapping[str, Layer],
    x: Float[Tensor, "b 3 h w"],
    perturbed: Float[Tensor, "b 3 h w"],
    loss: Loss = stability_loss,
) -> dict[str, Moments]:
    """Each layer's second moments over a batch, in double precision. Groups share the inputs' moment."""
    taps = {name: _MomentTap(name, layers[name], Projected(), len(x)) for name in layers}
    _backward(model, layers, taps, x, perturbed, loss, bf16=False)
    return {name: tap.moments() for name, tap in taps.items()}


def _backward(
    model: nn.Module, layers: Mapping[str, Layer], taps: Mapping[str, _Tap], x: Tensor, perturbed: Tensor, loss: Loss,
    bf16: bool,
) -> Tensor:  # fmt: skip
    """One forward and backward with the taps in place; returns the losses."""
    b = len(x)
    handles = [layers[name].register_forward_hook(tap.on_forward) for name, tap in taps.items()]
    try:
        with torch.enable_grad():
            with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                features = model(torch.cat([x, perturbed]).contiguous(memory_format=torch.channels_last))
            check_features(features, 2 * b)
            features = features.to(x.dtype)
            losses = loss(features[:b], features[b:])
            if not isinstance(losses, Tensor) or losses.shape != (b,):
                shape = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
                raise IsslError(f"loss gives {shape} for {b} images; it must give one loss per image")
            if not losses.requires_grad:
                raise IsslError("loss does not depend on the encoder's features; remove detach or no_grad from it")
            losses.sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    return losses.detach()


def check_features(features: object, rows: int) -> None:
    """An encoder's output must be (rows, d), finite, and not zero: the cosine of a zero vector is undefined."""
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != rows:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise IsslError(f"encoder gives {shape} for {rows} images; it must give features of shape ({rows}, d)")
    finite, nonzero = torch.isfinite(features).all(), features.any(1).all()
    if bool(finite & nonzero):
        return  # the usual case: a GPU is waited for once
    if not bool(finite):
        bad = int((~torch.isfinite(features).all(1)).sum())
        raise IsslError(
            f"encoder gives NaN or infinite features for {bad} of {rows} views; check its weights and input"
        )
    bad = int((~features.any(1)).sum())
    raise IsslError(f"encoder gives an all-zero feature vector for {bad} of {rows} views: its cosine is undefined")
