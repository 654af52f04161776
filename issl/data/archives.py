"""Sets in archives and tables, read where they are: WebDataset's tar shards, parquet, arrow as Hugging Face saves it.

tar:PATH        *.tar, uncompressed; an image KEY.jpg may have a class number in KEY.cls
parquet:PATH    *.parquet with a column of encoded images (`image` or `img`), at best a column `label`
arrow:PATH      *.arrow likewise, memory-mapped: what `datasets.Dataset.save_to_disk` writes

PATH is a file or a folder. An image's index is its place in the set (of a tar member, the hash of its name), so keep
the files in place; parts that are added at the end change nothing about the others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from issl.data.encoded import ArrowRows, Decoding, Encoded, ParquetRows, check, open_arrow, tar_members
from issl.data.image_folder import SUFFIXES, check_size, path_index
from issl.data.images import Images, sample_positions
from issl.data.lazy_pixels import LazyPixels
from issl.errors import IsslError

KINDS = ("tar", "parquet", "arrow")
IMAGE_COLUMNS = ("image", "img", "jpg", "png")


def is_archive(name: str) -> bool:
    """Whether `read` reads this set."""
    return name.partition(":")[0] in KINDS and ":" in name


def files(name: str, split: str) -> list[Path]:
    """The files of the set, sorted; IsslError if there are none, and for a split other than train."""
    kind, _, place = name.partition(":")
    if split != "train":
        raise IsslError(f"split {split!r}: {name} has no splits; name its files, such as {kind}:PATH/{split}.{kind}")
    path = Path(place).expanduser()
    found = [path] if path.is_file() else sorted(path.rglob(f"*.{kind}"))
    if not found:
        raise IsslError(f"{name}: there is no *.{kind} file; give one, or a folder that holds some")
    return found


def count(name: str, split: str) -> int:
    """How many images the set has."""
    return len(_opened(name, files(name, split))[0])


def read(
    name: str, split: str, n: int | None, seed: int, size: int, skip_broken: bool = False, workers: int | None = None
) -> Images:
    """n of the images (default: all) as squares of `size` px, decoded when they are needed; attributes: index, path (of
    a tar member), label_name, and all plain columns of a table."""
    check_size(size)
    encoded, table = _opened(name, files(name, split))
    rows = sample_positions(name, len(encoded), n, seed)
    good, broken = check(encoded, name, skip_broken, rows)
    known = table.iloc[good].reset_index(drop=True)
    labels = None
    if "label" in known and not known["label"].isna().any():
        if known["label"].dtype.kind not in "iu" and (known["label"] % 1 != 0).any():
            raise IsslError(f"{name}: its column label holds {known['label'].iloc[0]!r}; need whole numbers, or texts")
        if known["label"].min() < 0:
            raise IsslError(f"{name}: its column label holds {known['label'].min()}; drop the column, or number from 0")
        labels = torch.from_numpy(known["label"].to_numpy(dtype=np.int64, copy=True))
        if "label_name" not in known:
            known["label_name"] = known["label"].astype(str)
    pixels = LazyPixels(Decoding(encoded, size), (size, size), good, workers)
    return Images(pixels, labels, known, f"{name.partition(':')[0]}:{Path(name.partition(':')[2]).name}", broken=broken)


def _opened(name: str, paths: Sequence[Path]) -> tuple[Encoded, pd.DataFrame]:
    """The images, and a table of what is known about each."""
    if name.startswith("tar:"):
        members, labels = tar_members(paths, SUFFIXES)
        if not len(members):
            raise IsslError(f"{name}: its archives hold no images (looked for {', '.join(sorted(SUFFIXES))})")
        names = [f"{paths[archive].name}/{member}" for archive, _, _, member in members.members]
        if len(set(names)) < len(names):
            twice = next(text for k, text in enumerate(names) if text in names[:k])
            raise IsslError(f"{name}: {twice} occurs twice; each image needs a name of its own")
        known = pd.DataFrame({"index": [path_index(text) for text in names], "path": names})
        if any(label is not None for label in labels):
            known["label"] = pd.Series(labels)
        return members, known
    try:
        if name.startswith("parquet:"):
            column = _image_column(name, pq.read_schema(paths[0]))
            for path in paths[1:]:
                if column not in pq.read_schema(path).names:
                    raise IsslError(f"{path}: no column {column}, as {paths[0].name} has; write all files alike")
            plain = [c for c, kind in _plain(pq.read_schema(paths[0])) if c != column]
            table = pa.concat_tables([pq.read_table(path, columns=plain) for path in paths])
            encoded: Encoded = ParquetRows(paths, column)
        else:
            whole = pa.concat_tables([open_arrow(path) for path in paths])
            column = _image_column(name, whole.schema)
            table = whole.select([c for c, kind in _plain(whole.schema) if c != column])
            encoded = ArrowRows(paths, column)
    except (pa.ArrowException, OSError) as error:
        raise IsslError(f"{name}: a file cannot be read ({error}); copy or write it again") from error
    if not len(encoded):
        raise IsslError(f"{name}: its files hold no rows")
    known = table.to_pandas()
    if "index" in known:
        known = known.rename(columns={"index": "own_index"})
    known.insert(0, "index", np.arange(len(known)))
    if "label" in known and pa.types.is_string(table.schema.field("label").type):
        known = known.rename(columns={"label": "label_name"})
        known["label"] = known["label_name"].astype("category").cat.codes
    classes = _class_names(name, table.schema)
    if classes:
        if (highest := int(known["label"].max())) >= len(classes):
            raise IsslError(f"{name}: label {highest}, but its metadata names {len(classes)} classes; write it again")
        known["label_name"] = np.array(classes)[known["label"].to_numpy(dtype=np.int64)]
    return encoded, known


def _image_column(name: str, schema: pa.Schema) -> str:
    for column in IMAGE_COLUMNS:
        if column in schema.names:
            return column
    raise IsslError(
        f"{name}: no column of images ({', '.join(IMAGE_COLUMNS)}); its columns are {', '.join(schema.names)}"
    )


def _plain(schema: pa.Schema) -> list[tuple[str, pa.DataType]]:
    """The columns of numbers, texts and truth values."""
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_string, pa.types.is_boolean)
    return [(field.name, field.type) for field in schema if any(test(field.type) for test in tests)]


def _class_names(name: str, schema: pa.Schema) -> list[str] | None:
    """The names of the classes in `label`, from Hugging Face's metadata."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = info.get("info", {}).get("features", {}).get("label", {})
        found: list[str] | None = feature.get("names")
    except (ValueError, AttributeError) as error:
        raise IsslError(f"{name}: its metadata `huggingface` cannot be read ({error}); write it without") from error
    return found if "label" in schema.names else None
