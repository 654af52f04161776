"""Data sets in the layouts of the published ones, made small."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision
from PIL import Image


def png(pixels: np.ndarray) -> bytes:
    """One image (3, h, w), encoded."""
    out = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(out, "png")
    return out.getvalue()


def write_parquet(
    root: Path,
    folder: str,
    prefix: str,
    image: str,
    columns: dict,
    pixels: np.ndarray,
    metadata=None,
) -> Path:
    """One file in the Hugging Face layout."""
    path = root / folder / f"{prefix}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({image: [{"bytes": png(p), "path": None} for p in pixels], **columns})
    pq.write_table(table.replace_schema_metadata(metadata or {}), path)
    return path


def write_cifar10(root: Path, train: int, test: int) -> None:
    """A CIFAR-10 of so many drawn images, ten classes in turn."""
    rng = np.random.default_rng(0)
    for split, n in (("train", train), ("test", test)):
        pixels = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
        write_parquet(
            root, "cifar10/plain_text", split, "img", {"label": [k % 10 for k in range(n)]}, pixels
        )


def write_batches(
    root: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch, labels: list[int] | None = None
) -> Path:
    """CIFAR-10 in torchvision's layout, of few images: one in each training batch, the others are
    the test set (their labels: 0, 1, … unless given). The checksums that torchvision verifies are
    made those of its files. Returns its folder."""
    base, flat = root / "cifar-10-batches-py", pixels.reshape(len(pixels), -1)
    base.mkdir(parents=True)
    batches = {f"data_batch_{k}": {"data": flat[k - 1 : k], "labels": [k]} for k in range(1, 6)}
    batches["test_batch"] = {"data": flat[5:], "labels": labels or list(range(len(pixels) - 5))}
    sums = {}
    for name, content in {**batches, "batches.meta": {"label_names": list("abcdefghij")}}.items():
        (base / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((base / name).read_bytes()).hexdigest()
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [[k, sums[k]] for k in batches if k != "test_batch"])
    monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(
        kind,
        "meta",
        {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]},
    )
    return base
