"""Which layers of an encoder are scored, and which encoders cannot be scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from issl.errors import IsslError

Layer = nn.Linear | nn.Conv2d
COMPILED = ("torch.ao.nn", "torch.nn.quantized")  # packages of quantised layers
BatchNorm = nn.modules.batchnorm._BatchNorm
NORMS = (BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


def weight_shape(layer: Layer) -> tuple[int, int]:
    """(c_out, d_in) of the weight as a matrix."""
    return len(layer.weight), layer.weight[0].numel()


def find_layers(
    encoder: nn.Module, skip: Sequence[str] = (), untrained: bool = False
) -> tuple[dict[str, Layer], dict[str, str]]:
    """The Linear and Conv2d layers that are scored, by name; and what each weight is that cannot
    be scored, by name.

    A layer's weight is the one that it applies; for a parametrised layer (weight_norm, LoRA), that
    is the result. The input projections of nn.MultiheadAttention count as Linear layers.

    Args:
        skip: Names to leave out: layers, parameters, or modules that hold them.
        untrained: Accept BatchNorm that was never trained.
    """
    check_encoder(encoder, untrained)
    if isinstance(skip, str) or not isinstance(skip, Sequence):
        example = [skip] if isinstance(skip, str) else ["head"]
        raise IsslError(f"skip={skip!r}: give a list of names, such as {example}")
    modules = {
        name: m for name, m in encoder.named_modules() if "parametrizations" not in name.split(".")
    }
    known = {f"{name}.{own}".lstrip(".") for name, m in modules.items() for own, _ in _weights(m)}
    if unknown := [s for s in skip if s not in modules and s not in known]:
        raise IsslError(f"skip={unknown}: the encoder has no module or parameter of that name")

    def skipped(name: str) -> bool:
        return any(name == s or name.startswith(s + ".") for s in skip)

    layers: dict[str, Layer] = {}
    others: dict[str, str] = {}
    for name, m in modules.items():
        if isinstance(m, Layer) and not skipped(name):
            layers[name] = m
        if isinstance(m, (nn.Linear, nn.Conv2d, *NORMS)):
            continue
        for own, p in _weights(m):
            full = f"{name}.{own}".lstrip(".")
            if p.ndim < 2 or skipped(full):
                continue
            if isinstance(m, nn.MultiheadAttention) and own.endswith("proj_weight"):
                layers[full] = _as_linear(p)
            else:
                others[full] = f"is a weight of {type(m).__name__}"
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        computed = parametrize.is_parametrized(layer, "weight")
        if (first := owners.setdefault(id(layer if computed else layer.weight), name)) != name:
            raise IsslError(
                f"encoder: {first} and {name} share one weight; call one module twice instead, or "
                f"skip both: skip={[first, name]}"
            )
    if not layers and not others:
        left = f" left after skip={list(skip)}" if skip else ""
        raise IsslError(f"encoder has no Linear or Conv2d layer to score{left}")
    return layers, others


def scored_layers(
    encoder: nn.Module, skip: Sequence[str] = (), untrained: bool = False
) -> dict[str, Layer]:
    """The layers of `find_layers`. Raises IsslError if there are also other weights."""
    layers, others = find_layers(encoder, skip, untrained)
    if others:
        raise unscored(others, layers)
    return layers


def _as_linear(weight: Tensor) -> nn.Linear:
    """A Linear layer that shares this weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    own = isinstance(weight, nn.Parameter)
    layer.weight = weight if own else nn.Parameter(weight, requires_grad=False)
    return layer


def unscored(problems: Mapping[str, str], layers: Mapping[str, Layer]) -> IsslError:
    """The error that names all weights that cannot be scored, the reason for each, and how to leave
    them out."""
    names = list(problems)
    more = "" if set(layers) - set(names) else "; nothing would be left to score"
    return IsslError(
        f"encoder: {len(names)} of {len({*layers, *names})} weights cannot be scored: "
        f"{_some([f'{name} ({why})' for name, why in problems.items()])}; leave them out of the "
        f"score with skip={names} (--skip {','.join(names)}){more}"
    )


def check_encoder(encoder: object, untrained: bool = False) -> None:
    """Raises IsslError for an encoder that cannot be scored, whatever is left out of the score."""
    if not isinstance(encoder, nn.Module):
        what = "None" if encoder is None else f"a {type(encoder).__name__}"
        raise IsslError(
            f"encoder is {what}; give a torch.nn.Module, such as issl.load_encoder(FILE)"
        )
    for name, m in encoder.named_modules():
        if isinstance(m, torch.jit.ScriptModule) or type(m).__module__.startswith(COMPILED):
            raise IsslError(
                f"encoder: {name or 'it'} is a {type(m).__name__}, whose weights cannot be "
                "followed; give the module as it was before torch.jit or quantisation"
            )
    training = [name or "(the encoder itself)" for name, m in encoder.named_modules() if m.training]
    if training:
        raise IsslError(f"encoder is in train mode ({_some(training)}); call encoder.eval() first")
    for name, value in [*encoder.named_parameters(), *encoder.named_buffers()]:
        if value.is_meta or nn.parameter.is_lazy(value):
            raise IsslError(
                f"encoder: {name} has no values (device meta, or a lazy layer); load its weights"
            )
        if value.is_complex():
            raise IsslError(f"encoder: {name} is {value.dtype}; only real weights can be scored")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise IsslError(
                f"encoder: {name} holds NaN or infinite values; load an intact checkpoint"
            )
    for name, m in encoder.named_modules():
        if isinstance(m, BatchNorm):
            if m.running_mean is None or m.running_var is None:
                raise IsslError(
                    f"encoder: {name} normalises by the batch (track_running_stats=False), so "
                    "the images of a batch affect each other; use running statistics"
                )
            if not untrained and not m.running_mean.any() and bool((m.running_var == 1).all()):
                raise IsslError(
                    f"encoder: {name} was never trained (running mean 0, variance 1); load trained "
                    "weights or, for an encoder as initialised, say untrained=True (--untrained)"
                )


def _weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters by name; parametrised ones as they are applied."""
    yield from module.named_parameters(recurse=False)
    if parametrize.is_parametrized(module):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        yield from ((name, getattr(module, name)) for name in module.parametrizations)


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
