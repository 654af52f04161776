"""A folder of images as a data set; if every image is in a sub-folder, the sub-folders are the
classes.

Links to folders are followed; hidden files and folders (`.ipynb_checkpoints`) are not read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch

from issl.data.encoded import Decoding, Files, check
from issl.data.images import Images, sample_positions
from issl.data.lazy_pixels import LazyPixels
from issl.data.selection import CIRCLE, CLOSED, NOTHING, Selection, is_hidden, say_left_out
from issl.errors import IsslError, is_whole

PREFIX = "folder:"
VERSION = 2  # of `read`; 1: an image's index was its place among the sorted files
LARGEST_SIDE = 8192  # px: an image of 200 MB


def folder_of(name: str, split: str) -> Path:
    """The folder of the data set `folder:PATH`; IsslError if there is none, and for a split other
    than train."""
    if split != "train":
        raise IsslError(
            f"split {split!r}: {name} is an image folder, which has no splits; use a set that has"
        )
    folder = Path(name.removeprefix(PREFIX)).expanduser()
    if not folder.is_dir():
        raise IsslError(
            f"image folder {str(folder)!r} does not exist; write folder:PATH of a folder of images"
        )
    return folder


def image_files(folder: Path, selection: Selection | None = None) -> list[Path]:
    """All images below the folder, sorted, what is left out counted by `selection`; IsslError if
    there are none."""
    selection = selection or Selection()
    files = sorted(
        p for p in _files(folder, selection) if selection.takes(p.relative_to(folder).as_posix(), p)
    )
    if not files:
        left_out = f"; {selection}" if str(selection) else ""
        raise IsslError(
            f"image folder {str(folder)!r} has no images (looked for .jpg, .png and all else that this Pillow reads, "
            f"also in sub-folders{left_out})"
        )
    for path in files:
        try:
            str(path).encode()
        except UnicodeEncodeError as error:
            raise IsslError(
                f"image folder: the name {str(path)!r} is not in UTF-8; rename this file"
            ) from error
    return files


def _files(folder: Path, selection: Selection) -> Iterator[Path]:
    """All files below the folder, through links too, but not through one to a folder that it is in
    itself."""
    todo: list[tuple[str, tuple[str, ...]]] = [(str(folder), ())]
    while todo:
        place, holders = todo.pop()  # holders: where the links that led here really are
        hidden = is_hidden(Path(place).relative_to(folder).as_posix())
        try:
            entries = list(os.scandir(place))
        except OSError:
            selection.left_out[CLOSED] += not hidden
            continue
        for entry in entries:
            linked, hidden_too = entry.is_symlink(), hidden or is_hidden(entry.name)
            if linked and not os.path.exists(entry.path):  # noqa: PTH110 (a million `Path`s are slow)
                selection.left_out[NOTHING] += not hidden_too
            elif entry.is_file():
                yield Path(entry.path)
            elif entry.is_dir() and not linked:
                todo.append((entry.path, holders))
            elif entry.is_dir() and not hidden_too:
                real, here = os.path.realpath(entry.path), (*holders, os.path.realpath(place))
                if any(os.path.commonpath([real, holder]) == real for holder in here):
                    selection.left_out[CIRCLE] += 1
                else:
                    todo.append((entry.path, here))


def path_index(path: str) -> int:
    """An image's index: 62 bits of the hash of its path in the folder, so other files change
    nothing about it."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") >> 2


def read(
    folder: Path,
    n: int | None,
    seed: int,
    size: int,
    skip_broken: bool = False,
    workers: int | None = None,
    quiet: bool = False,
) -> Images:
    """n of the images below the folder (default: all) as squares of `size` px, decoded when they
    are needed; attributes: index, path, label_name."""
    check_size(size)
    selection = Selection()
    every = [path.relative_to(folder).as_posix() for path in image_files(folder, selection)]
    say_left_out(f"folder:{folder.name}", "" if quiet else str(selection))
    rows = sample_positions(f"folder:{folder}", len(every), n, seed)
    files = Files(folder, every if n is None else [every[i] for i in rows])
    good, broken = check(files, f"folder:{folder}", skip_broken)
    names = [files.paths[i] for i in good]
    attributes = pd.DataFrame({"index": [path_index(name) for name in names], "path": names})
    labels = None
    if all("/" in path for path in every):
        classes = sorted({path.partition("/")[0] for path in every})
        known = [name.partition("/")[0] for name in names]
        attributes["label_name"] = known
        number = {name: k for k, name in enumerate(classes)}
        labels = torch.tensor([number[name] for name in known], dtype=torch.int64)
    pixels = LazyPixels(Decoding(files, size), (size, size), good, workers)
    return Images(pixels, labels, attributes, f"folder:{folder.name}", broken=broken)


def check_size(size: int) -> None:
    """IsslError for a side that is too small or too large."""
    if not is_whole(size, 8, LARGEST_SIDE):
        raise IsslError(
            f"size={size!r}: images need a side of 8 px or more, and at most {LARGEST_SIDE}: a whole number"
        )
