"""The published data sets, CIFAR and FairFace: where they are, how they are read and downloaded.

They are read in the Hugging Face parquet layout (images as encoded bytes; needs pyarrow) or, for
CIFAR, in torchvision's layout, whose checksums torchvision itself verifies. A missing file is an
error that says where it belongs and how to get it. `identity` tells which images a set holds, by
their content, whatever the layout.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from issl.data.identity import SetIdentity, as_records, differences, digest, remembered
from issl.data.images import Images, decode
from issl.errors import IsslError

# from the number of images in the set to the positions of those wanted
Choose = Callable[[int], np.ndarray]
ENVIRONMENT = "ISSL_DATA"

# CIFAR-100's superclasses: twenty groups of five classes (Krizhevsky 2009, Learning Multiple Layers
# of Features from Tiny Images, §3.1)
SUPERCLASSES: dict[str, tuple[str, ...]] = {
    "aquatic mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit and vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household electrical devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large man-made outdoor things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large natural outdoor scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large omnivores and herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium-sized mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles 1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles 2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
_SUPERCLASS_OF = {name: group for group, names in SUPERCLASSES.items() for name in names}
CIFAR100_CLASSES = tuple(sorted(_SUPERCLASS_OF))  # by number
CIFAR100_SUPERCLASSES = tuple(_SUPERCLASS_OF[name] for name in CIFAR100_CLASSES)  # of each class
RACES = "East Asian,Indian,Black,White,Middle Eastern,Latino_Hispanic,Southeast Asian".split(",")
FACES = (
    "a derived copy of FairFace: its first 40,000 training and 5,000 validation photos, resized to "
    "64 × 64 px, as JPEG of quality 88, then as WebP of quality 79; nobody else has these bytes"
)


@dataclass(frozen=True)
class Source:
    """Where a set is under the data root, and what its columns mean."""

    folder: str  # of the parquet files, under the root
    image: str  # column of encoded images
    label: str  # column of class numbers
    repository: str  # on the Hugging Face hub
    # of each split: the beginning of its files' names, and what `identity` gives for the images on
    # which this project's results rest
    known: Mapping[str, tuple[str, SetIdentity]]
    names: Mapping[str, Sequence[str]]  # of the codes in a column
    size: int = 32  # side of the images in px
    lossy: bool = False  # pixels may depend on the decoder, so its files' bytes identify it
    unordered: bool = False  # copies differ in the order of rows; here, hashes order them
    torchvision: tuple[str, str] | None = None  # the set's class there, and its files' folder


SOURCES = {
    "cifar10": Source(
        "cifar10/plain_text",
        "img",
        "label",
        "uoft-cs/cifar10",
        known={
            "train": ("train", SetIdentity("a0181da372c0d63a", "cifar10")),
            "test": ("test", SetIdentity("8e2eb146ae340b09", "cifar10")),
        },
        names={"label": "airplane automobile bird cat deer dog frog horse ship truck".split()},
        torchvision=("CIFAR10", "cifar-10-batches-py"),
    ),
    "cifar100": Source(
        "cifar100/cifar100",
        "img",
        "fine_label",
        "uoft-cs/cifar100",
        known={
            "train": ("train", SetIdentity("43de8f4eb77d5528", "cifar100")),
            "test": ("test", SetIdentity("9ba650f9fc92e03a", "cifar100")),
        },
        names={"fine_label": CIFAR100_CLASSES},
        unordered=True,
        torchvision=("CIFAR100", "cifar-100-python"),
    ),
    "fairface": Source(
        "fairface/0.25",
        "image",
        "race",
        "HuggingFaceM4/FairFace",
        known={
            "train": ("train", SetIdentity("cca3925859a15ea3", "fairface-64px", FACES)),
            "test": ("validation", SetIdentity("02b960ef722af267", "fairface-64px", FACES)),
        },
        names={
            "age": "0-2,3-9,10-19,20-29,30-39,40-49,50-59,60-69,more than 70".split(","),
            "gender": ("Male", "Female"),
            "race": RACES,
        },
        size=64,
        lossy=True,
    ),
}


def data_root(root: str | Path | None = None) -> Path | None:
    """The folder of the data sets: the argument, else $ISSL_DATA, else None."""
    value = root or os.environ.get(ENVIRONMENT)
    return Path(value).expanduser() if value else None


def read(
    name: str, split: str, root: str | Path | None, choose: Choose, size: int | None = None
) -> Images:
    """The chosen images of a set.

    Attributes: index, label_name, the set's own columns, and CIFAR-100's superclass and row. `row`
    is the place in the files here; CIFAR-100's index is the same in every copy.
    """
    which, whole = identity(name, split, root), _open(name, split, _located(name, split, root))
    rows = choose(len(whole[1]))
    there = rows if which.order is None else np.array(which.order)[rows]
    images = _images(name, whole, there, size or SOURCES[name].size)
    images.attributes["index"] = rows
    if which.order is not None:
        images.attributes["row"] = there
    if name == "cifar100":
        superclass = np.array(CIFAR100_SUPERCLASSES)[images.require_labels().numpy()]
        images.attributes["superclass"] = superclass
    return images


def identity(name: str, split: str, root: str | Path | None) -> SetIdentity:
    """Which images are under the data root or, if there are none, the images on which this
    project's results rest.

    Raises IsslError for an unknown name or split, and for files that are damaged.
    """
    found = _found(name, split, data_root(root))
    if not found:
        return SOURCES[name].known[split][1]
    files = sorted(found[0].iterdir()) if found[0].is_dir() else found
    return remembered(f"{name} {split}", files, lambda: _identify(name, split, found))


def count(name: str, split: str, root: str | Path | None) -> int:
    """How many images the set has, without reading them."""
    found = _located(name, split, root)
    if found[0].is_dir():  # torchvision's layout is the whole set or nothing
        return 50_000 if split == "train" else 10_000
    return sum(len(_read_parquet(path, [SOURCES[name].label])) for path in found)


def download(name: str, root: str | Path | None = None) -> Path:
    """Download a data set from its public home into the data root; returns its folder."""
    base = data_root(root)
    if base is None:
        raise IsslError(
            f"download of {name!r}: say where to, with --data-root DIR or {ENVIRONMENT}=DIR"
        )
    if name not in SOURCES:
        raise IsslError(f"download of {name!r}: only {', '.join(SOURCES)} can be downloaded")
    source = SOURCES[name]
    try:
        if source.torchvision is not None:
            for train in (True, False):
                _torchvision_set(name, base, train, download=True)
            return base / source.torchvision[1]
        import huggingface_hub  # slow to import, and needed only here

        huggingface_hub.snapshot_download(
            source.repository,
            repo_type="dataset",
            allow_patterns="0.25/*.parquet",
            local_dir=base / Path(source.folder).parts[0],
        )
    except ImportError as error:
        raise IsslError(f"download of {name!r}: pip install huggingface_hub first") from error
    except (OSError, RuntimeError) as error:
        raise IsslError(
            f"download of {name!r} failed ({error}); copy the parquet files of Hugging Face's "
            f"{source.repository} to {base / source.folder}"
        ) from error
    return base / source.folder


def _identify(name: str, split: str, found: list[Path]) -> SetIdentity:
    source, (table, encoded) = SOURCES[name], _open(name, split, found)
    known = source.known[split][1]
    if source.lossy:
        columns = table.sort_index(axis=1).to_csv(index=False)
        content = [digest(data).encode() for data in encoded]
        here = digest(b"".join([*content, columns.encode()]))
        other = SetIdentity(here, name, f"not the photos that our results rest on ({known.about})")
        return known if here == known.digest else other
    images = _images(name, (table, encoded), np.arange(len(encoded)), source.size)
    sizes = [Image.open(io.BytesIO(data)).size for data in encoded if isinstance(data, bytes)]
    resized = len(sizes) - sizes.count((source.size, source.size))
    labels, order = images.require_labels().numpy(), None
    records = as_records(labels, images.tensor().numpy())
    if source.unordered:
        hashes = np.array([hashlib.sha256(record.tobytes()).digest() for record in records])
        rows = np.argsort(hashes, kind="stable")
        records, order = records[rows], rows.tolist()
    here = digest(records.tobytes())
    if here == known.digest and not resized:
        return replace(known, order=order)
    what, differs = differences(name, split, records, resized)
    return SetIdentity(here, f"{name}, not as published: {what}", differs, order)


def _found(name: str, split: str, base: Path | None) -> list[Path]:
    """The parquet files of a set or, where there are none, the one folder of torchvision's files;
    empty where there is neither. IsslError for an unknown name or split."""
    if name not in SOURCES:
        raise IsslError(
            f"data set {name!r}: known are scenes, {', '.join(SOURCES)}, cifair10, folder:PATH and "
            "hf:PATH_OR_NAME"
        )
    source = SOURCES[name]
    if split not in source.known:
        raise IsslError(f"split {split!r}: {name} has {' and '.join(source.known)}")
    if base is None:
        return []
    # the second: the data root is itself a snapshot of the set's repository on the hub
    for folder in (base / source.folder, base / Path(source.folder).name):
        if found := sorted(folder.glob(f"{source.known[split][0]}-*.parquet")):
            return found
    if source.torchvision is not None:
        folders = [place / source.torchvision[1] for place in (base, base / name)]
        return [folder for folder in folders if folder.is_dir()][:1]
    return []


def _located(name: str, split: str, root: str | Path | None) -> list[Path]:
    """Like `_found`, but raises IsslError if there is nothing."""
    base = data_root(root)
    if found := _found(name, split, base):
        return found
    source, there = SOURCES[name], base or Path("DIR")
    files = there / source.folder / f"{source.known[split][0]}-*.parquet"
    other = "" if source.torchvision is None else f" or {there / source.torchvision[1]}"
    raise IsslError(
        f"data set {name!r} ({split}): there is no {files}{other}; name the folder DIR of all data "
        f"sets with --data-root DIR (root=…) or {ENVIRONMENT}=DIR, and get the set with "
        f"`issl download {name} --data-root {there}`"
    )


def _open(name: str, split: str, found: list[Path]) -> tuple[pd.DataFrame, list[Any]]:
    """The table of what the files say about each image, with its class as a number; and the images,
    encoded or as torchvision's uint8 arrays (h, w, 3)."""
    source = SOURCES[name]
    if found[0].is_dir():
        try:
            whole = _torchvision_set(name, found[0].parent, split == "train", download=False)
        except (RuntimeError, OSError, EOFError) as error:
            raise IsslError(
                f"data set {name!r} under {found[0].parent}: {error} (a checksum differs or a file "
                "is missing); download it again"
            ) from error
        return pd.DataFrame({source.label: whole.targets}), list(whole.data)
    table = pd.concat([_read_parquet(path) for path in found], ignore_index=True)
    missing = {source.image, source.label} - set(table.columns)
    if missing:
        raise IsslError(
            f"{found[0]}: no column {sorted(missing)}; it has {', '.join(map(str, table))}"
        )
    encoded = [cell["bytes"] for cell in table.pop(source.image)]
    return table, encoded


def _read_parquet(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    try:
        return pd.read_parquet(path, columns=columns)
    except ImportError as error:
        raise IsslError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from error
    except (ValueError, OSError) as error:  # pyarrow's errors are among them
        raise IsslError(
            f"{path} is not a readable parquet file ({error}); copy or download it again"
        ) from error


def _images(
    name: str, whole: tuple[pd.DataFrame, list[Any]], rows: np.ndarray, size: int
) -> Images:
    """These rows of a set that `_open` returned; `index` is the row."""
    source, table = SOURCES[name], whole[0].iloc[rows]
    labels = table[source.label].to_numpy(np.int64, copy=True)
    attributes = pd.DataFrame({"index": rows})
    for column, values in table.items():
        names = source.names.get(str(column))
        if names is not None and not values.between(0, len(names) - 1).all():
            raise IsslError(
                f"{name}: {column} goes from {values.min()} to {values.max()}, and there are "
                f"{len(names)} names; get the published files again"
            )
        attributes[column] = values.to_numpy() if names is None else np.array(names)[values]
    attributes["label_name"] = np.array(source.names[source.label])[labels]
    pixels = np.empty((len(rows), 3, size, size), np.uint8)
    for k, row in enumerate(rows):
        image = whole[1][row]
        what = f"image {row} of {name}"
        pixels[k] = (
            decode(image, size, what) if isinstance(image, bytes) else image.transpose(2, 0, 1)
        )
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels), attributes, name)


def _torchvision_set(name: str, root: Path, train: bool, download: bool) -> Any:
    import torchvision  # slower to import than torch, and few runs read this layout

    names = SOURCES[name].torchvision
    assert names is not None  # the set was found in that layout
    return getattr(torchvision.datasets, names[0])(root, train=train, download=download)
