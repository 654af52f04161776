"""What people said of images, by eye: it is of the images that it names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from disk import write_cifar10

import issl
from issl.audit.data import human_choices
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


def test_labels_of_backgrounds_are_of_the_samples_drawn_and_follow_their_images() -> None:
    table = pd.read_csv(LABELS, keep_default_na=False).set_index("index")
    listed = pd.read_csv(LISTED).set_index("index")
    for seed, found in ((20261125, table.index), (20261129, listed.index[listed["random"] == 1])):
        drawn = np.random.default_rng(seed).permutation(50_000)[: len(found)]
        assert len(found) >= 100 and sorted(found) == sorted(drawn)
    assert ((table["colour"] == "") == (table["uniform"] == "no")).all()
    index = np.random.default_rng(0).permutation(50_000)[:3000]
    images = black(index)
    known, ends = background_labels(images), listed_backgrounds(images)
    assert known is not None and len(known) == np.isin(index, table.index).sum() > 5
    own = table.loc[index[known["position"]]]
    assert known["colour"].tolist() == own["colour"].tolist()
    assert known["uniform"].tolist() == own["uniform"].eq("yes").tolist()
    assert ends is not None and len(ends) == np.isin(index, listed.index).sum() > 5
    own = listed.loc[index[ends.index], "background"]
    assert ends["plain"].tolist() == own.eq("plain").tolist()
    assert ends["smooth"].tolist() == own.ne("no").tolist()
    assert background_labels(images, "test") is None
    assert background_labels(replace(images, name="fairface")) is None


def test_the_truth_of_scenes_is_known_but_of_atypical_ones() -> None:
    scenes = inject(issl.load("scenes", n=200), atypical=0.1)
    known, truth = background_labels(scenes), scenes.attributes
    assert known is not None and len(known) == (truth["atypical"] == "").sum() < 200
    of = truth.iloc[known["position"].to_numpy()]
    assert known["uniform"].tolist() == of["uniform"].tolist()
    assert known["colour"][known["uniform"]].isin(["white", "black", "other"]).all()
    assert (known["colour"][~known["uniform"]] == "").all()
    assert set(of["background"][(known["colour"] == "white").to_numpy()]) == {"white"}


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


def test_ambiguity_is_the_entropy_of_what_people_chose_of_the_image(tmp_path: Path) -> None:
    write_cifar10(tmp_path, 20, 30)
    counts = np.zeros(human_choices.SHAPE, np.int64)
    counts[:, 0], counts[:, 1] = 2, 1  # two in three agree
    counts[0], counts[1] = [0, 3] + [0] * 8, [1, 1, 1] + [0] * 7  # one is clear, one is not
    (tmp_path / "cifar10h").mkdir()
    np.save(tmp_path / human_choices.FILE, counts)
    images = issl.load("cifar10", split="test", root=tmp_path)
    found = human_choices.ambiguity(images, tmp_path)
    assert found[:2] == pytest.approx([0, np.log(3)])
    assert found[2:] == pytest.approx(-(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3)))
    some = images.subset([5, 1, 0])
    np.testing.assert_array_equal(human_choices.ambiguity(some, tmp_path), found[[5, 1, 0]])
    with pytest.raises(issl.IsslError, match="scenes"):
        human_choices.ambiguity(issl.load("scenes", n=16), tmp_path)
    beyond = images.attributes.assign(index=images.attributes["index"] + 9990)
    with pytest.raises(issl.IsslError, match="index 10000"):
        human_choices.ambiguity(replace(images, attributes=beyond), tmp_path)
    np.save(tmp_path / human_choices.FILE, np.zeros(human_choices.SHAPE, np.int64))
    with pytest.raises(issl.IsslError, match="at least one person"):
        human_choices.read(tmp_path)
    np.save(tmp_path / human_choices.FILE, np.ones((100, 10), np.int64))
    with pytest.raises(issl.IsslError, match=r"\(100, 10\).*\(10000, 10\)"):
        human_choices.read(tmp_path)


@pytest.mark.data
def test_most_people_see_the_class_that_an_image_is_labelled_with(data_root: Path) -> None:
    """So the order of the counts is the test set's own."""
    if human_choices.missing("cifar10", data_root):
        pytest.skip(human_choices.missing("cifar10", data_root))
    counts = human_choices.read(data_root)
    assert counts.sum(1).min() >= 47 and counts.sum(1).max() <= 63
    images = issl.load("cifar10", split="test", root=data_root)
    assert (counts.argmax(1) == images.require_labels().numpy()).mean() > 0.98
