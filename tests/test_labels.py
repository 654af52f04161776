"""The labels by eye are of the images that they name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import issl
from issl.audit.data.background_labels import LISTED, background_labels, listed_backgrounds
from issl.audit.data.injection import inject
from issl.audit.data.known_duplicates import known_duplicates
from issl.data.images import Images
from issl.files import PACKAGE

LABELS = PACKAGE / "audit" / "data" / "labels" / "cifar10_backgrounds.csv"


def black(index: np.ndarray) -> Images:
    """Images that are named as CIFAR-10's."""
    pixels = torch.zeros(len(index), 3, 8, 8, dtype=torch.uint8)
    return Images(pixels, None, pd.DataFrame({"index": index}), "cifar10")


def test_the_sample_is_the_one_that_was_drawn() -> None:
    table = pd.read_csv(LABELS, keep_default_na=False)
    drawn = np.sort(np.random.default_rng(20261125).permutation(50_000)[:360])
    assert table["index"].tolist() == drawn.tolist()
    assert ((table["colour"] == "") == (table["uniform"] == "no")).all()


def test_the_truth_of_scenes_is_known_but_of_atypical_ones() -> None:
    scenes = inject(issl.load("scenes", n=200), atypical=0.1)
    known, truth = background_labels(scenes), scenes.attributes
    assert known is not None and len(known) == (truth["atypical"] == "").sum() < 200
    of = truth.iloc[known["position"].to_numpy()]
    assert known["uniform"].tolist() == of["uniform"].tolist() and known["sure"].all()
    assert known["colour"][known["uniform"]].isin(["white", "black", "other"]).all()
    assert (known["colour"][~known["uniform"]] == "").all()
    assert set(of["background"][(known["colour"] == "white").to_numpy()]) == {"white"}


def test_the_backgrounds_at_the_ends_of_rankings_are_known_by_position() -> None:
    table = pd.read_csv(LISTED).set_index("index")
    drawn = np.random.default_rng(20261129).permutation(50_000)[:100]
    assert sorted(table.index[table["random"] == 1]) == sorted(drawn)
    index = np.array([*table.index[[5, 300, 7]], 2])  # the last has no label
    assert 2 not in table.index
    known = listed_backgrounds(black(index))
    assert known is not None and known.index.tolist() == [0, 1, 2]
    labels = table.loc[index[:3], "background"]
    assert known["plain"].tolist() == (labels == "plain").tolist()
    assert known["smooth"].tolist() == (labels != "no").tolist()


@pytest.mark.data
def test_labels_follow_their_images_through_any_choice(data_root) -> None:
    table = pd.read_csv(LABELS, keep_default_na=False).set_index("index")
    images = issl.load("cifar10", n=3000, root=data_root)
    images = images.subset(np.random.default_rng(0).permutation(3000))
    known = background_labels(images)
    assert known is not None and len(known) == np.isin(images.index.numpy(), table.index).sum() > 5
    for row in known.itertuples():
        label = table.loc[int(images.index[row.position])]
        assert (row.colour, row.uniform) == (label["colour"], label["uniform"] == "yes")
    assert background_labels(images, "test") is None
    assert background_labels(issl.load("fairface", n=20, root=data_root)) is None


def test_of_a_group_the_first_image_is_the_original() -> None:
    pairs = pd.read_csv(LABELS.with_name("cifar10_duplicates.csv")).query("same == 'yes'")
    index = np.unique([*pairs[["a", "b"]].to_numpy().ravel(), 7])
    images = black(index)
    known = known_duplicates(images).set_axis(index)
    assert known.loc[22535].tolist() == [41, "pair"]
    assert known.loc[13647].tolist() == [119, "series"]
    assert known.loc[[41, 7, 119], "duplicate_of"].eq(-1).all()
    # what was overwritten is in no pair, and another split has other images
    overwritten = images.attributes.assign(atypical=np.where(index == 41, "inverted", ""))
    known = known_duplicates(replace(images, attributes=overwritten))
    assert known["duplicate_of"].ne(41).all()
    assert known_duplicates(images, "test")["duplicate_of"].eq(-1).all()
