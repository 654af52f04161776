"""Any map-style torch Dataset as `Images`, decoded when it is needed: one's own files, transforms
and all."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from issl.data.decoding import as_it_looks, square
from issl.data.images import Images
from issl.data.labels import class_labels, plain
from issl.data.lazy_pixels import LazyPixels
from issl.errors import IsslError

LABELS = ("label", "labels", "target")  # what dicts call them
LISTED = ("targets", "labels", "_labels")  # as torchvision's data sets do


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

    Args:
        dataset: len and [i] → an image, or a tuple of one and its label, or a dict with `image` or
            `img`, and at best `label`: a PIL image of any mode (turned upright by its EXIF data), a
            uint8 tensor (3, h, w), or a float tensor in [0, 1] (rounded to 1/255, as in memory).
            Several threads call it at once, so a transform must not be random. Labels are whole
            numbers, texts or truth values, also numpy's and torch's; where `targets` or `labels` of
            the dataset do not list them, its items are read once for them.
        name: For titles and records.
        size: Side in px: PIL images are cropped to their centred square and resized. Needed only
            for them.
        index: Of each image, by which its noise is drawn; default: its place.
        identity: Changes when the images change; kept gradients (`store`) are checked by it.
        workers: Threads that read; default: the cores.

    Raises:
        IsslError: An item is none of these, or differs in size from the first.
    """
    if not isinstance(dataset, MapStyle) or len(dataset) == 0:
        raise IsslError(
            f"dataset {name!r}: need an object with a length of 1 or more and items by number"
        )
    item = _item(dataset, 0, name)
    first = _pixels(item, size, f"item 0 of {name}")
    index = range(len(dataset)) if index is None else index
    attributes = pd.DataFrame({"index": np.asarray(index, dtype=np.int64)})
    source = DatasetItems(dataset, name, size, (first.shape[1], first.shape[2]), identity)
    found, labels = _labels(source, _label(item), workers), None
    if found is not None:
        attributes = attributes.join(found["label_name"])
        labels = torch.from_numpy(found["label"].to_numpy(dtype=np.int64, copy=True))
    return Images(LazyPixels(source, source.shape, None, workers), labels, attributes, name)


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
        found = _pixels(_item(self.dataset, i, self.name), self.size, what)
        if found.shape[1:] != self.shape:
            raise IsslError(
                f"{what} is {found.shape[1:]} px, the first {self.shape}; resize them in the "
                "transform"
            )
        return found

    def identity(self) -> str:
        return f"{self.name} {len(self.dataset)} {self.version}"


def _item(dataset: MapStyle, i: int, name: str) -> Any:
    try:
        return dataset[i]
    except Exception as error:
        raise IsslError(
            f"item {i} of {name} cannot be read ({type(error).__name__}: {error}); leave it out"
        ) from error


def _pixels(item: Any, size: int | None, what: str) -> UInt8[np.ndarray, "3 h w"]:
    image = item
    if isinstance(image, dict):
        image = next((item[key] for key in ("image", "img") if key in item), None)
    if isinstance(image, tuple | list) and image:
        image = image[0]
    if isinstance(image, Image.Image):
        if size is None:
            raise IsslError(f"{what} is a PIL image; give size=, the side of the squares in px")
        return square(as_it_looks(image, what), size)
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3:
        shape = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise IsslError(
            f"{what} gives {shape}; need a PIL image or a tensor (3, h, w), first in a tuple or as "
            "`image`"
        )
    if image.dtype == torch.uint8:
        return image.numpy()
    if not image.is_floating_point() or not bool(((image >= 0) & (image <= 1)).all()):
        values = image.double()  # torch knows no least value of some kinds of numbers
        raise IsslError(
            f"{what} is {image.dtype} from {float(values.min()):g} to {float(values.max()):g}; "
            "need "
            "uint8, or floats in [0, 1] (normalisation is part of the encoder)"
        )
    return (255 * image).round().byte().numpy()


def _labels(source: DatasetItems, first: Any, workers: int | None) -> pd.DataFrame | None:
    """`label` and `label_name` of every item, whose first label is given; None where not every item
    has a class."""
    if type(first) not in (int, bool, str):
        return None
    n, what = len(source), f"dataset {source.name!r}: its labels"

    def label(i: int) -> Any:
        return _label(_item(source.dataset, i, source.name))

    values, names = _listed(source.dataset)
    asked = (0, n // 2, n - 1)  # a transform of the targets may say something else than the list
    if values is None or len(values) != n or not all(_same(values[i], label(i)) for i in asked):
        names = names if values is None else ()
        with ThreadPoolExecutor(workers) as pool:
            values = list(pool.map(label, range(n)))
    if any(isinstance(value, float) for value in values):
        return None  # numbers on a scale are no classes
    found = class_labels(values, what, names)
    without = int((found["label"].isna() | (found["label"] < 0).fillna(False)).sum())
    if without:  # as torchvision numbers images without a class
        print(
            f"{what} are not used, for {without} of {n} are missing or below 0",
            file=sys.stderr,
            flush=True,
        )
        return None
    return found


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and type(a) in (int, bool, str) and a == b


def _label(item: Any) -> Any:
    """What an item says of its class; None if nothing."""
    if isinstance(item, Mapping):
        return next((plain(item[key]) for key in LABELS if key in item), None)
    return plain(item[1]) if isinstance(item, tuple | list) and len(item) > 1 else None


def _listed(dataset: Any) -> tuple[list[Any] | None, Sequence[str]]:
    """The labels that a dataset tells without reading its images, and the names of its classes.

    torchvision's and Hugging Face's sets tell them, and parts of one; else None.
    """
    if isinstance(dataset, Subset):
        values, names = _listed(dataset.dataset)
        return None if values is None else [values[i] for i in dataset.indices], names
    if isinstance(dataset, TensorDataset):
        return [plain(value) for value in dataset.tensors[1]], ()
    columns = getattr(dataset, "column_names", None) or ()
    column = next((key for key in LABELS if key in columns), None)
    if column is not None:
        about = (getattr(dataset, "features", None) or {}).get(column)
        return [plain(value) for value in dataset[column]], getattr(about, "names", None) or ()
    lists = (getattr(dataset, name, None) for name in LISTED)
    kinds = (list, tuple, np.ndarray, Tensor)
    found = next((values for values in lists if isinstance(values, kinds)), None)
    classes = getattr(dataset, "classes", None)
    names = classes if isinstance(classes, list | tuple) else ()
    called = [name if isinstance(name, str) else ", ".join(map(str, name)) for name in names]
    return None if found is None else [plain(value) for value in found], called
