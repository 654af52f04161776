"""Which images a published set holds: the same in every container, and named where they are not the
published ones."""

from __future__ import annotations

import hashlib
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from disk import encoded, png, write_parquet, write_torchvision

import issl
from issl.data import datasets, identity

# of the official binary files: records of a label byte and 3,072 bytes, channel first
# (cs.toronto.edu/~kriz/cifar.html)
PUBLISHED = {
    "train": "5dd7e06a14cb22eb9f671a540d1b7c25 5ea93a67294ea407fff1d09f752e9692 "
    "942cd6a4bcdd0dd3c604fbe906cb4421 ae636b3ba5c66a11e91e8cb52e771fcb "
    "53f37980c15c3d472c316c40844f3f0d",
    "test": "803d5f7f4d78ea53de84dbe85f74fb6d",
}


def write(root: Path, pixels: np.ndarray, labels: list[int], encode=png) -> Path:
    """CIFAR-10's test images, or others, as parquet; returns the data root."""
    write_parquet(root / "cifar10/plain_text", "test", {"label": labels}, pixels, encode)
    return root


def test_an_identity_is_that_of_the_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 3, 32, 32), dtype=np.uint8)
    labels = [0, 1, 2, 3, 4, 5, 6]
    roots = [tmp_path / layout for layout in ("png", "webp", "torchvision")]
    write(roots[0], pixels, labels)
    write(roots[1], pixels, labels, partial(encoded, kind="webp", lossless=True))
    batches = {f"data_batch_{k}": (pixels[:1], [k]) for k in range(1, 6)}
    write_torchvision(roots[2], "CIFAR10", batches | {"test_batch": (pixels, labels)}, monkeypatch)
    found = [datasets.identity("cifar10", "test", root) for root in roots]
    assert len({which.digest for which in found}) == 1
    assert "there are 7 images instead of 10,000" in found[0].about
    splits = [datasets.identity("cifar10", split, roots[2]) for split in ("train", "test")]
    assert splits[0].digest != splits[1].digest == found[0].digest  # of the same files
    records = identity.as_records(np.array(labels), pixels)
    assert found[0].digest == hashlib.sha256(records.tobytes()).hexdigest()[:16]
    other = write(tmp_path / "labels", pixels, [0, 1, 2, 3, 4, 5, 7])
    assert datasets.identity("cifar10", "test", other).digest != found[0].digest


@pytest.mark.data
@pytest.mark.parametrize("split", ["test", pytest.param("train", marks=pytest.mark.slow)])
def test_the_known_identities_are_those_of_the_published_files(split: str, data_root: Path) -> None:
    images = issl.load("cifar10", split, root=data_root)
    records = identity.as_records(images.require_labels().numpy(), images.tensor().numpy())
    parts = [records[k : k + 10_000] for k in range(0, len(records), 10_000)]
    assert [hashlib.md5(part.tobytes()).hexdigest() for part in parts] == PUBLISHED[split].split()
    which = datasets.identity("cifar10", split, data_root)
    assert which.digest == identity.digest(records.tobytes())
    reference = np.load(identity.PACKAGE / f"data/reference/cifar10-{split}.npy")
    np.testing.assert_array_equal(identity.in_short(records), reference)
    for name in ("cifar10", "cifar100", "fairface"):
        here, known = (datasets.identity(name, split, root) for root in (data_root, None))
        assert here.digest == known.digest


COPIES = {  # and what differs, of 500 images
    "re-encoded?": (lambda x, y: (x, y), r"difference [1-9] of 255"),
    "shuffled?": (lambda x, y: (x[::-1], y[::-1]), "500 of 500"),
    "other labels": (lambda x, y: (x, [9] * 100 + y[100:]), "90 of 500"),
    "other images, or re-encoded in another order?": (lambda x, y: (255 - x, y), "500 of 500"),
}


@pytest.mark.parametrize("what", COPIES)
def test_a_copy_that_is_something_else_is_named(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (500, 3, 8, 8), dtype=np.uint8)
    pixels, labels = coarse.repeat(4, 2).repeat(4, 3), [k % 10 for k in range(500)]
    known = identity.in_short(identity.as_records(np.array(labels), pixels))
    (tmp_path / "data/reference").mkdir(parents=True)
    np.save(tmp_path / "data/reference/cifar10-test.npy", known)
    monkeypatch.setattr(identity, "PACKAGE", tmp_path)
    change, differs = COPIES[what]
    encode = partial(encoded, kind="jpeg", quality=90) if what == "re-encoded?" else png
    root = write(tmp_path, *change(pixels, labels), encode)
    which = datasets.identity("cifar10", "test", root)
    assert which.name == f"cifar10, not as published: {what}"
    assert which.digest != datasets.identity("cifar10", "test").digest
    for _ in range(2):
        assert len(issl.load("cifar10", "test", 5, root)) == 5
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"cifar10, not as published: {what}: ")
    assert re.search(differs, said)
