"""All data sets by name: `load` them, `count` their images, `identity` says which ones they are.

Each kind has a module of its own: `scenes` (drawn), `published` (CIFAR, FairFace), `judged_pairs`,
`folder`, `huggingface`. Nothing is downloaded unless asked for (`issl download NAME`, `hf:NAME`).
"""

from __future__ import annotations

import sys
from pathlib import Path

from issl.data import folder, huggingface, judged_pairs, published, scenes
from issl.data.folder import Folder
from issl.data.huggingface import Table
from issl.data.identity import SetIdentity
from issl.data.images import Images, sample_positions
from issl.errors import IsslError, is_whole

LARGEST_SEED = 1 << 32
LARGEST_SIDE = 8192  # px: an image of 200 MB
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
    """Load a data set.

    Args:
        name: `scenes`, `scenes-swapped` (`issl.data.scenes.swapped`), `cifar10`, `cifar100`,
            `fairface`, `cifair10` (`issl.data.judged_pairs`), `folder:PATH` or `hf:PATH_OR_NAME`
            (`issl.data.huggingface`). The last two are decoded when they are needed, so they may be
            larger than memory; the others are held in memory.
        split: `train` or `test`, or a split of the `hf:` set.
        n: How many images; None gives all. Sets on disk give a random subset (keyed by `seed`) in
            the original order, each image keeping its original `index`; `scenes` draws the first n.
        root: The folder of the published sets; default $ISSL_DATA.
        seed: The seed of the subset; for `scenes`, of the drawing.
        size: Side in px of the square images, only for `folder:`, `hf:` (default 32) and `fairface`
            (default 64).
        skip_broken: Leave out images that cannot be decoded (`.broken` of the result names them);
            only for `folder:` and `hf:`.
        workers: The number of decoding threads; default: one per core.
        quiet: Do not report images that are not those of the published set, or files that were left
            out.

    Raises:
        IsslError: Unknown name or split, missing or damaged file, more images asked for than there
            are.
    """
    if not isinstance(name, str):
        raise IsslError(f"data set {name!r}: give its name, such as cifar10 or folder:PATH")
    if n is not None and not is_whole(n, 1):
        raise IsslError(f"n={n!r}: ask {name!r} for a whole number of images, or None for all")
    if not is_whole(seed, 0, LARGEST_SEED):
        raise IsslError(f"seed={seed!r}: give a whole number from 0 to 2³²")
    if workers is not None and not is_whole(workers, 1):
        raise IsslError(f"workers={workers!r}: give a number of threads, or None for one per core")
    known = (*DRAWN, *published.SOURCES, "cifair10")
    if size is not None and name in known and not is_resized(name):
        raise IsslError(f"size={size}: {name!r} has a fixed size")
    if size is not None and not is_whole(size, 8, LARGEST_SIDE):
        raise IsslError(f"size={size!r}: give a whole number of px, 8 to {LARGEST_SIDE}")
    if name in DRAWN:
        return (scenes.draw if name == "scenes" else scenes.swapped)(n, split, seed)
    if (found := _encoded(name, split, size or 32)) is not None:
        if isinstance(found, Folder) and found.left_out and not quiet:
            print(f"{folder.printable(found.called)}: {found.left_out}", file=sys.stderr)
        return found.images(n, seed, skip_broken, workers)
    if not quiet:
        say(identity(name, split, root))
    if name == "cifair10":
        return judged_pairs.read(split, n, root, seed)
    return published.read(
        name, split, root, lambda total: sample_positions(name, total, n, seed), size
    )


def without_place(name: str) -> str:
    """A set's name to show to others: a PATH is shortened to its last part."""
    kind, colon, place = name.partition(":")
    return f"{kind}:{Path(place).name}" if colon else name


def is_resized(name: str) -> bool:
    """Whether `load` takes a `size` for this set."""
    return name == "fairface" or name.startswith((folder.PREFIX, huggingface.PREFIX))


def count(name: str, split: str = "train", root: str | Path | None = None) -> int | None:
    """How many images there are, without reading them; None for scenes, of which any number can be
    drawn."""
    if name in DRAWN:
        return None
    if (found := _encoded(name, split)) is not None:
        return len(found)
    if name == "cifair10":
        return published.count("cifar10", "train", root)
    return published.count(name, split, root)


def identity(name: str, split: str = "train", root: str | Path | None = None) -> SetIdentity:
    """Which images `load` gives, for cache keys: the hash of their content.

    Published sets need not be here. If one is not, this is the identity of the images on which this
    project's results rest. For an image folder, it is the hash of its file names, sizes and times.
    In other cases, raises IsslError where `load` would.
    """
    if name in DRAWN:
        return SetIdentity(f"{name}-{scenes.VERSION}", name)
    if (found := _encoded(name, split)) is not None:
        return found.which()
    if name == "cifair10":
        return judged_pairs.identity(split, root)
    return published.identity(name, split, root)


def _encoded(name: str, split: str, size: int = 32) -> Folder | Table | None:
    """A set whose images are decoded when they are needed; None for others."""
    if name.startswith(folder.PREFIX):
        return folder.open_set(name, split, size)
    return huggingface.open_set(name, split, size) if name.startswith(huggingface.PREFIX) else None


def say(which: SetIdentity) -> None:
    """Say once which images these are, if they are not a set as it was published."""
    if which.about and which.digest not in _said:
        _said.add(which.digest)
        print(f"{which.name}: {which.about}", file=sys.stderr, flush=True)


_said: set[str] = set()
