"""Sets that are decoded when they are needed: the same numbers as in memory, from every kind of source."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

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
from torch.utils.data import TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import issl
from issl import Computing, LoGra, keyed_random
from issl.commands import cli
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
    return pa.table({"image": rows, "label": labels, "note": [p.stem for p in files(photos)]}).replace_schema_metadata(
        metadata
    )


def parquet(photos: Path, folder: Path) -> str:
    whole = table(photos)
    pq.write_table(whole.slice(0, 11), folder / "train-0.parquet", row_group_size=4)
    pq.write_table(whole.slice(11), folder / "train-1.parquet", row_group_size=5)
    return f"parquet:{folder}"


def arrow(photos: Path, folder: Path) -> str:
    """The streaming format, which Hugging Face writes, and the file format."""
    whole = table(photos)
    for name, part, writer in (("a", whole.slice(0, 8), pa.ipc.new_stream), ("b", whole.slice(8), pa.ipc.new_file)):
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
        one, two = (issl.self_influence(net(), images, curvature=LoGra(3), computing=how) for images in (lazy, held))
        pd.testing.assert_frame_equal(one, two, check_exact=True)


@pytest.mark.parametrize("write", [tar, parquet, arrow])
def test_every_source_gives_the_same_images(write, photos: Path, tmp_path: Path) -> None:
    want = issl.load(f"folder:{photos}", size=SIDE)
    got = issl.load(write(photos, tmp_path), size=SIDE)
    assert torch.equal(got.tensor(), want.tensor()) and torch.equal(got.require_labels(), want.require_labels())
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
    floats = issl.from_dataset(ImageFolder(photos, v2.Compose([transform, v2.ToDtype(torch.float32, scale=True)])))
    assert torch.equal(floats.tensor(), own.tensor()) and floats.pixels.shape == (N, 3, 20, 20)
    given = issl.from_dataset([{"image": x} for x in own.tensor()], index=range(100, 100 + N))
    assert torch.equal(given.tensor(), own.tensor()) and given.index.tolist() == list(range(100, 100 + N))
    bad = [
        (TensorDataset(torch.zeros(3, 5)), r"item 0 of dataset gives \(5,\)"), (ImageFolder(photos), "give size="),
        (TensorDataset(torch.randn(3, 3, 8, 8)), r"normalisation is part of the encoder"), ([], "length of 1 or more"),
        (5, "items by number"),
    ]  # fmt: skip
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # what a user without beartype gets
    for dataset, message in bad:
        with pytest.raises(issl.IsslError, match=message):
            issl.from_dataset(dataset)
    uneven = issl.from_dataset([torch.zeros(3, 8, 8), torch.zeros(3, 9, 8)])
    with pytest.raises(issl.IsslError, match=r"item 1 of dataset is \(9, 8\) px, the first \(8, 8\)"):
        uneven.tensor()


def test_it_takes_positions_as_a_tensor_does(photos: Path) -> None:
    images = issl.load(f"folder:{photos}", size=SIDE)
    lazy, held = images.pixels, images.tensor()
    for where in (0, -1, slice(3, 9), slice(None), slice(20, 40), slice(0, 9, 4), [5, 2, 2], torch.tensor([-2, 0])):
        assert torch.equal(lazy[where], held[where]), where
    assert lazy.shape == held.shape and len(lazy) == N and lazy.ndim == 4 and lazy.dtype == torch.uint8
    assert torch.equal(torch.stack(list(lazy)), held) and [len(x) for x in lazy.split(10)] == [10, 10, 3]
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
    """Another file changes nothing about the others; the scores of images do not depend on their place."""
    for path in files(photos)[:6]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = issl.load(f"folder:{tmp_path}", size=SIDE)
    (tmp_path / "-new.jpg").write_bytes(files(photos)[9].read_bytes())
    after = issl.load(f"folder:{tmp_path}", size=SIDE)
    assert after.attributes["path"][0] == "-new.jpg" and after.index[1:].tolist() == before.index.tolist()
    assert before.attributes["index"].tolist() == [path_index(p) for p in before.attributes["path"]]
    assert (before.index >= 0).all() and int(before.index.max()) < 2**62
    fitted = issl.fit(net(), before, curvature=LoGra(3))
    assert fitted.score(after)["influence"][1:].tolist() == pytest.approx(fitted.score(before)["influence"].tolist())


def test_a_camera_held_sideways(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    (tmp_path / "a.jpg").write_bytes(jpeg(pixels))
    (tmp_path / "b.jpg").write_bytes(jpeg(pixels, orientation=6))  # to be turned clockwise by a quarter
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
    contents = {"x1.jpg": b"no image", "x2.jpg": b"", "x3.jpg": good[:-200], "x4.png": drawn[: len(drawn) // 2]}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_broken_files_are_named_before_any_work(damaged: Path) -> None:
    with pytest.raises(issl.IsslError, match=r"4 of 16 images cannot be decoded: .*x1.jpg.*x4.png.*--skip-broken"):
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


def test_the_command_skips_and_tells(damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from test_scale import ours

    encoder = ours(tmp_path / "e.safetensors")
    given = ["influence", "--data", f"folder:{damaged}", "--encoder", encoder, "--rank", "2", "--out"]
    assert cli.main([*given, str(tmp_path / "s.parquet")]) == 2
    assert "x1.jpg" in capsys.readouterr().err
    assert cli.main([*given, str(tmp_path / "s.parquet"), "--skip-broken", "--workers", "2"]) == 0
    assert "4 images could not be decoded" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "s.broken.csv")) == 4 and len(pd.read_parquet(tmp_path / "s.parquet")) == 12


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tar:{}/nothing", "there is no \\*.tar file"), ("tar:{}/photo.tar", "no readable, uncompressed tar"),
        ("parquet:{}/plain.parquet", "no column of images .*its columns are a"),
        ("parquet:{}/photo.parquet", "cannot be read"), ("arrow:{}/photo.arrow", "cannot be read"),
    ],
)  # fmt: skip
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
            LazyPixels(Watched(), (SIDE, SIDE), workers=1), images.labels, images.attributes, images.name
        )
        how = Computing(shards=shards, batch_size=2)
        scores = issl.self_influence(net(), watched, curvature=LoGra(3), computing=how)
        return scores["influence"].tolist(), len(opened)


def test_processes_of_uneven_shares_read_their_own(photos: Path) -> None:
    alone = issl.self_influence(net(), issl.load(f"folder:{photos}", size=SIDE), curvature=LoGra(3))["influence"]
    for scores, opened in on_processes(3, share_of(str(photos))):
        np.testing.assert_allclose(scores, alone, rtol=1e-5)
        assert opened <= 8 + 2  # its share, and one batch ahead
