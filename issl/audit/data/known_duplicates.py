"""What is known about the duplicates in a set: the set's own attributes, and pairs of CIFAR-10
labelled by eye."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from issl.data.images import Images
from issl.files import PACKAGE

# how they were made: README.md beside it
LABELS = PACKAGE / "audit" / "data" / "labels" / "cifar10_duplicates.csv"
SERIES = 5  # this many images of one thing, or more, are a series; fewer are pairs
UNMARKED = {"duplicate_of": -1, "duplicate_kind": "", "atypical": ""}


def marks(images: Images) -> pd.DataFrame:
    """The set's own attributes in the columns of UNMARKED, whose values replace missing columns."""
    given = images.attributes
    return pd.DataFrame(
        {c: given.get(c, default=none) for c, none in UNMARKED.items()}, given.index
    )


def known_duplicates(images: Images, split: str = "train") -> pd.DataFrame:
    """For each of n images duplicate_of (the index of its original, −1 for none) and duplicate_kind
    ("" for none).

    These are the set's own attributes (`issl.audit.data.injection`, `issl.data.judged_pairs`). For
    CIFAR-10's training images, the pairs labelled by eye are added: of kind `pair`, or `series`
    where SERIES or more images show one thing. The first image of such a group counts as the
    original. An overwritten image is in no labelled pair.
    """
    said, index = marks(images), images.index.numpy()
    known = said[["duplicate_of", "duplicate_kind"]].copy()
    if (images.name, split) != ("cifar10", "train"):
        return known
    usable = ((said["duplicate_kind"] == "") & (said["atypical"] == "")).to_numpy()
    place = pd.Series(np.flatnonzero(usable), index[usable])
    pairs = pd.read_csv(LABELS).query("same == 'yes'")
    pairs = pairs[pairs["a"].isin(place.index) & pairs["b"].isin(place.index)]
    a, b = (place[pairs[end]].to_numpy() for end in ("a", "b"))
    edges = coo_array((np.ones(len(a)), (a, b)), shape=(len(images), len(images)))
    _, group = connected_components(edges, directed=False)
    size, first = np.bincount(group), np.unique(group, return_index=True)[1]
    copy = np.flatnonzero(np.arange(len(group)) != first[group])
    known.loc[copy, "duplicate_of"] = index[first[group[copy]]]
    known.loc[copy, "duplicate_kind"] = np.where(size[group[copy]] >= SERIES, "series", "pair")
    return known
