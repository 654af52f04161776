"""`load`: the one door to all data sets, and the readers of those that lie on disk.

CIFAR and FairFace are read in the Hugging Face parquet layout (images as encoded bytes) or, for CIFAR, in
torchvision's layout, whose checksums torchvision itself verifies. Nothing is downloaded unless asked for
(`issl download NAME`): a missing file is an error that says where it belongs and how to get it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, UnidentifiedImageError

from issl.data import scenes
from issl.data.images import Images, sample_positions
from issl.errors import IsslError

T = TypeVar("T")
Choose = Callable[[int], np.ndarray]  # from the number of images there are to the positions of those wanted

ENVIRONMENT = "ISSL_DATA"
DRAWN = ("scenes", "scenes-swapped")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}

# names of the label codes, for files that do not carry them in their own metadata (the published ones do)
KNOWN_NAMES = {
    ("cifar10", "label"): (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    ),
    ("fairface", "age"): ("0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "more than 70"),
    ("fairface", "gender"): ("Male", "Female"),
    ("fairface", "race"): (
        "East Asian", "Indian", "Black", "White", "Middle Eastern", "Latino_Hispanic", "Southeast Asian",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where a set lies under the data root, and which of its columns mean what."""

    folder: str  # of the parquet files, under the root
    image: str  # column of encoded images
    label: str  # column of class numbers
    splits: dict[str, str]  # our split name → prefix of its files
    repository: str  # on the Hugging Face hub
    size: int  # side of the tensor the images are brought to


SOURCES = {
    "cifar10": Source("cifar10/plain_text", "img", "label", {"train": "train", "test": "test"}, "uoft-cs/cifar10", 32),
    "cifar100": Source(
        "cifar100/cifar100", "img", "fine_label", {"train": "train", "test": "test"}, "uoft-cs/cifar100", 32
    ),
    "fairface": Source(
        "fairface/0.25",
        "image",
        "race",
        {"train": "train", "test": "validation"},
        "HuggingFaceM4/FairFace",
        64,
    ),
}
CIFAR10_TRAIN = 50_000  # images of its training set, judged pairs count from there
TORCHVISION = {"cifar10": ("CIFAR10", "cifar-10-batches-py"), "cifar100": ("CIFAR100", "cifar-100-python")}


def _torchvision_set(name: str, root: Path | None, train: bool, download: bool) -> Any:
    import torchvision  # here, not above: it takes longer to import than torch, and few runs read this layout

    return getattr(torchvision.datasets, TORCHVISION[name][0])(root, train=train, download=download)


def load(
    name: str,
    split: str = "train",
    n: int | None = None,
    root: str | Path | None = None,
    seed: int = 0,
    size: int | None = None,
) -> Images:
    """Load a data set: `scenes`, `cifar10`, `cifar100`, `fairface`, `cifair10` or `folder:PATH`.

    scenes-swapped is each of n scenes on four backgrounds, see `issl.data.scenes.swapped`; cifair10 is
    CIFAR-10's training set with those test images that people judged to show the same as a training image.

    n     how many images; None gives all. Sets on disk give a random subset (keyed by `seed`) in the
          original order, each image keeping its original `index`; `scenes` draws the first n.
    root  where the sets on disk lie; default $ISSL_DATA.
    seed  of the subset; for `scenes`, of the drawing.
    size  side in px of the square images; only for `folder:` (default 32) and `fairface` (default 64).

    Raises IsslError: unknown name or split, missing or damaged file, more images asked for than there are.
    """
    if name == "scenes":
        return scenes.draw(n, split=split, seed=seed)
    if name == "scenes-swapped":
        return scenes.swapped(n, split=split, seed=seed)
    if size is not None and not name.startswith("folder:") and name != "fairface":
        raise IsslError(f"size={size}: {name!r} has a fixed size; it applies to folder:PATH and fairface")
    if name.startswith("folder:"):
        return _folder(_folder_path(name, split), n, seed, 32 if size is None else size)
    if name == "cifair10":
        return _judged_pairs(split, n, root, seed)
    return _read(name, split, root, lambda total: sample_positions(name, total, n, seed), size)


def _read(name: str, split: str, root: str | Path | None, choose: Choose, size: int | None = None) -> Images:
    source, files = _locate(name, split, root)
    if files:
        return _parquet(name, source, files, choose, source.size if size is None else size)
    return _torchvision(name, split, _torchvision_root(name, data_root(root)), choose)


def data_root(root: str | Path | None = None) -> Path | None:
    """The folder of the data sets: the argument, else $ISSL_DATA, else None."""
    value = root or os.environ.get(ENVIRONMENT)
    return Path(value).expanduser() if value else None


def fingerprint(name: str, split: str = "train", root: str | Path | None = None) -> str:
    """What identifies the bytes that `load` would read, for cache keys; raises where `load` would.

    Content hash of the source files; of an image folder, the hash of its file names, sizes and times.
    """
    if name in DRAWN:
        return f"{name}-{scenes.VERSION}"
    if name.startswith("folder:"):
        folder = _folder_path(name, split)
        rows = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in _image_files(folder)]
        return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
    if name == "cifair10":
        pairs = _pairs_file(split, root)
        digest = _digest(pairs, pairs.stat().st_size, pairs.stat().st_mtime_ns)[:16]
        return "-".join([fingerprint("cifar10", "train", root), fingerprint("cifar10", "test", root), digest])
    _, files = _locate(name, split, root)
    if not files:
        place = _torchvision_root(name, data_root(root))
        assert place is not None  # `_locate` found the set there
        files = sorted((place / TORCHVISION[name][1]).iterdir())
    return "-".join(_digest(p, p.stat().st_size, p.stat().st_mtime_ns)[:16] for p in files)


def count(name: str, split: str = "train", root: str | Path | None = None) -> int | None:
    """How many images there are, without reading them; None for `scenes`, which draws any number."""
    if name in DRAWN:
        return None
    if name.startswith("folder:"):
        return len(_image_files(_folder_path(name, split)))
    if name == "cifair10":
        return count("cifar10", "train", root)
    _, files = _locate(name, split, root)
    if not files:
        return 50_000 if split == "train" else 10_000  # torchvision's layout is the whole set or nothing
    return sum(_opened(path, pq.read_metadata).num_rows for path in files)


@lru_cache(maxsize=64)
def _digest(path: Path, size: int, mtime: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(name: str, root: str | Path | None = None) -> Path:
    """Fetch a data set into the data root from its public home; returns where it now lies."""
    base = data_root(root)
    if base is None:
        raise IsslError(f"download of {name!r}: say where to, with --data-root DIR or {ENVIRONMENT}=DIR")
    if name not in SOURCES:
        raise IsslError(f"download of {name!r}: only {', '.join(SOURCES)} can be downloaded")
    target = base / SOURCES[name].folder
    try:
        if name in TORCHVISION:
            target = base / TORCHVISION[name][1]
            for train in (True, False):
                _torchvision_set(name, base, train=train, download=True)
        else:
            import huggingface_hub  # slow to import, and needed here alone

            huggingface_hub.snapshot_download(
                SOURCES[name].repository, repo_type="dataset", allow_patterns="0.25/*.parquet",
                local_dir=base / Path(SOURCES[name].folder).parts[0],
            )  # fmt: skip
    except (OSError, RuntimeError) as error:
        raise IsslError(f"download of {name!r} failed ({error}). {_how_to_get(name, base)}") from error
    return target


def _locate(name: str, split: str, root: str | Path | None) -> tuple[Source, list[Path]]:
    """The parquet files of a set, or an empty list where torchvision's layout is there instead."""
    if name not in SOURCES:
        raise IsslError(f"data set {name!r}: known are scenes, {', '.join(SOURCES)}, cifair10 and folder:PATH")
    source, base = SOURCES[name], data_root(root)
    if split not in source.splits:
        raise IsslError(f"split {split!r}: {name} has {' and '.join(source.splits)}")
    if base is None:
        raise IsslError(
            f"data set {name!r} is read from disk: name its folder with --data-root DIR (root=…) or {ENVIRONMENT}=DIR. "
            + _how_to_get(name, Path("DIR"))
        )
    if not base.is_dir():
        raise IsslError(f"data root {str(base)!r} is not a folder; check --data-root or {ENVIRONMENT}")
    files = sorted((base / source.folder).glob(f"{source.splits[split]}-*.parquet"))
    if not files and _torchvision_root(name, base, required=False) is None:
        raise IsslError(f"data set {name!r} ({split}) is not under {str(base)!r}. {_how_to_get(name, base)}")
    return source, files


def _how_to_get(name: str, base: Path) -> str:
    source = SOURCES[name]
    places = [f"{base / source.folder}/{'|'.join(source.splits.values())}-*.parquet"]
    if name in TORCHVISION:
        places.append(f"{base / TORCHVISION[name][1]}/ (torchvision's layout)")
    return (
        f"Expected: {' or '.join(places)}. Get it with `issl download {name} --data-root {base}`, or copy the "
        f"parquet files of the Hugging Face data set {source.repository} there."
    )


def _torchvision_root(name: str, base: Path | None, required: bool = True) -> Path | None:
    """The folder to hand to torchvision: the root itself or the set's own folder in it."""
    candidates = [] if base is None or name not in TORCHVISION else [base, base / name]
    for candidate in candidates:
        if (candidate / TORCHVISION[name][1]).is_dir():
            return candidate
    if required:
        raise IsslError(f"data set {name!r} is not under {base}")
    return None


def _torchvision(name: str, split: str, root: Path | None, choose: Choose) -> Images:
    try:
        data = _torchvision_set(name, root, train=split == "train", download=False)
    except (RuntimeError, OSError, EOFError) as error:
        raise IsslError(
            f"data set {name!r} under {root}: {error} (a checksum differs or a file is missing); download it again"
        ) from error
    rows = choose(len(data.data))
    labels = np.asarray(data.targets)[rows]
    return Images(
        pixels=torch.from_numpy(np.ascontiguousarray(data.data[rows].transpose(0, 3, 1, 2))),
        labels=torch.from_numpy(labels.astype(np.int64)),
        attributes=pd.DataFrame({"index": rows, "label_name": np.array(data.classes)[labels]}),
        name=name,
    )


def _parquet(name: str, source: Source, files: Sequence[Path], choose: Choose, size: int) -> Images:
    table = pa.concat_tables([_opened(path, pq.read_table) for path in files])
    missing = {source.image, source.label} - set(table.column_names)
    if missing:
        raise IsslError(f"{files[0]}: no column {sorted(missing)}; {name} has {table.column_names}")
    rows = choose(len(table))
    table = table.take(rows)
    encoded = table.column(source.image).combine_chunks().field("bytes")
    pixels = np.empty((len(rows), 3, size, size), np.uint8)
    for k, data in enumerate(encoded):
        pixels[k] = decode(data.as_py(), size, f"image {rows[k]} of {name} ({files[0].parent})")
    attributes = pd.DataFrame({"index": rows})
    for column in table.column_names:
        if column != source.image:
            attributes[column] = _named(name, table, column)
    attributes["label_name"] = attributes[source.label]
    labels = torch.from_numpy(table.column(source.label).to_numpy().astype(np.int64))
    return Images(torch.from_numpy(pixels), labels, attributes, name)


def _pairs_file(split: str, root: str | Path | None) -> Path:
    if split != "train":
        raise IsslError(f"split {split!r}: cifair10 is one set, train")
    base = data_root(root)
    path = (base or Path("DIR")) / "cifair" / "duplicates_cifar10.csv"
    if base is None or not path.is_file():
        raise IsslError(
            f"data set 'cifair10' needs {path}: meta/duplicates_cifar10.csv of github.com/cvjena/cifair, under "
            f"the data root (--data-root DIR or {ENVIRONMENT}=DIR)"
        )
    return path


def _judged_pairs(split: str, n: int | None, root: str | Path | None, seed: int) -> Images:
    """n training images, the judged ones among them, followed by their test partners (index CIFAR10_TRAIN + TestID).

    Attributes: duplicate_of (of a test image, the index of its training partner; −1), duplicate_kind (near duplicate
    or very similar, as judged). Source: Barz & Denzler 2020, arXiv 1902.00423.
    """
    path = _pairs_file(split, root)
    table = pd.read_csv(path)
    missing = {"TestID", "TrainID", "Judgment"} - set(table.columns)
    if missing:
        raise IsslError(f"{path}: no column {sorted(missing)}; it has {', '.join(table.columns)}")
    table, judged = table.sort_values("TestID"), table["TrainID"].unique()

    def choose(total: int) -> np.ndarray:
        wanted = total if n is None else n
        if not len(judged) <= wanted <= total:
            raise IsslError(
                f"n={wanted}: cifair10 has {len(judged)} judged images among {total}; ask for as many or more"
            )
        others = np.setdiff1d(np.arange(total), judged)
        drawn = np.random.default_rng(seed).choice(others, wanted - len(judged), replace=False)
        return np.sort(np.concatenate([judged, drawn]))

    first = _read("cifar10", "train", root, choose)
    second = _read("cifar10", "test", root, lambda _: table["TestID"].to_numpy())
    assert first.labels is not None and second.labels is not None  # CIFAR-10 has them
    kinds = np.array(["exact duplicate", "near duplicate", "very similar"])[table["Judgment"].to_numpy()]
    attributes = pd.concat(
        [
            first.attributes.assign(duplicate_of=-1, duplicate_kind=""),
            second.attributes.assign(
                index=second.attributes["index"] + CIFAR10_TRAIN, duplicate_of=table["TrainID"].to_numpy(),
                duplicate_kind=kinds,
            ),
        ],
        ignore_index=True,
    )  # fmt: skip
    return Images(
        torch.cat([first.pixels, second.pixels]), torch.cat([first.labels, second.labels]), attributes, "cifair10"
    )


def _opened(path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise IsslError(f"{path} is not a readable parquet file ({error}); copy or download it again") from error


def _named(name: str, table: pa.Table, column: str) -> np.ndarray:
    """A column's values, class codes replaced by their names (from the file's metadata, else KNOWN_NAMES)."""
    values = table.column(column).to_numpy()
    metadata = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = metadata.get("info", {}).get("features", {}).get(column, {})
    names = feature.get("names") or KNOWN_NAMES.get((name, column))
    return values if names is None else np.array(names)[values.astype(np.int64)]


def _folder_path(name: str, split: str) -> Path:
    if split != "train":
        raise IsslError(f"split {split!r}: {name} is an image folder, which has no splits; use a set that has")
    folder = Path(name.removeprefix("folder:")).expanduser()
    if not folder.is_dir():
        raise IsslError(f"image folder {str(folder)!r} does not exist; write folder:PATH of a folder of images")
    return folder


def _image_files(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise IsslError(
            f"image folder {str(folder)!r} has no images (looked for {', '.join(sorted(IMAGE_SUFFIXES))}, also in "
            "sub-folders)"
        )
    return files


def _folder(folder: Path, n: int | None, seed: int, size: int) -> Images:
    """All images below a folder; sub-folders, where every image lies in one, are the classes."""
    if size < 8:
        raise IsslError(f"size={size}: images need a side of 8 px or more")
    every = _image_files(folder)
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


def decode(data: bytes, size: int, what: str) -> np.ndarray:
    """Encoded bytes to uint8 (3, size, size): the centred square, resized where it must be."""
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise IsslError(f"{what} cannot be decoded ({error}); repair or remove it") from error
    side = min(image.size)
    if image.size != (size, size):
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(image).transpose(2, 0, 1)
