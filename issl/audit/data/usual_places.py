"""CIFAR-10 where other programs leave it, so that a first run can show real photos without being
told where they are.

Looked at, in this order: the data root; `data` and `datasets` in the current folder and at home;
torch's cache; the caches of Hugging Face's hub and of its `datasets`; Keras' cache. Only these
folders are looked at, nothing in them is searched, and nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from issl.data import datasets, published
from issl.errors import IsslError

NAME = "cifar10"


@dataclass(frozen=True)
class Place:
    """Where a set is: what `datasets.load` takes to read it.

    dataset, root   its arguments
    folder, layout  for the reader
    """

    dataset: str
    root: Path | None
    folder: Path
    layout: str


def find_cifar10(root: Path | None, n: int) -> tuple[Place | None, list[str]]:
    """The first usual place that holds at least n training images of CIFAR-10 and can be read, or
    None; and a line for each place before it that holds the set, but damaged or too small.

    root   the data root: the argument of a command, or $ISSL_DATA
    """
    wrong = []
    for place in _places(root):
        try:
            count = datasets.count(place.dataset, "train", place.root)
            if count is None or count < n:
                raise IsslError(f"it has {count:,} training images, and {n:,} are needed")
            # a damaged file is found now, not in the middle of a run
            datasets.load(place.dataset, "train", 1, place.root).require_labels()
        except (IsslError, OSError) as error:
            wrong.append(f"{place.folder} ({place.layout}): {_first_sentence(error)}")
        else:
            return place, wrong
    return None, wrong


def _places(root: Path | None) -> Iterator[Place]:
    """Every usual place that has the set's files, whatever is in them."""
    seen: set[Path] = set()
    for folder in ([] if root is None else [root]) + _roots():
        try:
            layout = published.layout(NAME, "train", folder)
        except OSError:
            # a folder of somebody else's, which we may not read, is not where this person keeps
            # images
            continue
        if layout is not None and folder.resolve() not in seen:
            seen.add(folder.resolve())
            yield Place(NAME, folder.resolve(), folder, layout)
    for path in _arrow_files():
        yield Place(
            f"arrow:{path.resolve()}", None, path, "an arrow file of Hugging Face's datasets"
        )


def _roots() -> list[Path]:
    """Folders that may be a data root."""
    owner, name = published.SOURCES[NAME].repository.split("/")
    snapshots = [
        path
        for repository in (f"datasets--{owner}--{name}", f"datasets--{name}")
        for path in sorted(
            (_hugging_face("HF_HUB_CACHE", "hub") / repository / "snapshots").glob("*")
        )
    ]
    torch, keras = _cache("TORCH_HOME", ".cache/torch"), _cache("KERAS_HOME", ".keras") / "datasets"
    beside = [base / folder for base in (Path.cwd(), _home()) for folder in ("data", "datasets")]
    # newer versions of Keras unpack the archive into a folder of the archive's name
    return [
        *beside,
        torch,
        torch / "data",
        torch / "datasets",
        *snapshots,
        keras,
        keras / "cifar-10-batches-py-target",
    ]


def _arrow_files() -> list[Path]:
    """CIFAR-10's training set as the library `datasets` prepares it."""
    owner, name = published.SOURCES[NAME].repository.split("/")
    cache = _hugging_face("HF_DATASETS_CACHE", "datasets")
    return [
        p
        for folder in (f"{owner}___{name}", name)
        for p in sorted((cache / folder).glob("*/*/*/*-train.arrow"))
    ]


def _hugging_face(variable: str, folder: str) -> Path:
    given = os.environ.get(variable)
    return Path(given).expanduser() if given else _cache("HF_HOME", ".cache/huggingface") / folder


def _cache(variable: str, at_home: str) -> Path:
    given = os.environ.get(variable)
    return Path(given).expanduser() if given else _home() / at_home


def _home() -> Path:
    """The person's home; where a container's user has none, the current folder."""
    try:
        return Path.home()
    except RuntimeError:
        return Path.cwd()


def _first_sentence(error: Exception) -> str:
    return str(error).splitlines()[0].split(". ")[0]
