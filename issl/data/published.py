"""The published data sets, CIFAR and FairFace: where they are under the data root, how they are read and downloaded.

They are read in the Hugging Face parquet layout (images as encoded bytes) or, for CIFAR, in torchvision's layout, whose
checksums torchvision itself verifies. A missing file is an error that says where it belongs and how to get it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from issl.data import superclasses
from issl.data.images import Images, decode
from issl.errors import IsslError

T = TypeVar("T")
Choose = Callable[[int], np.ndarray]  # from the number of images in the set to the positions of those wanted

ENVIRONMENT = "ISSL_DATA"


@dataclass(frozen=True)
class Source:
    """Where a set is under the data root, and what its columns mean."""

    folder: str  # of the parquet files, under the root
    image: str  # column of encoded images
    label: str  # column of class numbers
    repository: str  # on the Hugging Face hub
    size: int = 32  # side of the images in px
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})  # → prefix of files
    torchvision: tuple[str, str] | None = None  # its class there, and the folder of its files
    superclasses: Sequence[str] | None = None  # of each class, by its number
    # names of the codes in a column, for files that do not carry them in their own metadata (the published ones do)
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)


SOURCES = {
    "cifar10": Source(
        "cifar10/plain_text", "img", "label", "uoft-cs/cifar10", torchvision=("CIFAR10", "cifar-10-batches-py"),
        names={"label": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")},
    ),
    "cifar100": Source(
        "cifar100/cifar100", "img", "fine_label", "uoft-cs/cifar100", torchvision=("CIFAR100", "cifar-100-python"),
        superclasses=superclasses.OF_CLASS, names={"fine_label": superclasses.CLASSES},
    ),
    "fairface": Source(
        "fairface/0.25", "image", "race", "HuggingFaceM4/FairFace", 64, {"train": "train", "test": "validation"},
        names={
            "age": ("0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "more than 70"),
            "gender": ("Male", "Female"),
            "race": (
                "East Asian", "Indian", "Black", "White", "Middle Eastern", "Latino_Hispanic", "Southeast Asian",
            ),
        },
    ),
}  # fmt: skip


def data_root(root: str | Path | None = None) -> Path | None:
    """The folder of the data sets: the argument, else $ISSL_DATA, else None."""
    value = root or os.environ.get(ENVIRONMENT)
    return Path(value).expanduser() if value else None


def read(name: str, split: str, root: str | Path | None, choose: Choose, size: int | None = None) -> Images:
    """The chosen images of a set; attributes: index, label_name, the set's own columns, and CIFAR-100's superclass."""
    found, source = _locate(name, split, root), SOURCES[name]
    if isinstance(found, Path):
        images = _read_torchvision(name, split, found, choose)
    else:
        images = _read_parquet(name, found, choose, source.size if size is None else size)
    if source.superclasses is not None:
        images.attributes["superclass"] = np.array(source.superclasses)[images.require_labels().numpy()]
    return images


def files(name: str, split: str, root: str | Path | None) -> list[Path]:
    """The files that `read` would read."""
    found = _locate(name, split, root)
    if not isinstance(found, Path):
        return found
    _, folder = _torchvision_names(name)
    return sorted((found / folder).iterdir())


def count(name: str, split: str, root: str | Path | None) -> int:
    """How many images the set has, without reading them."""
    found = _locate(name, split, root)
    if isinstance(found, Path):
        return 50_000 if split == "train" else 10_000  # torchvision's layout is the whole set or nothing
    return sum(_opened(path, pq.read_metadata).num_rows for path in found)


def download(name: str, root: str | Path | None = None) -> Path:
    """Download a data set from its public home into the data root; returns its folder."""
    base = data_root(root)
    if base is None:
        raise IsslError(f"download of {name!r}: say where to, with --data-root DIR or {ENVIRONMENT}=DIR")
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
            source.repository, repo_type="dataset", allow_patterns="0.25/*.parquet",
            local_dir=base / Path(source.folder).parts[0],
        )  # fmt: skip
    except (OSError, RuntimeError) as error:
        raise IsslError(f"download of {name!r} failed ({error}). {_how_to_get(name, base)}") from error
    return base / source.folder


def _locate(name: str, split: str, root: str | Path | None) -> list[Path] | Path:
    """The parquet files of a set or, where there are none, the folder in which torchvision finds it."""
    if name not in SOURCES:
        raise IsslError(
            f"data set {name!r}: known are scenes, {', '.join(SOURCES)}, cifair10, and folder:PATH (also tar:, "
            "parquet:, arrow:)"
        )
    source, base = SOURCES[name], data_root(root)
    if split not in source.splits:
        raise IsslError(f"split {split!r}: {name} has {' and '.join(source.splits)}")
    if base is None:
        raise IsslError(
            f"data set {name!r} is read from disk: name its folder with --data-root DIR (root=…) or {ENVIRONMENT}=DIR. "
            + _how_to_get(name, Path("DIR"))
        )
    if not base.is_dir():
        raise IsslError(f"data root {str(base)!r} is not a folder; check --data-root or {ENVIRONMENT}")
    if (found := _found(name, split, base)) is not None:
        return found
    raise IsslError(f"data set {name!r} ({split}) is not under {str(base)!r}. {_how_to_get(name, base)}")


def layout(name: str, split: str, base: Path) -> str | None:
    """In which layout this folder holds the set, in words; None where it does not hold it. No file is opened."""
    found = _found(name, split, base)
    if found is None:
        return None
    return "torchvision's layout" if isinstance(found, Path) else "Hugging Face's parquet files"


def _found(name: str, split: str, base: Path) -> list[Path] | Path | None:
    """As `_locate`; None where this folder holds neither."""
    source = SOURCES[name]
    # the second: the folder is itself a snapshot of the set's repository, as the hub's cache keeps it
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


def _read_parquet(name: str, paths: Sequence[Path], choose: Choose, size: int) -> Images:
    source, table = SOURCES[name], pa.concat_tables([_opened(path, pq.read_table) for path in paths])
    missing = {source.image, source.label} - set(table.column_names)
    if missing:
        raise IsslError(f"{paths[0]}: no column {sorted(missing)}; {name} has {table.column_names}")
    rows = choose(len(table))
    table = table.take(rows)
    encoded = table.column(source.image).combine_chunks().field("bytes")
    pixels = np.empty((len(rows), 3, size, size), np.uint8)
    for k, data in enumerate(encoded):
        pixels[k] = decode(data.as_py(), size, f"image {rows[k]} of {name} ({paths[0].parent})")
    attributes = pd.DataFrame({"index": rows})
    for column in table.column_names:
        if column != source.image:
            attributes[column] = _named(source, table, column)
    attributes["label_name"] = attributes[source.label]
    labels = torch.from_numpy(table.column(source.label).to_numpy().astype(np.int64))
    return Images(torch.from_numpy(pixels), labels, attributes, name)


def _opened(path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise IsslError(f"{path} is not a readable parquet file ({error}); copy or download it again") from error


def _named(source: Source, table: pa.Table, column: str) -> np.ndarray:
    """A column's values, class codes replaced by their names (from the file's metadata, else the source's)."""
    values = table.column(column).to_numpy()
    metadata = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = metadata.get("info", {}).get("features", {}).get(column, {})
    names = feature.get("names") or source.names.get(column)
    return values if names is None else np.array(names)[values.astype(np.int64)]


def _read_torchvision(name: str, split: str, root: Path, choose: Choose) -> Images:
    try:
        data = _torchvision_set(name, root, train=split == "train", download=False)
    except (RuntimeError, OSError, EOFError) as error:
        raise IsslError(
            f"data set {name!r} under {root}: {error} (a checksum differs or a file is missing); download it again"
        ) from error
    rows = choose(len(data.data))
    labels = np.asarray(data.targets)[rows]
    return Images(
        pixels=torch.from_numpy(np.ascontiguousarray(data.data[rows].transpose(0, 3, 1, 2))),
        labels=torch.from_numpy(labels.astype(np.int64)),
        attributes=pd.DataFrame({"index": rows, "label_name": np.array(data.classes)[labels]}),
        name=name,
    )


def _torchvision_set(name: str, root: Path, train: bool, download: bool) -> Any:
    import torchvision  # slower to import than torch, and few runs read this layout

    kind, _ = _torchvision_names(name)
    return getattr(torchvision.datasets, kind)(root, train=train, download=download)


def _torchvision_names(name: str) -> tuple[str, str]:
    names = SOURCES[name].torchvision
    assert names is not None  # the caller found the set in that layout
    return names
