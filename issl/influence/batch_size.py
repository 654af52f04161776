"""How many images at once: from what one image pair takes, and the memory there is."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from issl.devices import free_memory

MOST = {"cpu": 64, "cuda": 512}  # more at once are not faster
# of the free memory; kernels need workspaces of their own beside the tensors that are counted
SHARE = 0.4


def choose_batch_size(work: Callable[[int], object], device: torch.device) -> int:
    """The batch for this work, a power of two.

    work    a function of the number of images that does what will be done for each batch
    """
    few = 2
    each = max(1, peak_bytes(lambda: work(few), device) // few)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    fits = int(SHARE * free_bytes(device) / here / each)
    return 1 << (max(1, min(fits, MOST.get(device.type, 64))).bit_length() - 1)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken: the device's, or the machine's within the limit of this
    container or job."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory()


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that this work holds at one time, beyond those there are."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    with _Counted() as counted:
        work()
    return counted.peak


class _Counted(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside, until they are freed; torch keeps no such
    count on CPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, size: int) -> None:
        self.live -= size
