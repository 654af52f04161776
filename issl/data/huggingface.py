"""`hf:PATH_OR_NAME`, whatever Hugging Face's `datasets` reads (the extra `issl[hf]`).

PATH is a file or a folder: parquet, arrow, WebDataset's tar archives, an image folder with
metadata, or what `Dataset.save_to_disk` wrote. NAME is a set on the Hugging Face hub, which is
downloaded unless HF_DATASETS_OFFLINE=1 says otherwise. `datasets` prepares a copy as arrow files in
$XDG_CACHE_HOME/issl/datasets (~/.cache/issl/datasets), which are memory-mapped; images are decoded
when they are needed. No code of a set is run, because `datasets` 4 and later runs none.
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
from torch import Tensor

from issl.data.identity import DIGITS, SetIdentity, cache_folder, remembered, stamp
from issl.data.images import OURS, Encoded, own_names
from issl.data.torch_dataset import class_labels
from issl.errors import IsslError

PREFIX = "hf:"
IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp")  # names of columns of image bytes
LABELS = ("label", "cls")  # the second: WebDataset's
PLAIN = ("int", "uint", "float", "bool", "string", "large_string")  # prefixes of type names
INTERNAL = ("__url__", "__index_level_")  # columns that say nothing about an image
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}


@dataclass(frozen=True)
class Table(Encoded):
    """A Hugging Face set (a `datasets.Dataset`) whose column of images is not decoded.

    An image's index is its row. If `linked`, images may also be files that the set names (as in an
    image folder), not only bytes in it.
    """

    rows: Any
    column: str
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
        return f"{stamp(self._files)} at {self.size} px"

    def about(self, rows: np.ndarray) -> tuple[pd.DataFrame, Tensor | None]:
        """index, label_name, and all columns of numbers, strings and booleans; a column with one of
        our names becomes `own_…`."""
        known = self._known.iloc[rows].reset_index(drop=True)
        if "label" not in known or known["label"].isna().any():
            return known, None
        if known["label"].min() < 0:
            raise IsslError(
                f"{self.called}: a label is {known['label'].min()}; drop the column, or number "
                "from 0"
            )
        return known, torch.from_numpy(known["label"].to_numpy(dtype=np.int64, copy=True))

    def which(self) -> SetIdentity:
        """The hash of the encoded images and labels in their order, which is the same in every
        container. It is remembered until the files' times change."""
        return remembered(self.called, self._files, self._identify)

    def _identify(self) -> SetIdentity:
        whole = hashlib.sha256()
        for i in range(len(self)):
            with self.open(i) as file:
                whole.update(hashlib.sha256(file.read()).digest())
        if "label" in self._known:
            whole.update(repr(self._known["label"].tolist()).encode())
        return SetIdentity(whole.hexdigest()[:DIGITS], self.called)

    @cached_property
    def _files(self) -> list[Path]:
        """The files that hold the images."""
        prepared = [Path(file["filename"]) for file in self.rows.cache_files]
        if not self.linked:
            return prepared
        images = (value and value.get("path") for value in self.rows[self.column])
        return prepared + [Path(path) for path in images if path and Path(path).is_file()]

    @cached_property
    def _known(self) -> pd.DataFrame:
        """What is known about every image, with `label` as numbers and `label_name`."""
        features = self.rows.features
        plain = [
            column
            for column, feature in features.items()
            if str(getattr(feature, "dtype", "")).startswith(PLAIN)
            and not column.startswith(INTERNAL)
            and column != self.column
        ]
        known = pd.DataFrame(index=range(len(self)))
        if plain:
            known = self.rows.select_columns(plain).to_pandas()
        known = own_names(known, [c for c in plain if c in OURS or c.startswith("influence@")])
        known.insert(0, "index", range(len(self)))
        source = next((column for column in LABELS if column in known), None)
        if source is None:
            return known
        classes: Sequence[str] = getattr(features[source], "names", None) or ()
        found = class_labels(known[source], f"{self.called}: its column {source}", classes)
        if classes and (found["label"] >= len(classes)).any():
            raise IsslError(
                f"{self.called}: label {found['label'].max()}, but its metadata names "
                f"{len(classes)} classes"
            )
        if "label_name" in known and not classes and pd.api.types.is_numeric_dtype(known[source]):
            return known.assign(label=found["label"])
        return own_names(known, ["label_name"]).assign(**found)


def open_set(name: str, split: str, size: int) -> Table:
    """The images of a set; IsslError where `datasets` cannot read it."""
    try:
        import datasets  # slow to import, and an extra
    except ImportError as error:
        raise IsslError(
            f"{name} needs Hugging Face's datasets: pip install 'issl[hf]' (version 4 or later)"
        ) from error
    place = name.removeprefix(PREFIX)
    path = Path(place).expanduser()
    if not place or (place.startswith(("/", ".", "~")) and not path.exists()):
        raise IsslError(f"{name}: there is no such file or folder; write hf:PATH or hf:NAME")
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            found, linked = datasets.load_from_disk(str(path)), False
        else:
            source = str(path.resolve()) if path.exists() else place
            files = {"data_files": source} if path.is_file() else {}
            builder = datasets.load_dataset_builder(
                BUILDERS.get(path.suffix, source) if files else source,
                cache_dir=str(cache_folder("datasets")),
                **files,
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
        column = _image_column(name, rows.features, datasets.Image)
        if isinstance(rows.features[column], datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    except IsslError:
        raise
    except Exception as error:  # a reader may raise anything on files from elsewhere
        why = str(error.__cause__ or error).split("\n")[0]
        raise IsslError(f"{name}: Hugging Face's datasets cannot read it ({why})") from error
    if not len(rows):
        raise IsslError(f"{name}: it holds no rows")
    return Table(f"{PREFIX}{path.name}", size, rows, column, linked)


def _batches(builder: Any, files: Sequence[str], **_: Any) -> Iterator[tuple[str, Any]]:
    """The rows of parquet files, 100 at a time. This replaces the Arrow scanner that `datasets`
    uses, which reads up to 1 GiB ahead of what is written."""
    import pyarrow.parquet

    for path in files:
        with pyarrow.parquet.ParquetFile(path, buffer_size=2**16, pre_buffer=False) as file:
            for batch in file.iter_batches(100, use_threads=False):
                yield path, builder._cast_table(pyarrow.Table.from_batches([batch]))


def _image_column(name: str, features: Any, kind: type) -> str:
    """The column that `datasets` knows to hold images, else one with a name from `IMAGES`."""
    known = [column for column, feature in features.items() if isinstance(feature, kind)]
    found = known + [column for column in IMAGES if column in features]
    if not found:
        raise IsslError(
            f"{name}: no column of images ({', '.join(IMAGES)}); its columns are "
            f"{', '.join(features)}"
        )
    return found[0]
