"""From encoded images to pixels: every format and mode that Pillow reads, upright, in 8 bits.

`Encoded` is a set of encoded images, the files of a folder or the rows of a table.
"""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO, cast

import numpy as np
import pandas as pd
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from issl.data.images import Images, LazyPixels, sample_positions
from issl.errors import IsslError

TAIL = 4096  # bytes at a file's end in which its closing mark must be
CLOSING = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}


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
