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
import torch
import torchvision
from nets import make
from PIL import Image

from issl.pretraining.encoder import Head, new_encoder, save_encoder


def png(pixels: np.ndarray) -> bytes:
    """One image (3, h, w), encoded."""
    out = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(out, "png")
    return out.getvalue()


def jpeg(pixels: np.ndarray, orientation: int = 1) -> bytes:
    """One image (3, h, w), encoded, from a camera that was held so."""
    out, exif = io.BytesIO(), Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels.transpose(1, 2, 0)).save(out, "jpeg", exif=exif)
    return out.getvalue()


def images_of_every_kind(folder: Path) -> Path:
    """A folder of images of every mode that a file may have."""
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (20, 28, 4), dtype=np.uint8), "RGBA")
    grey, rgb = rgba.convert("L"), rgba.convert("RGB")
    deep = Image.fromarray(rng.integers(0, 2**16, (20, 28)).astype(np.uint16))
    palette, sideways, deep_sideways = rgb.quantize(20), rgb.copy(), deep.copy()
    palette.info["transparency"] = 3
    sideways.getexif()[274], deep_sideways.getexif()[274] = 6, 8
    kinds = {
        "L.png": grey,
        "LA.png": rgba.convert("LA"),
        "P.png": palette,
        "RGBA.png": rgba,
        "CMYK.tiff": rgb.convert("CMYK"),
        "CMYK.jpeg": rgba.convert("CMYK"),
        "YCbCr.jpeg": rgb,
        "1.png": grey.convert("1"),
        "16 bits.png": deep,
        "16 bits.tiff": deep,
        "16 bits.pgm": deep,
        "GIF.gif": rgba.convert("P"),
        "EXIF.jpeg": sideways,
        "EXIF.png": sideways,
        "EXIF.tiff": sideways,
        "16 bits, EXIF.png": deep_sideways,
    }
    folder.mkdir()
    for name, image in kinds.items():
        image.save(folder / name, exif=image.getexif())
    return folder


def net() -> torch.nn.Module:
    """A small encoder, always the same."""
    return make("batchnorm", torch.float32)


def encoder(path: Path) -> str:
    """A small encoder in a file of ours."""
    drawn = new_encoder(2, Head(hidden=8, out=8), 0).train()
    with torch.no_grad():
        drawn(torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    save_encoder(path, drawn, {})
    return str(path)


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
