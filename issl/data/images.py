"""A set of images with what is known about each: the input of every part of the library.

`issl.load` (in `issl.data.datasets`) makes them.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int64, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from issl.data.lazy_pixels import LazyPixels
from issl.errors import IsslError

# columns that are ours in tables of scores and beside them: what a set's own table calls so is
# renamed as it is read
OURS = (
    "index",
    "influence",
    "stability_loss",
    "loss",
    "grad_norm",
    "standard_error",
    "position",
    "path",
    "duplicate_of",
    "duplicate_kind",
    "atypical",
)


@dataclass(frozen=True)
class Images:
    """A set of images, all of one size.

    pixels      uint8 (n, 3, H, W), 0…255: a tensor, or `LazyPixels`, which decodes what is asked
                for
    labels      int64 (n,), or None where the set has none
    attributes  one row per image; always has `index`, the image's identity: it survives `subset`,
                and the image's random numbers depend on it. With labels there is `label_name`
    name        the data set's name, for titles and records
    masks       uint8 (n, H, W), 255 = foreground, where it is known (`scenes`), else None
    broken      the images that were left out because they cannot be decoded: name and reason of
                each
    """

    pixels: UInt8[Tensor, "n 3 h w"] | LazyPixels
    labels: Int64[Tensor, " n"] | None
    attributes: pd.DataFrame
    name: str
    masks: UInt8[Tensor, "n h w"] | None = None
    broken: Sequence[tuple[str, str]] = ()

    def __post_init__(self) -> None:
        n = len(self.pixels)
        if self.pixels.dtype != torch.uint8 or self.pixels.ndim != 4 or self.pixels.shape[1] != 3:
            raise IsslError(
                f"images {self.name!r}: pixels are {self.pixels.dtype} {tuple(self.pixels.shape)}, "
                "need uint8 (n, 3, H, W)"
            )
        if "index" not in self.attributes.columns:
            raise IsslError(f"images {self.name!r}: attributes need a column `index`")
        sizes = {"attributes": len(self.attributes), "pixels": n}
        sizes |= {} if self.labels is None else {"labels": len(self.labels)}
        sizes |= {} if self.masks is None else {"masks": len(self.masks)}
        if len(set(sizes.values())) != 1:
            raise IsslError(f"images {self.name!r}: lengths differ: {sizes}")
        if self.attributes["index"].duplicated().any():
            twice = self.attributes["index"][self.attributes["index"].duplicated()].iloc[0]
            raise IsslError(
                f"images {self.name!r}: index {twice} occurs twice; each image needs its own"
            )

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
        """These attributes of the images; if one is missing, an IsslError that names the existing
        ones."""
        missing = [a for a in attributes if a not in self.attributes]
        if missing:
            known = ", ".join(self.attributes.columns)
            raise IsslError(
                f"{self.name} has no attribute {missing[0]!r}; choose among {known}, or another data set"
            )
        return self.attributes[list(attributes)]

    def require_labels(self) -> Int64[Tensor, " n"]:
        """The labels; IsslError if the set has none."""
        if self.labels is None:
            raise IsslError(
                f"images {self.name!r} have no labels; use a labelled set (an image folder gets labels "
                "from one sub-folder per class)"
            )
        return self.labels

    def subset(self, idx: Sequence[int] | np.ndarray | Tensor) -> Images:
        """The images at positions `idx` (or where a boolean mask is true), each keeping its
        `index`."""
        rows = idx if isinstance(idx, Tensor) else torch.from_numpy(_positions(idx, self.name))
        if rows.dtype == torch.bool:
            if len(rows) != len(self):
                raise IsslError(
                    f"subset of {self.name!r}: mask of length {len(rows)} for {len(self)} images"
                )
            rows = rows.nonzero().squeeze(1)
        rows = rows.to(torch.int64)
        if len(rows) and (int(rows.min()) < -len(self) or int(rows.max()) >= len(self)):
            raise IsslError(
                f"subset of {self.name!r}: position {int(rows.max())} in a set of {len(self)}"
            )
        return Images(
            pixels=self.pixels.subset(rows)
            if isinstance(self.pixels, LazyPixels)
            else self.pixels[rows],
            labels=None if self.labels is None else self.labels[rows],
            attributes=self.attributes.iloc[rows.numpy()].reset_index(drop=True),
            name=self.name,
            masks=None if self.masks is None else self.masks[rows],
        )


def own_names(attributes: pd.DataFrame, ours: Iterable[str]) -> pd.DataFrame:
    """The attributes with `own_` before the names that are among `ours`, so that ours keep their
    names beside them."""
    names: dict[str, str] = {}
    for column in set(ours) & set(attributes.columns):
        names[column] = f"own_{column}"
        while names[column] in attributes:
            names[column] = f"own_{names[column]}"
    return attributes.rename(columns=names)


def _positions(idx: Sequence[int] | np.ndarray, name: str) -> np.ndarray:
    found = np.array(idx)
    if found.ndim != 1 or (len(found) and found.dtype.kind not in "biu"):
        raise IsslError(f"subset of {name!r}: {idx!r}; give positions (whole numbers) or a mask")
    return found if len(found) else found.astype(np.int64)


def sample_positions(name: str, total: int, n: int | None, seed: int) -> np.ndarray:
    """The positions that a request for `n` of `total` images gets: all, or a random subset in the
    original order."""
    if n is None:
        return np.arange(total)
    if not 0 < n <= total:
        raise IsslError(f"n={n}: data set {name!r} has {total} images here; ask for 1 to {total}")
    return np.sort(np.random.default_rng(seed).choice(total, n, replace=False))


def decode(data: bytes, size: int, what: str) -> UInt8[np.ndarray, "3 s s"]:
    """The centred square of an encoded image, upright, resized to `size` px if necessary. Raises
    IsslError, which says `what` it is, if the bytes are not an image."""
    try:
        opened = Image.open(io.BytesIO(data))
    except Exception as error:  # what a decoder raises on a stranger's bytes is not ours to list
        raise _undecodable(what, error) from error
    with opened:
        return square(as_it_looks(opened, what, ours=True), size)


def as_it_looks(image: Image.Image, what: str, ours: bool = False) -> Image.Image:
    """An image of any mode in RGB, upright as its camera was held, of 8 bits; nobody else's image
    is changed (`ours` may be). Raises IsslError, which says `what` it is, if it cannot be decoded
    or its white is not known."""
    try:
        why = unknown_range(image)  # before its format is forgotten
        if ours:
            ImageOps.exif_transpose(image, in_place=True)
        else:
            image = ImageOps.exif_transpose(image)
        rgb = eight_bits(image).convert("RGB")
    except Exception as error:  # as above: an opened file need not be decoded yet
        raise _undecodable(what, error) from error
    if why:
        raise IsslError(f"{what} has {why}")
    return rgb


def _undecodable(what: str, error: Exception) -> IsslError:
    return IsslError(f"{what} cannot be decoded ({in_words(error)}); repair or remove it")


def in_words(error: Exception) -> str:
    """Why an image cannot be decoded."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or damaged at its start"
    return str(error) or type(error).__name__


def unknown_range(image: Image.Image) -> str:
    """Why it cannot be known what is white in this image; "" where it can."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        return f"pixels of mode {image.mode}, whose range is not known: save it with 8 or 16 bits"
    return ""


def eight_bits(image: Image.Image) -> Image.Image:
    """A greyscale image of 16 bits, scaled to 8 (Pillow cuts it off at 255, which is white); others
    as they are."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


def square(image: Image.Image, size: int) -> UInt8[np.ndarray, "3 s s"]:
    """The centred square of an RGB image, resized to `size` px if necessary."""
    side = min(image.size)
    if image.size != (size, size):
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.resize(
            (size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
        )
    return np.asarray(image).transpose(2, 0, 1)
