"""`folder:PATH`, a folder of images; if every image is in a sub-folder, these are the classes.

Links to folders are followed; hidden files and folders (`.ipynb_checkpoints`) are not read. Images
that are left out are counted with the reason, so that none is lost in silence.
"""

from __future__ import annotations

import hashlib
import io
import mimetypes
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from issl.data.decoding import Decoding, check, stamp
from issl.data.identity import SetIdentity, digest
from issl.data.images import Images, sample_positions
from issl.data.lazy_pixels import LazyPixels
from issl.errors import IsslError

PREFIX = "folder:"
VERSION = 2  # of `read`; 1: an image's index was its place among the sorted files
# endings that Pillow knows of files that it cannot read, or that are mostly not of pictures
OF_OTHERS = set(".bufr .emf .eps .fit .grib .h5 .hdf .iim .mpeg .mpg .ps .wmf".split())
# further endings of pictures, which are read where Pillow (or a plugin of it) has learned to
PICTURES = set(
    ".3fr .arw .avif .cr2 .cr3 .crw .dng .emf .eps .erf .exr .heic .heics .heif .heifs .hif .j2k "
    ".jls .jp2 .jxl .jxr .kdc .mrw .nef .nrw .orf .pef .psb .raf .raw .rw2 .sr2 .srf .srw .svg "
    ".svgz .webp .wmf .x3f .xcf".split()
)
SYNONYMS = {".jfi", ".jif", ".pjp", ".pjpeg"}  # of .jpg, which Pillow does not list
STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
CIRCLE, CLOSED = "linked in a circle", "that cannot be opened"


@dataclass(frozen=True)
class Files:
    """Image files by their paths in a folder (as texts: a million `Path`s take a gigabyte)."""

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
        name = str(self.folder / self.paths[i])
        return name if name.isprintable() else repr(name)  # it may hold a newline

    def identity(self) -> str:
        return stamp(self.folder / path for path in self.paths)


def read(
    name: str,
    split: str,
    n: int | None,
    seed: int,
    size: int,
    skip_broken: bool,
    workers: int | None,
    quiet: bool,
) -> Images:
    """Images of a folder as squares of `size` px; the arguments are those of `issl.load`.

    Attributes: index, path, label_name.
    """
    folder = _folder_of(name, split)
    every, left_out = image_files(folder)
    called = f"{PREFIX}{folder.name}"
    if left_out and not quiet:
        print(f"{called if called.isprintable() else repr(called)}: {left_out}", file=sys.stderr)
    files = Files(folder, [every[i] for i in sample_positions(name, len(every), n, seed)])
    pixels = Decoding(files, size)
    good, broken = check(files, name, skip_broken, np.arange(len(files)))
    paths = [files.paths[i] for i in good]
    attributes, labels = pd.DataFrame({"index": map(path_index, paths), "path": paths}), None
    if all("/" in path for path in every):
        classes = sorted({path.partition("/")[0] for path in every})
        attributes["label_name"] = [path.partition("/")[0] for path in paths]
        number = {label: k for k, label in enumerate(classes)}
        labels = torch.tensor([number[label] for label in attributes["label_name"]])
    lazy = LazyPixels(pixels, (size, size), good, workers)
    return Images(lazy, labels, attributes, called, broken=broken)


def count(name: str, split: str) -> int:
    """How many images the folder holds."""
    return len(image_files(_folder_of(name, split))[0])


def identity(name: str, split: str) -> SetIdentity:
    """A folder is known by its images' paths, sizes and times of change."""
    folder = _folder_of(name, split)
    files, left_out = image_files(folder)
    stats = [(path, (folder / path).stat()) for path in files]
    rows = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    key = f"{digest(repr(rows).encode())}-{VERSION}"
    return SetIdentity(key, f"{PREFIX}{folder.name}", left_out)


def path_index(path: str) -> int:
    """An image's index: 62 bits of the hash of its path in the folder, so other files change
    nothing about it."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") >> 2


def image_files(folder: Path) -> tuple[list[str], str]:
    """The paths of all images below the folder, sorted; and in one line what is left out and why.

    Raises:
        IsslError: there are none, or a name is not in UTF-8.
    """
    endings, left_out = readable_endings(), Counter[str]()
    found = []
    for path, hidden in _walk(folder, left_out):
        ending = os.path.splitext(path)[1].lower()  # noqa: PTH122 (a million `Path`s are slow)
        if ending in endings and not hidden:
            found.append(path)
        elif why := _why_left_out(folder / path, ending, ending in endings, hidden):
            left_out[why] += 1
    if not found:
        raise IsslError(
            f"image folder {str(folder)!r} has no images that this Pillow reads, also in "
            f"sub-folders; {_summary(left_out) or 'give another folder'}"
        )
    for path in found:
        if not path.isascii() and path != path.encode(errors="replace").decode():
            raise IsslError(f"image folder: the name {path!r} is not in UTF-8; rename this file")
    return sorted(found, key=lambda path: path.split("/")), _summary(left_out)


def readable_endings() -> set[str]:
    """The endings of image files that this Pillow reads, with the plugins that it has now."""
    known = Image.registered_extensions()
    return ({ending for ending, kind in known.items() if kind in Image.OPEN} | SYNONYMS) - OF_OTHERS


def _folder_of(name: str, split: str) -> Path:
    if split != "train":
        raise IsslError(f"split {split!r}: {name} is an image folder, which has no splits")
    folder = Path(name.removeprefix(PREFIX)).expanduser()
    if not folder.is_dir():
        raise IsslError(
            f"image folder {str(folder)!r} does not exist; write folder:PATH of a folder of images"
        )
    return folder


def _walk(folder: Path, left_out: Counter[str]) -> Iterator[tuple[str, bool]]:
    """The paths of all files in the folder, and whether they are hidden.

    Links are followed, but not one to a folder that it is in itself.
    """
    todo: list[tuple[str, bool, tuple[str, ...]]] = [("", False, ())]
    while todo:
        place, hidden, holders = todo.pop()  # holders: where the links that led here really are
        try:
            entries = list(os.scandir(folder / place))
        except OSError:
            left_out[CLOSED] += not hidden
            continue
        for entry in entries:
            path, hides = f"{place}{entry.name}", hidden or entry.name.startswith(".")
            if entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110
                left_out["linked to nothing"] += not hides
            elif entry.is_file():
                yield path, hides
            elif entry.is_dir() and not entry.is_symlink():
                todo.append((f"{path}/", hides, holders))
            elif entry.is_dir() and not hides:
                here = (*holders, os.path.realpath(folder / place))
                real = os.path.realpath(entry.path)
                if any(os.path.commonpath([real, holder]) == real for holder in here):
                    left_out[CIRCLE] += 1
                else:
                    todo.append((f"{path}/", hides, here))


def _why_left_out(path: Path, ending: str, readable: bool, hidden: bool) -> str:
    """Why this file is not read though it is an image; "" where it is none."""
    if hidden:
        return "hidden" if readable else ""
    if ending in PICTURES:
        return f"{ending} (this Pillow cannot read them)"
    if mimetypes.guess_type(path.name)[0] is not None or not _begins_as_image(path):
        return ""
    called = ending if ending.isascii() and ending.isprintable() else "otherwise called"
    return f"{called or 'without an ending'} (images by their content: name them so)"


def _begins_as_image(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(12)
    except OSError:
        return False  # nothing is known about it
    return start.startswith(STARTS) or (start[:4] == b"RIFF" and start[8:] == b"WEBP")


def _summary(left_out: Counter[str]) -> str:
    counted = sorted(((many, why) for why, many in left_out.items() if many), reverse=True)
    if not counted:
        return ""
    total = sum(many for many, _ in counted)
    folders = " or folders" if left_out[CIRCLE] or left_out[CLOSED] else ""
    some = ", ".join(f"{many} {why}" for many, why in counted)
    return f"left out {total} {'file' if total == 1 else 'files'}{folders}: {some}"
