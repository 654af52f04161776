"""The published data sets, CIFAR and FairFace: where they are under the data root, how they are
read and downloaded.

They are read in the Hugging Face parquet layout (images as encoded bytes) or, for CIFAR, in
torchvision's layout, whose checksums torchvision itself verifies. A missing file is an error that
says where it belongs and how to get it. Which images a set holds is known by their content
(`identity`), whatever the layout.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from issl.data import superclasses
from issl.data.identity import (
    SetIdentity,
    as_records,
    canonical_order,
    differences,
    digest,
    remembered,
)
from issl.data.images import Images, decode
from issl.errors import IsslError

T = TypeVar("T")
Choose = Callable[
    [int], np.ndarray
]  # from the number of images in the set to the positions of those wanted

ENVIRONMENT = "ISSL_DATA"


@dataclass(frozen=True)
class Source:
    """Where a set is under the data root, and what its columns mean."""

    folder: str  # of the parquet files, under the root
    image: str  # column of encoded images
    label: str  # column of class numbers
    repository: str  # on the Hugging Face hub
    size: int = 32  # side of the images in px
    # of each split what `identity` gives for the images on which this project's results rest
    known: Mapping[str, SetIdentity] = field(default_factory=dict)
    splits: Mapping[str, str] = field(
        default_factory=lambda: {"train": "train", "test": "test"}
    )  # → prefix of files
    lossy: bool = (
        False  # photos whose decoded pixels may depend on the decoder: known by their files' bytes
    )
    unordered: bool = (
        False  # copies have their rows in different orders; here they stand in that of their hashes
    )
    torchvision: tuple[str, str] | None = None  # its class there, and the folder of its files
    superclasses: Sequence[str] | None = None  # of each class, by its number
    # names of the codes in a column, for files that do not carry them in their own metadata (the
    # published ones do)
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)


FACES = (
    "a derived copy of FairFace: its first 40,000 training and 5,000 validation photos, resized to 64 × 64 px, as JPEG "
    "of quality 88, then as WebP of quality 79; nobody else has these bytes"
)


def _known(train: str, test: str, name: str, about: str = "") -> Mapping[str, SetIdentity]:
    return {"train": SetIdentity(train, name, about), "test": SetIdentity(test, name, about)}


SOURCES = {
    "cifar10": Source(
        "cifar10/plain_text",
        "img",
        "label",
        "uoft-cs/cifar10",
        known=_known("a0181da372c0d63a", "8e2eb146ae340b09", "cifar10"),
        torchvision=("CIFAR10", "cifar-10-batches-py"),
        names={
            "label": (
                "airplane",
                "automobile",
                "bird",
                "cat",
                "deer",
                "dog",
                "frog",
                "horse",
                "ship",
                "truck",
            )
        },
    ),
    "cifar100": Source(
        "cifar100/cifar100",
        "img",
        "fine_label",
        "uoft-cs/cifar100",
        unordered=True,
        known=_known("43de8f4eb77d5528", "9ba650f9fc92e03a", "cifar100"),
        torchvision=("CIFAR100", "cifar-100-python"),
        superclasses=superclasses.OF_CLASS,
        names={"fine_label": superclasses.CLASSES},
    ),
    "fairface": Source(
        "fairface/0.25",
        "image",
        "race",
        "HuggingFaceM4/FairFace",
        64,
        _known("cca3925859a15ea3", "02b960ef722af267", "fairface-64px", FACES),
        {"train": "train", "test": "validation"},
        lossy=True,
        names={
            "age": (
                "0-2",
                "3-9",
                "10-19",
                "20-29",
                "30-39",
                "40-49",
                "50-59",
                "60-69",
                "more than 70",
            ),
            "gender": ("Male", "Female"),
            "race": (
                "East Asian",
                "Indian",
                "Black",
                "White",
                "Middle Eastern",
                "Latino_Hispanic",
                "Southeast Asian",
            ),
        },
    ),
}


def data_root(root: str | Path | None = None) -> Path | None:
    """The folder of the data sets: the argument, else $ISSL_DATA, else None."""
    value = root or os.environ.get(ENVIRONMENT)
    return Path(value).expanduser() if value else None


def read(
    name: str, split: str, root: str | Path | None, choose: Choose, size: int | None = None
) -> Images:
    """The chosen images of a set; attributes: index, label_name, the set's own columns, and
    CIFAR-100's superclass and row (in the files here; its index is that in the order which any copy
    gives)."""
    found, source = _locate(name, split, root), SOURCES[name]
    which, whole = identity(name, split, root), _open(name, split, found)
    rows = choose(len(whole))
    there = rows if which.order is None else np.array(which.order)[rows]
    images = _images(name, whole, there, source.size if size is None else size)
    images.attributes["index"] = rows
    if which.order is not None:
        images.attributes["row"] = there
    if source.superclasses is not None:
        images.attributes["superclass"] = np.array(source.superclasses)[
            images.require_labels().numpy()
        ]
    return images


def identity(name: str, split: str, root: str | Path | None) -> SetIdentity:
    """Which images are under the data root or, where none are, on which ones this project's results
    rest.

    Raises IsslError for an unknown name or split, and for files that are damaged.
    """
    base = data_root(root)
    _check(name, split)
    found = None if base is None else _found(name, split, base)
    if found is None:
        return SOURCES[name].known[split]
    return remembered(_files(name, found), lambda: _identify(name, split, found))


def _identify(name: str, split: str, found: list[Path] | Path) -> SetIdentity:
    source, known, whole = SOURCES[name], SOURCES[name].known[split], _open(name, split, found)
    if source.lossy:
        content = [digest(data.as_py()).encode() for data in _encoded(name, whole)]
        labels = (
            whole.select(sorted(set(whole.column_names) - {source.image}))
            .to_pandas()
            .to_csv(index=False)
        )
        here = digest(b"".join([*content, labels.encode()]))
        other = SetIdentity(here, name, f"not the photos that our results rest on ({known.about})")
        return known if here == known.digest else other
    images, resized = _images(name, whole, np.arange(len(whole)), source.size), 0
    if isinstance(whole, pa.Table):
        sizes = [Image.open(io.BytesIO(data.as_py())).size for data in _encoded(name, whole)]
        resized = len(sizes) - sizes.count((source.size, source.size))
    records = as_records(images.require_labels().numpy().astype(np.uint8), images.tensor().numpy())
    order = canonical_order(records) if source.unordered else np.arange(len(records))
    records, rows = records[order], tuple(order.tolist()) if source.unordered else None
    here = digest(records.tobytes())
    if here == known.digest and not resized:
        return replace(known, order=rows)
    what, differs = differences(name, split, records, resized)
    return SetIdentity(here, f"{name}, not as published: {what}", differs, rows)


def _files(name: str, found: list[Path] | Path) -> list[Path]:
    """Those in which the set was found."""
    if not isinstance(found, Path):
        return found
    _, folder = _torchvision_names(name)
    return sorted((found / folder).iterdir())


def count(name: str, split: str, root: str | Path | None) -> int:
    """How many images the set has, without reading them."""
    found = _locate(name, split, root)
    if isinstance(found, Path):
        return (
            50_000 if split == "train" else 10_000
        )  # torchvision's layout is the whole set or nothing
    return sum(_opened(path, pq.read_metadata).num_rows for path in found)


def download(name: str, root: str | Path | None = None) -> Path:
    """Download a data set from its public home into the data root; returns its folder."""
    base = data_root(root)
    if base is None:
        raise IsslError(
            f"download of {name!r}: say where to, with --data-root DIR or {ENVIRONMENT}=DIR"
        )
    if name not in SOURCES:
        raise IsslError(f"download of {name!r}: only {', '.join(SOURCES)} can be downloaded")
    source = SOURCES[name]
    try:
        if source.torchvision is not None:
            for train in (True, False):
                _torchvision_set(name, base, train=train, download=True)
            return base / source.torchvision[1]
        import huggingface_hub  # slow to import, and needed only here

        huggingface_hub.snapshot_download(
            source.repository,
            repo_type="dataset",
            allow_patterns="0.25/*.parquet",
            local_dir=base / Path(source.folder).parts[0],
        )
    except (OSError, RuntimeError) as error:
        raise IsslError(
            f"download of {name!r} failed ({error}). {_how_to_get(name, base)}"
        ) from error
    return base / source.folder


def _locate(name: str, split: str, root: str | Path | None) -> list[Path] | Path:
    """The parquet files of a set or, where there are none, the folder in which torchvision finds
    it."""
    _check(name, split)
    base = data_root(root)
    if base is None:
        raise IsslError(
            f"data set {name!r} is read from disk: name its folder with --data-root DIR (root=…) or {ENVIRONMENT}=DIR. "
            + _how_to_get(name, Path("DIR"))
        )
    if not base.is_dir():
        raise IsslError(
            f"data root {str(base)!r} is not a folder; check --data-root or {ENVIRONMENT}"
        )
    if (found := _found(name, split, base)) is not None:
        return found
    raise IsslError(
        f"data set {name!r} ({split}) is not under {str(base)!r}. {_how_to_get(name, base)}"
    )


def _check(name: str, split: str) -> None:
    if name not in SOURCES:
        raise IsslError(
            f"data set {name!r}: known are scenes, {', '.join(SOURCES)}, cifair10, and folder:PATH (also tar:, "
            "parquet:, arrow:)"
        )
    if split not in SOURCES[name].splits:
        raise IsslError(f"split {split!r}: {name} has {' and '.join(SOURCES[name].splits)}")


def layout(name: str, split: str, base: Path) -> str | None:
    """In which layout this folder holds the set, in words; None where it does not hold it. No file
    is opened."""
    found = _found(name, split, base)
    if found is None:
        return None
    return "torchvision's layout" if isinstance(found, Path) else "Hugging Face's parquet files"


def _found(name: str, split: str, base: Path) -> list[Path] | Path | None:
    """As `_locate`; None where this folder holds neither."""
    source = SOURCES[name]
    # the second: the folder is itself a snapshot of the set's repository, as the hub's cache keeps
    # it
    for folder in (base / source.folder, base / Path(source.folder).name):
        if found := sorted(folder.glob(f"{source.splits[split]}-*.parquet")):
            return found
    for place in (base, base / name):
        if source.torchvision is not None and (place / source.torchvision[1]).is_dir():
            return place
    return None


def _how_to_get(name: str, base: Path) -> str:
    source = SOURCES[name]
    places = [f"{base / source.folder}/{'|'.join(source.splits.values())}-*.parquet"]
    if source.torchvision is not None:
        places.append(f"{base / source.torchvision[1]}/ (torchvision's layout)")
    return (
        f"Expected: {' or '.join(places)}. Get it with `issl download {name} --data-root {base}`, or copy the "
        f"parquet files of the Hugging Face data set {source.repository} there."
    )


def _open(name: str, split: str, found: list[Path] | Path) -> Any:
    """The whole set, not decoded: a table, or torchvision's set."""
    if isinstance(found, Path):
        try:
            return _torchvision_set(name, found, train=split == "train", download=False)
        except (RuntimeError, OSError, EOFError) as error:
            raise IsslError(
                f"data set {name!r} under {found}: {error} (a checksum differs or a file is missing); download it again"
            ) from error
    source, table = (
        SOURCES[name],
        pa.concat_tables([_opened(path, pq.read_table) for path in found]),
    )
    missing = {source.image, source.label} - set(table.column_names)
    if missing:
        raise IsslError(f"{found[0]}: no column {sorted(missing)}; {name} has {table.column_names}")
    return table


def _encoded(name: str, table: pa.Table) -> pa.Array:
    return table.column(SOURCES[name].image).combine_chunks().field("bytes")


def _images(name: str, whole: Any, rows: np.ndarray, size: int) -> Images:
    """These rows of what `_open` gave; `index` is the row."""
    attributes, source = pd.DataFrame({"index": rows}), SOURCES[name]
    if isinstance(whole, pa.Table):
        table = whole.take(rows)
        pixels = np.empty((len(rows), 3, size, size), np.uint8)
        for k, data in enumerate(_encoded(name, table)):
            pixels[k] = decode(data.as_py(), size, f"image {rows[k]} of {name}")
        for column in (c for c in table.column_names if c != source.image):
            attributes[column] = _named(source, table, column)
        labels = table.column(source.label).to_numpy()
        attributes["label_name"] = attributes[source.label]
    else:
        pixels, labels = (
            np.ascontiguousarray(whole.data[rows].transpose(0, 3, 1, 2)),
            np.asarray(whole.targets)[rows],
        )
        attributes["label_name"] = np.array(whole.classes)[labels]
    return Images(
        torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64)), attributes, name
    )


def _opened(path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise IsslError(
            f"{path} is not a readable parquet file ({error}); copy or download it again"
        ) from error


def _named(source: Source, table: pa.Table, column: str) -> np.ndarray:
    """A column's values, class codes replaced by their names (from the file's metadata, else the
    source's)."""
    values = table.column(column).to_numpy()
    metadata = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = metadata.get("info", {}).get("features", {}).get(column, {})
    names = feature.get("names") or source.names.get(column)
    return values if names is None else np.array(names)[values.astype(np.int64)]


def _torchvision_set(name: str, root: Path, train: bool, download: bool) -> Any:
    import torchvision  # slower to import than torch, and few runs read this layout

    kind, _ = _torchvision_names(name)
    return getattr(torchvision.datasets, kind)(root, train=train, download=download)


def _torchvision_names(name: str) -> tuple[str, str]:
    names = SOURCES[name].torchvision
    assert names is not None  # the caller found the set in that layout
    return names
