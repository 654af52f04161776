"""`hf:` reads what Hugging Face's datasets reads: the pixels of a folder, labels of every type."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets as hf
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from disk import png
from nets import make

import issl
from issl import LoGra
from issl.data import datasets

FOUR = [png(np.full((3, 16, 16), 50 * k, np.uint8)) for k in range(4)]
TEXTS = ["cat", "dog", "cat", "ant"]
SIZE = 24


def table(photos: Path) -> pa.Table:
    paths = sorted(photos.rglob("*.jpg"))
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=list("abc"))})
    rows = {
        "image": [{"bytes": path.read_bytes(), "path": None} for path in paths],
        "label": ["abc".index(path.parent.name) for path in paths],
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
                archive.add(path, path.name)
                label = tarfile.TarInfo(f"{path.stem}.cls")
                label.size = 1
                archive.addfile(label, io.BytesIO(b"%d" % "abc".index(path.parent.name)))
    return folder


CONTAINERS = [parquet, arrow, saved, tar, lambda photos, _: photos]  # the last: an image folder


@pytest.mark.parametrize("write", CONTAINERS)
def test_every_container_gives_the_same_images(write, photos: Path, tmp_path: Path) -> None:
    want = issl.load(f"folder:{photos}", size=SIZE)
    name = f"hf:{write(photos, tmp_path)}"
    content = [hashlib.sha256(p.read_bytes()).digest() for p in sorted(photos.rglob("*.jpg"))]
    content.append(repr(want.labels.tolist()).encode())
    digest = hashlib.sha256(b"".join(content)).hexdigest()[:16]
    assert datasets.identity(name).digest == digest
    got = issl.load(name, size=SIZE)
    assert torch.equal(got.tensor(), want.tensor())
    assert torch.equal(got.require_labels(), want.require_labels())
    assert got.index.tolist() == list(range(13)) and datasets.count(name) == 13
    if write is not tar:  # which knows no names
        assert got.attributes["label_name"].tolist() == want.attributes["label_name"].tolist()
    some = issl.load(name, n=7, size=SIZE, seed=3)
    assert len(some) == 7 and torch.equal(some.tensor(), want.tensor()[some.index])
    assert some.name == f"hf:{Path(name).name}"


def test_splits_and_a_set_that_changed_in_its_place(photos: Path, tmp_path: Path) -> None:
    whole, name = table(photos), f"hf:{tmp_path}"
    pq.write_table(whole.slice(0, 8), tmp_path / "train.parquet")
    pq.write_table(whole.slice(8), tmp_path / "test.parquet")
    assert [len(issl.load(name, split)) for split in ("train", "test")] == [8, 5]
    before, one = datasets.identity(name), issl.load(name, size=SIZE).pixels.identity()
    pq.write_table(whole.slice(8, 4), tmp_path / "train.parquet")
    assert datasets.identity(name).digest != before.digest and datasets.count(name) == 4
    assert issl.load(name, size=SIZE).pixels.identity() != one


def written(tmp_path: Path, columns: dict) -> str:
    pq.write_table(pa.table(columns), tmp_path / "set.parquet")
    return f"hf:{tmp_path / 'set.parquet'}"


def test_texts_are_classes_and_columns_may_be_called_like_ours(tmp_path: Path) -> None:
    ours = "index influence influence@1 stability_loss loss grad_norm standard_error position path"
    own = {name: [k + j / 10 for j in range(4)] for k, name in enumerate(ours.split())}
    letters, texts = (pa.array(some).dictionary_encode() for some in (list("wxyz"), TEXTS))
    more = {"own_loss": letters, "label": texts, "label_name": [7, 8, 9, 9]}
    name = written(tmp_path, {"image": FOUR, **own, **more})
    images, some = issl.load(name, size=16), issl.load(name, n=2, size=16, seed=1)
    assert images.require_labels().tolist() == [1, 2, 1, 0]
    assert some.require_labels().tolist() == [[1, 2, 1, 0][k] for k in some.index]
    known = images.attributes
    assert known["index"].tolist() == [0, 1, 2, 3] and known["own_loss"].tolist() == list("wxyz")
    for name, values in own.items():
        column = "own_own_loss" if name == "loss" else f"own_{name}"
        assert known[column].tolist() == values, name
    assert known["label_name"].tolist() == TEXTS
    assert known["own_label_name"].tolist() == [7, 8, 9, 9]
    encoder = make("batchnorm", torch.float32)
    scores = issl.self_influence(encoder, images, curvature=LoGra(3), draws=2, sweep=(1.0,))
    assert set(scores) & set(known) == {"index"}


def test_bad_tables(tmp_path: Path) -> None:
    for columns, message in [
        ({"image": [{"bytes": None, "path": "/etc/passwd"}]}, "holds no encoded image but None"),
        ({"image": FOUR, "label": [-1, 5, 0, 1]}, "a label is -1"),
        ({"image": FOUR, "label": [0.5, 1.0, 1.0, 1.0]}, "need whole numbers, or texts"),
    ]:
        with pytest.raises(issl.IsslError, match=message):
            issl.load(written(tmp_path, columns), size=16)


WITHOUT_A_NETWORK = """
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


def test_without_a_network_no_code_is_run_and_nothing_is_kept_elsewhere(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for name in ("plain", "evil"):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"image": FOUR}), tmp_path / name / "train.parquet")
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    own = {"HOME": str(home), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    own |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    command = [sys.executable, "-c", WITHOUT_A_NETWORK, str(tmp_path)]
    done = subprocess.run(command, env=kept | own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded, evil, nothing = done.stdout.splitlines()
    assert loaded == "4" and not (tmp_path / "mark").exists()
    assert "scripts are no longer supported" in evil and "hf:nobody/nothing: " in nothing
    assert (tmp_path / "cache" / "issl" / "datasets").is_dir() and not list(home.iterdir())
