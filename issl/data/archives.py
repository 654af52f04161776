"""Sets in archives and tables, read where they are: WebDataset's tar shards, parquet, arrow as
Hugging Face saves it.

tar:PATH        *.tar, uncompressed; an image KEY.jpg may have a class number in KEY.cls
parquet:PATH    *.parquet with a column of encoded images (`image` or `img`), at best a column
`label`: whole numbers,
                texts or truth values, of any type that holds such
arrow:PATH      *.arrow likewise, memory-mapped: what `datasets.Dataset.save_to_disk` writes

PATH is a file or a folder. An image's index is its place in the set (of a tar member, the hash of
its name), so keep the files in place; parts that are added at the end change nothing about the
others.
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

from issl.data.class_labels import class_labels
from issl.data.encoded import (
    ArrowRows,
    Decoding,
    Encoded,
    ParquetRows,
    check,
    open_arrow,
    tar_members,
)
from issl.data.image_folder import check_size, path_index
from issl.data.images import OURS, Images, own_names, sample_positions
from issl.data.lazy_pixels import LazyPixels
from issl.data.selection import Selection, say_left_out
from issl.errors import IsslError

KINDS = ("tar", "parquet", "arrow")
IMAGE_COLUMNS = ("image", "img", "jpg", "png")
TEXTS = ("string", "large_string", "string_view")


def is_archive(name: str) -> bool:
    """Whether `read` reads this set."""
    return name.partition(":")[0] in KINDS and ":" in name


def files(name: str, split: str) -> list[Path]:
    """The files of the set, sorted; IsslError if there are none, and for a split other than
    train."""
    kind, _, place = name.partition(":")
    if split != "train":
        raise IsslError(
            f"split {split!r}: {name} has no splits; name its files, such as {kind}:PATH/{split}.{kind}"
        )
    path = Path(place).expanduser()
    found = [path] if path.is_file() else sorted(path.rglob(f"*.{kind}"))
    if not found:
        raise IsslError(f"{name}: there is no *.{kind} file; give one, or a folder that holds some")
    return found


def listed(name: str, split: str) -> tuple[list[str], str]:
    """Of tar archives, the names of the images and what is left out; of tables nothing, whose rows
    are all read."""
    if not name.startswith("tar:"):
        return [], ""
    members, _ = tar_members(files(name, split), selection := Selection())
    return [member for *_, member in members.members], str(selection)


def count(name: str, split: str) -> int:
    """How many images the set has."""
    return len(_opened(name, files(name, split), Selection())[0])


def read(
    name: str,
    split: str,
    n: int | None,
    seed: int,
    size: int,
    skip_broken: bool = False,
    workers: int | None = None,
    quiet: bool = False,
) -> Images:
    """n of the images (default: all) as squares of `size` px, decoded when they are needed;
    attributes: index, path (of a tar member), label_name, and all plain columns of a table; one
    that is called like a column of ours is `own_…`."""
    check_size(size)
    encoded, table = _opened(name, files(name, split), selection := Selection())
    called = f"{name.partition(':')[0]}:{Path(name.partition(':')[2]).name}"
    say_left_out(called, "" if quiet else str(selection))
    rows = sample_positions(name, len(encoded), n, seed)
    good, broken = check(encoded, name, skip_broken, rows)
    known = table.iloc[good].reset_index(drop=True)
    labels = None
    if "label" in known and not known["label"].isna().any():
        if known["label"].min() < 0:
            raise IsslError(
                f"{name}: its column label holds {known['label'].min()}; drop the column, or number from 0"
            )
        labels = torch.from_numpy(known["label"].to_numpy(dtype=np.int64, copy=True))
    pixels = LazyPixels(Decoding(encoded, size), (size, size), good, workers)
    return Images(pixels, labels, known, called, broken=broken)


def _opened(name: str, paths: Sequence[Path], selection: Selection) -> tuple[Encoded, pd.DataFrame]:
    """The images, and a table of what is known about each."""
    if name.startswith("tar:"):
        members, labels = tar_members(paths, selection)
        if not len(members):
            left_out = f"; {selection}" if str(selection) else ""
            raise IsslError(
                f"{name}: its archives hold no images (looked for all that this Pillow reads{left_out})"
            )
        names = [f"{paths[archive].name}/{member}" for archive, _, _, member in members.members]
        if len(set(names)) < len(names):
            twice = next(text for k, text in enumerate(names) if text in names[:k])
            raise IsslError(f"{name}: {twice} occurs twice; each image needs a name of its own")
        known = pd.DataFrame({"index": [path_index(text) for text in names], "path": names})
        if any(label is not None for label in labels):
            known[["label", "label_name"]] = class_labels(labels, name)
        return members, known
    try:
        if name.startswith("parquet:"):
            column, plain = _columns(name, paths, [pq.read_schema(path) for path in paths])
            tables = [pq.read_table(path, columns=plain) for path in paths]
            encoded: Encoded = ParquetRows(paths, column)
        else:
            opened = [open_arrow(path) for path in paths]
            column, plain = _columns(name, paths, [table.schema for table in opened])
            tables = [table.select(plain) for table in opened]
            encoded = ArrowRows(paths, column)
        table = pa.concat_tables([_decoded(each) for each in tables])
    except (pa.ArrowException, OSError) as error:
        raise IsslError(
            f"{name}: a file cannot be read ({error}); copy or write it again"
        ) from error
    if not len(encoded):
        raise IsslError(f"{name}: its files hold no rows")
    known = table.to_pandas(ignore_metadata=True).reindex(
        range(len(encoded))
    )  # there may be no other column
    known = own_names(known, [c for c in known if c in OURS or c.startswith("influence@")])
    known.insert(0, "index", np.arange(len(known)))
    return encoded, _labelled(
        name, known, _class_names(name, tables[0].schema)
    ) if "label" in known else known


def _labelled(name: str, known: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """The table with `label` as numbers and with `label_name`: what `classes` says, or a column of
    that name beside numbers, or the labels themselves."""
    found = class_labels(known["label"], f"{name}: its column label", classes)
    if classes and (found["label"] >= len(classes)).any():
        highest = found["label"].max()
        raise IsslError(
            f"{name}: label {highest}, but its metadata names {len(classes)} classes; write it again"
        )
    if "label_name" in known and not classes and pd.api.types.is_numeric_dtype(known["label"]):
        return known.assign(label=found["label"])
    return own_names(known, ["label_name"]).assign(**found)


def _columns(
    name: str, paths: Sequence[Path], schemas: Sequence[pa.Schema]
) -> tuple[str, list[str]]:
    """The column of images, and those of numbers, texts and truth values, in the first file; all
    others have them."""
    names = schemas[0].names
    column = next((c for c in IMAGE_COLUMNS if c in names), None)
    if column is None:
        raise IsslError(
            f"{name}: no column of images ({', '.join(IMAGE_COLUMNS)}); its columns are {', '.join(names)}"
        )
    if len(set(names)) < len(names):
        twice = next(c for c in names if names.count(c) > 1)
        raise IsslError(
            f"{name}: {names.count(twice)} columns are called {twice}; give each its own name"
        )
    plain = [field.name for field in schemas[0] if field.name != column and _is_plain(field.type)]
    for path, schema in zip(paths, schemas, strict=True):
        for missing in (c for c in (column, *plain) if c not in schema.names):
            raise IsslError(
                f"{path}: no column {missing}, as {paths[0].name} has; write all files alike"
            )
    return column, plain


def _is_plain(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    return str(kind) in TEXTS or any(test(kind) for test in tests)


def _decoded(table: pa.Table) -> pa.Table:
    """The same with the values of dictionaries, and one type for all texts."""
    for k, field in enumerate(table.schema):
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        column = table.column(k).cast(kind)
        table = table.set_column(
            k, field.name, column.cast(pa.large_string()) if str(kind) in TEXTS else column
        )
    return table


def _class_names(name: str, schema: pa.Schema) -> Sequence[str]:
    """The names of the classes in `label`, from Hugging Face's metadata; none where it has none."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = info.get("info", {}).get("features", {}).get("label", {})
        found: list[str] | None = feature.get("names")
    except (ValueError, AttributeError) as error:
        raise IsslError(
            f"{name}: its metadata `huggingface` cannot be read ({error}); write it without"
        ) from error
    return found or ()
