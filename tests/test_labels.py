"""The labels by eye: that they are of the images that they name, and what they say of the detector."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import issl
from issl.analysis.image_statistics import image_statistics
from issl.data.background_labels import background_labels
from issl.data.injection import inject
from issl.files import PACKAGE

LABELS = PACKAGE / "data" / "labels" / "cifar10_backgrounds.csv"


def test_the_sample_is_the_one_that_was_drawn() -> None:
    table = pd.read_csv(LABELS, keep_default_na=False)
    drawn = np.sort(np.random.default_rng(20261125).permutation(50_000)[:360])
    assert table["index"].tolist() == drawn.tolist()
    assert set(table["uniform"]) == {"yes", "no"} and set(table["sure"]) == {0, 1}
    assert ((table["colour"] == "") == (table["uniform"] == "no")).all()
    assert set(table["colour"]) == {"", "white", "black", "other"}


@pytest.mark.data
def test_they_fit_the_images_and_the_detector_misses_most(data_root) -> None:
    table = pd.read_csv(LABELS, keep_default_na=False)
    images = issl.load("cifar10", root=data_root).subset(table["index"].to_numpy())
    statistics = image_statistics(images)
    assert statistics["index"].tolist() == table["index"].tolist()
    sure, uniform = table["sure"].to_numpy() == 1, (table["uniform"] == "yes").to_numpy()
    grey = statistics["border_grey"].to_numpy()
    white, black = ((table["colour"] == c).to_numpy() & sure for c in ("white", "black"))
    assert np.median(grey[white]) > 0.8 and np.median(grey[black]) < 0.2  # of the images that they name
    flagged = statistics["uniform"].to_numpy()
    precision, recall = (flagged & uniform).sum() / flagged.sum(), (flagged & uniform).sum() / uniform.sum()
    assert precision == pytest.approx(0.91, abs=0.01) and recall == pytest.approx(0.18, abs=0.01)


def test_the_truth_of_scenes_is_known_but_of_atypical_ones() -> None:
    scenes = inject(issl.load("scenes", n=200), atypical=0.1)
    known, truth = background_labels(scenes), scenes.attributes
    assert known is not None and len(known) == (truth["atypical"] == "").sum() < 200
    of = truth.iloc[known["position"].to_numpy()]
    assert known["uniform"].tolist() == of["uniform"].tolist() and known["sure"].all()
    assert known["colour"][known["uniform"]].isin(["white", "black", "other"]).all()
    assert (known["colour"][~known["uniform"]] == "").all()
    assert set(of["background"][(known["colour"] == "white").to_numpy()]) == {"white"}


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
