"""Data sets: the drawn world's promises, the layouts on disk, sets that are decoded when they are
needed, bad input; and which images a published set holds."""

import hashlib
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from disk import encoded, encoder, png, write_parquet, write_torchvision
from nets import make
from PIL import Image
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import issl
from issl import Computing, LoGra, cli, keyed_random
from issl.data import datasets, identity, published, scenes
from issl.data.images import LazyPixels


def test_scenes_are_deterministic_and_nested() -> None:
    a, b = scenes.draw(300), scenes.draw(120)
    assert torch.equal(a.pixels[:120], b.pixels) and torch.equal(a.masks[:120], b.masks)
    assert a.attributes[:120].equals(b.attributes)
    for other in (scenes.draw(120, seed=1), scenes.draw(120, split="test")):
        assert not torch.equal(b.pixels, other.pixels)


def test_scenes_and_their_duplicates_are_what_they_say() -> None:
    shares = {"exact_duplicates": 0.05, "near_duplicates": 0.05, "atypical": 0.1}
    images = scenes.draw(3000, uniform=0.5, **shares)
    a = images.attributes
    plain = a[a["atypical"] == ""]
    assert plain["uniform"].mean() == pytest.approx(0.5, abs=0.04)
    assert (plain["group"] == "cool").mean() == pytest.approx(0.2, abs=0.03)
    for kind in ("exact", "near"):
        assert (a["duplicate_kind"] == kind).mean() == pytest.approx(0.05, abs=0.015)
    assert (a["atypical"] != "").mean() == pytest.approx(0.1, abs=0.02)
    assert set(a["atypical"]) == {"", *scenes.ATYPICAL} and a["label_name"].nunique() == 10
    copies = a[a["duplicate_of"] >= 0]
    assert (copies["duplicate_of"] < copies["index"]).all()
    originals = a.loc[copies["duplicate_of"]]
    assert (originals["duplicate_of"] == -1).all() and (originals["atypical"] == "").all()
    assert (originals["label_name"].to_numpy() == copies["label_name"].to_numpy()).all()
    same = (images.pixels[copies.index] == images.pixels[originals.index]).flatten(1).all(1).numpy()
    assert (same == (copies["duplicate_kind"] == "exact").to_numpy()).all()


def test_subset_keeps_identity() -> None:
    images = issl.load("scenes", n=50)
    part = images.subset([7, 3, -1])
    assert part.index.tolist() == [7, 3, 49] and torch.equal(part.pixels[1], images.pixels[3])
    assert images.subset(np.isin(np.arange(50), [4, 9])).index.tolist() == [4, 9]
    for bad, message in (([50], "position 50"), ([1, 1], "occurs twice"), ([True], "of length 1")):
        with pytest.raises(issl.IsslError, match=message):
            images.subset(bad)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)


@pytest.mark.data
def test_superclasses_are_the_published_ones(data_root: Path) -> None:
    (file,) = (data_root / "cifar100/cifar100").glob("test-*.parquet")
    known = pd.read_parquet(file, columns=["fine_label", "coarse_label"]).drop_duplicates()
    names = list(published.SUPERCLASSES)
    found = [names.index(published.CIFAR100_SUPERCLASSES[k]) for k in known["fine_label"]]
    assert found == known["coarse_label"].tolist() and len(found) == 100
    assert len(set(published.CIFAR100_CLASSES)) == 100


def test_cifar100_is_the_same_in_both_layouts_and_any_order(tmp_path, pixels, monkeypatch) -> None:
    fine = [4, 99, 0, 30, 2, 11, 98, 35, 46, 50, 95, 55]
    wanted = [published.CIFAR100_SUPERCLASSES[k] for k in fine]
    columns = {"fine_label": fine, "coarse_label": [0] * 12}
    write_parquet(tmp_path / "a/cifar100/cifar100", "train", columns, pixels)
    batches = {"train": (pixels[::-1], fine[::-1]), "test": (pixels[:2], fine[:2])}
    write_torchvision(tmp_path / "b", "CIFAR100", batches, monkeypatch)
    images, again = (issl.load("cifar100", root=tmp_path / layout) for layout in "ab")
    rows = images.attributes["row"].tolist()  # in the file: the set has an order of its own
    np.testing.assert_array_equal(images.pixels, pixels[rows])
    assert torch.equal(images.tensor(), again.tensor())
    digests = {datasets.identity("cifar100", root=tmp_path / layout).digest for layout in "ab"}
    assert len(digests) == 1
    there = images.attributes.sort_values("row")
    assert images.labels.tolist() == again.labels.tolist() == [fine[k] for k in rows]
    assert there["superclass"].tolist() == wanted
    assert there["label_name"].tolist() == [published.CIFAR100_CLASSES[k] for k in fine]
    some = issl.load("cifar100", n=5, root=tmp_path / "b", seed=3)
    np.testing.assert_array_equal(some.pixels, images.pixels[some.index])
    assert (np.diff(some.index) > 0).all() and len(some) == 5


def test_bad_files(tmp_path: Path, pixels: np.ndarray) -> None:
    def fails(message: str, name: str = "cifar10", **arguments) -> None:
        with pytest.raises(issl.IsslError, match=message):
            issl.load(name, **{"root": tmp_path, **arguments})

    fails("data set 'mnist': known are", "mnist")
    fails(r"there is no .*cifar10/plain_text/train.* or .*cifar-10-.*issl download cifar10")
    folder, outside = tmp_path / "cifar10/plain_text", {"label": [1] * 11 + [10]}
    write_parquet(folder, "train", outside, pixels)
    fails("label goes from 1 to 10, and there are 10 names")
    path = write_parquet(folder, "train", {"label": [1] * 12}, pixels)
    path.write_bytes(path.read_bytes()[:9000])
    fails("not a readable parquet file")
    fails("has no images", f"folder:{tmp_path}")


@pytest.mark.data
def test_real_faces(data_root: Path) -> None:
    faces = issl.load("fairface", n=100, root=data_root)
    assert faces.pixels.shape == (100, 3, 64, 64)
    assert set(faces.attributes["gender"]) == {"Male", "Female"}


def saved(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.transpose(1, 2, 0)).save(path)


def test_linked_folders_are_classes_and_circles_end(tmp_path, pixels: np.ndarray, capsys) -> None:
    for k, name in enumerate(["store/cat/1.png", "store/cat/old/2.png", "set/dog/1.png"]):
        saved(tmp_path / name, pixels[k])
    folder, cats = tmp_path / "set", tmp_path / "store/cat"
    (folder / "cat").symlink_to(cats)
    (folder / "kitten").symlink_to("../store/cat")  # the same once more
    (folder / "dog/up").symlink_to(folder)
    (cats / "back").symlink_to(folder)  # through links: in cat and in kitten
    (folder / "gone").symlink_to(tmp_path / "no such folder")
    images = issl.load(f"folder:{folder}")
    there = "cat/1.png cat/old/2.png dog/1.png kitten/1.png kitten/old/2.png".split()
    assert images.attributes["path"].tolist() == there
    assert images.attributes["label_name"].tolist() == "cat cat dog kitten kitten".split()
    assert images.labels.tolist() == [0, 0, 1, 2, 2]
    np.testing.assert_array_equal(images.pixels[:], pixels[[0, 1, 2, 0, 1]])
    assert "3 linked in a circle, 1 linked to nothing" in capsys.readouterr().err


def test_what_was_read_before_is_read_as_before(tmp_path: Path, pixels: np.ndarray) -> None:
    """The order, the indices and the key of a folder with nothing new in it."""
    names = "Z/1.bmp a/b/y.gif a/x.tif a/é.webp a-b/1.png b/10.jpg b/2.JPG z.jpeg".split()
    for k, name in enumerate(reversed(names)):
        saved(tmp_path / name, pixels[k])
    (tmp_path / "notes.txt").write_text("no image")
    images = issl.load(f"folder:{tmp_path}", size=16)
    assert images.attributes["path"].tolist() == names and images.labels is None
    hashes = [hashlib.sha256(name.encode()).digest() for name in names]
    assert images.index.tolist() == [int.from_bytes(found[:8], "big") >> 2 for found in hashes]
    stats = [(name, (tmp_path / name).stat()) for name in names]
    rows = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    key = hashlib.sha256(repr(rows).encode()).hexdigest()[:16] + "-2"
    assert datasets.identity(f"folder:{tmp_path}").digest == key


SIDE = 24


def score(images: issl.Images, batch_size: int = 64) -> pd.DataFrame:
    net, how = make("batchnorm", torch.float32), Computing(batch_size=batch_size)
    return issl.self_influence(net, images, curvature=LoGra(3), computing=how)


def test_streamed_scores_are_those_in_memory(photos: Path) -> None:
    """Bit for bit, whatever the batches."""
    images = issl.load(f"folder:{photos}", size=SIDE, workers=2)
    for lazy in (images, images.subset(torch.tensor([12, 3, 4, 11]))):
        held = lazy.in_memory()
        assert isinstance(lazy.pixels, LazyPixels) and isinstance(held.pixels, torch.Tensor)
        for batch_size in (5, 64):
            one, two = (score(some, batch_size) for some in (lazy, held))
            pd.testing.assert_frame_equal(one, two, check_exact=True)


def test_it_takes_positions_as_a_tensor_does(photos: Path) -> None:
    images = issl.load(f"folder:{photos}", size=SIDE)
    lazy, held = images.pixels, images.tensor()
    slices = slice(3, 9), slice(None), slice(10, 40), slice(0, 9, 4)
    for where in (0, -1, *slices, [5, 2, 2], torch.tensor([-2, 0])):
        assert torch.equal(lazy[where], held[where]), where
    assert (lazy.shape, lazy.ndim, lazy.dtype) == (held.shape, 4, torch.uint8)
    assert torch.equal(torch.stack(list(lazy)), held)
    assert torch.equal(lazy.subset(np.array([4, 1])).subset(np.array([1]))[:], held[1:2])


def test_threads_draw_the_same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    index, shape = torch.arange(40), (3, 17, 5)
    alone = [draw(3, index, shape) for draw in (keyed_random.normal, keyed_random.uniform)]
    monkeypatch.setattr(keyed_random, "SEVERAL_THREADS", 0)
    several = [draw(3, index, shape) for draw in (keyed_random.normal, keyed_random.uniform)]
    assert all(torch.equal(a, b) for a, b in zip(alone, several, strict=True))


def test_a_torch_dataset(photos: Path) -> None:
    """PIL images, transforms of one's own, floats and bytes."""
    want = issl.load(f"folder:{photos}", size=SIDE)
    plain = issl.from_dataset(ImageFolder(photos), size=SIDE)
    assert torch.equal(plain.tensor(), want.tensor())
    assert plain.require_labels().tolist() == want.require_labels().tolist()
    assert plain.attributes["label_name"].tolist() == want.attributes["label_name"].tolist()
    transform = v2.Compose([v2.CenterCrop(20), v2.PILToTensor()])
    own = issl.from_dataset(ImageFolder(photos, transform))
    as_floats = v2.Compose([transform, v2.ToDtype(torch.float32, scale=True)])
    floats = issl.from_dataset(ImageFolder(photos, as_floats))
    assert torch.equal(floats.tensor(), own.tensor()) and floats.pixels.shape == (13, 3, 20, 20)
    index = list(range(100, 113))
    given = issl.from_dataset([{"image": x} for x in own.tensor()], index=index)
    assert torch.equal(given.tensor(), own.tensor()) and given.index.tolist() == index


def test_bad_datasets() -> None:
    for items, message in [
        ([torch.zeros(5)], r"item 0 of dataset gives \(5,\)"),
        ([torch.randn(3, 8, 8)], "normalisation is part of the encoder"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 9, 8)], r"item 1 of dataset is \(9, 8\) px"),
    ]:
        with pytest.raises(issl.IsslError, match=message):
            issl.from_dataset(items).tensor()


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


def test_a_dataset_keeps_its_labels() -> None:
    texts = ["cat", "dog", "cat", "ant"]
    for labels, numbers, names in (
        ([np.uint8(2), torch.tensor(0), 2.0, 1], [2, 0, 2, 1], list("2021")),
        (texts, [1, 2, 1, 0], texts),
        ([np.True_, False, True, True], [1, 0, 1, 1], ["True", "False", "True", "True"]),
    ):
        for as_dict in (False, True):
            images = issl.from_dataset(Pairs(labels, as_dict))
            assert images.require_labels().tolist() == numbers
            assert images.labels.dtype == torch.int64
            assert images.attributes["label_name"].tolist() == names
            assert images.subset([2, 0]).labels.tolist() == [numbers[2], numbers[0]]


def test_what_is_no_class_is_no_label() -> None:
    numbers, missing = [1.0, 0.37, 2.0, 0.5], ["cat", None, "dog", "cat"]
    for given in ([{"boxes": []}] * 4, numbers, [0, -1, 1, -1], missing):
        assert issl.from_dataset(Pairs(given)).labels is None, given


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
        score(images)


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


def test_an_identity_is_that_of_the_content(tmp_path: Path, monkeypatch) -> None:
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
def test_a_copy_that_is_something_else_is_named(what: str, tmp_path, monkeypatch, capsys) -> None:
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
