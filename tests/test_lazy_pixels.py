"""Sets that are decoded when they are needed: the same numbers as in memory, from any dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from disk import encoder, net
from PIL import Image
from torch.utils.data import Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import issl
from issl import Computing, LoGra, cli, keyed_random
from issl.data.images import LazyPixels

SIDE = 24


def same_scores(lazy: issl.Images, held: issl.Images) -> None:
    """Bit for bit, whatever the batches."""
    assert isinstance(lazy.pixels, LazyPixels) and isinstance(held.pixels, torch.Tensor)
    for batch_size in (5, 64):
        how = Computing(batch_size=batch_size)
        one, two = (
            issl.self_influence(net(), images, curvature=LoGra(3), computing=how)
            for images in (lazy, held)
        )
        pd.testing.assert_frame_equal(one, two, check_exact=True)


def test_streamed_scores_are_those_in_memory(photos: Path) -> None:
    images = issl.load(f"folder:{photos}", size=SIDE, workers=2)
    same_scores(images, images.in_memory())
    rows = torch.tensor([12, 3, 4, 11])
    same_scores(images.subset(rows), images.in_memory().subset(rows))


def test_it_takes_positions_as_a_tensor_does(photos: Path) -> None:
    images = issl.load(f"folder:{photos}", size=SIDE)
    lazy, held = images.pixels, images.tensor()
    slices = slice(3, 9), slice(None), slice(10, 40), slice(0, 9, 4)
    for where in (0, -1, *slices, [5, 2, 2], torch.tensor([-2, 0])):
        assert torch.equal(lazy[where], held[where]), where
    assert (lazy.shape, lazy.ndim, lazy.dtype) == (held.shape, 4, torch.uint8)
    assert torch.equal(torch.stack(list(lazy)), held)
    assert [len(x) for x in lazy.split(10)] == [10, 3]
    assert torch.equal(lazy.subset(np.array([4, 1])).subset(np.array([1]))[:], held[1:2])


def test_threads_draw_the_same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    index, shape = torch.arange(40), (3, 17, 5)
    alone = [draw(3, index, shape) for draw in (keyed_random.normal, keyed_random.uniform)]
    monkeypatch.setattr(keyed_random, "SEVERAL_THREADS", 0)
    several = [draw(3, index, shape) for draw in (keyed_random.normal, keyed_random.uniform)]
    assert all(torch.equal(a, b) for a, b in zip(alone, several, strict=True))


# --- datasets of one's own ---


def test_a_torch_dataset(photos: Path) -> None:
    """PIL images, transforms of one's own, floats and bytes."""
    want = issl.load(f"folder:{photos}", size=SIDE)
    plain = issl.from_dataset(ImageFolder(photos), size=SIDE)
    assert torch.equal(plain.tensor(), want.tensor())
    assert plain.require_labels().tolist() == want.require_labels().tolist()
    assert plain.attributes["label_name"].tolist() == want.attributes["label_name"].tolist()
    transform = v2.Compose([v2.CenterCrop(20), v2.PILToTensor()])
    own = issl.from_dataset(ImageFolder(photos, transform))
    same_scores(own, own.in_memory())
    as_floats = v2.Compose([transform, v2.ToDtype(torch.float32, scale=True)])
    floats = issl.from_dataset(ImageFolder(photos, as_floats))
    assert torch.equal(floats.tensor(), own.tensor()) and floats.pixels.shape == (13, 3, 20, 20)
    index = list(range(100, 113))
    given = issl.from_dataset([{"image": x} for x in own.tensor()], index=index)
    assert torch.equal(given.tensor(), own.tensor()) and given.index.tolist() == index


def test_bad_datasets() -> None:
    bad = [
        ([Image.fromarray(np.zeros((20, 28), np.float32))], "item 0 of dataset .*mode F"),
        (TensorDataset(torch.zeros(3, 5)), r"item 0 of dataset gives \(5,\)"),
        (TensorDataset(torch.randn(3, 3, 8, 8)), "normalisation is part of the encoder"),
        ([torch.tensor([0, 65535], dtype=torch.uint16).expand(3, 4, 2)], "torch.uint16 from 0 to"),
    ]
    for dataset, message in bad:
        with pytest.raises(issl.IsslError, match=message):
            issl.from_dataset(dataset, size=16)
    uneven = issl.from_dataset([torch.zeros(3, 8, 8), torch.zeros(3, 9, 8)])
    with pytest.raises(issl.IsslError, match=r"item 1 of dataset is \(9, 8\) px"):
        uneven.tensor()


TEXTS, NUMBERS = ["cat", "dog", "cat", "ant"], [2, 0, 2, 1]


class Pairs:
    """A dataset of one's own: images with what is given."""

    def __init__(self, labels, as_dict: bool = False):
        self.given, self.as_dict, self.asked = labels, as_dict, 0

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, i: int):
        self.asked += 1
        image = torch.full((3, 16, 16), i, dtype=torch.uint8)
        item = {"image": image, "label": self.given[i]}
        return item if self.as_dict else (image, self.given[i], "more")


@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [
        (list(np.array(NUMBERS, np.uint8)), NUMBERS, list("2021")),
        (torch.tensor(NUMBERS), NUMBERS, list("2021")),
        ([float(k) for k in NUMBERS], NUMBERS, list("2021")),
        (TEXTS, [1, 2, 1, 0], TEXTS),
        ([True, False, True, True], [1, 0, 1, 1], ["True", "False", "True", "True"]),
    ],
    ids=["of numpy", "of torch", "whole floats", "texts", "truths"],
)
def test_a_dataset_keeps_its_labels(labels, numbers: list[int], names: list[str]) -> None:
    for as_dict in (False, True):
        images = issl.from_dataset(Pairs(labels, as_dict))
        assert images.require_labels().tolist() == numbers and images.labels.dtype == torch.int64
        assert images.attributes["label_name"].tolist() == names
        assert images.subset([2, 0]).labels.tolist() == [numbers[2], numbers[0]]


@pytest.mark.parametrize(
    "given",
    [
        [torch.zeros(3, 8, 8)] * 4,
        [1.0, 0.37, 2.0, 0.5],
        [{"boxes": []}] * 4,
        [0, -1, 1, -1],
        ["cat", None, "dog", "cat"],
    ],
)
def test_what_is_no_class_is_no_label(given: list) -> None:
    assert issl.from_dataset(Pairs(given)).labels is None


def test_labels_that_a_dataset_lists_are_not_read_from_its_images() -> None:
    many = [k % 3 for k in range(100)]
    dataset = Pairs(many)
    dataset.targets = torch.tensor(many)
    dataset.classes = ["cat", "dog", ("tench", "Tinca tinca")]
    images = issl.from_dataset(dataset)
    assert images.labels.tolist() == many and dataset.asked < 6
    assert images.attributes["label_name"][:3].tolist() == ["cat", "dog", "tench, Tinca tinca"]
    part = issl.from_dataset(Subset(dataset, [5, 0, 2]))
    assert part.labels.tolist() == [2, 0, 2] and part.attributes["label_name"][1] == "cat"
    dataset.targets = [9] * 100  # the items say something else: a transform of the targets
    assert issl.from_dataset(dataset).labels.tolist() == many


def test_broken_files_are_named_or_skipped(photos: Path, tmp_path: Path, capsys: Any) -> None:
    """By the library and by the command."""
    folder, good = tmp_path / "images", sorted(photos.rglob("*.jpg"))[:12]
    folder.mkdir()
    for path in good:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "x1.jpg").write_bytes(b"no image")
    (folder / "x2.jpg").write_bytes(good[0].read_bytes()[:-200])
    told = ["influence", "--data", f"folder:{folder}", "--rank", "2"]
    told += ["--out", str(tmp_path / "s.csv"), "--encoder", encoder(tmp_path / "e.safetensors")]
    assert cli.main(told) == 2
    assert "2 of 14 images" in (said := capsys.readouterr().err) and "x1.jpg" in said
    assert cli.main([*told, "--skip-broken", "--workers", "2"]) == 0
    assert "2 images were left out" in capsys.readouterr().out
    found = [len(pd.read_csv(tmp_path / name)) for name in ("s.csv", "s.broken.csv")]
    assert found == [12, 2]
    images = issl.load(f"folder:{folder}", size=SIDE, skip_broken=True)
    assert [Path(name).name for name, _ in images.broken] == ["x1.jpg", "x2.jpg"]
    (folder / images.attributes["path"][3]).unlink()  # and one that vanishes later
    with pytest.raises(issl.IsslError, match=r"cannot be read .*restore it"):
        issl.self_influence(net(), images)
