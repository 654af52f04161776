"""How an encoder applies the weights that are scored: every use of them in a forward pass is seen,
whichever code makes it.

`Following` is active while the encoder runs. It hands each product with a scored weight
(`F.linear`, `F.conv2d`, also inside attention) to that weight's tap: the input as it is multiplied,
after a layer's own padding, and the output. Other uses of a scored weight are recorded, because the
tap may then not see the whole gradient.

`examine` runs it once on a few images and compares what the taps gather with autograd, so an
encoder whose gradients cannot be followed leads to an error, never to a wrong number.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from issl.devices import without_onednn
from issl.influence.frozen_encoder import requiring_grad
from issl.influence.layers import Layer, weight_shape

CONVOLUTION = ("stride", "padding", "dilation", "groups")  # F.conv2d's arguments after bias
# what code may read from a weight without using its values
ATTRIBUTES = "dtype device shape ndim is_cuda requires_grad layout is_leaf is_quantized".split()
METHODS = "size dim numel stride is_floating_point element_size".split()
ASKED = {getattr(Tensor, name).__get__ for name in ATTRIBUTES}
ASKED |= {getattr(Tensor, name) for name in METHODS}
# what torch's composed functions check before they do their own work
INSIDE: dict[str, Any] = {
    f"has_torch_function{kind}": lambda *_: False for kind in ("", "_unary", "_variadic")
}


@dataclass(frozen=True)
class Convolution:
    """The arguments of one call of F.conv2d."""

    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1


# takes an input, how the weight is applied to it (None: as a matrix) and the function that computes
# the product; returns the output to continue with
OnProduct = Callable[[Tensor, Convolution | None, Callable[[Tensor], Tensor]], Tensor]


class Following(TorchFunctionMode):
    """Sees every torch function that is called while it is active.

    products   id of a scored weight → what to do with a product with it, or with a tensor made
               from it (LoRA adds to it, a cast copies it)
    used       id of a scored weight → the name of the first other function that used it
    """

    def __init__(self, products: Mapping[int, OnProduct]):
        super().__init__()
        self.products, self.used = dict(products), dict.fromkeys(products, "")
        # tensors made from scored weights, and from which; kept so that no id is reused
        self.made: dict[int, tuple[Tensor, int]] = {}

    def __torch_function__(
        self,
        func: Any,
        kinds: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        found = [k for k in _ids((*args, *kwargs.values())) if k in self.products]
        if not found or func in ASKED:
            return func(*args, **kwargs)
        if isinstance(func, types.FunctionType) and func.__module__ == F.__name__:
            with self, mock.patch.multiple(F, **INSIDE):  # down to its own products
                return func(*args, **kwargs)
        names = ("input", "weight", "bias", *CONVOLUTION)
        named = dict(zip(names, args, strict=False)) | dict(kwargs)
        if func in (F.linear, F.conv2d) and found == [id(named["weight"])]:
            x = named.pop("input")
            settings = {k: v for k, v in named.items() if k in CONVOLUTION}
            how = None if func is F.linear else Convolution(**settings)
            return self.products[found[0]](x, how, lambda given: func(given, **named))
        result = func(*args, **kwargs)
        origin = self.made[found[0]][1] if found[0] in self.made else found[0]
        self.used[origin] = self.used[origin] or getattr(func, "__name__", str(func))
        if isinstance(result, Tensor):
            self.products[id(result)] = self.products[origin]
            self.made[id(result)] = result, origin
        return result


def _ids(values: Sequence[Any]) -> Iterator[int]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _ids(value)
        else:
            yield id(value)


PATCHED = threading.RLock()  # one thread at a time: the patches apply to the whole process


@contextmanager
def followed(products: Mapping[int, OnProduct]) -> Iterator[Following]:
    """Run an encoder inside this context to follow it. Activation checkpointing is off, because
    what it recomputes in the backward pass would not be seen."""
    following, plain = Following(products), lambda function, _, *args: function(*args)
    with (
        PATCHED,
        mock.patch.object(checkpoint.CheckpointFunction, "apply", plain),
        mock.patch.object(checkpoint, "_checkpoint_hook", nullcontext, create=True),
        following,
    ):
        yield following


# --- what a weight's input and output gradient are, row by row ---


def count_rows(how: Convolution | None, x: Tensor) -> int:
    """How many rows there are: the first dimension of a convolution's input, or the product of all
    but the last dimension for a matrix."""
    return x[..., 0].numel() if how is None else len(x)


def read_inputs(
    weight: Tensor, how: Convolution | None, x: Tensor, p: Tensor | None
) -> Float[Tensor, "r g k t"]:
    """P a_t for every row, group and position t; the patches themselves if P is None. It shares no
    memory with x, which may be changed in place later."""
    if how is None:
        rows = x.reshape(-1, x.shape[-1])
        return (rows.clone() if p is None else rows @ p.T.to(x.dtype))[:, None, :, None]
    g, inside, padding = how.groups, weight.shape[1:], how.padding
    if p is not None:
        kernel = p.to(x.dtype).unflatten(1, tuple(inside)).repeat(g, 1, 1, 1)
        patches = F.conv2d(x, kernel, None, how.stride, padding, how.dilation, g)
        return patches.flatten(2).unflatten(1, (g, len(p)))
    if isinstance(padding, str):  # F.unfold takes only numbers
        if padding == "same":
            total = (torch.tensor(how.dilation) * (torch.tensor(inside[1:]) - 1)).tolist()
            x = F.pad(x, [side for t in reversed(total) for side in (t // 2, t - t // 2)])
        padding = 0
    patches = F.unfold(x, tuple(inside[1:]), how.dilation, padding, how.stride)
    return patches.unflatten(1, (g, inside.numel()))


def read_outputs(how: Convolution | None, d: Tensor) -> Float[Tensor, "r g o t"]:
    """The output gradient d_t of every row, group and position t."""
    if how is None:
        return d.reshape(-1, d.shape[-1])[:, None, :, None]
    return d.flatten(2).unflatten(1, (how.groups, -1))


def by_image(rows: Float[Tensor, "r g k t"], n: int, token_major: bool) -> Float[Tensor, "n g k u"]:
    """Group rows, as positions, by the image they belong to. Image i has rows m·i to m·i + m − 1,
    or, if token-major, every n-th row from row i."""
    if len(rows) == n:
        return rows
    if token_major:
        return rows.unflatten(0, (-1, n)).permute(1, 2, 3, 0, 4).flatten(3)
    return rows.unflatten(0, (n, -1)).permute(0, 2, 3, 1, 4).flatten(3)


# --- one trial run of an encoder, before it is trusted ---

IMAGES, IMAGE = 3, 1  # how many are run, and which one's features are backpropagated


class _Trial:
    """Gathers what `examine` compares for one layer."""

    def __init__(self, layer: Layer):
        self.layer, self.problem, self.called, self.tokens_first = layer, "", False, False
        # the image's Σ_t d_t a_tᵀ, if rows are image by image and if they are token-major
        self.totals = [layer.weight.new_zeros(weight_shape(layer)) for _ in (False, True)]
        self.size = 0.0  # Σ_t ‖d_t‖ ‖a_t‖, an upper bound on its norm

    def on_product(
        self, x: Tensor, how: Convolution | None, multiply: Callable[[Tensor], Tensor]
    ) -> Tensor:
        self.called = True
        if not torch.is_grad_enabled():
            self.problem = "is used under no_grad"
        elif (count := count_rows(how, x)) % IMAGES:
            self.problem = f"sees {count} rows for {IMAGES} images"
        if self.problem:
            return multiply(x)
        self.tokens_first |= how is None and x.ndim > 2 and x.shape[1] == IMAGES != len(x)
        kept = x.clone()
        output = multiply(kept)
        output.register_hook(lambda gradient: self.add(how, kept.detach(), gradient))
        return output

    @torch.no_grad()
    def add(self, how: Convolution | None, x: Tensor, gradient: Tensor) -> None:
        a, d = read_inputs(self.layer.weight, how, x, None), read_outputs(how, gradient)
        self.size += float((d.norm(dim=2) * a.norm(dim=2)).sum())
        for major in (False, True):
            left, right = (by_image(v, IMAGES, major)[IMAGE] for v in (d, a))
            self.totals[major] += (left @ right.mT).flatten(0, 1)

    def compare(self, gradient: Tensor | None, used_by: str) -> bool:
        """Whether rows are token-major, judged by autograd's gradient. Records a problem if that
        gradient matches the image's rows in neither order."""
        truth = torch.zeros_like(self.totals[0]) if gradient is None else gradient.flatten(1)
        most = 1e-3 * float(truth.norm()) + 1e-5 * self.size
        # features that are NaN have no gradient to compare
        fits = [not float((total - truth).norm()) > most for total in self.totals]
        if not self.called:
            self.problem = f"is used by {used_by} alone" if used_by else "is never used (a head?)"
        elif not self.problem and not any(fits):
            alone = "has another gradient than the sum over its rows for one image"
            self.problem = f"is also used by {used_by}" if used_by else alone
        return self.tokens_first if fits[self.tokens_first] else fits[True]


def examine(
    layers: Mapping[str, Layer], run: Callable[[], Float[Tensor, "3 d"]]
) -> tuple[set[str], dict[str, str]]:
    """The layers whose rows are token-major (see `by_image`), and the reason for each layer whose
    weight cannot be scored.

    One image's features are backpropagated. In each layer, the products of the image's rows must
    sum to the gradient that autograd finds.
    """
    trials = {name: _Trial(layer) for name, layer in layers.items()}
    products = {id(layer.weight): trials[name].on_product for name, layer in layers.items()}
    weights = [layer.weight for layer in layers.values()]
    found: Sequence[Tensor | None] = [None] * len(weights)
    with requiring_grad(weights, True):
        with torch.enable_grad(), followed(products) as following:
            features = run()
        fixed = torch.Generator().manual_seed(0)
        direction = torch.randn(features.shape[1], generator=fixed).to(features)
        wanted = (features[IMAGE] * direction).sum()
        if wanted.requires_grad:
            with without_onednn():
                found = torch.autograd.grad(wanted, weights, allow_unused=True)
    token_major = {
        name
        for (name, trial), gradient in zip(trials.items(), found, strict=True)
        if trial.compare(gradient, following.used[id(trial.layer.weight)])
    }
    return token_major, {name: trial.problem for name, trial in trials.items() if trial.problem}
