"""Data sets in the layouts of the published ones, made small."""

import hashlib
import io
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from PIL import Image

from issl.data import published
from issl.pretraining.encoder import Head, new_encoder, save_encoder


def encoded(image: Image.Image | np.ndarray, kind: str, **how: Any) -> bytes:
    """An image, or its pixels (3, h, w), as a file."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image.transpose(1, 2, 0))
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


png = partial(encoded, kind="png")


def encoder(path: Path) -> str:
    """A small encoder in a file of ours."""
    drawn = new_encoder(2, Head(hidden=8, out=8), 0).train()
    with torch.no_grad():
        drawn(torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    save_encoder(path, drawn, {})
    return str(path)


def write_parquet(folder: Path, split: str, columns: dict, pixels: np.ndarray, encode=png) -> Path:
    """One file in the Hugging Face layout."""
    path = folder / f"{split}-00000-of-00001.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({"img": [{"bytes": encode(p), "path": None} for p in pixels], **columns})
    pq.write_table(table, path)
    return path


def write_cifar10(root: Path, train: int, test: int) -> None:
    """A CIFAR-10 of so many drawn images, ten classes in turn."""
    rng = np.random.default_rng(0)
    for split, n in (("train", train), ("test", test)):
        pixels = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
        labels = {"label": [k % 10 for k in range(n)]}
        write_parquet(root / "cifar10/plain_text", split, labels, pixels)


def write_torchvision(
    root: Path, kind: str, batches: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CIFAR in torchvision's layout, with its checksums; the last file is the test set's."""
    of = getattr(torchvision.datasets, kind)
    base, sums = root / of.base_folder, {}
    base.mkdir(parents=True)
    labels, names = of.meta["key"].replace("_names", "s"), published.SOURCES[kind.lower()].names
    contents = {
        name: {"data": x.reshape(len(x), -1), labels: y} for name, (x, y) in batches.items()
    }
    contents[of.meta["filename"]] = {of.meta["key"]: next(iter(names.values()))}
    for name, content in contents.items():
        (base / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((base / name).read_bytes()).hexdigest()
    *train, test = batches
    monkeypatch.setattr(of, "train_list", [[name, sums[name]] for name in train])
    monkeypatch.setattr(of, "test_list", [[test, sums[test]]])
    monkeypatch.setattr(of, "meta", of.meta | {"md5": sums[of.meta["filename"]]})
