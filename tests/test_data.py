"""Data sets: the drawn world's promises, the layouts on disk, and bad input."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from disk import write_parquet, write_torchvision
from PIL import Image

import issl
from issl.data import datasets, published, scenes

# --- scenes ---


def test_scenes_are_deterministic_and_nested() -> None:
    a, b = scenes.draw(300), scenes.draw(120)
    assert torch.equal(a.pixels[:120], b.pixels) and torch.equal(a.masks[:120], b.masks)
    assert a.attributes[:120].equals(b.attributes)
    for other in (scenes.draw(120, seed=1), scenes.draw(120, split="test")):
        assert not torch.equal(b.pixels, other.pixels)


def test_scenes_keep_their_shares() -> None:
    shares = {"exact_duplicates": 0.05, "near_duplicates": 0.05, "atypical": 0.1}
    a = scenes.draw(3000, uniform=0.5, **shares).attributes
    plain = a[a["atypical"] == ""]
    assert plain["uniform"].mean() == pytest.approx(0.5, abs=0.04)
    assert (plain["group"] == "cool").mean() == pytest.approx(0.2, abs=0.03)
    for kind in ("exact", "near"):
        assert (a["duplicate_kind"] == kind).mean() == pytest.approx(0.05, abs=0.015)
    assert (a["atypical"] != "").mean() == pytest.approx(0.1, abs=0.02)
    assert set(a["atypical"]) == {"", *scenes.ATYPICAL} and a["label_name"].nunique() == 10


def test_duplicates_are_what_they_say() -> None:
    images = scenes.draw(1500, exact_duplicates=0.05, near_duplicates=0.05)
    a = images.attributes
    copies = a[a["duplicate_of"] >= 0]
    assert (copies["duplicate_of"] < copies["index"]).all()
    originals = a.loc[copies["duplicate_of"]]
    assert (originals["duplicate_of"] == -1).all() and (originals["atypical"] == "").all()
    assert (originals["label_name"].to_numpy() == copies["label_name"].to_numpy()).all()
    same = (images.pixels[copies.index] == images.pixels[originals.index]).flatten(1).all(1).numpy()
    assert (same == (copies["duplicate_kind"] == "exact").to_numpy()).all()


def test_another_background_changes_the_background_alone() -> None:
    a, b = (scenes.draw(200, background=k) for k in ("white", "texture"))
    plain = (a.attributes["duplicate_of"] < 0) & (a.attributes["atypical"] == "")
    plain = torch.from_numpy(plain.to_numpy().copy())[:, None, None]
    assert torch.equal(a.masks, b.masks)
    white, textured = (x.pixels.movedim(1, 3) for x in (a, b))
    inside = (a.masks == 255) & plain
    # a mask of 255 is an opacity of 0.998 or more
    assert int((white[inside].int() - textured[inside].int()).abs().max()) <= 1
    assert (white[(a.masks == 0) & inside.any(1).any(1)[:, None, None]] > 225).all()


# --- Images ---


def test_subset_keeps_identity() -> None:
    images = issl.load("scenes", n=50)
    part = images.subset([7, 3, -1])
    assert part.index.tolist() == [7, 3, 49] and torch.equal(part.pixels[1], images.pixels[3])
    assert images.subset(np.isin(np.arange(50), [4, 9])).index.tolist() == [4, 9]
    for bad, message in (([50], "position 50"), ([1, 1], "occurs twice"), ([True], "of length 1")):
        with pytest.raises(issl.IsslError, match=message):
            images.subset(bad)


# --- published sets ---


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)


COARSE = """
 4  1 14  8  0  6  7  7 18  3  3 14  9 18  7 11  3  9  7 11  6 11  5 10  7  6 13 15  3 15  0 11  1 10 12 14 16  9 11  5
 5 19  8  8 15 13 14 17 18 10 16  4 17  4  2  0 17  4 18 17 10  3  2 12 12 16 12  1  9 19  2 10  0  1 16 12  9 13 15 13
16 19  2  4  6 19  5  5  8 19 18  1  2 15  6  0 17  8 14 13
"""  # the number of each class's superclass, as the published files have it


def test_superclasses_are_the_published_ones() -> None:
    numbers = {name: k for k, name in enumerate(published.SUPERCLASSES)}  # in alphabetical order
    found = [numbers[name] for name in published.CIFAR100_SUPERCLASSES]
    assert found == [int(k) for k in COARSE.split()]
    assert len(set(published.CIFAR100_CLASSES)) == 100
    assert {len(classes) for classes in published.SUPERCLASSES.values()} == {5}


def test_cifar100_is_the_same_in_both_layouts_and_any_order(
    tmp_path: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = [4, 99, 0, 30, 2, 11, 98, 35, 46, 50, 95, 55]
    wanted = [published.CIFAR100_SUPERCLASSES[k] for k in fine]
    assert wanted[1:4] == ["non-insect invertebrates", "fruit and vegetables", "aquatic mammals"]
    columns = {"fine_label": fine, "coarse_label": [0] * 12}
    write_parquet(tmp_path / "a", "cifar100/cifar100", "train", "img", columns, pixels)
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
    fails("split 'val': cifar10 has train and test", split="val")
    fails(r"Expected: .*cifar10/plain_text/train.*issl download cifar10")
    fails("size=16: 'cifar10' has a fixed size", size=16)
    columns = {"label": [1] * 12}
    outside = {"label": [1] * 11 + [10]}
    write_parquet(tmp_path, "cifar10/plain_text", "train", "img", outside, pixels)
    fails("label goes from 1 to 10, and there are 10 names")
    path = write_parquet(tmp_path, "cifar10/plain_text", "train", "img", columns, pixels)
    fails("n=13: data set 'cifar10' has 12", n=13)
    path.write_bytes(path.read_bytes()[:9000])
    fails("not a readable parquet file")
    fails("does not exist", f"folder:{tmp_path / 'none'}")
    fails("has no images", f"folder:{tmp_path}")


@pytest.mark.data
def test_real_faces(data_root: Path) -> None:
    faces = issl.load("fairface", n=100, root=data_root)
    assert faces.pixels.shape == (100, 3, 64, 64)
    assert set(faces.attributes["gender"]) == {"Male", "Female"}


# --- folders ---


def saved(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.transpose(1, 2, 0)).save(path)


def test_image_folder(tmp_path: Path, pixels: np.ndarray) -> None:
    for k, name in enumerate(["a/1.png", "a/2.png", "b/1.png"]):
        saved(tmp_path / name, pixels[k])
    images = issl.load(f"folder:{tmp_path}")
    np.testing.assert_array_equal(images.pixels, pixels[:3])
    assert images.labels.tolist() == [0, 0, 1]
    assert images.attributes["label_name"].tolist() == ["a", "a", "b"]
    saved(tmp_path / "of no class.png", pixels[3])
    assert issl.load(f"folder:{tmp_path}").labels is None
    assert issl.load(f"folder:{tmp_path}", n=2, size=16).pixels.shape == (2, 3, 16, 16)


def test_linked_folders_are_classes_and_circles_end(
    tmp_path: Path, pixels: np.ndarray, capsys
) -> None:
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
    np.testing.assert_array_equal(images.pixels[:], pixels[[0, 1, 2, 0, 1]])
    assert "3 linked in a circle, 1 linked to nothing" in capsys.readouterr().err


def test_what_was_read_before_is_read_as_before(tmp_path: Path, pixels: np.ndarray) -> None:
    """The order, the indices and the key of a folder with nothing new in it."""
    names = "Z/1.bmp a/b/y.gif a/x.tif a/é.webp a-b/1.png b/10.jpg b/2.JPG z.jpeg".split()
    for k, name in enumerate(reversed(names)):
        saved(tmp_path / name, pixels[k])
    (tmp_path / "notes.txt").write_text("no image")
    images = issl.load(f"folder:{tmp_path}", size=16)
    assert images.attributes["path"].tolist() == names
    hashes = [hashlib.sha256(name.encode()).digest() for name in names]
    assert images.index.tolist() == [int.from_bytes(found[:8], "big") >> 2 for found in hashes]
    stats = [(name, (tmp_path / name).stat()) for name in names]
    rows = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    key = hashlib.sha256(repr(rows).encode()).hexdigest()[:16] + "-2"
    assert datasets.identity(f"folder:{tmp_path}").digest == key
