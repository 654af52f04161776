"""From encoded images to pixels: every format and mode that Pillow reads, upright, in 8 bits.

`Encoded` says where images are: files of a folder, rows of a Hugging Face set. The rest is the same
for all of them.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, cast, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from issl.errors import IsslError, is_whole

TAIL = 4096  # bytes at a file's end in which its closing mark must be
CLOSING = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
LARGEST = 2**29  # bytes of an encoded image; a photograph has some 10⁷
LARGEST_SIDE = 8192  # px: an image of 200 MB


@runtime_checkable
class Encoded(Protocol):
    """Images that are not decoded; `open` is called by several threads at once."""

    def __len__(self) -> int: ...

    def open(self, i: int) -> io.BufferedIOBase:
        """Image i as a file, at its start."""
        ...

    def name(self, i: int) -> str:
        """What a message calls image i."""
        ...

    def identity(self) -> str:
        """A text that changes when the images may have changed."""
        ...


@dataclass(frozen=True)
class Decoding:
    """The source of `LazyPixels`: each image's centred square at `size` px."""

    encoded: Encoded
    size: int

    def __post_init__(self) -> None:
        if not is_whole(self.size, 8, LARGEST_SIDE):
            raise IsslError(f"size={self.size!r}: give a whole number of px, 8 to {LARGEST_SIDE}")

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, i: int) -> UInt8[np.ndarray, "3 s s"]:
        with self.encoded.open(i) as file:
            data = read_all(file, self.encoded.name(i))
        return decode(data, self.size, self.encoded.name(i))

    def identity(self) -> str:
        return f"{self.encoded.identity()} at {self.size} px"


def read_all(file: io.BufferedIOBase, name: str) -> bytes:
    """The bytes of an encoded image; IsslError for one that is far too large to be one."""
    data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise IsslError(
            f"{name} has more than {LARGEST >> 20} MB, too much for an image; remove it"
        )
    return data


def stamp(paths: Iterable[Path]) -> str:
    """The paths, sizes and times of files, as one hash."""
    digest = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        digest.update(repr((str(path), stat.st_size, stat.st_mtime_ns)).encode())
    return digest.hexdigest()


def decode(data: bytes, size: int, what: str) -> UInt8[np.ndarray, "3 s s"]:
    """The centred square of an encoded image, upright, resized to `size` px if necessary.

    Raises:
        IsslError: the bytes are not an image, or it is not known what is white in it; it says
            `what` the image is.
    """
    try:
        opened = Image.open(io.BytesIO(data))
    except Exception as error:  # what a decoder raises on a stranger's bytes is not ours to list
        raise _undecodable(what, error) from error
    with opened:
        return square(as_it_looks(opened, what, ours=True), size)


def as_it_looks(image: Image.Image, what: str, ours: bool = False) -> Image.Image:
    """An image of any mode in RGB of 8 bits, upright as its camera was held.

    Only an image that is `ours` may be changed itself.

    Raises:
        IsslError: as `decode` does.
    """
    try:
        why = unknown_range(image)  # before its format is forgotten
        if ours:
            ImageOps.exif_transpose(image, in_place=True)
        else:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        rgb = image.convert("RGB")
    except Exception as error:  # as above: an opened file need not be decoded yet
        raise _undecodable(what, error) from error
    if why:
        raise IsslError(f"{what} has {why}")
    return rgb


def square(image: Image.Image, size: int) -> UInt8[np.ndarray, "3 s s"]:
    """The centred square of an RGB image, resized to `size` px if necessary."""
    side = min(image.size)
    if image.size != (size, size):
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image).transpose(2, 0, 1)


def unknown_range(image: Image.Image) -> str:
    """Why it cannot be known what is white in this image; "" where it can."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        return f"pixels of mode {image.mode}, whose range is not known: save it with 8 or 16 bits"
    return ""


def in_words(error: Exception) -> str:
    """Why an image cannot be decoded."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or damaged at its start"
    return str(error) or type(error).__name__


def _undecodable(what: str, error: Exception) -> IsslError:
    return IsslError(f"{what} cannot be decoded ({in_words(error)}); repair or remove it")


def check(
    encoded: Encoded, what: str, skip: bool, rows: np.ndarray
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Find the images that cannot be decoded, by their headers and ends, which is quick.

    Where the closing mark of a JPEG or PNG is not where it belongs, the image is decoded to be
    sure. An image that is damaged in between is found only when it is needed.

    Returns:
        Those of the positions `rows` whose images are whole; the others by name, with the reason.

    Raises:
        IsslError: some are broken and are not to be skipped, or all are; it names the first five.
    """
    shares = [rows[k : k + 256].tolist() for k in range(0, len(rows), 256)]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda share: [(i, _fault(encoded, i)) for i in share], shares)
        faults = {i: why for share in found for i, why in share if why}
    if faults and (not skip or len(faults) == len(rows)):
        some = "; ".join(f"{encoded.name(i)} ({why})" for i, why in [*faults.items()][:5])
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise IsslError(
            f"{what}: {len(faults)} of {len(rows)} images cannot be decoded: {some}{more}; "
            "repair or remove them, or add --skip-broken (skip_broken=True)"
        )
    good = np.array([i for i in rows if i not in faults], dtype=np.int64)
    return good, [(encoded.name(i), why) for i, why in faults.items()]


def _fault(encoded: Encoded, i: int) -> str:
    try:
        with encoded.open(i) as file, Image.open(cast(BinaryIO, file)) as image:
            if why := unknown_range(image):
                return why
            mark = CLOSING.get(image.format or "")
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL))
            if mark is None or mark in file.read():
                return ""
        with encoded.open(i) as file:
            Image.open(io.BytesIO(read_all(file, encoded.name(i)))).load()
    except IsslError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 (whatever a decoder raises is told)
        return in_words(error)
    return ""
