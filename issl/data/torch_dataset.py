"""Any map-style torch Dataset as `Images`, with its own files and transforms, decoded when it is
needed; and labels of any kind as numbers with names (`class_labels`)."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset

from issl.data.images import Images, LazyPixels, decode
from issl.errors import IsslError

LABELS = ("label", "labels", "target")  # their keys in dicts
LISTED = ("targets", "labels", "_labels")  # attributes of torchvision's data sets that list them
CLASSES = (int, bool, str)


def from_dataset(
    dataset: Any,
    name: str = "dataset",
    size: int | None = None,
    index: Sequence[int] | None = None,
    workers: int | None = None,
) -> Images:
    """A torch Dataset as a set of images that is never held in memory as a whole.

    Args:
        dataset: len and [i] → an image, a tuple of an image and its label, or a dict with `image`
            or `img` and optionally `label`. An image is a PIL image of any mode (turned upright by
            its EXIF data), a uint8 tensor (3, h, w), or a float tensor in [0, 1], rounded to 1/255
            as in memory. Several threads call it at once, so a transform must not be random. Labels
            are whole numbers, strings or booleans, also of numpy and torch. If neither `targets`
            nor `labels` of the dataset lists them, its items are read once for them.
        name: For titles and records; change it when the images change.
        size: Side in px: PIL images are cropped to their centred square and resized. Needed only
            for them.
        index: The index of each image, which keys its noise; default: its position.
        workers: The number of reading threads; default: one per core.

    Raises:
        IsslError: An item is none of these, or differs in size from the first.
    """
    numbered = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not numbered or len(dataset) == 0:
        raise IsslError(
            f"dataset {name!r}: need an object with a length of 1 or more and items by number"
        )
    source = Items(dataset, name, size)
    index = range(len(dataset)) if index is None else index
    attributes, labels = pd.DataFrame({"index": np.asarray(index, dtype=np.int64)}), None
    if (found := source.labels(workers)) is not None:
        attributes = attributes.join(found["label_name"])
        labels = torch.from_numpy(found["label"].to_numpy(dtype=np.int64, copy=True))
    return Images(LazyPixels(source, source.shape, None, workers), labels, attributes, name)


class Items:
    """A dataset as the source of `LazyPixels`."""

    def __init__(self, dataset: Any, name: str, size: int | None):
        self.dataset, self.name, self.size = dataset, name, size
        _, h, w = self._pixels(0).shape
        self.shape = h, w

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> UInt8[np.ndarray, "3 h w"]:
        found = self._pixels(i)
        if found.shape[1:] != self.shape:
            raise IsslError(
                f"item {i} of {self.name} is {found.shape[1:]} px, the first {self.shape}; resize "
                "them in the transform"
            )
        return found

    def identity(self) -> str:
        return f"{self.name} {len(self)}"

    def _item(self, i: int) -> Any:
        try:
            return self.dataset[i]
        except Exception as error:
            raise IsslError(
                f"item {i} of {self.name} cannot be read ({type(error).__name__}: {error}); leave "
                "it out"
            ) from error

    def _pixels(self, i: int) -> UInt8[np.ndarray, "3 h w"]:
        image, what = self._item(i), f"item {i} of {self.name}"
        if isinstance(image, dict):
            image = image.get("image", image.get("img"))
        elif isinstance(image, tuple | list) and image:
            image = image[0]
        if isinstance(image, Image.Image):
            if self.size is None:
                raise IsslError(f"{what} is a PIL image; give size=, the side of the squares in px")
            return decode(image, self.size, what)
        if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3:
            shape = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise IsslError(
                f"{what} gives {shape}; need a PIL image or a tensor (3, h, w), first in a tuple "
                "or as `image`"
            )
        if image.dtype == torch.uint8:
            return image.numpy()
        if not image.is_floating_point() or not bool(((image >= 0) & (image <= 1)).all()):
            values = image.double()  # torch has no minimum for some dtypes
            raise IsslError(
                f"{what} is {image.dtype} from {float(values.min()):g} to {float(values.max()):g}; "
                "need uint8, or floats in [0, 1] (normalisation is part of the encoder)"
            )
        return (255 * image).round().byte().numpy()

    def _label(self, i: int) -> Any:
        """The label of an item; None if it has none."""
        item = self._item(i)
        if isinstance(item, Mapping):
            return next((plain(item[key]) for key in LABELS if key in item), None)
        return plain(item[1]) if isinstance(item, tuple | list) and len(item) > 1 else None

    def labels(self, workers: int | None) -> pd.DataFrame | None:
        """`label` and `label_name` of every item; None where not every item has a class."""
        n, what = len(self), f"dataset {self.name!r}: its labels"
        asked = {i: self._label(i) for i in (0, n // 2, n - 1)}
        if type(asked[0]) not in CLASSES:
            return None
        values, names = _listed(self.dataset)
        # a transform of the targets may give other labels than the list
        if len(values) != n or any(
            type(values[i]) is not type(label) or values[i] != label for i, label in asked.items()
        ):
            names = names if values else ()
            with ThreadPoolExecutor(workers) as pool:
                values = list(pool.map(self._label, range(n)))
        if any(isinstance(value, float) for value in values):
            return None  # numbers on a scale are not classes
        found = class_labels(values, what, names)
        without = int((found["label"].isna() | (found["label"] < 0).fillna(False)).sum())
        if without:  # torchvision gives images without a class such numbers
            said = f"{what} are not used, for {without} of {n} are missing or below 0"
            print(said, file=sys.stderr, flush=True)
            return None
        return found


def _listed(dataset: Any) -> tuple[list[Any], Sequence[str]]:
    """The labels that a dataset lists without reading its images (empty if it lists none), and its
    class names. Works for torchvision's and Hugging Face's sets, and for a `Subset` of one."""
    if isinstance(dataset, Subset):
        values, names = _listed(dataset.dataset)
        return [values[i] for i in dataset.indices] if values else [], names
    columns = getattr(dataset, "column_names", None) or ()
    column = next((key for key in LABELS if key in columns), None)
    if column is not None:
        about = (getattr(dataset, "features", None) or {}).get(column)
        return [plain(value) for value in dataset[column]], getattr(about, "names", None) or ()
    lists = (getattr(dataset, name, None) for name in LISTED)
    kinds = (list, tuple, np.ndarray, Tensor)
    found = next((values for values in lists if isinstance(values, kinds)), ())
    classes = getattr(dataset, "classes", None)
    names = classes if isinstance(classes, list | tuple) else ()
    called = [name if isinstance(name, str) else ", ".join(map(str, name)) for name in names]
    return [plain(value) for value in found], called


def class_labels(values: Iterable[Any], what: str, names: Sequence[str] = ()) -> pd.DataFrame:
    """One row per label: `label`, a whole number, and `label_name`; both missing if the label is.

    Args:
        values: Whole numbers, strings (numbered in sorted order) or booleans, of Python, numpy or
            torch.
        what: What they are, for messages.
        names: The names of the classes from 0; a class without one is named by its number.
    """
    known = [plain(value) for value in values]
    one_of = {type(value): value for value in known if value is not None}
    if not one_of.keys() <= {int, bool, str} or len(one_of) > 1:
        some = " and ".join(f"{value!r:.40}" for value in one_of.values())
        raise IsslError(f"{what} holds {some}; need whole numbers, or texts")
    texts = sorted(set(known) - {None}) if str in one_of else []
    number = {text: k for k, text in enumerate(texts)}
    numbers = [value if value is None else number.get(value, value) for value in known]
    if any(k is not None and not -(2**63) <= k < 2**63 for k in numbers):
        raise IsslError(f"{what} holds numbers beyond 64 bits; number the classes from 0")
    label = pd.Series(numbers, dtype="Int64")
    called = [_name(value, names) for value in known]
    return pd.DataFrame(
        {"label": label if label.isna().any() else label.astype(np.int64), "label_name": called}
    )


def plain(value: Any) -> Any:
    """A label as Python's int, bool or str; None where it is missing; anything else as it is."""
    if isinstance(value, Tensor | np.ndarray | np.generic) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _name(value: Any, names: Sequence[str]) -> str | None:
    if type(value) is int and 0 <= value < len(names):
        return names[value]
    return None if value is None else str(value)
