"""`hf:PATH_OR_NAME`, whatever Hugging Face's `datasets` reads (the extra `issl[hf]`).

PATH is a file or a folder: parquet, arrow, WebDataset's tar archives, an image folder with
metadata, or what `Dataset.save_to_disk` wrote. NAME is a set on the Hugging Face hub, which is
downloaded unless HF_DATASETS_OFFLINE=1 says otherwise. `datasets` prepares a copy as arrow files in
$XDG_CACHE_HOME/issl/datasets (~/.cache/issl/datasets), which are memory-mapped; images are decoded
when they are needed. No code of a set is run: `datasets` 4 and later knows none.

A set's identity is the hash of its encoded images and labels in their order, so it is the same in
every container. An image's index is its row.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from issl.data.decoding import Decoding, check, stamp
from issl.data.identity import DIGITS, SetIdentity, cache_folder, remembered
from issl.data.images import OURS, Images, own_names, sample_positions
from issl.data.labels import class_labels
from issl.data.lazy_pixels import LazyPixels
from issl.errors import IsslError

PREFIX = "hf:"
IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp")  # what columns of bytes are called
LABELS = ("label", "cls")  # the second: WebDataset's
PLAIN = ("int", "uint", "float", "bool", "string", "large_string")  # beginnings of types
INTERNAL = ("__url__", "__index_level_")  # columns that say nothing about an image
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}


@dataclass(frozen=True)
class Rows:
    """A Hugging Face set whose column of images is not decoded.

    rows    the set, a `datasets.Dataset`
    column  that of the images
    called  the set's name for messages
    linked  images may be files that the set names (of an image folder), not only bytes in it
    """

    rows: Any
    column: str
    called: str
    linked: bool

    def __len__(self) -> int:
        return len(self.rows)

    def open(self, i: int) -> io.BufferedIOBase:
        value = self.rows[i][self.column]
        data = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(data, bytes):
            return io.BytesIO(data)
        if self.linked and isinstance(value, dict) and value.get("path"):
            try:
                return Path(value["path"]).open("rb")
            except OSError as error:
                raise IsslError(f"{self.name(i)} cannot be read ({error}); restore it") from error
        raise IsslError(
            f"{self.name(i)} holds no encoded image but {data!r:.80}; write the set with its "
            "images embedded"
        )

    def name(self, i: int) -> str:
        return f"row {i} of {self.called}"

    def identity(self) -> str:
        return stamp(self.files)

    @cached_property
    def files(self) -> list[Path]:
        """The files in which the images are."""
        prepared = [Path(file["filename"]) for file in self.rows.cache_files]
        if not self.linked:
            return prepared
        images = (value and value.get("path") for value in self.rows[self.column])
        return prepared + [Path(path) for path in images if path and Path(path).is_file()]


def read(
    name: str,
    split: str,
    n: int | None,
    seed: int,
    size: int,
    skip_broken: bool,
    workers: int | None,
) -> Images:
    """Images of a set as squares of `size` px; the arguments are those of `issl.load`.

    Attributes: index, label_name, and all columns of numbers, texts and truth values. One that is
    called like a column of ours is `own_…`.
    """
    encoded = _open(name, split)
    pixels = Decoding(encoded, size)
    wanted = sample_positions(name, len(encoded), n, seed)
    good, broken = check(encoded, name, skip_broken, wanted)
    attributes = _attributes(name, encoded).iloc[good].reset_index(drop=True)
    labels = None
    if "label" in attributes and not attributes["label"].isna().any():
        if attributes["label"].min() < 0:
            raise IsslError(
                f"{name}: a label is {attributes['label'].min()}; drop the column, or number from 0"
            )
        labels = torch.from_numpy(attributes["label"].to_numpy(dtype=np.int64, copy=True))
    lazy = LazyPixels(pixels, (size, size), good, workers)
    return Images(lazy, labels, attributes, encoded.called, broken=broken)


def count(name: str, split: str) -> int:
    """How many images the set has."""
    return len(_open(name, split))


def identity(name: str, split: str) -> SetIdentity:
    """The hash of the encoded images and labels in their order; remembered by the files' times."""
    encoded = _open(name, split)

    def identify() -> SetIdentity:
        labels, whole = _attributes(name, encoded).get("label"), hashlib.sha256()
        for i in range(len(encoded)):
            with encoded.open(i) as file:
                whole.update(hashlib.sha256(file.read()).digest())
        if labels is not None:
            whole.update(repr(labels.tolist()).encode())
        return SetIdentity(whole.hexdigest()[:DIGITS], encoded.called)

    return remembered(encoded.files, identify)


def _open(name: str, split: str) -> Rows:
    try:
        import datasets  # slow to import, and an extra
    except ImportError as error:
        raise IsslError(
            f"{name} needs Hugging Face's datasets: pip install 'issl[hf]' (version 4 or later)"
        ) from error
    place = name.removeprefix(PREFIX)
    path, cache = Path(place).expanduser(), str(cache_folder("datasets"))
    if not place or (place.startswith(("/", ".", "~")) and not path.exists()):
        raise IsslError(f"{name}: there is no such file or folder; write hf:PATH or hf:NAME")
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            found, linked = datasets.load_from_disk(str(path)), False
        else:
            source = str(path.resolve()) if path.exists() else place
            files = {"data_files": source} if path.is_file() else {}
            builder = datasets.load_dataset_builder(
                BUILDERS.get(path.suffix, source) if files else source, cache_dir=cache, **files
            )
            if builder.name == "parquet":
                builder._generate_tables = partial(_batches, builder)
            builder.download_and_prepare()
            found, linked = builder.as_dataset(), builder.name == "imagefolder"
        if isinstance(found, datasets.Dataset):
            found = {"train": found}
        if split not in found:
            raise IsslError(f"split {split!r}: {name} has {', '.join(found)}")
        rows = found[split]
        column = _image_column(name, rows, datasets.Image)
        if isinstance(rows.features[column], datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    except IsslError:
        raise
    except Exception as error:  # what a reader raises on a stranger's files is not ours to list
        why = str(error.__cause__ or error).split("\n")[0]
        raise IsslError(f"{name}: Hugging Face's datasets cannot read it ({why})") from error
    if not len(rows):
        raise IsslError(f"{name}: it holds no rows")
    return Rows(rows, column, f"{PREFIX}{path.name}", linked)


def _batches(builder: Any, files: Sequence[str], **_: Any) -> Iterator[tuple[str, Any]]:
    """A parquet file's rows, 100 at a time, in place of Arrow's scanner, which `datasets` uses and
    which reads up to 1 GiB ahead of what is written."""
    import pyarrow.parquet

    for path in files:
        with pyarrow.parquet.ParquetFile(path, buffer_size=2**16, pre_buffer=False) as file:
            for batch in file.iter_batches(100, use_threads=False):
                yield path, builder._cast_table(pyarrow.Table.from_batches([batch]))


def _image_column(name: str, rows: Any, kind: type) -> str:
    """The column that `datasets` knows to hold images, else one that is called like one."""
    known = [column for column, feature in rows.features.items() if isinstance(feature, kind)]
    called = [column for column in IMAGES if column in rows.features]
    if not known + called:
        raise IsslError(
            f"{name}: no column of images ({', '.join(IMAGES)}); its columns are "
            f"{', '.join(rows.column_names)}"
        )
    return (known + called)[0]


def _attributes(name: str, encoded: Rows) -> pd.DataFrame:
    """What is known about every image, with `label` as numbers and `label_name`."""
    rows = encoded.rows
    plain = [
        column
        for column, feature in rows.features.items()
        if str(getattr(feature, "dtype", "")).startswith(PLAIN)
        and not column.startswith(INTERNAL)
        and column != encoded.column
    ]
    known = (
        rows.select_columns(plain).to_pandas() if plain else pd.DataFrame(index=range(len(rows)))
    )
    known = own_names(known, [c for c in plain if c in OURS or c.startswith("influence@")])
    known.insert(0, "index", range(len(rows)))
    source = next((column for column in LABELS if column in known), None)
    if source is None:
        return known
    classes: Sequence[str] = getattr(rows.features[source], "names", None) or ()
    found = class_labels(known[source], f"{name}: its column {source}", classes)
    if classes and (found["label"] >= len(classes)).any():
        raise IsslError(
            f"{name}: label {found['label'].max()}, but its metadata names {len(classes)} classes"
        )
    if "label_name" in known and not classes and pd.api.types.is_numeric_dtype(known[source]):
        return known.assign(label=found["label"])
    return own_names(known, ["label_name"]).assign(**found)
