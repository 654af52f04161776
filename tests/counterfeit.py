"""A counterfeit GPU: tensors that say they are on a device, compute on the CPU, and refuse what a
GPU refuses.

    with counterfeit.watched() as seen: …      # seen.waits: how often issl waited for the device,
    by its line

The device is torch's PrivateUse1, registered from Python alone (torch 2.11 has the hooks, as has
2.15), under the name `gpu`. Each tensor is a wrapper around one on the CPU. What a real GPU would
raise, raises here too: an operation on tensors of both devices (0-dimensional ones on the CPU are
fine, as are indices on the CPU), `.numpy()`, a generator of the CPU. What makes the host wait is
counted: copies in both directions, reading a number, and results whose shape depends on values. It
cannot tell how fast anything is, and its results are the CPU's.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_flatten, tree_map

import issl

NAME = "gpu"
HOOKS = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
WHY_NOT = f"torch {torch.__version__} has no hooks for a device written in Python (2.11 has)"
FOLDER = str(Path(issl.__file__).parent)
ATEN = torch.ops.aten
# operations that may take tensors of the CPU beside those of the device
MIXING = {ATEN.copy_.default, ATEN._to_copy.default}
INDEXING = {
    ATEN.index.Tensor,
    ATEN.index_put_.default,
    ATEN._index_put_impl_.default,
    ATEN.index_put.default,
}
# operations whose result the host must see before it can go on
READING = {
    ATEN._local_scalar_dense.default,
    ATEN.equal.default,
    ATEN.is_nonzero.default,
    ATEN.nonzero.default,
    ATEN.masked_select.default,
    ATEN._unique2.default,
    ATEN.unique_dim.default,
}


# operations that compute nothing: other views of the same memory, and memory itself
VIEWS = {
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "expand",
    "detach",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "split",
    "split_with_sizes",
    "as_strided",
    "alias",
    "permute",
    "unbind",
    "unfold",
    "diagonal",
    "narrow",
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "lift_fresh",
}


@dataclass
class Seen:
    """waits      how often the host waited for the device, by line of issl: `folder/file.py:line`
    launches   operations that compute or copy, about as many as kernels
    """

    waits: Counter[str] = field(default_factory=Counter)
    launches: int = 0


_watching: list[Seen] = []


@contextmanager
def watched() -> Iterator[Seen]:
    """Counts inside."""
    _watching.append(Seen())
    try:
        yield _watching[-1]
    finally:
        _watching.pop()


def _wait() -> None:
    if not _watching:
        return
    frame: Any = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.startswith(FOLDER):
        frame = frame.f_back
    if frame is not None:
        _watching[-1].waits[
            f"{Path(frame.f_code.co_filename).relative_to(FOLDER)}:{frame.f_lineno}"
        ] += 1


class Counterfeit(Tensor):
    """A tensor on the device; `inner` holds its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Counterfeit:
        assert type(inner) is Tensor, f"a {type(inner).__name__} inside the counterfeit"
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(NAME, 0),
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Counterfeit({self.inner})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = Counterfeit(self.inner.detach().clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied._is_param = True
        memo[id(self)] = copied
        return copied

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(
            f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first"
        )

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_device(func, args, kwargs or {})


def on_device(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation of the device on the CPU, after checking that the device would run it."""
    flat = tree_flatten((args, kwargs))[0]
    here = [leaf for leaf in flat if isinstance(leaf, Counterfeit)]
    _refuse(func, flat, here)
    target = next((leaf for leaf in flat if isinstance(leaf, torch.device)), None)
    if (
        func in READING
        or _leaves(func, here, target)
        or _enters(func, flat)
        or _by_mask(func, args)
    ):
        _wait()
    if _watching and func.overloadpacket.__name__ not in VIEWS:
        _watching[-1].launches += 1
    wrapped = {id(leaf.inner): leaf for leaf in here}

    def inside(leaf: Any) -> Any:
        if isinstance(leaf, Counterfeit):
            return leaf.inner
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

    def outside(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in wrapped:
            return wrapped[id(leaf)]
        return leaf if target is not None and target.type == "cpu" else Counterfeit(leaf)

    return tree_map(outside, func(*tree_map(inside, args), **tree_map(inside, kwargs)))


def _refuse(func: Any, flat: list[Any], here: list[Counterfeit]) -> None:
    """Raise what a GPU would."""
    if any(isinstance(leaf, torch.Generator) and leaf.device.type == "cpu" for leaf in flat):
        raise RuntimeError(f"{func}: Expected a '{NAME}' device type for generator but found 'cpu'")
    there = [
        x for x in flat if isinstance(x, Tensor) and not isinstance(x, Counterfeit) and x.ndim > 0
    ]
    if (
        not (here and there)
        or func in MIXING
        or (func in INDEXING and isinstance(flat[0], Counterfeit))
    ):
        return
    raise RuntimeError(
        f"{func}: Expected all tensors to be on the same device, but found {NAME}:0 and cpu"
    )


def _leaves(func: Any, here: list[Counterfeit], target: torch.device | None) -> bool:
    """Does it copy from the device to the CPU?"""
    return bool(here) and target is not None and target.type == "cpu"


def _enters(func: Any, flat: list[Any]) -> bool:
    """Does it copy from the CPU's memory to the device (or back, in place)?"""
    if func is not ATEN.copy_.default:
        return False
    return isinstance(flat[0], Counterfeit) != isinstance(flat[1], Counterfeit)


def _by_mask(func: Any, args: Any) -> bool:
    """Does a mask choose, so that the shape of the result depends on its values?"""
    if func not in INDEXING:
        return False
    kinds = (torch.bool, torch.uint8)
    return any(
        i is not None and (i.dtype in kinds or not isinstance(i, Counterfeit)) for i in args[1]
    )


class _Module:
    """What torch asks a device's module."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """It has no random numbers of its own."""

    @staticmethod
    def get_rng_state(_: Any) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    @staticmethod
    def set_rng_state(state: Tensor, _: Any) -> None:
        """As above."""

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_libraries: list[Any] = []


def device() -> torch.device:
    """The device; registered at the first call, for the whole process."""
    if not _libraries:
        backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
        library = torch.library.Library("aten", "IMPL")
        for name, make in (
            ("empty.memory_format", torch.empty),
            ("empty_strided", torch.empty_strided),
        ):
            library.impl(name, _factory(make), "PrivateUse1")
        library.impl("_copy_from", _copy_from, "PrivateUse1")
        autocast = torch.library.Library("_", "IMPL")
        autocast.fallback(
            torch.library.fallthrough_kernel, "AutocastPrivateUse1"
        )  # bf16 stays fp32
        _libraries.extend([library, autocast])
    return torch.device(NAME)


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """What `new_tensor` calls, past the dispatch of subclasses."""
    _wait()
    held = [x.inner if isinstance(x, Counterfeit) else x for x in (source, target)]
    held[1].copy_(held[0])
    return target


def _factory(make: Any) -> Any:
    def made(
        *args: Any,
        dtype: Any = None,
        layout: Any = None,
        device: Any = None,
        pin_memory: Any = None,
        **more: Any,
    ) -> Tensor:
        return Counterfeit(
            make(*args, dtype=dtype, **{k: v for k, v in more.items() if v is not None})
        )

    return made
