"""Encoded images where they are: files, members of tar archives, rows of parquet and arrow tables.

Each says how to open image i, by name for messages; decoding is the same for all. Nothing is held
but where things are.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import BinaryIO, Protocol, cast, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt8
from PIL import Image

from issl.data.images import decode, in_words, unknown_range
from issl.data.selection import Selection
from issl.errors import IsslError

TAIL = 4096  # bytes at a file's end in which its closing mark must be
CLOSING = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
KEPT_GROUPS = 2  # parquet row groups that are held
LARGEST = 2**29  # bytes of an encoded image; a photograph has some 10⁷
LARGEST_CLASS = 18  # digits of a class number
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZ": "bzip2",
    b"\xfd7": "xz",
    b"(\xb5": "zstd",
}  # by a file's first two bytes


@runtime_checkable
class Encoded(Protocol):
    """Images that are not decoded; `open` is called by several threads at once."""

    def __len__(self) -> int: ...

    def open(self, i: int) -> io.BufferedIOBase:
        """Image i as a file, at its start."""
        ...

    def name(self, i: int) -> str:
        """How a message calls image i."""
        ...

    def identity(self) -> str:
        """A text that changes when the images may have changed."""
        ...


@dataclass(frozen=True)
class Decoding:
    """The source of `LazyPixels`: each image's centred square at `size` px."""

    encoded: Encoded
    size: int

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, i: int) -> UInt8[np.ndarray, "3 s s"]:
        with self.encoded.open(i) as file:
            data = read_all(file, self.encoded.name(i))
        return decode(data, self.size, self.encoded.name(i))

    def identity(self) -> str:
        return f"{self.encoded.identity()} at {self.size} px"


def read_all(file: io.BufferedIOBase, name: str) -> bytes:
    """The bytes of an encoded image; IsslError for one that is far too large to be one."""
    data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise IsslError(
            f"{name} has more than {LARGEST / 1e6:.0f} MB; an image has far less: remove it"
        )
    return data


def on_one_line(name: str) -> str:
    """A name as it is, or quoted where it would break a message (a name may hold a newline)."""
    return name if name.isprintable() else repr(name)


@dataclass(frozen=True)
class Files:
    """Image files, by their paths in a folder (as texts: a million `Path`s take a gigabyte)."""

    folder: Path
    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, i: int) -> io.BufferedIOBase:
        try:
            return (self.folder / self.paths[i]).open("rb")
        except OSError as error:
            raise IsslError(
                f"{self.name(i)} cannot be read ({error}); restore it, or remove it from the set"
            ) from error

    def name(self, i: int) -> str:
        return on_one_line(str(self.folder / self.paths[i]))

    def identity(self) -> str:
        return _of_files([self.folder / path for path in self.paths])


@dataclass(frozen=True)
class TarMembers:
    """Members of uncompressed tar archives, each by its archive, offset and length: WebDataset's
    layout."""

    archives: Sequence[Path]
    members: Sequence[tuple[int, int, int, str]]  # number of the archive, offset, length, name

    def __len__(self) -> int:
        return len(self.members)

    def open(self, i: int) -> io.BufferedIOBase:
        archive, offset, length, _ = self.members[i]
        if length > LARGEST:
            raise IsslError(
                f"{self.name(i)} has {length / 1e6:.0f} MB; an image has far less: remove it"
            )
        with self.archives[archive].open("rb") as file:
            return io.BytesIO(os.pread(file.fileno(), length, offset))

    def name(self, i: int) -> str:
        archive, _, _, name = self.members[i]
        return on_one_line(f"{self.archives[archive]}:{name}")

    def identity(self) -> str:
        return _of_files(self.archives)


def tar_members(
    archives: Sequence[Path], selection: Selection
) -> tuple[TarMembers, list[int | None]]:
    """The selected images of these archives, in order, and of each the number in its member
    `KEY.cls`, if any."""
    members, labels = [], []
    for number, path in enumerate(archives):
        found: list[tuple[int, int, int, str]] = []
        classes: dict[str, int] = {}
        with path.open("rb") as file:
            how = COMPRESSED.get(file.read(2))
        if how is not None:
            raise IsslError(
                f"{path} is compressed ({how}), so its images cannot be read one by one; unpack it to a .tar"
            )
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    key, suffix = os.path.splitext(member.name)  # noqa: PTH122 (no path of this machine)
                    if member.isfile() and selection.takes(member.name):
                        found.append((number, member.offset_data, member.size, member.name))
                    elif member.isfile() and suffix == ".cls":
                        content = archive.extractfile(member)
                        assert content is not None  # it is a file
                        classes[key] = _class_number(
                            content.read(LARGEST_CLASS + 1), f"{path}:{member.name}"
                        )
        except (tarfile.TarError, OSError, ValueError) as error:
            raise IsslError(
                f"{path} is no readable, uncompressed tar archive ({error}); repair or remove it"
            ) from error
        members += found
        labels += [classes.get(os.path.splitext(name)[0]) for *_, name in found]  # noqa: PTH122
    return TarMembers(archives, members), labels


def _class_number(content: bytes, name: str) -> int:
    text = content.decode("ascii", "replace").strip()
    if not text.isdigit() or len(text) > LARGEST_CLASS:
        raise IsslError(f"{on_one_line(name)} holds {text!r}; a class number is 0 or more")
    return int(text)


class Rows:
    """Rows of tables with a column of encoded images, as Hugging Face writes them: {bytes, path},
    or bytes alone."""

    def __init__(self, files: Sequence[Path], column: str, starts: np.ndarray):
        self.files, self.column, self.starts = (
            files,
            column,
            starts,
        )  # of each part; the last entry: how many rows

    def __len__(self) -> int:
        return int(self.starts[-1])

    def open(self, i: int) -> io.BufferedIOBase:
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        value = self.images(part)[i - int(self.starts[part])].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise IsslError(
                f"{self.name(i)} holds no encoded image but {data!r:.80}; write the set with images embedded"
            )
        return io.BytesIO(data)

    def images(self, part: int) -> pa.Array:
        """The column of one part of the tables."""
        raise NotImplementedError

    def name(self, i: int) -> str:
        return f"row {i} of {self.files[0].parent}"

    def identity(self) -> str:
        return _of_files(self.files)


class ParquetRows(Rows):
    """Rows of parquet files; the row groups that were used last are held."""

    def __init__(self, files: Sequence[Path], column: str):
        opened = [pq.ParquetFile(path) for path in files]
        self.groups = [(f, g) for f, file in enumerate(opened) for g in range(file.num_row_groups)]
        lengths = [opened[f].metadata.row_group(g).num_rows for f, g in self.groups]
        super().__init__(files, column, np.cumsum([0, *lengths], dtype=np.int64))
        self._held: OrderedDict[int, pa.Array] = OrderedDict()
        self._lock = Lock()

    def images(self, part: int) -> pa.Array:
        with self._lock:
            if part not in self._held:
                file, group = self.groups[part]
                table = pq.ParquetFile(self.files[file]).read_row_group(
                    group, columns=[self.column]
                )
                self._held[part] = table.column(self.column).combine_chunks()
                if len(self._held) > KEPT_GROUPS:
                    self._held.popitem(last=False)
            self._held.move_to_end(part)
            return self._held[part]


class ArrowRows(Rows):
    """Rows of arrow files, memory-mapped: the system reads what is used."""

    def __init__(self, files: Sequence[Path], column: str):
        self.tables = [open_arrow(path) for path in files]
        self.chunks = [chunk for table in self.tables for chunk in table.column(column).chunks]
        super().__init__(
            files, column, np.cumsum([0, *(len(chunk) for chunk in self.chunks)], dtype=np.int64)
        )

    def images(self, part: int) -> pa.Array:
        return self.chunks[part]


def open_arrow(path: Path) -> pa.Table:
    """A memory-mapped arrow file, of the streaming format (Hugging Face's) or the file format."""
    mapped = pa.memory_map(str(path))
    try:
        return pa.ipc.open_stream(mapped).read_all()
    except pa.ArrowInvalid:
        mapped.seek(0)
        return pa.ipc.open_file(mapped).read_all()


def _of_files(paths: Sequence[Path]) -> str:
    """Names, sizes and times of files, as one hash."""
    digest = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        digest.update(repr((str(path), stat.st_size, stat.st_mtime_ns)).encode())
    return digest.hexdigest()


# --- broken images
# -----------------------------------------------------------------------------------------


def broken(encoded: Encoded, rows: np.ndarray, workers: int = 8) -> list[tuple[int, str]]:
    """Which of these images cannot be decoded, and why: by their headers and ends, which is quick.

    Where the closing mark of a JPEG or PNG is not where it belongs, the image is decoded to be
    sure. An image that is damaged in between is found only when it is needed.
    """
    shares = [rows[k : k + 256].tolist() for k in range(0, len(rows), 256)]
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(
            lambda share: [(i, fault) for i in share if (fault := _fault(encoded, i))], shares
        )
        return [each for share in found for each in share]


def _fault(encoded: Encoded, i: int) -> str:
    try:
        with encoded.open(i) as file, Image.open(cast(BinaryIO, file)) as image:
            if why := unknown_range(image):
                return why
            mark = CLOSING.get(image.format or "")
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL))
            if mark is None or mark in file.read():
                return ""
        with encoded.open(i) as file:
            Image.open(io.BytesIO(read_all(file, encoded.name(i)))).load()
    except IsslError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 (whatever a decoder raises on a stranger's bytes: it is told)
        return in_words(error)
    return ""


def check(
    encoded: Encoded, what: str, skip: bool, rows: np.ndarray | None = None
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Of these positions (default: all) those of images that can be decoded; the others by name,
    with the reason.

    Raises IsslError that lists the first broken ones, unless they are to be skipped, and if none is
    left.
    """
    wanted = np.arange(len(encoded)) if rows is None else rows
    faults = broken(encoded, wanted)
    if faults and (not skip or len(faults) == len(wanted)):
        some = "; ".join(f"{encoded.name(i)} ({why})" for i, why in faults[:5])
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        remedy = "repair or remove them, or add --skip-broken (skip_broken=True)"
        raise IsslError(
            f"{what}: {len(faults)} of {len(wanted)} images cannot be decoded: {some}{more}; {remedy}"
        )
    bad = {i for i, _ in faults}
    good = np.array([i for i in wanted if i not in bad], dtype=np.int64)
    return good, [(encoded.name(i), why) for i, why in faults]
