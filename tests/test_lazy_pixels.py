"""Sets that are decoded when they are needed: the same numbers as in memory, from every kind of
source."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import jaxtyping
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from disk import png
from forked import on_processes
from nets import make
from PIL import Image
from torch.utils.data import Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import issl
from issl import Computing, LoGra, cli, keyed_random
from issl.data.image_folder import path_index
from issl.data.lazy_pixels import LazyPixels
from issl.shards import Shards

N, SIDE = 23, 24


def jpeg(pixels: np.ndarray, orientation: int = 1) -> bytes:
    out, exif = io.BytesIO(), Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels.transpose(1, 2, 0)).save(out, "jpeg", exif=exif)
    return out.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of mixed size in three folders."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for k in range(N):
        path = folder / "abc"[k % 3] / f"{k:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jpeg(rng.integers(0, 256, (3, 30 + k, 40), dtype=np.uint8)))
    return folder


def files(photos: Path) -> list[Path]:
    return sorted(photos.rglob("*.jpg"))


def tar(photos: Path, folder: Path) -> str:
    """Two shards, with classes."""
    for shard, part in enumerate((files(photos)[:9], files(photos)[9:])):
        with tarfile.open(folder / f"part-{shard}.tar", "w") as archive:
            for path in part:
                for name, data in (
                    (path.name, path.read_bytes()),
                    (f"{path.stem}.cls", b"%d" % "abc".index(path.parent.name)),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return f"tar:{folder}"


def table(photos: Path) -> pa.Table:
    rows = [{"bytes": path.read_bytes(), "path": path.name} for path in files(photos)]
    labels = ["abc".index(path.parent.name) for path in files(photos)]
    features = {"label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(
        {"image": rows, "label": labels, "note": [p.stem for p in files(photos)]}
    ).replace_schema_metadata(metadata)


def parquet(photos: Path, folder: Path) -> str:
    whole = table(photos)
    pq.write_table(whole.slice(0, 11), folder / "train-0.parquet", row_group_size=4)
    pq.write_table(whole.slice(11), folder / "train-1.parquet", row_group_size=5)
    return f"parquet:{folder}"


def arrow(photos: Path, folder: Path) -> str:
    """The streaming format, which Hugging Face writes, and the file format."""
    whole = table(photos)
    for name, part, writer in (
        ("a", whole.slice(0, 8), pa.ipc.new_stream),
        ("b", whole.slice(8), pa.ipc.new_file),
    ):
        with writer(folder / f"{name}.arrow", whole.schema) as out:
            out.write_table(part, max_chunksize=3)
    return f"arrow:{folder}"


def net() -> torch.nn.Module:
    return make("batchnorm", torch.float32)


def same_scores(lazy: issl.Images, held: issl.Images) -> None:
    """Bit for bit, whatever the batches."""
    assert isinstance(lazy.pixels, LazyPixels) and isinstance(held.pixels, torch.Tensor)
    for batch_size in (5, 8, 64):
        how = Computing(batch_size=batch_size)
        one, two = (
            issl.self_influence(net(), images, curvature=LoGra(3), computing=how)
            for images in (lazy, held)
        )
        pd.testing.assert_frame_equal(one, two, check_exact=True)


@pytest.mark.parametrize("write", [tar, parquet, arrow])
def test_every_source_gives_the_same_images(write, photos: Path, tmp_path: Path) -> None:
    want = issl.load(f"folder:{photos}", size=SIDE)
    got = issl.load(write(photos, tmp_path), size=SIDE)
    assert torch.equal(got.tensor(), want.tensor()) and torch.equal(
        got.require_labels(), want.require_labels()
    )
    if write is not tar:
        assert got.attributes["label_name"].tolist() == want.attributes["label_name"].tolist()
        assert got.attributes["note"].tolist() == [p.stem for p in files(photos)]
    some = issl.load(f"{write.__name__}:{tmp_path}", n=7, size=SIDE, seed=3)
    places = [got.attributes["index"].tolist().index(i) for i in some.attributes["index"]]
    assert len(some) == 7 and torch.equal(some.tensor(), want.tensor()[places])
    assert issl.data.datasets.count(f"{write.__name__}:{tmp_path}") == N


def test_streamed_scores_are_those_in_memory(photos: Path) -> None:
    images = issl.load(f"folder:{photos}", size=SIDE, workers=2)
    same_scores(images, images.in_memory())
    rows = torch.tensor([20, 3, 4, 11])
    same_scores(images.subset(rows), images.in_memory().subset(rows))


def test_a_torch_dataset(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL images, transforms of one's own, floats and bytes."""
    want = issl.load(f"folder:{photos}", size=SIDE)
    plain = issl.from_dataset(ImageFolder(photos), size=SIDE)
    assert torch.equal(plain.tensor(), want.tensor())
    transform = v2.Compose([v2.CenterCrop(20), v2.PILToTensor()])
    own = issl.from_dataset(ImageFolder(photos, transform))
    same_scores(own, own.in_memory())
    floats = issl.from_dataset(
        ImageFolder(photos, v2.Compose([transform, v2.ToDtype(torch.float32, scale=True)]))
    )
    assert torch.equal(floats.tensor(), own.tensor()) and floats.pixels.shape == (N, 3, 20, 20)
    given = issl.from_dataset([{"image": x} for x in own.tensor()], index=range(100, 100 + N))
    assert torch.equal(given.tensor(), own.tensor()) and given.index.tolist() == list(
        range(100, 100 + N)
    )
    bad = [
        (TensorDataset(torch.zeros(3, 5)), r"item 0 of dataset gives \(5,\)"),
        (ImageFolder(photos), "give size="),
        (TensorDataset(torch.randn(3, 3, 8, 8)), r"normalisation is part of the encoder"),
        ([], "length of 1 or more"),
        (5, "items by number"),
    ]
    monkeypatch.setattr(
        jaxtyping.config, "jaxtyping_disable", True
    )  # what a user without beartype gets
    for dataset, message in bad:
        with pytest.raises(issl.IsslError, match=message):
            issl.from_dataset(dataset)
    uneven = issl.from_dataset([torch.zeros(3, 8, 8), torch.zeros(3, 9, 8)])
    with pytest.raises(
        issl.IsslError, match=r"item 1 of dataset is \(9, 8\) px, the first \(8, 8\)"
    ):
        uneven.tensor()


# --- one decoder for all ---


def of_every_kind() -> dict[str, tuple[Image.Image, str]]:
    """Images of every mode that a file may have, each with how it is saved."""
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (20, 28, 4), dtype=np.uint8), "RGBA")
    grey, deep = (
        rgba.convert("L"),
        Image.fromarray(rng.integers(0, 2**16, (20, 28)).astype(np.uint16)),
    )
    palette = rgba.convert("RGB").quantize(20)
    palette.info["transparency"] = 3
    sideways = rgba.convert("RGB")
    sideways.getexif()[274] = 6
    deep_sideways = deep.copy()
    deep_sideways.getexif()[274] = 8
    return {
        "L": (grey, "png"),
        "LA": (rgba.convert("LA"), "png"),
        "P": (palette, "png"),
        "RGBA": (rgba, "png"),
        "CMYK": (rgba.convert("RGB").convert("CMYK"), "tiff"),
        "CMYK JPEG": (rgba.convert("CMYK"), "jpeg"),
        "YCbCr": (rgba.convert("RGB"), "jpeg"),
        "1": (grey.convert("1"), "png"),
        "I;16": (deep, "png"),
        "I;16 TIFF": (deep, "tiff"),
        "I;16 PGM": (deep, "ppm"),
        "GIF": (rgba.convert("P"), "gif"),
        "EXIF": (sideways, "jpeg"),
        "EXIF PNG": (sideways, "png"),
        "EXIF TIFF": (sideways, "tiff"),
        "EXIF, 16 bits": (deep_sideways, "png"),
    }


class Opened(list[Path]):
    """A dataset that opens its files, as people write them."""

    def __getitem__(self, i):
        return Image.open(super().__getitem__(i))


@pytest.mark.parametrize("size", [12, 20])
def test_a_dataset_gives_the_pixels_of_a_folder(size: int, tmp_path: Path) -> None:
    for k, (name, (image, kind)) in enumerate(of_every_kind().items()):
        image.save(tmp_path / f"{k:02} {name.replace('/', ' ')}.{kind}", exif=image.getexif())
    paths = Opened(sorted(tmp_path.iterdir()))
    want = issl.load(f"folder:{tmp_path}", size=size)
    assert [tmp_path / name for name in want.attributes["path"]] == list(paths)
    got = issl.from_dataset(paths, size=size)
    same = [torch.equal(a, b) for a, b in zip(got.tensor(), want.tensor(), strict=True)]
    assert all(same) and len(same) > 12, same
    held = [Image.open(path) for path in list(paths)]
    again = issl.from_dataset(held, size=size)
    for _ in range(2):  # they are not changed
        assert torch.equal(again.tensor(), want.tensor())
    sixteen = want.tensor()[[i for i, p in enumerate(list(paths)) if "16" in p.name]].float()
    assert (sixteen.mean((1, 2, 3)) - 127).abs().max() < 10  # of even noise, not cut off


@pytest.mark.parametrize("kind", ["I", "F"])
def test_an_unknown_range_is_an_error_in_both(kind: str, tmp_path: Path) -> None:
    image = Image.fromarray(np.full((20, 28), 3, np.int32 if kind == "I" else np.float32))
    image.save(tmp_path / "a.tiff")
    with pytest.raises(
        issl.IsslError, match=rf"a.tiff \(pixels of mode {kind}, whose range is not known: save it"
    ):
        issl.load(f"folder:{tmp_path}", size=16)
    for each in (image, Image.open(tmp_path / "a.tiff")):
        with pytest.raises(
            issl.IsslError, match=rf"item 0 of dataset has pixels of mode {kind}, whose range"
        ):
            issl.from_dataset([each], size=16)


def test_a_damaged_image_of_a_dataset_is_named(tmp_path: Path) -> None:
    whole = jpeg(np.random.default_rng(0).integers(0, 256, (3, 60, 60), dtype=np.uint8))
    (tmp_path / "a.jpg").write_bytes(whole)
    (tmp_path / "b.jpg").write_bytes(whole[:-300])
    images = issl.from_dataset(Opened(sorted(tmp_path.iterdir())), size=16)
    with pytest.raises(issl.IsslError, match=r"item 1 of dataset cannot be decoded \(.*truncated"):
        images.tensor()
    with pytest.raises(issl.IsslError, match="item 0 of mine cannot be read"):
        issl.from_dataset(Opened([tmp_path / "none.jpg"]), name="mine", size=16)
    with pytest.raises(
        issl.IsslError, match=r"torch.uint16 from 0 to 65535; need uint8, or floats in"
    ):
        issl.from_dataset([torch.tensor([0, 65535], dtype=torch.uint16).expand(3, 4, 2)])


# --- labels of every kind ---

TEXTS, NUMBERS, TRUTHS = ["cat", "dog", "cat", "ant"], [2, 0, 2, 1], [True, False, True, True]
NAMED: dict[str, tuple[pa.Array, list[int], list[str]]] = {
    **{
        f"{kind}": (pa.array(TEXTS, pa.string()).cast(kind), [1, 2, 1, 0], TEXTS)
        for kind in (pa.string(), pa.large_string(), pa.string_view())
    },
    **{
        f"{kind}": (pa.array(NUMBERS, kind), NUMBERS, [str(k) for k in NUMBERS])
        for kind in (
            pa.int8(),
            pa.int16(),
            pa.int32(),
            pa.int64(),
            pa.uint8(),
            pa.uint16(),
            pa.uint32(),
            pa.uint64(),
            pa.float16(),
            pa.float32(),
            pa.float64(),
        )
    },
    "bool": (pa.array(TRUTHS), [1, 0, 1, 1], ["True", "False", "True", "True"]),
    "dictionary of texts": (pa.array(TEXTS).dictionary_encode(), [1, 2, 1, 0], TEXTS),
    "dictionary of large texts": (
        pa.array(TEXTS, pa.large_string()).dictionary_encode(),
        [1, 2, 1, 0],
        TEXTS,
    ),
    "dictionary of numbers": (
        pa.array(NUMBERS).dictionary_encode(),
        NUMBERS,
        [str(k) for k in NUMBERS],
    ),
    "a category of pandas": (
        pa.array(pd.Categorical(TEXTS, ["dog", "cat", "ant"])),
        [1, 2, 1, 0],
        TEXTS,
    ),
}
FOUR = [png(np.full((3, 16, 16), 50 * k, np.uint8)) for k in range(4)]


def written(whole: pa.Table, folder: Path, kind: str, halved: bool = True) -> str:
    """The table in two files, or one."""
    for k, part in enumerate((whole.slice(0, 3), whole.slice(3)) if halved else [whole]):
        if kind == "parquet":
            pq.write_table(part, folder / f"{k}.parquet")
        else:
            with pa.ipc.new_stream(folder / f"{k}.arrow", whole.schema) as out:
                out.write_table(part)
    return f"{kind}:{folder}"


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("of", NAMED)
@pytest.mark.parametrize("alone", [True, False])
def test_a_table_keeps_labels_of_every_type(
    of: str, alone: bool, kind: str, tmp_path: Path
) -> None:
    labels, numbers, names = NAMED[of]
    others = (
        {} if alone else {"n": [5, 6, 7, 8], "what": pa.array(list("wxyz")).dictionary_encode()}
    )
    images = issl.load(
        written(pa.table({"image": FOUR, **others, "label": labels}), tmp_path, kind), size=16
    )
    assert images.labels is not None and images.labels.tolist() == numbers
    assert images.attributes["label_name"].tolist() == names
    assert images.tensor()[:, 0, 0, 0].tolist() == [0, 50, 100, 150]
    if not alone:
        assert images.attributes["n"].tolist() == [5, 6, 7, 8] and images.attributes[
            "what"
        ].tolist() == list("wxyz")
    some = issl.load(f"{kind}:{tmp_path}", n=2, size=16, seed=1)
    rows = some.index.tolist()
    assert some.labels.tolist() == [numbers[k] for k in rows]  # numbered by the whole set
    assert some.attributes["label_name"].tolist() == [names[k] for k in rows]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("of", ["binary", "large_binary", "binary_view", "dictionary"])
def test_a_table_may_hold_images_alone_of_every_type(
    of: str, nested: bool, kind: str, tmp_path: Path
) -> None:
    column = (
        pa.array(FOUR).dictionary_encode()
        if of == "dictionary"
        else pa.array(FOUR).cast(getattr(pa, of)())
    )
    if nested:  # as Hugging Face keeps them
        column = pa.StructArray.from_arrays([column, pa.nulls(4, pa.string())], ["bytes", "path"])
    halved = of != "binary_view"  # which arrow cannot write sliced
    images = issl.load(written(pa.table({"image": column}), tmp_path, kind, halved), size=16)
    assert (
        images.labels is None
        and list(images.attributes) == ["index"]
        and images.index.tolist() == [0, 1, 2, 3]
    )
    assert images.tensor()[:, 0, 0, 0].tolist() == [0, 50, 100, 150]
    assert issl.data.datasets.count(f"{kind}:{tmp_path}") == 4
    with_others = pa.table({"image": column, "label": list("baba"), "box": [[1.0, 2.0]] * 4})
    assert issl.load(written(with_others, tmp_path, kind, halved), size=16).labels.tolist() == [
        1,
        0,
        1,
        0,
    ]


def test_a_label_that_pandas_took_for_its_index_is_there(tmp_path: Path) -> None:
    """`df.set_index("label").to_parquet`; and rows that were filtered keep an index of pandas'
    own."""
    frame = pd.DataFrame({"image": FOUR, "label": TEXTS, "n": range(4)})
    frame.set_index("label").to_parquet(tmp_path / "a.parquet")
    images = issl.load(f"parquet:{tmp_path / 'a.parquet'}", size=16)
    assert images.attributes["label_name"].tolist() == TEXTS and images.attributes[
        "n"
    ].tolist() == [0, 1, 2, 3]
    frame[frame["n"] > 1].to_parquet(tmp_path / "b.parquet")
    images = issl.load(f"parquet:{tmp_path / 'b.parquet'}", size=16)
    assert images.index.tolist() == [0, 1] and images.attributes["n"].tolist() == [2, 3]
    frame.assign(label=pd.Categorical(TEXTS)).to_parquet(tmp_path / "c.parquet")
    assert issl.load(f"parquet:{tmp_path / 'c.parquet'}", size=16).labels.tolist() == [1, 2, 1, 0]


@pytest.mark.parametrize(
    "labels",
    [
        ["cat", None, "dog", "cat"],
        [3, None, 0, 1],
        [True, None, False, True],
        [1.0, float("nan"), 0.0, 2.0],
        [None] * 4,
    ],
)
def test_a_missing_label_is_none(labels: list, tmp_path: Path) -> None:
    column = pa.array(labels, None if any(x is not None for x in labels) else pa.string())
    data = written(pa.table({"image": FOUR, "label": column}), tmp_path, "parquet")
    assert issl.load(data, size=16).labels is None
    there = [k for k, label in enumerate(labels) if label is not None and label == label]
    if there:
        names = issl.load(data, size=16).attributes["label_name"]
        assert [k for k in range(4) if isinstance(names[k], str)] == there


def test_names_of_classes_stand_beside_missing_labels(tmp_path: Path) -> None:
    metadata = {
        "huggingface": json.dumps({"info": {"features": {"label": {"names": ["no", "yes"]}}}})
    }
    whole = pa.table(
        {"image": FOUR, "label": pa.array([1, None, 0, 1], pa.int64())}
    ).replace_schema_metadata(metadata)
    images = issl.load(written(whole, tmp_path, "parquet"), size=16)
    assert images.labels is None and images.attributes["label_name"][[0, 2, 3]].tolist() == [
        "yes",
        "no",
        "yes",
    ]


class Pairs:
    """A dataset of one's own: images with what is given."""

    def __init__(self, labels, as_dict: bool = False):
        self.given, self.as_dict = labels, as_dict

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, i: int):
        image = torch.full((3, 16, 16), i, dtype=torch.uint8)
        return (
            {"image": image, "label": self.given[i]}
            if self.as_dict
            else (image, self.given[i], "more")
        )


KINDS = {
    "ints": (NUMBERS, NUMBERS, None),
    "numpy's": (np.array(NUMBERS, np.int16), NUMBERS, None),
    "numpy's, unsigned": (list(np.array(NUMBERS, np.uint8)), NUMBERS, None),
    "torch's": (torch.tensor(NUMBERS), NUMBERS, None),
    "torch's, of one element": (torch.tensor(NUMBERS)[:, None], NUMBERS, None),
    "arrays of one element": (np.array(NUMBERS)[:, None], NUMBERS, None),
    "whole floats": ([float(k) for k in NUMBERS], NUMBERS, None),
    "texts": (TEXTS, [1, 2, 1, 0], TEXTS),
    "numpy's texts": (np.array(TEXTS), [1, 2, 1, 0], TEXTS),
    "truths": (TRUTHS, [1, 0, 1, 1], ["True", "False", "True", "True"]),
    "numpy's truths": (np.array(TRUTHS), [1, 0, 1, 1], ["True", "False", "True", "True"]),
    "torch's truths": (torch.tensor(TRUTHS), [1, 0, 1, 1], ["True", "False", "True", "True"]),
}


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("of", KINDS)
def test_a_dataset_keeps_its_labels(of: str, as_dict: bool) -> None:
    given, numbers, names = KINDS[of]
    images = issl.from_dataset(Pairs(given, as_dict))
    assert images.require_labels().tolist() == numbers and images.labels.dtype == torch.int64
    assert images.attributes["label_name"].tolist() == (names or [str(k) for k in numbers])
    assert images.subset([2, 0]).labels.tolist() == [numbers[2], numbers[0]]
    assert images.tensor()[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "given",
    [
        [torch.zeros(3, 8, 8)] * 4,
        [None] * 4,
        [0.37, 1.0, 2.0, 0.5],
        [1.0, 0.37, 2.0, 0.5],
        [{"boxes": []}] * 4,
        [[1, 2]] * 4,
    ],
)
def test_what_is_no_class_is_no_label(given: list) -> None:
    assert issl.from_dataset(Pairs(given)).labels is None


def test_labels_that_a_dataset_lists_are_not_read_from_its_images() -> None:
    class Listing(Pairs):
        asked = 0

        def __getitem__(self, i: int):
            self.asked += 1
            return super().__getitem__(i)

    many = [k % 3 for k in range(100)]
    for name in ("targets", "labels"):
        dataset = Listing(many)
        setattr(dataset, name, torch.tensor(many))
        dataset.classes = ["cat", "dog", ("tench", "Tinca tinca")]
        images = issl.from_dataset(dataset)
        assert images.labels.tolist() == many and dataset.asked < 6
        assert images.attributes["label_name"][:3].tolist() == ["cat", "dog", "tench, Tinca tinca"]
    part = issl.from_dataset(Subset(dataset, [5, 0, 2]))
    assert part.labels.tolist() == [2, 0, 2] and part.attributes["label_name"][1] == "cat"

    class Columns(Listing):
        """As Hugging Face's: items by number, columns by name."""

        column_names, features = (
            ("image", "label"),
            {"label": SimpleNamespace(names=["cat", "dog", "ant"])},
        )

        def __getitem__(self, i):
            return self.given if i == "label" else super().__getitem__(i)

    columns = Columns(many, as_dict=True)
    images = issl.from_dataset(columns)
    assert images.labels.tolist() == many and columns.asked < 6
    assert images.attributes["label_name"][:3].tolist() == ["cat", "dog", "ant"]
    dataset.targets = [9] * 100  # the items say something else: a transform of the targets
    assert issl.from_dataset(dataset).labels.tolist() == many
    pixels = torch.zeros(4, 3, 8, 8)
    assert (
        issl.from_dataset(TensorDataset(pixels, torch.tensor(NUMBERS))).labels.tolist() == NUMBERS
    )
    assert issl.from_dataset(TensorDataset(pixels)).labels is None


def test_images_without_a_class_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    """torchvision numbers them -1."""
    assert issl.from_dataset(Pairs([0, -1, 1, -1]), name="mine").labels is None
    assert (
        capsys.readouterr().err
        == "dataset 'mine': its labels are not used, for 2 of 4 are missing or below 0\n"
    )
    with pytest.raises(
        issl.IsslError, match=r"its labels holds? 1 and 'a'; need whole numbers, or texts|'a' and 1"
    ):
        issl.from_dataset(Pairs([1, "a", 1, 1]))


def test_an_image_folder_of_torchvision_has_the_labels_of_ours(photos: Path) -> None:
    want, got = (
        issl.load(f"folder:{photos}", size=SIDE),
        issl.from_dataset(ImageFolder(photos), size=SIDE),
    )
    by_path = {
        name: int(label) for name, label in zip(want.attributes["path"], want.labels, strict=True)
    }
    assert got.labels.tolist() == [
        by_path[str(Path(p).relative_to(photos))] for p, _ in ImageFolder(photos).samples
    ]
    assert set(got.attributes["label_name"]) == {"a", "b", "c"}


# --- columns that are called like ours ---

OURS = (
    "index",
    "influence",
    "stability_loss",
    "loss",
    "grad_norm",
    "standard_error",
    "position",
    "path",
    "influence@1",
)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_tables_own_columns_stand_beside_ours(kind: str, tmp_path: Path) -> None:
    own = {name: pa.array([k + j / 10 for j in range(4)]) for k, name in enumerate(OURS)}
    whole = pa.table(
        {"image": FOUR, **own, "own_loss": list("wxyz"), "label": TEXTS, "label_name": [7, 8, 9, 9]}
    )
    images = issl.load(written(whole, tmp_path, kind), size=16)
    known = images.attributes
    assert known["index"].tolist() == [0, 1, 2, 3] and known["own_loss"].tolist() == list("wxyz")
    for name in OURS:
        assert (
            known["own_own_loss" if name == "loss" else f"own_{name}"].tolist()
            == own[name].tolist()
        ), name
    assert not set(known) & (set(OURS) - {"index"}) and len(set(known)) == len(known.columns)
    assert known["label_name"].tolist() == TEXTS and known["own_label_name"].tolist() == [
        7,
        8,
        9,
        9,
    ]
    scores = issl.self_influence(net(), images, curvature=LoGra(3), draws=2, sweep=(1.0,))
    labelled = issl.self_influence(
        net(), images, curvature=LoGra(3), loss=lambda features, *_: features.square().sum(1)
    )
    assert (set(scores) | set(labelled)) & set(known) == {
        "index"
    }  # whatever is scored, nothing is called twice
    joined = scores.merge(known, on="index")
    pd.testing.assert_frame_equal(joined[list(scores)], scores, check_exact=True)


def test_the_commands_keep_the_names_of_the_scores(tmp_path: Path) -> None:
    from test_scale import ours

    rng = np.random.default_rng(0)
    images = [png(rng.integers(0, 256, (3, 32, 32), dtype=np.uint8)) for _ in range(6)]
    own = {
        name: [10.0 * k + j for j in range(6)]
        for k, name in enumerate((*OURS, "similarity", "rank", "list"))
    }
    pq.write_table(pa.table({"image": images, **own}), tmp_path / "clash.parquet")
    pq.write_table(pa.table({"image": images}), tmp_path / "plain.parquet")
    encoder, tables = ours(tmp_path / "e.safetensors"), {}
    for name in ("clash", "plain"):
        told = [
            "--data",
            f"parquet:{tmp_path / name}.parquet",
            "--encoder",
            encoder,
            "--rank",
            "2",
            "--draws",
            "2",
        ]
        out = tmp_path / "out" / name
        assert cli.main(["influence", *told, "--out", f"{out}.csv"]) == 0
        assert cli.main(["influence", *told, "--out", str(out)]) == 0
        assert (
            cli.main(
                ["explain", "train:1", *told, "--any-data", "--k", "2", "--out", f"{out}-lists.png"]
            )
            == 0
        )
        tables[name] = [
            pd.read_csv(f"{out}.csv"),
            pd.read_parquet(out / "scores"),
            pd.read_csv(f"{out}-lists.csv"),
        ]
    for plain, clash in zip(tables["plain"], tables["clash"], strict=True):
        pd.testing.assert_frame_equal(clash[list(plain)], plain)
        assert len(plain) > 2 and not [c for c in clash if c.endswith(("_x", "_y"))]
        for name, values in own.items():
            column = f"own_{name}" if f"own_{name}" in clash else name
            assert clash[column].tolist() == [values[k] for k in clash["index"]], name


def test_it_takes_positions_as_a_tensor_does(photos: Path) -> None:
    images = issl.load(f"folder:{photos}", size=SIDE)
    lazy, held = images.pixels, images.tensor()
    for where in (
        0,
        -1,
        slice(3, 9),
        slice(None),
        slice(20, 40),
        slice(0, 9, 4),
        [5, 2, 2],
        torch.tensor([-2, 0]),
    ):
        assert torch.equal(lazy[where], held[where]), where
    assert (
        lazy.shape == held.shape and len(lazy) == N and lazy.ndim == 4 and lazy.dtype == torch.uint8
    )
    assert torch.equal(torch.stack(list(lazy)), held) and [len(x) for x in lazy.split(10)] == [
        10,
        10,
        3,
    ]
    assert torch.equal(lazy.subset(torch.tensor([4, 1])).subset(torch.tensor([1]))[:], held[1:2])


def test_only_the_next_batch_is_read_ahead(photos: Path) -> None:
    read: list[int] = []

    class Counted:
        def __len__(self) -> int:
            return 100

        def __getitem__(self, i: int) -> np.ndarray:
            read.append(i)
            return np.full((3, 4, 4), i, np.uint8)

        def identity(self) -> str:
            return "counted"

    pixels = LazyPixels(Counted(), (4, 4), workers=1)
    for k in range(0, 40, 10):
        assert (pixels[k : k + 10] == torch.arange(k, k + 10)[:, None, None, None]).all()
        assert max(read) <= k + 19
    pixels[50:52]
    assert sorted(read[:40]) == list(range(40))  # each once


def test_an_index_belongs_to_the_path(photos: Path, tmp_path: Path) -> None:
    """Another file changes nothing about the others; the scores of images do not depend on their
    place."""
    for path in files(photos)[:6]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = issl.load(f"folder:{tmp_path}", size=SIDE)
    (tmp_path / "-new.jpg").write_bytes(files(photos)[9].read_bytes())
    after = issl.load(f"folder:{tmp_path}", size=SIDE)
    assert (
        after.attributes["path"][0] == "-new.jpg"
        and after.index[1:].tolist() == before.index.tolist()
    )
    assert before.attributes["index"].tolist() == [path_index(p) for p in before.attributes["path"]]
    assert (before.index >= 0).all() and int(before.index.max()) < 2**62
    fitted = issl.fit(net(), before, curvature=LoGra(3))
    assert fitted.score(after)["influence"][1:].tolist() == pytest.approx(
        fitted.score(before)["influence"].tolist()
    )


def test_a_camera_held_sideways(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    (tmp_path / "a.jpg").write_bytes(jpeg(pixels))
    (tmp_path / "b.jpg").write_bytes(
        jpeg(pixels, orientation=6)
    )  # to be turned clockwise by a quarter
    upright, turned = issl.load(f"folder:{tmp_path}").tensor()
    assert torch.equal(turned, upright.rot90(-1, (1, 2)))


def test_threads_draw_the_same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    index, shape = torch.arange(40), (3, 17, 5)
    alone = [draw(3, index, shape) for draw in (keyed_random.normal, keyed_random.uniform)]
    monkeypatch.setattr(keyed_random, "SEVERAL_THREADS", 0)
    several = [draw(3, index, shape) for draw in (keyed_random.normal, keyed_random.uniform)]
    assert all(torch.equal(a, b) for a, b in zip(alone, several, strict=True))


# --- broken files ---


@pytest.fixture
def damaged(photos: Path, tmp_path: Path) -> Path:
    """Twelve good images; a text, an empty file, a JPEG and a PNG cut short."""
    for path in files(photos)[:12]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    good = files(photos)[0].read_bytes()
    drawn = png(np.random.default_rng(0).integers(0, 256, (3, 60, 60), dtype=np.uint8))
    contents = {
        "x1.jpg": b"no image",
        "x2.jpg": b"",
        "x3.jpg": good[:-200],
        "x4.png": drawn[: len(drawn) // 2],
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_broken_files_are_named_before_any_work(damaged: Path) -> None:
    with pytest.raises(
        issl.IsslError, match=r"4 of 16 images cannot be decoded: .*x1.jpg.*x4.png.*--skip-broken"
    ):
        issl.load(f"folder:{damaged}")
    images = issl.load(f"folder:{damaged}", size=SIDE, skip_broken=True)
    assert len(images) == 12 and [Path(name).name for name, _ in images.broken] == [
        "x1.jpg",
        "x2.jpg",
        "x3.jpg",
        "x4.png",
    ]
    assert all(why for _, why in images.broken)
    assert images.tensor().shape == (12, 3, SIDE, SIDE)


def test_trailing_bytes_are_no_fault(damaged: Path) -> None:
    """A closing mark that is not near the end makes the check decode, and find nothing."""
    for name in ("x1.jpg", "x2.jpg", "x3.jpg", "x4.png"):
        (damaged / name).unlink()
    path = next(damaged.glob("*.jpg"))
    path.write_bytes(path.read_bytes() + bytes(9000))
    assert len(issl.load(f"folder:{damaged}")) == 12


def test_a_file_that_vanishes_is_named(damaged: Path) -> None:
    images = issl.load(f"folder:{damaged}", skip_broken=True)
    (damaged / Path(images.attributes["path"][3])).unlink()
    with pytest.raises(issl.IsslError, match=r"cannot be read .*restore it"):
        issl.self_influence(net(), images)


def test_the_command_skips_and_tells(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_scale import ours

    encoder = ours(tmp_path / "e.safetensors")
    given = [
        "influence",
        "--data",
        f"folder:{damaged}",
        "--encoder",
        encoder,
        "--rank",
        "2",
        "--out",
    ]
    assert cli.main([*given, str(tmp_path / "s.parquet")]) == 2
    assert "x1.jpg" in capsys.readouterr().err
    assert cli.main([*given, str(tmp_path / "s.parquet"), "--skip-broken", "--workers", "2"]) == 0
    assert "4 images were left out" in capsys.readouterr().out
    assert (
        len(pd.read_csv(tmp_path / "s.broken.csv")) == 4
        and len(pd.read_parquet(tmp_path / "s.parquet")) == 12
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tar:{}/nothing", "there is no \\*.tar file"),
        ("tar:{}/photo.tar", "no readable, uncompressed tar"),
        ("parquet:{}/plain.parquet", "no column of images .*its columns are a"),
        ("parquet:{}/photo.parquet", "cannot be read"),
        ("arrow:{}/photo.arrow", "cannot be read"),
    ],
)
def test_bad_archives(name: str, message: str, photos: Path, tmp_path: Path) -> None:
    for suffix in ("tar", "parquet", "arrow"):
        (tmp_path / f"photo.{suffix}").write_bytes(files(photos)[0].read_bytes())
    pq.write_table(pa.table({"a": [1]}), tmp_path / "plain.parquet")
    with pytest.raises(issl.IsslError, match=message):
        issl.load(name.format(tmp_path))


# --- several processes ---


def share_of(folder: str):
    return _Share(folder)


class _Share:
    """What each process does: score its share, and say which files it opened."""

    def __init__(self, folder: str):
        self.folder = folder

    def __call__(self, shards: Shards) -> tuple[list[float], int]:
        images = issl.load(f"folder:{self.folder}", size=SIDE, workers=1)
        opened: set[int] = set()
        decode = images.pixels.source

        class Watched:
            def __len__(self) -> int:
                return len(decode)

            def __getitem__(self, i: int) -> np.ndarray:
                opened.add(i)
                return decode[i]

            def identity(self) -> str:
                return decode.identity()

        watched = issl.Images(
            LazyPixels(Watched(), (SIDE, SIDE), workers=1),
            images.labels,
            images.attributes,
            images.name,
        )
        how = Computing(shards=shards, batch_size=2)
        scores = issl.self_influence(net(), watched, curvature=LoGra(3), computing=how)
        return scores["influence"].tolist(), len(opened)


def test_processes_of_uneven_shares_read_their_own(photos: Path) -> None:
    alone = issl.self_influence(
        net(), issl.load(f"folder:{photos}", size=SIDE), curvature=LoGra(3)
    )["influence"]
    for scores, opened in on_processes(3, share_of(str(photos))):
        np.testing.assert_allclose(scores, alone, rtol=1e-5)
        assert opened <= 8 + 2  # its share, and one batch ahead
