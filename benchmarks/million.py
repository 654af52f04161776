"""A million drawn images through the whole path: written as JPEGs in parquet, then fit and scored
by `issl influence`.

    python benchmarks/million.py FOLDER                    # about an hour of one core
    python benchmarks/million.py FOLDER --images 20000     # a rehearsal

Prints the rates and the peak memory of the command. The encoder is a ResNet-18 of width 1, so that
what is measured is the path: decoding, noise, gradients, parts.
"""

from __future__ import annotations

import argparse
import io
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from issl.pretraining.encoder import Head, new_encoder, save_encoder

SHARD = 50_000


def draw(folder: Path, count: int) -> None:
    """Random pictures of 32 px with a class each, as JPEGs, 50,000 a file."""
    folder.mkdir(parents=True)
    for start in range(0, count, SHARD):
        rng = np.random.default_rng(start)
        rows = []
        for k in range(start, min(start + SHARD, count)):
            coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            file = io.BytesIO()
            coarse.resize((32, 32), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            rows.append(
                {"image": {"bytes": file.getvalue(), "path": f"{k:07}.jpg"}, "label": k % 10}
            )
        pq.write_table(
            pa.Table.from_pylist(rows), folder / f"{start:07}.parquet", row_group_size=1000
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--batch-size", default="256")
    options = parser.parse_args()
    photos, encoder, out = (
        options.folder / name for name in ("photos", "encoder.safetensors", "out")
    )
    began = time.monotonic()
    if not photos.exists():
        draw(photos, options.images)
        net = new_encoder(1, Head(hidden=32, out=16), 0).train()
        with torch.no_grad():
            net(torch.rand(256, 3, 32, 32))  # BatchNorm has seen images
        save_encoder(encoder, net, {})
    print(
        f"drawn in {time.monotonic() - began:.0f} s: "
        f"{sum(p.stat().st_size for p in photos.iterdir()) / 1e9:.2f} GB"
    )
    began = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "issl",
        "influence",
        "--data",
        f"hf:{photos}",
        "--encoder",
        str(encoder),
    ]
    command += ["--out", str(out), "--batch-size", options.batch_size, "--device", "cpu"]
    subprocess.run(command, check=True)
    seconds, used = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    scores = pd.read_parquet(out / "scores")
    print(
        f"{len(scores):,} images, {scores['index'].nunique():,} different: {seconds:.0f} s "
        f"({used.ru_utime + used.ru_stime:.0f} s of a core), {len(scores) / seconds:.0f} images/s, "
        f"peak {used.ru_maxrss / 1024:.0f} MB"
    )


if __name__ == "__main__":
    main()
