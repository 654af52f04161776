"""The copy of an encoder that is hooked into: the user's model is never touched."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from issl.errors import IsslError


def frozen_copy(encoder: nn.Module, device: torch.device) -> nn.Module:
    """The same function in a copy of its own, parameters frozen, made faster where that costs nothing: convolutions in
    NHWC, the better order on CPUs and GPUs alike, and eval-mode BatchNorm as a product and a sum.

    Raises IsslError for an encoder that cannot be copied.
    """
    try:
        model = copy.deepcopy(encoder)
    except Exception as error:
        raise IsslError(f"encoder {type(encoder).__name__} cannot be copied ({error})") from error
    model = model.to(device).to(memory_format=torch.channels_last).requires_grad_(False)
    for m in model.modules():
        if type(m) is nn.BatchNorm2d and not m.training and m.running_mean is not None and m.running_var is not None:
            scale = (m.running_var + m.eps).rsqrt() * (1 if m.weight is None else m.weight)
            shift = -m.running_mean * scale + (0 if m.bias is None else m.bias)
            m.forward = partial(_affine, m, scale[:, None, None], shift[:, None, None])  # type: ignore[method-assign]
    return model


def _affine(
    norm: nn.BatchNorm2d, scale: Float[Tensor, "c 1 1"], shift: Float[Tensor, "c 1 1"], x: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b c h w"]:
    """x · scale + shift. Its backward is one product, where torch's own took five times as long as the forward pass."""
    if x.dtype != scale.dtype:  # under autocast the statistics stay in full precision, which torch's own sees to
        return nn.BatchNorm2d.forward(norm, x)
    return torch.addcmul(shift, x, scale)


class FoldedConv2d(nn.Conv2d):
    """A convolution that has taken in the BatchNorm after it: weight · scale, and its shift as bias.

    With respect to the convolution's own output, the gradient is scale · (that with respect to this one's output).
    """

    scale: Float[Tensor, " c_out"]


@torch.no_grad()
def fold_batchnorm(model: nn.Module, x: Float[Tensor, "b 3 h w"]) -> list[str]:
    """Let convolutions take in the eval-mode BatchNorm that follows them: two passes less over their outputs.

    Which one follows which is seen by running `model`, a `frozen_copy`, on x. A convolution that is called several
    times is left alone; and so are all where the features would change, because an output has a second user, say.
    Returns the names of the convolutions that were folded.
    """
    before, pairs = _conv_norm_pairs(model, x)
    kept = [(conv, conv.weight, conv.bias, norm, norm.forward) for _, conv, norm in pairs]
    for _, conv, norm in pairs:
        assert norm.running_mean is not None and norm.running_var is not None  # _conv_norm_pairs has looked
        scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
        shift = (0 if norm.bias is None else norm.bias) - norm.running_mean * scale
        bias = shift if conv.bias is None else shift + conv.bias * scale
        folded = (conv.weight * scale[:, None, None, None]).contiguous(memory_format=torch.channels_last)
        conv.weight, conv.bias = (nn.Parameter(v, requires_grad=False) for v in (folded, bias))
        conv.__class__ = FoldedConv2d
        conv.scale = scale
        norm.forward = _same  # type: ignore[method-assign, assignment]
    after = model(x)
    # rounding alone may differ: by far more than its own for the least change of the function
    if torch.allclose(after, before, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
        return [name for name, _, _ in pairs]
    for conv, own_weight, own_bias, norm, forward in kept:
        conv.__class__, conv.weight, conv.bias = nn.Conv2d, own_weight, own_bias
        norm.forward = forward  # type: ignore[method-assign]
    return []


def _same(x: Tensor) -> Tensor:
    return x


def _conv_norm_pairs(model: nn.Module, x: Tensor) -> tuple[Tensor, list[tuple[str, nn.Conv2d, nn.BatchNorm2d]]]:
    """The model's features of x, and every convolution whose output is a BatchNorm's input, both called once."""
    calls: dict[str, int] = {}
    outputs: list[tuple[str, nn.Conv2d, Tensor]] = []  # held, so that no other tensor can take a place in memory
    inputs: list[tuple[str, nn.BatchNorm2d, Tensor]] = []

    def see(name: str, m: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[name] = calls.get(name, 0) + 1
        if type(m) is nn.Conv2d:
            outputs.append((name, m, output))
        elif isinstance(m, nn.BatchNorm2d) and "forward" in m.__dict__:  # `frozen_copy` has seen that it is fixed
            inputs.append((name, m, args[0]))

    watched = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    handles = [m.register_forward_hook(partial(see, name)) for name, m in watched]
    try:
        features = model(x)
    finally:
        for handle in handles:
            handle.remove()
    pairs = [
        (name, conv, norm)
        for name, conv, output in outputs
        for other, norm, given in inputs
        if given is output and calls[name] == calls[other] == 1
    ]
    return features, pairs
