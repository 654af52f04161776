"""Which layers of an encoder are scored, and which encoders cannot be scored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from issl.errors import IsslError

Layer = nn.Linear | nn.Conv2d
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


def weight_shape(layer: Layer) -> tuple[int, int]:
    """(c_out, d_in) of the weight as a matrix."""
    return len(layer.weight), layer.weight[0].numel()


def scored_layers(encoder: nn.Module, skip: Sequence[str] = ()) -> dict[str, Layer]:
    """The Linear and Conv2d layers by name, except those that `skip` names, themselves or a module that holds them.

    Raises IsslError where the encoder cannot be scored: not a module, no such layer, train mode, weights that are not
    there (device meta) or not finite, normalisation by batch statistics or never trained, unsupported kinds of weights.
    """
    if not isinstance(encoder, nn.Module):
        raise IsslError(
            f"encoder is {'None' if encoder is None else f'a {type(encoder).__name__}'}; give a torch.nn.Module, such "
            "as issl.load_encoder(FILE)"
        )
    if isinstance(skip, str):
        raise IsslError(f"skip={skip!r}: give a list of names, such as [{skip!r}]")
    training = [name or "(the encoder itself)" for name, m in encoder.named_modules() if m.training]
    if training:
        raise IsslError(f"encoder is in train mode ({_some(training)}); call encoder.eval() first")
    for name, value in [*encoder.named_parameters(), *encoder.named_buffers()]:
        if value.is_meta:
            raise IsslError(f"encoder: {name} has no values (device meta); load its weights, then score it")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise IsslError(f"encoder: {name} holds NaN or infinite values; load an intact checkpoint")
    for name, m in encoder.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            if m.running_mean is None or m.running_var is None:
                raise IsslError(
                    f"encoder: {name} normalises by the batch (track_running_stats=False), so examples see each "
                    "other; use running statistics"
                )
            if not m.running_mean.any() and bool((m.running_var == 1).all()):
                raise IsslError(f"encoder: {name} was never trained (running mean 0, variance 1); load trained weights")

    def skipped(name: str) -> bool:
        return any(name == s or name.startswith(s + ".") for s in skip)

    unknown = [s for s in skip if not _exists(encoder, s)]
    if unknown:
        raise IsslError(f"skip={unknown}: the encoder has no module or parameter of that name")
    layers: dict[str, Layer] = {}
    unsupported: list[str] = []
    owners: dict[int, str] = {}
    for name, m in encoder.named_modules():
        if isinstance(m, Layer):
            if skipped(name):
                continue
            layers[name] = m
            if id(m.weight) in owners:
                raise IsslError(
                    f"encoder: {owners[id(m.weight)]} and {name} share one weight; call one module twice instead, or "
                    f"skip both: skip={[owners[id(m.weight)], name]}"
                )
            owners[id(m.weight)] = name
        elif not isinstance(m, NORMS):
            for own, p in m.named_parameters(recurse=False):
                full = f"{name}.{own}" if name else own
                if p.ndim >= 2 and not skipped(full):
                    unsupported.append(f"{full} ({type(m).__name__})")
    if unsupported:
        names = [u.split(" ")[0] for u in unsupported]
        raise IsslError(
            f"encoder: weights outside Linear and Conv2d are not supported: {_some(unsupported)}; leave them out of "
            f"the score with skip={names} (--skip {','.join(names)})"
        )
    if not layers:
        raise IsslError(
            "encoder has no Linear or Conv2d layer to score" + (f" left after skip={list(skip)}" if skip else "")
        )
    return layers


def _exists(encoder: nn.Module, name: str) -> bool:
    return name in dict(encoder.named_modules()) or name in dict(encoder.named_parameters())


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
