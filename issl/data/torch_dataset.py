"""Any map-style torch Dataset as `Images`, decoded when it is needed: one's own files, transforms and all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from issl.data.images import Images, square
from issl.data.lazy_pixels import LazyPixels
from issl.errors import IsslError


@runtime_checkable
class MapStyle(Protocol):
    """What torch calls a map-style Dataset: a length and items by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Any: ...


def from_dataset(
    dataset: MapStyle,
    name: str = "dataset",
    size: int | None = None,
    index: Sequence[int] | None = None,
    identity: str = "",
    workers: int | None = None,
) -> Images:
    """A torch Dataset as a set of images that is never held in memory as a whole.

    dataset   len and [i] → an image, or a tuple that begins with one, or a dict with `image` or `img`: a PIL image, a
              uint8 tensor (3, h, w), or a float tensor in [0, 1] (rounded to 1/255, as in memory). Several threads call
              it at once, so a transform must not be random
    name      for titles and records
    size      side in px: PIL images are cropped to their centred square and resized; needed only for them
    index     of each image, by which its noise is drawn; default: its place
    identity  changes when the images change; kept gradients (`store`) are checked by it
    workers   threads that read; default: the cores

    Raises IsslError for an item that is none of these, or that differs in size from the first.
    """
    if not isinstance(dataset, MapStyle) or len(dataset) == 0:
        raise IsslError(f"dataset {name!r}: need an object with a length of 1 or more and items by number")
    first = _pixels(dataset[0], size, f"item 0 of {name}")
    places = np.arange(len(dataset)) if index is None else np.asarray(index, dtype=np.int64)
    source = DatasetItems(dataset, name, size, (first.shape[1], first.shape[2]), identity)
    return Images(LazyPixels(source, source.shape, None, workers), None, pd.DataFrame({"index": places}), name)


@dataclass(frozen=True)
class DatasetItems:
    """The source of `LazyPixels`."""

    dataset: MapStyle
    name: str
    size: int | None
    shape: tuple[int, int]
    version: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> UInt8[np.ndarray, "3 h w"]:
        what = f"item {i} of {self.name}"
        try:
            item = self.dataset[i]
        except Exception as error:
            raise IsslError(f"{what} cannot be read ({type(error).__name__}: {error}); leave it out") from error
        found = _pixels(item, self.size, what)
        if found.shape[1:] != self.shape:
            raise IsslError(f"{what} is {found.shape[1:]} px, the first {self.shape}; resize them in the transform")
        return found

    def identity(self) -> str:
        return f"{self.name} {len(self.dataset)} {self.version}"


def _pixels(item: Any, size: int | None, what: str) -> UInt8[np.ndarray, "3 h w"]:
    image = item
    if isinstance(image, dict):
        image = next((item[key] for key in ("image", "img") if key in item), None)
    if isinstance(image, tuple | list) and image:
        image = image[0]
    if isinstance(image, Image.Image):
        if size is None:
            raise IsslError(f"{what} is a PIL image; give size=, the side of the squares in px")
        return square(image.convert("RGB"), size)
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3:
        shape = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise IsslError(f"{what} gives {shape}; need a PIL image or a tensor (3, h, w), first in a tuple or as `image`")
    if image.dtype == torch.uint8:
        return image.numpy()
    if not image.is_floating_point() or not bool(((image >= 0) & (image <= 1)).all()):
        raise IsslError(
            f"{what} is {image.dtype} from {float(image.min()):g} to {float(image.max()):g}; need uint8, or floats in "
            "[0, 1] (normalisation is part of the encoder)"
        )
    return (255 * image).round().byte().numpy()
