"""cifair10: CIFAR-10's training set, and the test images that people judged to show the same as a
training image (Barz & Denzler 2020, arXiv 1902.00423)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from issl.data import published
from issl.data.identity import SetIdentity, digest
from issl.data.images import Images
from issl.errors import IsslError

CIFAR10_TRAIN = 50_000  # images of its training set; test images are numbered from here on
PAIRS = "75dad6cc7b1628eb"  # of the judgements as published
COLUMNS = ["TestID", "TrainID", "Judgment"]
KINDS = np.array(["exact duplicate", "near duplicate", "very similar"])  # by Judgment


def identity(split: str, root: str | Path | None) -> SetIdentity:
    """The identity of CIFAR-10's two sets and of the judgements together. The published ones stand
    for those that are not here."""
    path = _file(split, root)
    pairs = digest(_pairs(path).to_csv().encode()) if path.is_file() else PAIRS
    parts = [published.identity("cifar10", split, root) for split in ("train", "test")]
    changed = [part for part in parts if part.about]
    name = changed[0].name.replace("cifar10", "cifair10") if changed else "cifair10"
    whole = digest("-".join([*(p.digest for p in parts), pairs]).encode())
    return SetIdentity(whole, name, "; ".join(p.about for p in changed))


def read(split: str, n: int | None, root: str | Path | None, seed: int) -> Images:
    """n training images, the judged ones among them, followed by their test partners (index
    CIFAR10_TRAIN + TestID).

    Attributes: duplicate_of is the index of a test image's training partner, −1 for all others;
    duplicate_kind is exact duplicate, near duplicate or very similar, as judged. Raises IsslError
    for an n that is too small or large.
    """
    table = _pairs(_file(split, root))
    judged = table["TrainID"].unique()

    def choose(total: int) -> np.ndarray:
        wanted = total if n is None else n
        if not len(judged) <= wanted <= total:
            raise IsslError(
                f"n={wanted}: cifair10 has {len(judged)} judged images among {total}; ask for a "
                "number between these two"
            )
        others = np.setdiff1d(np.arange(total), judged)
        drawn = np.random.default_rng(seed).choice(others, wanted - len(judged), replace=False)
        return np.sort(np.concatenate([judged, drawn]))

    first = published.read("cifar10", "train", root, choose)
    second = published.read("cifar10", "test", root, lambda _: table["TestID"].to_numpy())
    partners = second.attributes.assign(
        index=second.attributes["index"] + CIFAR10_TRAIN,
        duplicate_of=table["TrainID"].to_numpy(),
        duplicate_kind=KINDS[table["Judgment"].to_numpy()],
    )
    given = first.attributes.assign(duplicate_of=-1, duplicate_kind="")
    return Images(
        torch.cat([first.tensor(), second.tensor()]),
        torch.cat([first.require_labels(), second.require_labels()]),
        pd.concat([given, partners], ignore_index=True),
        "cifair10",
    )


def _file(split: str, root: str | Path | None) -> Path:
    if split != "train":
        raise IsslError(f"split {split!r}: cifair10 is one set, train")
    return (published.data_root(root) or Path("DIR")) / "cifair" / "duplicates_cifar10.csv"


def _pairs(path: Path) -> pd.DataFrame:
    """The judgements, in the order of the test images; IsslError where the table is missing."""
    if not path.is_file():
        raise IsslError(
            f"data set 'cifair10' needs {path}: meta/duplicates_cifar10.csv of github.com/cvjena/"
            f"cifair, under the data root (--data-root DIR or {published.ENVIRONMENT}=DIR)"
        )
    table = pd.read_csv(path)
    if missing := set(COLUMNS) - set(table.columns):
        raise IsslError(f"{path}: no column {sorted(missing)}; it has {', '.join(table.columns)}")
    return table[COLUMNS].sort_values("TestID").reset_index(drop=True)
