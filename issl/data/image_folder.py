"""A folder of images as a data set; if every image is in a sub-folder, the sub-folders are the classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from issl.data.images import Images, decode, sample_positions
from issl.errors import IsslError

PREFIX = "folder:"
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
    return files


def read(folder: Path, n: int | None, seed: int, size: int) -> Images:
    """n of the images below the folder (default: all) as squares of `size` px; attributes: index, path, label_name."""
    if size < 8:
        raise IsslError(f"size={size}: images need a side of 8 px or more")
    every = image_files(folder)
    rows = sample_positions(f"folder:{folder}", len(every), n, seed)
    files = [every[i] for i in rows]
    pixels = np.stack([decode(p.read_bytes(), size, str(p)) for p in files])
    attributes = pd.DataFrame({"index": rows, "path": [str(p.relative_to(folder)) for p in files]})
    parents = [p.relative_to(folder).parts[0] if p.parent != folder else None for p in every]
    labels = None
    if all(p is not None for p in parents):
        names = sorted({p for p in parents if p is not None})
        labels = torch.tensor([names.index(parents[i] or "") for i in rows], dtype=torch.int64)
        attributes["label_name"] = [parents[i] for i in rows]
    return Images(torch.from_numpy(pixels), labels, attributes, f"folder:{folder.name}")
