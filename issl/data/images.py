"""A set of images with what is known about each: the input of every part of the library.

`issl.load` (in `issl.data.datasets`) makes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from issl.data.lazy_pixels import LazyPixels
from issl.errors import IsslError

# columns that are ours in tables of scores and beside them: what a set's own table calls so is
# renamed as it is read
OURS = (
    "index influence stability_loss loss grad_norm standard_error position path duplicate_of "
    "duplicate_kind atypical"
).split()


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
        broken: Name and reason of the images that were left out, which cannot be decoded.
    """

    pixels: UInt8[Tensor, "n 3 h w"] | LazyPixels
    labels: Int64[Tensor, " n"] | None
    attributes: pd.DataFrame
    name: str
    masks: UInt8[Tensor, "n h w"] | None = None
    broken: Sequence[tuple[str, str]] = ()

    def __post_init__(self) -> None:
        n = len(self.pixels)
        shape, dtype = tuple(self.pixels.shape), self.pixels.dtype
        if dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3:
            raise IsslError(
                f"images {self.name!r}: pixels are {dtype} {shape}; need uint8 (n, 3, H, W)"
            )
        if "index" not in self.attributes.columns:
            raise IsslError(f"images {self.name!r}: attributes need a column `index`")
        sizes = {"attributes": len(self.attributes), "pixels": n}
        sizes |= {} if self.labels is None else {"labels": len(self.labels)}
        sizes |= {} if self.masks is None else {"masks": len(self.masks)}
        if len(set(sizes.values())) != 1:
            raise IsslError(f"images {self.name!r}: lengths differ: {sizes}")
        twice = self.attributes["index"][self.attributes["index"].duplicated()]
        if len(twice):
            raise IsslError(
                f"images {self.name!r}: index {twice.iloc[0]} occurs twice; each image needs its "
                "own"
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
        """These attributes of the images; IsslError with those that exist, if one is missing."""
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
        found = idx.numpy() if isinstance(idx, Tensor) else np.asarray(idx)
        if found.ndim != 1 or (len(found) and found.dtype.kind not in "biu"):
            raise IsslError(f"subset of {self.name!r}: {idx!r}; give positions or a mask")
        if found.dtype == bool and len(found) != len(self):
            raise IsslError(
                f"subset of {self.name!r}: mask of length {len(found)} for {len(self)} images"
            )
        found = np.flatnonzero(found) if found.dtype == bool else found.astype(np.int64)
        beyond = found[(found < -len(self)) | (found >= len(self))]
        if len(beyond):
            raise IsslError(f"subset of {self.name!r}: position {beyond[0]} in {len(self)} images")
        rows, lazy = torch.from_numpy(found), self.pixels
        return Images(
            pixels=lazy.subset(rows) if isinstance(lazy, LazyPixels) else lazy[rows],
            labels=None if self.labels is None else self.labels[rows],
            attributes=self.attributes.iloc[found].reset_index(drop=True),
            name=self.name,
            masks=None if self.masks is None else self.masks[rows],
        )


def own_names(attributes: pd.DataFrame, ours: Iterable[str]) -> pd.DataFrame:
    """The attributes with `own_` before the names that are among `ours`, which stand beside
    them."""
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
    if not 0 < n <= total:
        raise IsslError(f"n={n}: data set {name!r} has {total} images here; ask for 1 to {total}")
    return np.sort(np.random.default_rng(seed).choice(total, n, replace=False))
