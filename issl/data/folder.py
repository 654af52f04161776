"""`folder:PATH`, a folder of images; if every image is in a sub-folder, these are the classes.

Links to folders are followed; hidden files and folders (`.ipynb_checkpoints`) are not read. Images
that are left out are counted with the reason, so none is lost silently.
"""

from __future__ import annotations

import hashlib
import io
import mimetypes
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from issl.data.identity import SetIdentity, digest, stamp
from issl.data.images import Encoded
from issl.errors import IsslError

PREFIX = "folder:"
VERSION = 2  # of how an image gets its index; 1: its place among the sorted files
# endings that Pillow knows, but of files that it cannot read or that are mostly not pictures
OF_OTHERS = set(".bufr .emf .eps .fit .grib .h5 .hdf .iim .mpeg .mpg .ps .wmf".split())
# further endings of pictures, which are read if Pillow or one of its plugins supports them
PICTURES = set(
    ".3fr .arw .avif .cr2 .cr3 .crw .dng .emf .eps .erf .exr .heic .heics .heif .heifs .hif .j2k "
    ".jls .jp2 .jxl .jxr .kdc .mrw .nef .nrw .orf .pef .psb .raf .raw .rw2 .sr2 .srf .srw .svg "
    ".svgz .webp .wmf .x3f .xcf".split()
)
SYNONYMS = {".jfi", ".jif", ".pjp", ".pjpeg"}  # of .jpg, which Pillow does not list
STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
CIRCLE, CLOSED = "linked in a circle", "that cannot be opened"


@dataclass(frozen=True)
class Folder(Encoded):
    """Image files by their paths in a folder (as texts: a million `Path`s take a gigabyte)."""

    folder: Path
    paths: list[str]
    left_out: str  # which images are not among them, and why, in a line

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
        return printable(str(self.folder / self.paths[i]))

    def identity(self) -> str:
        return f"{stamp(self.folder / path for path in self.paths)} at {self.size} px"

    def about(self, rows: np.ndarray) -> tuple[pd.DataFrame, Tensor | None]:
        """index, path, label_name. An index is 62 bits of the hash of the path, so it does
        not depend on other files."""
        paths = [self.paths[i] for i in rows]
        hashes = (hashlib.sha256(path.encode()).digest() for path in paths)
        index = [int.from_bytes(found[:8], "big") >> 2 for found in hashes]
        known = pd.DataFrame({"index": index, "path": paths})
        if not all("/" in path for path in self.paths):
            return known, None
        number = {name: k for k, name in enumerate(sorted({_class(p) for p in self.paths}))}
        known["label_name"] = [_class(path) for path in paths]
        return known, torch.tensor([number[name] for name in known["label_name"]])

    def which(self) -> SetIdentity:
        """A folder is identified by the paths, sizes and modification times of its images."""
        stats = ((path, (self.folder / path).stat()) for path in self.paths)
        rows = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
        key = f"{digest(repr(rows).encode())}-{VERSION}"
        return SetIdentity(key, self.called, self.left_out)


def open_set(name: str, split: str, size: int) -> Folder:
    """The images of a folder, in the order of their paths."""
    if split != "train":
        raise IsslError(f"split {split!r}: {name} is an image folder, which has no splits")
    folder = Path(name.removeprefix(PREFIX)).expanduser()
    if not folder.is_dir():
        raise IsslError(
            f"image folder {str(folder)!r} does not exist; write folder:PATH of a folder of images"
        )
    endings, left_out, found = readable_endings(), Counter[str](), []
    for path, hidden in _files(folder, left_out):
        ending = os.path.splitext(path)[1].lower()  # noqa: PTH122 (a million `Path`s are slow)
        if ending in endings and not hidden:
            found.append(path)
        elif why := _why_left_out(folder / path, ending, ending in endings, hidden):
            left_out[why] += 1
    said = _summary(left_out)
    if not found:
        raise IsslError(
            f"image folder {str(folder)!r} has no images that this Pillow reads, also in "
            f"sub-folders; {said or 'give another folder'}"
        )
    for path in found:
        if not path.isascii() and path != path.encode(errors="replace").decode():
            raise IsslError(f"image folder: the name {path!r} is not in UTF-8; rename this file")
    found.sort(key=lambda path: path.split("/"))
    return Folder(f"{PREFIX}{folder.name}", size, folder, found, said)


def printable(name: str) -> str:
    """A file's name on one line, even if it holds a newline."""
    return name if name.isprintable() else repr(name)


def readable_endings() -> set[str]:
    """The endings of image files that this Pillow reads, with the plugins that it has now."""
    known = Image.registered_extensions()
    return ({ending for ending, kind in known.items() if kind in Image.OPEN} | SYNONYMS) - OF_OTHERS


def _class(path: str) -> str:
    return path.partition("/")[0]


def _files(folder: Path, left_out: Counter[str]) -> Iterator[tuple[str, bool]]:
    """The paths of all files in the folder, and whether they are hidden.

    Links are followed, except a link to a folder that contains the link.
    """

    def closed(_: OSError) -> None:
        left_out[CLOSED] += 1

    for place, folders, names in os.walk(folder, followlinks=True, onerror=closed):
        inside = Path(place).relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        for name in [name for name in folders if os.path.islink(f"{place}/{name}")]:  # noqa: PTH114
            real = os.path.realpath(f"{place}/{name}")
            holders = (os.path.realpath(folder / path) for path in (inside, *inside.parents))
            if hidden or name.startswith("."):
                folders.remove(name)
            elif any(os.path.commonpath([real, holder]) == real for holder in holders):
                folders.remove(name)
                left_out[CIRCLE] += 1
        for name in names:
            hides = hidden or name.startswith(".")
            if os.path.isfile(f"{place}/{name}"):  # noqa: PTH113
                yield "/".join((*inside.parts, name)), hides
            elif os.path.islink(f"{place}/{name}"):  # noqa: PTH114
                left_out["linked to nothing"] += not hides


def _why_left_out(path: Path, ending: str, readable: bool, hidden: bool) -> str:
    """Why this file is not read although it is an image; "" if it is not an image."""
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
    total = left_out.total()
    folders = " or folders" if left_out[CIRCLE] or left_out[CLOSED] else ""
    some = ", ".join(f"{many} {why}" for many, why in counted)
    return f"left out {total} {'file' if total == 1 else 'files'}{folders}: {some}"
