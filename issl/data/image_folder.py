"""A folder of images as a data set; if every image is in a sub-folder, the sub-folders are the classes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pandas as pd
import torch

from issl.data.encoded import Decoding, Files, check
from issl.data.images import Images, sample_positions
from issl.data.lazy_pixels import LazyPixels
from issl.errors import IsslError, is_whole

PREFIX = "folder:"
VERSION = 2  # of `read`; 1: an image's index was its place among the sorted files
LARGEST_SIDE = 8192  # px: an image of 200 MB
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


def folder_of(name: str, split: str) -> Path:
    """The folder of the data set `folder:PATH`; IsslError if there is none, and for a split other than train."""
    if split != "train":
        raise IsslError(f"split {split!r}: {name} is an image folder, which has no splits; use a set that has")
    folder = Path(name.removeprefix(PREFIX)).expanduser()
    if not folder.is_dir():
        raise IsslError(f"image folder {str(folder)!r} does not exist; write folder:PATH of a folder of images")
    return folder


def image_files(folder: Path) -> list[Path]:
    """All images below the folder, sorted; IsslError if there are none."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise IsslError(
            f"image folder {str(folder)!r} has no images (looked for {', '.join(sorted(SUFFIXES))}, also in "
            "sub-folders)"
        )
    for path in files:
        try:
            str(path).encode()
        except UnicodeEncodeError as error:
            raise IsslError(f"image folder: the name {str(path)!r} is not in UTF-8; rename this file") from error
    return files


def path_index(path: str) -> int:
    """An image's index: 62 bits of the hash of its path in the folder, so other files change nothing about it."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") >> 2


def read(
    folder: Path, n: int | None, seed: int, size: int, skip_broken: bool = False, workers: int | None = None
) -> Images:
    """n of the images below the folder (default: all) as squares of `size` px, decoded when they are needed;
    attributes: index, path, label_name."""
    check_size(size)
    every = [path.relative_to(folder).as_posix() for path in image_files(folder)]
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
