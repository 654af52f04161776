"""Which files are images, by their names; those that are left out are counted, so that none is lost
in silence."""

from __future__ import annotations

import mimetypes
import sys
from collections import Counter
from pathlib import Path, PurePosixPath

from PIL import Image

# endings that Pillow knows of files that it cannot read, or that are mostly of other things than
# pictures
OF_OTHERS = {
    ".bufr",
    ".emf",
    ".eps",
    ".fit",
    ".grib",
    ".h5",
    ".hdf",
    ".iim",
    ".mpeg",
    ".mpg",
    ".ps",
    ".wmf",
}
# further endings of pictures, which are read where Pillow (or a plugin of it) has learned to
PICTURES = {
    ".3fr",
    ".arw",
    ".avif",
    ".cr2",
    ".cr3",
    ".crw",
    ".dng",
    ".emf",
    ".eps",
    ".erf",
    ".exr",
    ".heic",
    ".heics",
    ".heif",
    ".heifs",
    ".hif",
    ".j2k",
    ".jls",
    ".jp2",
    ".jxl",
    ".jxr",
    ".kdc",
    ".mrw",
    ".nef",
    ".nrw",
    ".orf",
    ".pef",
    ".psb",
    ".raf",
    ".raw",
    ".rw2",
    ".sr2",
    ".srf",
    ".srw",
    ".svg",
    ".svgz",
    ".webp",
    ".wmf",
    ".x3f",
    ".xcf",
}
SYNONYMS = {".jfi", ".jif", ".pjp", ".pjpeg"}  # of .jpg, which Pillow does not list
STARTS = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"II*\0",
    b"MM\0*",
)  # of files by another name
HIDDEN, CIRCLE, NOTHING, CLOSED = (
    "hidden",
    "linked in a circle",
    "linked to nothing",
    "that cannot be opened",
)


def readable_endings() -> set[str]:
    """The endings of image files that this Pillow reads, with the plugins that are registered
    now."""
    known = Image.registered_extensions()
    return ({ending for ending, kind in known.items() if kind in Image.OPEN} | SYNONYMS) - OF_OTHERS


class Selection:
    """Takes images by their names, and counts what it leaves out: `left_out`, how many by the
    reason."""

    def __init__(self) -> None:
        self.endings = readable_endings()
        self.left_out: Counter[str] = Counter()

    def takes(self, name: str, file: Path | None = None) -> bool:
        """Is this a file to read? `name` is its path in the set; in `file` it is looked whether one
        of an unknown ending is an image after all, to count it."""
        ending = PurePosixPath(name).suffix.lower()
        hidden = is_hidden(name)
        if ending in self.endings:
            self.left_out[HIDDEN] += hidden
            return not hidden
        if not hidden and ending in PICTURES:
            self.left_out[f"{ending} (this Pillow cannot read them)"] += 1
        elif (
            not hidden
            and file is not None
            and mimetypes.guess_type(name)[0] is None
            and _begins_as_image(file)
        ):
            called = ending if ending.isascii() and ending.isprintable() else "otherwise called"
            self.left_out[
                f"{called or 'without an ending'} (images by their content: name them so)"
            ] += 1
        return False

    def __str__(self) -> str:
        """What was left out and why, in one line; nothing where nothing was."""
        counted = [(many, why) for why, many in self.left_out.items() if many]
        if not counted:
            return ""
        total, some = (
            sum(many for many, _ in counted),
            ", ".join(f"{m} {w}" for m, w in sorted(counted, reverse=True)),
        )
        folders = any(why in (CIRCLE, CLOSED) for _, why in counted)
        return f"left out {total} {'file' if total == 1 else 'files'}{' or folders' if folders else ''}: {some}"


def say_left_out(name: str, what: str) -> None:
    """Say what was left out of a set, if anything."""
    if what:
        print(f"{name if name.isprintable() else repr(name)}: {what}", file=sys.stderr, flush=True)


def is_hidden(name: str) -> bool:
    """Is it, or a folder in its path, one that programs keep for themselves (.ipynb_checkpoints,
    ._x.jpg)?"""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _begins_as_image(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(12)
    except OSError:
        return False  # nothing is known about it
    return start.startswith(STARTS) or (start[:4] == b"RIFF" and start[8:] == b"WEBP")
