"""Files that strangers send: strange, damaged, or made to do harm."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from disk import png
from PIL import Image

PIXELS = (np.arange(3 * 16 * 16) % 251).astype(np.uint8).reshape(3, 16, 16)
GOOD = png(PIXELS)
PICTURE = Image.fromarray(PIXELS.transpose(1, 2, 0))


# --- images ---


def chunk(kind: bytes, content: bytes) -> bytes:
    """One of a PNG's parts."""
    length, check = (struct.pack(">I", v) for v in (len(content), zlib.crc32(kind + content)))
    return length + kind + content + check


def declaring(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes that says that it is so large."""
    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    parts = size, chunk(b"IDAT", zlib.compress(b"\0" * 100)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def with_text_of(length: int) -> bytes:
    """A PNG with a compressed text that unpacks to so many bytes."""
    place = GOOD.index(b"IDAT") - 4
    return GOOD[:place] + chunk(b"zTXt", b"k\0\0" + zlib.compress(b"A" * length)) + GOOD[place:]


def folder(parent: Path, **files: bytes) -> str:
    """A data set of these files: name (`_` before the suffix) → bytes."""
    place = parent / "images"
    place.mkdir()
    for name, content in files.items():
        (place / name.replace("__", ".")).write_bytes(content)
    return f"folder:{place}"


# --- archives and tables ---


def parquet(parent: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), parent / "set.parquet")
    return f"hf:{parent / 'set.parquet'}"


# --- checkpoints ---


class Evil:
    """Unpickled with the usual reader, it creates a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def malicious(path: Path, mark: Path, how: str) -> Path:
    """A checkpoint that would run a command: `zip` as torch writes them now, `legacy`, `pickle`."""
    if how == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Evil(mark)}))
    else:
        torch.save({"state_dict": Evil(mark)}, path, _use_new_zipfile_serialization=how == "zip")
    return path


def zip_bomb(path: Path, unpacked: int) -> Path:
    """A checkpoint of some kilobytes that unpacks to so many bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        with archive.open("a/data.pkl", "w") as member:
            for _ in range(unpacked // 2**20):
                member.write(b"\0" * 2**20)
        archive.writestr("a/version", "3")
    return path
