"""The copy of an encoder that is scored, so that the user's model keeps its weights and state."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from issl.errors import IsslError


def frozen(encoder: nn.Module, device: torch.device, layout: torch.memory_format) -> nn.Module:
    """A faster copy with the same features and frozen parameters. Convolutions are in `layout`:
    NHWC is the better one on CPUs and GPUs alike. Eval-mode BatchNorm is one product and one sum.
    Weights that are computed (weight_norm, LoRA, pruning) are replaced by their values.

    An encoder with custom functions (a replaced `forward`, hooks) is not copied but used as it is.
    Such a function may hold the encoder itself, and its copy would keep calling the original.

    Raises IsslError for an encoder that cannot be copied.
    """
    if any(map(_has_functions, encoder.modules())):
        first = next(encoder.parameters())
        if first.device.type != device.type:
            raise IsslError(
                f"device={str(device)!r}: this encoder has a replaced forward or hooks, so it is "
                f"scored where it is, on {first.device}; move it to the requested device first"
            )
        return encoder
    # torch does not copy tensors computed with a gradient, such as the weights of the older
    # weight_norm or features that a module kept
    held = [v for m in encoder.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    try:
        model = copy.deepcopy(encoder, {id(v): v.detach().clone() for v in held if not v.is_leaf})
    except Exception as error:
        raise IsslError(f"encoder {type(encoder).__name__} cannot be copied ({error})") from error
    for m in list(model.modules()):
        if parametrize.is_parametrized(m):
            assert isinstance(m.parametrizations, nn.ModuleDict)
            for name in list(m.parametrizations):
                parametrize.remove_parametrizations(m, name, leave_parametrized=True)
        for key, hook in list(m._forward_pre_hooks.items()):
            hook.remove(m)  # type: ignore[attr-defined]  # torch's own, see `_has_functions`
            del m._forward_pre_hooks[key]
    model = model.to(device).to(memory_format=layout).requires_grad_(False)
    for m in model.modules():
        # `check_encoder` has required running statistics and eval mode
        if type(m) is nn.BatchNorm2d and m.running_mean is not None and m.running_var is not None:
            scale = (m.running_var + m.eps).rsqrt() * (1 if m.weight is None else m.weight)
            shift = -m.running_mean * scale + (0 if m.bias is None else m.bias)
            m.forward = partial(_affine, m, scale[:, None, None], shift[:, None, None])  # type: ignore[method-assign]
    return model


@contextmanager
def requiring_grad(weights: Iterable[Tensor], required: bool) -> Iterator[None]:
    """Inside this context, all of these weights require a gradient, or none does."""
    before = [(weight, weight.requires_grad) for weight in weights]
    try:
        for weight, _ in before:
            weight.requires_grad_(required)
        yield
    finally:
        for weight, own in before:
            weight.requires_grad_(own)


def _has_functions(m: nn.Module) -> bool:
    """Whether a module has a replaced method, a function that holds a module, or hooks other than
    those of torch's older weight_norm, spectral_norm and pruning."""
    hooks = m._forward_pre_hooks.values()
    if m._forward_hooks or any(not type(h).__module__.startswith("torch.nn.utils.") for h in hooks):
        return True
    return any(
        name == "forward"
        or (isinstance(value, types.FunctionType) and hasattr(type(m), name))
        or _holds_a_module(value)
        for name, value in vars(m).items()
    )


def _holds_a_module(function: object) -> bool:
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # a name that was deleted
            if isinstance(cell.cell_contents, nn.Module):
                return True
    return False


def _affine(
    norm: nn.BatchNorm2d,
    scale: Float[Tensor, "c 1 1"],
    shift: Float[Tensor, "c 1 1"],
    x: Float[Tensor, "b c h w"],
) -> Float[Tensor, "b c h w"]:
    """x · scale + shift. Its backward pass is one product; that of torch's BatchNorm took five
    times as long as the forward pass."""
    if x.dtype != scale.dtype:  # under autocast torch's BatchNorm keeps its statistics in fp32
        return nn.BatchNorm2d.forward(norm, x)
    return torch.addcmul(shift, x, scale)
