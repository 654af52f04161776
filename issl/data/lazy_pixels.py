"""Pixels that need not fit into memory: decoded when they are asked for, the next ones ahead of
time.

Threads decode, not processes: the decoders of Pillow release the interpreter's lock, nothing is
copied from one process to another, and a process that holds a GPU need not fork. At most one
further batch is held.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor


@runtime_checkable
class Source(Protocol):
    """Where pixels come from; its methods are called by several threads at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> UInt8[np.ndarray, "3 h w"]:
        """Image i, decoded; IsslError that names it if it is broken."""
        ...

    def identity(self) -> str:
        """A text that changes when the images may have changed."""
        ...


class LazyPixels:
    """The uint8 pixels (n, 3, h, w) of some images of a source.

    It takes positions as a tensor does, and gives tensors.

    Args:
        source: From which images are decoded.
        size: (h, w) of every image.
        rows: Which images of the source; default: all.
        workers: Threads that decode; default: the cores.
    """

    dtype, ndim = torch.uint8, 4

    def __init__(
        self,
        source: Source,
        size: tuple[int, int],
        rows: Sequence[int] | np.ndarray | None = None,
        workers: int | None = None,
    ):
        self.source, self.workers = source, workers
        self.rows = np.arange(len(source)) if rows is None else np.asarray(rows, dtype=np.int64)
        self.shape = torch.Size((len(self.rows), 3, *size))
        self._ahead: dict[int, Future[np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(
        self, where: int | np.integer | slice | Sequence[int] | np.ndarray | Tensor
    ) -> Tensor:
        """A slice also begins to decode the images that follow it, as many again."""
        if isinstance(where, slice):
            places = range(*where.indices(len(self)))
            found = self._decoded(places)
            until = places.stop + len(places) if places.step == 1 else 0
            follow = range(places.stop, min(until, len(self)))
            self._ahead = {place: self._start(place) for place in follow}
            return found
        chosen = torch.as_tensor(where)
        found = self._decoded(chosen.reshape(-1).tolist())
        return found[0] if chosen.ndim == 0 else found

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.split(64):
            yield from batch

    def split(self, size: int) -> Iterator[Tensor]:
        """All images in batches, as of a tensor."""
        return (self[k : k + size] for k in range(0, len(self), size))

    def subset(self, rows: Tensor) -> LazyPixels:
        """These images, still not decoded."""
        return LazyPixels(
            self.source, (self.shape[2], self.shape[3]), self.rows[rows.numpy()], self.workers
        )

    def identity(self) -> str:
        """A text that changes when the images may have changed."""
        rows = hashlib.sha256(self.rows.tobytes()).hexdigest()
        return f"{self.source.identity()} {tuple(self.shape)} {rows}"

    def _start(self, place: int) -> Future[np.ndarray]:
        pool = _threads(os.getpid(), self.workers or _default_workers())
        return pool.submit(self.source.__getitem__, int(self.rows[place]))

    def _decoded(self, places: Sequence[int]) -> UInt8[Tensor, "b 3 h w"]:
        futures = [self._ahead.pop(p) if p in self._ahead else self._start(p) for p in places]
        out = np.empty((len(futures), *self.shape[1:]), np.uint8)
        for k, future in enumerate(futures):
            out[k] = future.result()
        return torch.from_numpy(out)


def _default_workers() -> int:
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@lru_cache(maxsize=4)
def _threads(process: int, workers: int) -> ThreadPoolExecutor:
    """The threads of this process; one that was forked from it has none of them."""
    return ThreadPoolExecutor(workers, thread_name_prefix="decode")
