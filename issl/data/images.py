"""A set of images with what is known about each: the input of every part of the library.

`issl.load` (in `issl.data.datasets`) makes them. Pixels are a tensor, or `LazyPixels`, which are
decoded on demand, the next ones ahead of time, so that they need not fit into memory. `Encoded` is
a set of encoded images, the files of a folder or the rows of a table: every format and mode that
Pillow reads, upright, in 8 bits.
"""

from __future__ import annotations

import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, BinaryIO, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int64, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from issl.errors import IsslError

TAIL = 4096  # bytes at a file's end in which its closing mark must be
CLOSING = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
# the columns that we add to tables of scores and of images: a set's own column of such a name is
# renamed when it is read
OURS = (
    "index influence stability_loss loss grad_norm standard_error position path duplicate_of "
    "duplicate_kind atypical"
).split()


class LazyPixels:
    """The uint8 pixels (n, 3, h, w) of some images of a source. They are indexed like a tensor,
    and give tensors.

    Threads decode, not processes: Pillow releases the interpreter's lock, nothing is copied, and a
    process that holds a GPU need not fork. At most one batch is held ahead.

    Args:
        source: Has a length, decodes image i by [i] (uint8, (3, h, w); an IsslError names a broken
            one), and gives an identity(), a text that changes when the images may have changed.
            Several threads call it at once.
        size: (h, w) of every image.
        rows: Which images of the source; default: all.
        workers: The number of decoding threads; default: one per core.
    """

    dtype, ndim = torch.uint8, 4

    def __init__(
        self,
        source: Any,
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


@dataclass(frozen=True)
class Encoded(ABC):
    """A set of encoded images: each one's centred square, as a source of `LazyPixels`.

    Attributes:
        called: The set's name, for titles and messages.
        size: Side of the squares in px.
    """

    called: str
    size: int

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def open(self, i: int) -> io.BufferedIOBase:
        """Image i as a file, at its start; several threads call this at once."""

    @abstractmethod
    def name(self, i: int) -> str:
        """What a message calls image i."""

    @abstractmethod
    def identity(self) -> str:
        """A text that changes when the images may have changed."""

    @abstractmethod
    def about(self, rows: np.ndarray) -> tuple[pd.DataFrame, Tensor | None]:
        """The attributes of these images, and their labels if all have one."""

    def __getitem__(self, i: int) -> UInt8[np.ndarray, "3 s s"]:
        return decode(self._data(i), self.size, self.name(i))

    def images(self, n: int | None, seed: int, skip_broken: bool, workers: int | None) -> Images:
        """n of them, decoded when they are needed; the arguments are those of `issl.load`."""
        rows = sample_positions(self.called, len(self), n, seed)
        good, broken = self._whole(rows, skip_broken)
        attributes, labels = self.about(good)
        pixels = LazyPixels(self, (self.size, self.size), good, workers)
        return Images(pixels, labels, attributes, self.called, broken=broken)

    def _whole(self, rows: np.ndarray, skip: bool) -> tuple[np.ndarray, list[tuple[str, str]]]:
        """The images that can be decoded, and the others by name with the reason.

        A file with a good start and end passes, which is quick to check. Damage in between is found
        only when the image is needed. IsslError if all are broken, or some and `skip` is false.
        """
        shares = [rows[k : k + 256].tolist() for k in range(0, len(rows), 256)]
        with ThreadPoolExecutor(8) as pool:
            found = pool.map(lambda share: [(i, self._fault(i)) for i in share], shares)
            faults = {i: why for share in found for i, why in share if why}
        broken = [(self.name(i), why) for i, why in faults.items()]
        if broken and (not skip or len(broken) == len(rows)):
            some = "; ".join(f"{name} ({why})" for name, why in broken[:5])
            more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
            raise IsslError(
                f"{self.called}: {len(broken)} of {len(rows)} images cannot be decoded: "
                f"{some}{more}; repair or remove them, or add --skip-broken (skip_broken=True)"
            )
        return np.array([i for i in rows if i not in faults], dtype=np.int64), broken

    def _fault(self, i: int) -> str:
        """Why image i cannot be decoded; "" if the check finds nothing wrong."""
        try:
            with self.open(i) as file, Image.open(cast(BinaryIO, file)) as image:
                check_range(image)
                mark = CLOSING.get(image.format or "")
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - TAIL))
                if mark is None or mark in file.read():
                    return ""
            Image.open(io.BytesIO(self._data(i))).load()  # to be sure
        except Exception as error:  # noqa: BLE001 (whatever a decoder raises is reported)
            return _in_words(error)
        return ""

    def _data(self, i: int) -> bytes:
        with self.open(i) as file:
            return file.read()


def decode(given: bytes | Image.Image, size: int, what: str) -> UInt8[np.ndarray, "3 s s"]:
    """The centred square of an image, upright as its camera was held, resized to `size` px; `what`
    names it in errors."""
    try:
        image: Image.Image = Image.open(io.BytesIO(given)) if isinstance(given, bytes) else given
        check_range(image)  # before its format is forgotten
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image if image.mode == "RGB" else image.convert("RGB")
        if image.size != (size, size):
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            box = (left, top, left + side, top + side)
            image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    except Exception as error:  # a decoder may raise anything on bytes from elsewhere
        raise IsslError(
            f"{what} cannot be decoded ({_in_words(error)}); repair or remove it"
        ) from error
    return np.asarray(image).transpose(2, 0, 1)


def check_range(image: Image.Image) -> None:
    """Raises ValueError if it is unknown which value is white in this image."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(
            f"pixels of mode {image.mode}, whose range is not known: save it with 8 or 16 bits"
        )


def _in_words(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or damaged at its start"
    return str(error) or type(error).__name__
