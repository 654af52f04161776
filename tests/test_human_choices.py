"""CIFAR-10H: the entropy of what people chose, whose images it is of, and files that are missing or
wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from disk import write_cifar10

import issl
from issl.audit.data import human_choices


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three people an image: image 0 is clear, image 1 is not, of all others two in three agree."""
    write_cifar10(tmp_path, 20, 30)
    counts = np.zeros(human_choices.SHAPE, np.int64)
    counts[:, 0], counts[:, 1] = 2, 1
    counts[0], counts[1] = [0, 3] + [0] * 8, [1, 1, 1] + [0] * 7
    (tmp_path / "cifar10h").mkdir()
    np.save(tmp_path / human_choices.FILE, counts)
    return tmp_path


def test_entropy_by_the_images_own_index(root: Path) -> None:
    images = issl.load("cifar10", split="test", root=root)
    found = human_choices.ambiguity(images, root)
    assert found[:2] == pytest.approx([0, np.log(3)])
    assert found[2:] == pytest.approx(-(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3)))
    some = images.subset([5, 1, 0])
    np.testing.assert_array_equal(human_choices.ambiguity(some, root), found[[5, 1, 0]])


def test_wrong_counts_and_images_that_nobody_judged(root: Path) -> None:
    images = issl.load("cifar10", split="test", root=root)
    beyond = images.attributes.assign(index=images.attributes["index"] + 9990)
    unknown = {
        "scenes": issl.load("scenes", n=16),
        "index 10000": replace(images, attributes=beyond),
    }
    for named, others in unknown.items():
        with pytest.raises(issl.IsslError, match=named):
            human_choices.ambiguity(others, root)
    np.save(root / human_choices.FILE, np.ones((100, 10), np.int64))
    with pytest.raises(issl.IsslError, match=r"\(100, 10\).*\(10000, 10\)"):
        human_choices.read(root)


@pytest.mark.data
def test_the_published_counts(data_root: Path) -> None:
    if human_choices.missing("cifar10", data_root):
        pytest.skip(human_choices.missing("cifar10", data_root))
    counts = human_choices.read(data_root)
    assert counts.sum(1).min() >= 47 and counts.sum(1).max() <= 63
    images = issl.load("cifar10", split="test", root=data_root)
    # most people see the class that the image is labelled with: the order is the test set's own
    assert (counts.argmax(1) == images.require_labels().numpy()).mean() > 0.98
