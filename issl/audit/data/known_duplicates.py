"""What is known about duplicates in a set: what the set says of itself, and pairs of CIFAR-10
labelled by eye."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from issl.data.images import Images
from issl.files import PACKAGE

LABELS = (
    PACKAGE / "audit" / "data" / "labels" / "cifar10_duplicates.csv"
)  # how they were made: README.md beside it
SERIES = 5  # as many images of one thing, or more, are a series; fewer are pairs


def known_duplicates(images: Images, split: str = "train") -> pd.DataFrame:
    """For each of n images duplicate_of (the index of its original, −1 for none) and duplicate_kind
    ("" for none).

    To what the set says of itself (`issl.audit.data.injection`, `issl.data.judged_pairs`)
    CIFAR-10's training images add the pairs labelled by eye, of kind `pair` or, where SERIES or
    more images show one thing, `series`. Of such a group the first image counts as the original. An
    image that was overwritten is in no labelled pair.
    """
    given = images.attributes
    known = pd.DataFrame(
        {
            "duplicate_of": given.get("duplicate_of", pd.Series(-1, given.index)).to_numpy(
                np.int64
            ),
            "duplicate_kind": given.get("duplicate_kind", pd.Series("", given.index)).to_numpy(
                object
            ),
        }
    )
    if (images.name, split) != ("cifar10", "train"):
        return known
    index, strange = (
        images.index.numpy(),
        given.get("atypical", pd.Series("", given.index)).to_numpy(object),
    )
    usable = (known["duplicate_kind"] == "").to_numpy() & (strange == "")
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
