"""A set of images with what is known about each: the input of every part of the library.

`issl.load` (in `issl.data.datasets`) makes them. Pixels are a tensor, or `LazyPixels`, which are
decoded on demand, the next ones ahead of time, so that they need not fit into memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from issl.errors import IsslError

# the columns that we add to tables of scores and of images: a set's own column of such a name is
# renamed when it is read
OURS = (
    "index influence stability_loss loss grad_norm standard_error position path duplicate_of "
    "duplicate_kind atypical"
).split()


@runtime_checkable
class Source(Protocol):
    """Where lazy pixels come from; several threads call its methods at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> UInt8[np.ndarray, "3 h w"]:
        """Image i, decoded; IsslError that names it if it is broken."""
        ...

    def identity(self) -> str:
        """A text that changes when the images may have changed."""
        ...


class LazyPixels:
    """The uint8 pixels (n, 3, h, w) of some images of a source. They are indexed like a tensor,
    and give tensors.

    Threads decode, not processes: Pillow releases the interpreter's lock, nothing is copied, and a
    process that holds a GPU need not fork. At most one batch is held ahead.

    Args:
        size: (h, w) of every image.
        rows: Which images of the source; default: all.
        workers: The number of decoding threads; default: one per core.
    """

    dtype, ndim = torch.uint8, 4

    def __init__(
        self,
        source: Source,
        size: tuple[int, int],
        rows: np.ndarray | None = None,
        workers: int | None = None,
    ):
        self.source, self.workers = source, workers
        self.rows = np.arange(len(source)) if rows is None else rows
        self.shape = torch.Size((len(self.rows), 3, *size))
        self._ahead: dict[int, Future[np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(
        self, where: int | np.integer | slice | Sequence[int] | np.ndarray | Tensor
    ) -> Tensor:
        """A slice also starts to decode the images that follow it, as many as it holds."""
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
        """All images in batches, as `Tensor.split` gives them."""
        return (self[k : k + size] for k in range(0, len(self), size))

    def subset(self, rows: np.ndarray) -> LazyPixels:
        """These images, still not decoded."""
        size = self.shape[2], self.shape[3]
        return LazyPixels(self.source, size, self.rows[rows], self.workers)

    def identity(self) -> str:
        """A text that changes when the images may have changed."""
        rows = hashlib.sha256(self.rows.tobytes()).hexdigest()
        return f"{self.source.identity()} {tuple(self.shape)} {rows}"

    def _start(self, place: int) -> Future[np.ndarray]:
        pool = _threads(os.getpid(), self.workers)
        return pool.submit(self.source.__getitem__, int(self.rows[place]))

    def _decoded(self, places: Sequence[int]) -> UInt8[Tensor, "b 3 h w"]:
        futures = [self._ahead.pop(p) if p in self._ahead else self._start(p) for p in places]
        out = np.empty((len(futures), *self.shape[1:]), np.uint8)
        for k, future in enumerate(futures):
            out[k] = future.result()
        return torch.from_numpy(out)


@lru_cache(maxsize=4)
def _threads(process: int, workers: int | None) -> ThreadPoolExecutor:
    """The threads of this process. A forked process inherits none of them, so it gets its own."""
    return ThreadPoolExecutor(workers or os.cpu_count(), thread_name_prefix="decode")


@dataclass(frozen=True)
class Images:
    """A set of images, all of one size.

    Attributes:
        pixels: uint8 (n, 3, H, W), 0…255: a tensor, or `LazyPixels`, which decodes what is asked
            for.
        labels: int64 (n,), or None where the set has none.
        attributes: One row per image. It always has `index`, the image's identity: it survives
            `subset`, and the image's random numbers depend on it. With labels there is
            `label_name`.
        name: The data set's name, for titles and records.
        masks: uint8 (n, H, W), 255 = foreground, where it is known (`scenes`), else None.
        broken: The name of each image that was left out, and the reason.
    """

    pixels: UInt8[Tensor, "n 3 h w"] | LazyPixels
    labels: Int64[Tensor, " n"] | None
    attributes: pd.DataFrame
    name: str
    masks: UInt8[Tensor, "n h w"] | None = None
    broken: Sequence[tuple[str, str]] = ()

    def __post_init__(self) -> None:
        this, shape, dtype = f"images {self.name!r}", tuple(self.pixels.shape), self.pixels.dtype
        if dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3:
            raise IsslError(f"{this}: pixels are {dtype} {shape}; need uint8 (n, 3, H, W)")
        if "index" not in self.attributes:
            raise IsslError(f"{this}: attributes need a column `index`")
        parts = {name: getattr(self, name) for name in ("attributes", "pixels", "labels", "masks")}
        sizes = {name: len(part) for name, part in parts.items() if part is not None}
        if len(set(sizes.values())) != 1:
            raise IsslError(f"{this}: lengths differ: {sizes}")
        twice = self.attributes["index"][self.attributes["index"].duplicated()]
        if len(twice):
            raise IsslError(f"{this}: index {twice.iloc[0]} occurs twice; each image needs its own")

    def __len__(self) -> int:
        return len(self.pixels)

    @cached_property
    def index(self) -> Int64[Tensor, " n"]:
        """The identity of each image, as a tensor."""
        return torch.from_numpy(self.attributes["index"].to_numpy(dtype=np.int64).copy())

    def tensor(self) -> UInt8[Tensor, "n 3 h w"]:
        """All pixels in memory."""
        return self.pixels[:] if isinstance(self.pixels, LazyPixels) else self.pixels

    def in_memory(self) -> Images:
        """The same set with all pixels in memory."""
        return replace(self, pixels=self.tensor())

    def require(self, attributes: Sequence[str]) -> pd.DataFrame:
        """These attributes of the images; if one is missing, IsslError lists those that exist."""
        missing = [a for a in attributes if a not in self.attributes]
        if missing:
            known = ", ".join(self.attributes.columns)
            raise IsslError(f"{self.name} has no attribute {missing[0]!r}; choose among {known}")
        return self.attributes[list(attributes)]

    def require_labels(self) -> Int64[Tensor, " n"]:
        """The labels; IsslError if the set has none."""
        if self.labels is None:
            raise IsslError(
                f"images {self.name!r} have no labels; use a labelled set, such as an image folder "
                "with one sub-folder per class"
            )
        return self.labels

    def subset(self, idx: Sequence[int] | np.ndarray | Tensor) -> Images:
        """The images at positions `idx`, or where a mask is true; each keeps its `index`."""
        this, found = f"subset of {self.name!r}", np.asarray(idx)
        if found.ndim != 1 or (len(found) and found.dtype.kind not in "biu"):
            raise IsslError(f"{this}: {idx!r}; give positions or a mask")
        if found.dtype == bool:
            if len(found) != len(self):
                raise IsslError(f"{this}: mask of length {len(found)} for {len(self)} images")
            found = np.flatnonzero(found)
        found = found.astype(np.int64)
        beyond = found[(found < -len(self)) | (found >= len(self))]
        if len(beyond):
            raise IsslError(f"{this}: position {beyond[0]}, but it has {len(self)} images")
        rows, lazy = torch.from_numpy(found), self.pixels
        return Images(
            pixels=lazy.subset(found) if isinstance(lazy, LazyPixels) else lazy[rows],
            labels=None if self.labels is None else self.labels[rows],
            attributes=self.attributes.iloc[found].reset_index(drop=True),
            name=self.name,
            masks=None if self.masks is None else self.masks[rows],
        )


def own_names(attributes: pd.DataFrame, ours: Iterable[str]) -> pd.DataFrame:
    """The attributes, with `own_` put before each column name that is among `ours`, the columns
    beside them."""
    names: dict[str, str] = {}
    for column in set(ours) & set(attributes.columns):
        names[column] = f"own_{column}"
        while names[column] in attributes:
            names[column] = f"own_{names[column]}"
    return attributes.rename(columns=names)


def sample_positions(name: str, total: int, n: int | None, seed: int) -> np.ndarray:
    """The positions of `n` of `total` images: all, or a random subset in the original order."""
    if n is None:
        return np.arange(total)
    if n > total:
        raise IsslError(f"n={n}: data set {name!r} has {total} images here; ask for 1 to {total}")
    return np.sort(np.random.default_rng(seed).choice(total, n, replace=False))
