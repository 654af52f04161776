"""`hf:` reads what Hugging Face's datasets reads: the pixels of a folder, labels of every type."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets as hf
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from disk import encoder, images_of_every_kind, net, png
from PIL import Image

import issl
from issl import LoGra, cli
from issl.data import datasets

FOUR = [png(np.full((3, 16, 16), 50 * k, np.uint8)) for k in range(4)]
TEXTS, NUMBERS, TRUTHS = ["cat", "dog", "cat", "ant"], [2, 0, 2, 1], [True, False, True, True]
SIZE = 24


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of mixed size in three folders."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for k in range(13):
        path = folder / "abc"[k * 3 // 13] / f"{k:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30 + k, 40, 3), dtype=np.uint8)).save(path)
    return folder


def table(photos: Path) -> pa.Table:
    paths = sorted(photos.rglob("*.jpg"))
    kinds = {"label": hf.ClassLabel(names=["a", "b", "c"]), "note": hf.Value("string")}
    features = hf.Features({"image": hf.Image(), **kinds})
    rows = {
        "image": [{"bytes": path.read_bytes(), "path": None} for path in paths],
        "label": ["abc".index(path.parent.name) for path in paths],
        "note": [path.stem for path in paths],
    }
    return pa.table(rows, schema=features.arrow_schema)


def parquet(photos: Path, folder: Path) -> Path:
    whole = table(photos)
    pq.write_table(whole.slice(0, 8), folder / "train-00000-of-00002.parquet", row_group_size=4)
    pq.write_table(whole.slice(8), folder / "train-00001-of-00002.parquet", row_group_size=5)
    return folder


def arrow(photos: Path, folder: Path) -> Path:
    with pa.ipc.new_stream(folder / "a.arrow", table(photos).schema) as out:
        out.write_table(table(photos), max_chunksize=3)
    return folder / "a.arrow"


def saved(photos: Path, folder: Path) -> Path:
    hf.Dataset(table(photos)).save_to_disk(folder / "saved")
    return folder / "saved"


def tar(photos: Path, folder: Path) -> Path:
    """WebDataset's shards, with classes by number."""
    paths = sorted(photos.rglob("*.jpg"))
    for shard, part in enumerate((paths[:8], paths[8:])):
        with tarfile.open(folder / f"part-{shard}.tar", "w") as archive:
            for path in part:
                label = b"%d" % "abc".index(path.parent.name)
                for name, data in ((path.name, path.read_bytes()), (f"{path.stem}.cls", label)):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return folder


def imagefolder(photos: Path, _: Path) -> Path:
    return photos


@pytest.mark.parametrize("write", [parquet, arrow, saved, tar, imagefolder])
def test_every_container_gives_the_same_images(write, photos: Path, tmp_path: Path) -> None:
    want = issl.load(f"folder:{photos}", size=SIZE)
    name = f"hf:{write(photos, tmp_path)}"
    got = issl.load(name, size=SIZE)
    assert torch.equal(got.tensor(), want.tensor())
    assert torch.equal(got.require_labels(), want.require_labels())
    assert got.index.tolist() == list(range(13)) and datasets.count(name) == 13
    if write is not tar:  # which knows no names
        assert got.attributes["label_name"].tolist() == want.attributes["label_name"].tolist()
    some = issl.load(name, n=7, size=SIZE, seed=3)
    assert len(some) == 7 and torch.equal(some.tensor(), want.tensor()[some.index])
    assert some.name == f"hf:{Path(name).name}"


def test_an_identity_is_that_of_the_content(photos: Path, tmp_path: Path) -> None:
    digests = set()
    for k, write in enumerate((parquet, arrow, saved, tar, imagefolder)):
        (tmp_path / str(k)).mkdir()
        digests.add(datasets.identity(f"hf:{write(photos, tmp_path / str(k))}").digest)
    assert len(digests) == 1
    name = f"hf:{tmp_path / '0'}"
    one = issl.load(name, size=SIZE).pixels.identity()
    pq.write_table(table(photos).slice(8, 4), tmp_path / "0" / "train-00001-of-00002.parquet")
    assert datasets.identity(name).digest not in digests  # of a set that changed in its place
    assert issl.load(name, size=SIZE).pixels.identity() != one and datasets.count(name) == 12


def test_splits(photos: Path, tmp_path: Path) -> None:
    whole = table(photos)
    pq.write_table(whole.slice(0, 8), tmp_path / "train.parquet")
    pq.write_table(whole.slice(8), tmp_path / "test.parquet")
    sizes = [len(issl.load(f"hf:{tmp_path}", split)) for split in ("train", "test")]
    assert sizes == [8, 5]
    with pytest.raises(issl.IsslError, match=r"split 'val'.* has train, test"):
        issl.load(f"hf:{tmp_path}", "val")


def test_every_kind_of_image_as_from_a_folder(tmp_path: Path) -> None:
    """EXIF, 16 bits, CMYK, palettes, ..."""
    folder = images_of_every_kind(tmp_path / "images")
    paths = sorted(folder.iterdir())
    name = written(tmp_path, {"image": [path.read_bytes() for path in paths]})
    want = issl.load(f"folder:{folder}", size=20).tensor()
    assert torch.equal(issl.load(name, size=20).tensor(), want)


def written(tmp_path: Path, columns: dict) -> str:
    pq.write_table(pa.table(columns), tmp_path / "set.parquet")
    return f"hf:{tmp_path / 'set.parquet'}"


LABELS = {
    "string": (pa.array(TEXTS), [1, 2, 1, 0], TEXTS),
    "large string": (pa.array(TEXTS, pa.large_string()), [1, 2, 1, 0], TEXTS),
    "string view": (pa.array(TEXTS).cast(pa.string_view()), [1, 2, 1, 0], TEXTS),
    "category": (pa.array(TEXTS).dictionary_encode(), [1, 2, 1, 0], TEXTS),
    "numbers in a dictionary": (pa.array(NUMBERS).dictionary_encode(), NUMBERS, list("2021")),
    "bool": (pa.array(TRUTHS), [1, 0, 1, 1], ["True", "False", "True", "True"]),
    **{
        str(kind): (pa.array(NUMBERS, kind), NUMBERS, list("2021"))
        for kind in (pa.int8(), pa.int64(), pa.uint8(), pa.uint64(), pa.float16(), pa.float64())
    },
}


@pytest.mark.parametrize("of", LABELS)
def test_labels_of_every_type(of: str, tmp_path: Path) -> None:
    labels, numbers, names = LABELS[of]
    what = pa.array(list("wxyz")).dictionary_encode()
    name = written(tmp_path, {"image": FOUR, "n": [5, 6, 7, 8], "what": what, "label": labels})
    images = issl.load(name, size=16)
    assert images.require_labels().tolist() == numbers
    assert images.attributes["label_name"].tolist() == names
    assert images.attributes["n"].tolist() == [5, 6, 7, 8]
    assert images.attributes["what"].tolist() == list("wxyz")
    some = issl.load(name, n=2, size=16, seed=1)  # numbered by the whole set
    assert some.require_labels().tolist() == [numbers[k] for k in some.index]


@pytest.mark.parametrize(
    "labels", [["cat", None, "dog", "cat"], [3, None, 0, 1], [True, None, False, True], [None] * 4]
)
def test_a_missing_label_is_none(labels: list, tmp_path: Path) -> None:
    column = pa.array(labels, None if any(x is not None for x in labels) else pa.string())
    images = issl.load(written(tmp_path, {"image": FOUR, "label": column}), size=16)
    assert images.labels is None
    names = images.attributes["label_name"]
    there = [isinstance(name, str) for name in names]
    assert there == [label is not None for label in labels]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("of", ["binary", "large_binary", "binary_view", "dictionary"])
def test_images_alone_of_every_type(of: str, nested: bool, tmp_path: Path) -> None:
    bare = pa.array(FOUR)
    column = bare.dictionary_encode() if of == "dictionary" else bare.cast(getattr(pa, of)())
    if nested:  # as Hugging Face keeps them
        column = pa.StructArray.from_arrays([column, pa.nulls(4, pa.string())], ["bytes", "path"])
    images = issl.load(written(tmp_path, {"image": column}), size=16)
    assert images.labels is None and list(images.attributes) == ["index"]
    assert images.tensor()[:, 0, 0, 0].tolist() == [0, 50, 100, 150]


def test_an_index_of_pandas(tmp_path: Path) -> None:
    """`df.set_index("label").to_parquet`; and rows that were filtered keep an index of their
    own."""
    frame = pd.DataFrame({"image": FOUR, "label": TEXTS, "n": range(4)})
    frame.set_index("label").to_parquet(tmp_path / "a.parquet")
    images = issl.load(f"hf:{tmp_path / 'a.parquet'}", size=16)
    assert images.attributes["label_name"].tolist() == TEXTS
    frame[frame["n"] > 1].to_parquet(tmp_path / "b.parquet")
    images = issl.load(f"hf:{tmp_path / 'b.parquet'}", size=16)
    assert set(images.attributes) == {"index", "label", "n", "label_name"}
    assert images.attributes["n"].tolist() == [2, 3]


OURS = "index influence stability_loss loss grad_norm standard_error position path".split()


def test_columns_that_are_called_like_ours(tmp_path: Path) -> None:
    own = {name: [k + j / 10 for j in range(4)] for k, name in enumerate((*OURS, "influence@1"))}
    more = {"own_loss": list("wxyz"), "label": TEXTS, "label_name": [7, 8, 9, 9]}
    images = issl.load(written(tmp_path, {"image": FOUR, **own, **more}), size=16)
    known = images.attributes
    assert known["index"].tolist() == [0, 1, 2, 3] and known["own_loss"].tolist() == list("wxyz")
    for name, values in own.items():
        column = "own_own_loss" if name == "loss" else f"own_{name}"
        assert known[column].tolist() == values, name
    assert known["label_name"].tolist() == TEXTS
    assert known["own_label_name"].tolist() == [7, 8, 9, 9]
    scores = issl.self_influence(net(), images, curvature=LoGra(3), draws=2, sweep=(1.0,))
    assert set(scores) & set(known) == {"index"}


def test_the_commands_keep_the_names_of_the_scores(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [png(rng.integers(0, 256, (3, 32, 32), dtype=np.uint8)) for _ in range(6)]
    own = {name: [10.0 * k + j for j in range(6)] for k, name in enumerate((*OURS, "similarity"))}
    pq.write_table(pa.table({"image": images, **own}), tmp_path / "clash.parquet")
    pq.write_table(pa.table({"image": images}), tmp_path / "plain.parquet")
    given, tables = ["--encoder", encoder(tmp_path / "e.safetensors"), "--rank", "2"], {}
    for name in ("clash", "plain"):
        told = [*given, "--data", f"hf:{tmp_path / name}.parquet"]
        out = tmp_path / name
        assert cli.main(["influence", *told, "--out", f"{out}.csv"]) == 0
        explain = ["explain", "train:1", *told, "--any-data", "--k", "2"]
        assert cli.main([*explain, "--out", f"{out}-lists.png"]) == 0
        tables[name] = [pd.read_csv(f"{out}.csv"), pd.read_csv(f"{out}-lists.csv")]
    for plain, clash in zip(tables["plain"], tables["clash"], strict=True):
        pd.testing.assert_frame_equal(clash[list(plain)], plain)
        for name, values in own.items():
            column = f"own_{name}" if f"own_{name}" in clash else name
            assert clash[column].tolist() == [values[k] for k in clash["index"]], name


def test_broken_images_are_named_or_skipped(tmp_path: Path) -> None:
    name = written(tmp_path, {"image": [FOUR[0], FOUR[1][:-30], b"no image", FOUR[3]]})
    with pytest.raises(issl.IsslError, match=r"2 of 4 images .*row 1 of hf:set.parquet.*--skip-br"):
        issl.load(name, size=16)
    images = issl.load(name, size=16, skip_broken=True)
    assert images.index.tolist() == [0, 3] and len(images.broken) == 2
    assert images.tensor()[:, 0, 0, 0].tolist() == [0, 150]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": [1]}, "no column of images .*its columns are a"),
        ({"image": pa.array([], pa.binary())}, "no rows|cannot read"),
        ({"image": [1, 2]}, "holds no encoded image but"),
        ({"image": [{"bytes": None, "path": "/etc/passwd"}]}, "holds no encoded image but None"),
        ({"image": FOUR, "label": [-1, 5, 0, 1]}, "a label is -1"),
        ({"image": FOUR, "label": [0.5, 1.0, 1.0, 1.0]}, "need whole numbers, or texts"),
    ],
)
def test_bad_tables(columns: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(issl.IsslError, match=message):
        issl.load(written(tmp_path, columns), size=16)


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "tar"])
def test_damaged_files(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(FOUR[0] * 9)
    said = rf"a.{suffix}: Hugging Face's datasets cannot read it"
    with pytest.raises(issl.IsslError, match=said):
        issl.load(f"hf:{tmp_path}/a.{suffix}")


def alone(code: str, tmp_path: Path, *arguments: str, **environment: str) -> str:
    """What a Python process of its own prints, with a home of its own."""
    home = tmp_path / "home"
    home.mkdir()
    own = {"HOME": str(home), "XDG_CACHE_HOME": str(tmp_path / "cache"), **environment}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=kept | own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(home.iterdir())  # nothing is kept outside the cache of this library
    return done.stdout


def test_without_a_network_no_code_is_run_and_nothing_is_kept_elsewhere(tmp_path: Path) -> None:
    for name in ("plain", "evil"):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"image": FOUR}), tmp_path / name / "train.parquet")
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    code = """if True:
        import socket, sys
        def refuse(*_, **__):
            raise OSError("no network")
        socket.socket.connect = socket.getaddrinfo = refuse
        import issl
        print(len(issl.load(f"hf:{sys.argv[1]}/plain", size=16).tensor()))
        for name in (f"hf:{sys.argv[1]}/evil", "hf:nobody/nothing"):
            try:
                issl.load(name, size=16)
            except issl.IsslError as error:
                print(error)
    """
    said = alone(code, tmp_path, str(tmp_path), HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1")
    loaded, evil, nothing = said.splitlines()
    assert loaded == "4" and not (tmp_path / "mark").exists()
    assert "scripts are no longer supported" in evil and "hf:nobody/nothing: " in nothing
    assert (tmp_path / "cache" / "issl" / "datasets").is_dir()


PEAK = """if True:
    import sys, threading, time
    import datasets, torch
    import datasets.packaged_modules.parquet.parquet
    import issl, issl.data.datasets
    def anonymous():
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    start, peak = anonymous(), []
    def watch():
        while True:
            peak.append(anonymous())
            time.sleep(0.01)
    threading.Thread(target=watch, daemon=True).start()
    images = issl.load(f"hf:{sys.argv[1]}", size=32, workers=2, n=int(sys.argv[2]))
    total = sum(int(batch.sum()) for batch in images.pixels.split(64))
    print(len(images), (max(peak) - start) / 1024)
"""


def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    """Anonymous memory, which the system cannot drop; 16,000 photos have 160 MB."""
    rng, peaks = np.random.default_rng(0), []
    one = [png(rng.integers(0, 256, (3, 58, 58), dtype=np.uint8)) for _ in range(100)]
    for n in (1_000, 16_000):
        part = pa.table({"image": one, "label": [k % 10 for k in range(100)]})
        (tmp_path / str(n)).mkdir()
        file = tmp_path / str(n) / "set.parquet"
        with pq.ParquetWriter(file, part.schema) as out:
            for _ in range(n // 100):
                out.write_table(part)
        count, peak = alone(PEAK, tmp_path / str(n), str(file), str(n // 10)).split()
        assert int(count) == n // 10
        peaks.append(float(peak))
    assert peaks[1] < peaks[0] + 60, peaks
