"""All data sets by name: `load` them, `count` their images, `identity` says which ones they are.

Each kind of set has a module of its own: `scenes` (drawn), `published` (CIFAR, FairFace),
`image_folder`, `archives`, `judged_pairs`. Nothing is downloaded unless asked for (`issl download
NAME`).
"""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path

from issl.data import archives, image_folder, judged_pairs, published, scenes
from issl.data.identity import DIGITS, SetIdentity, digest
from issl.data.images import Images, sample_positions
from issl.data.selection import Selection
from issl.errors import IsslError, is_whole
from issl.files import file_digest

LARGEST_SEED = 1 << 32
DRAWN = ("scenes", "scenes-swapped")


def load(
    name: str,
    split: str = "train",
    n: int | None = None,
    root: str | Path | None = None,
    seed: int = 0,
    size: int | None = None,
    skip_broken: bool = False,
    workers: int | None = None,
    quiet: bool = False,
) -> Images:
    """Load a data set: `scenes`, `cifar10`, `cifar100`, `fairface`, `cifair10`, `folder:PATH`,
    `tar:PATH`, `parquet:PATH` or `arrow:PATH`.

    The last four are read where they are and decoded when they are needed, so they may be larger
    than memory (`issl.data.archives`); the others are held in memory.

    scenes-swapped is each of n scenes on four backgrounds, see `issl.data.scenes.swapped`; cifair10
    is CIFAR-10's training set with its judged pairs, see `issl.data.judged_pairs`.

    n     how many images; None gives all. Sets on disk give a random subset (keyed by `seed`) in
          the original order, each image keeping its original `index`; `scenes` draws the first n.
    root  the folder of the sets on disk; default $ISSL_DATA.
    seed  of the subset; for `scenes`, of the drawing.
    size  side in px of the square images; only for sets with a PATH (default 32) and `fairface`
          (default 64).
    skip_broken  leave images out that cannot be decoded (`.broken` of the result names them); only
                 for sets with a PATH
    workers      threads that decode; default: the cores
    quiet        do not say where the images are not those of the published set, nor which files
                 were left out

    Raises IsslError: unknown name or split, missing or damaged file, more images asked for than
    there are.
    """
    if not isinstance(name, str):
        raise IsslError(f"data set {name!r}: give its name, such as cifar10 or folder:PATH")
    if n is not None and not is_whole(n, 1):
        raise IsslError(
            f"n={n!r}: data set {name!r}: ask for a whole number of images, 1 or more, or None for all"
        )
    if not is_whole(seed, 0, LARGEST_SEED):
        raise IsslError(f"seed={seed!r}: give a whole number from 0 to 2³²")
    if workers is not None and not is_whole(workers, 1):
        raise IsslError(
            f"workers={workers!r}: give a whole number of threads, 1 or more, or None for the cores"
        )
    if size is not None and not is_resized(name):
        raise IsslError(
            f"size={size}: {name!r} has a fixed size; it applies to folder:PATH and fairface"
        )
    if name == "scenes":
        return scenes.draw(n, split=split, seed=seed)
    if name == "scenes-swapped":
        return scenes.swapped(n, split=split, seed=seed)
    side = 32 if size is None else size
    if name.startswith(image_folder.PREFIX):
        return image_folder.read(
            image_folder.folder_of(name, split), n, seed, side, skip_broken, workers, quiet
        )
    if archives.is_archive(name):
        return archives.read(name, split, n, seed, side, skip_broken, workers, quiet)
    if not quiet:
        say(identity(name, split, root))
    if name == "cifair10":
        return judged_pairs.read(split, n, root, seed)
    return published.read(
        name, split, root, lambda total: sample_positions(name, total, n, seed), size
    )


def without_place(name: str) -> str:
    """A set's name for others to read: of one with a PATH, only the last part of it."""
    kind, colon, place = name.partition(":")
    return f"{kind}:{Path(place).name}" if colon else name


def is_resized(name: str) -> bool:
    """Whether `load` takes a `size` for this set."""
    return name.startswith(image_folder.PREFIX) or archives.is_archive(name) or name == "fairface"


def count(name: str, split: str = "train", root: str | Path | None = None) -> int | None:
    """How many images there are, without reading them; None for `scenes`, which draws any
    number."""
    if name in DRAWN:
        return None
    if name.startswith(image_folder.PREFIX):
        return len(image_folder.image_files(image_folder.folder_of(name, split)))
    if archives.is_archive(name):
        return archives.count(name, split)
    if name == "cifair10":
        return published.count("cifar10", "train", root)
    return published.count(name, split, root)


def identity(name: str, split: str = "train", root: str | Path | None = None) -> SetIdentity:
    """Which images `load` gives, for cache keys: the hash of their content.

    Published sets need not be here: then it is that of the images on which this project's results
    rest. Of an image folder it is the hash of its file names, sizes and times. Raises IsslError
    where `load` would for other reasons.
    """
    if name in DRAWN:
        return SetIdentity(f"{name}-{scenes.VERSION}", name)
    if name.startswith(image_folder.PREFIX):
        folder = image_folder.folder_of(name, split)
        files = image_folder.image_files(folder, selection := Selection())
        stats = [(str(p.relative_to(folder)), p.stat()) for p in files]
        rows = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
        key = f"{digest(repr(rows).encode())}-{image_folder.VERSION}"
        return SetIdentity(key, without_place(name), str(selection))
    if archives.is_archive(name):
        paths = archives.files(name, split)
        stamps = [_digest(p, p.stat().st_size, p.stat().st_mtime_ns)[:DIGITS] for p in paths]
        names, left_out = archives.listed(
            name, split
        )  # which these are depends on what Pillow reads
        stamps += [digest(repr(names).encode())] if names else []
        return SetIdentity("-".join(stamps), without_place(name), left_out)
    return (
        judged_pairs.identity(split, root)
        if name == "cifair10"
        else published.identity(name, split, root)
    )


@lru_cache(maxsize=64)
def _digest(path: Path, size: int, mtime: int) -> str:
    return file_digest(path)


def say(which: SetIdentity) -> None:
    """Say which images these are, once, where they are not a set as it was published."""
    if which.about and which.digest not in _said:
        _said.add(which.digest)
        print(f"{which.name}: {which.about}", file=sys.stderr, flush=True)


_said: set[str] = set()
