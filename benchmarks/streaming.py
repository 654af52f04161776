"""Peak memory and rates of fit and score on a folder of JPEGs that is decoded as it is needed.

    python benchmarks/streaming.py FOLDER --draw 16000     # draws the JPEGs (256 px) first, if
    FOLDER is not there python benchmarks/streaming.py FOLDER --images 2000

The encoder is cheap, so that decoding and noise are what costs. Compare the peaks of runs on other
numbers of images.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import issl
from issl import Computing, LoGra


def draw(folder: Path, count: int) -> None:
    """Smooth random pictures, in ten folders."""
    rng = np.random.default_rng(0)
    for k in range(count):
        path = folder / f"c{k % 10}" / f"{k:07}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        coarse.resize((256, 256), Image.Resampling.BICUBIC).save(path, quality=90)


def peak_mb() -> float:
    """Of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--draw", type=int, default=0, metavar="N")
    parser.add_argument(
        "--images", type=int, default=None, metavar="N", help="how many (default: all)"
    )
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if options.draw and not options.folder.exists():
        draw(options.folder, options.draw)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    body = [
        nn.Conv2d(3, 8, 16, 16),
        nn.ReLU(),
        nn.Conv2d(8, 16, 2, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    encoder = nn.Sequential(*body, nn.Linear(16, 16)).eval()
    imports, began = peak_mb(), time.process_time()
    images = issl.load(
        f"folder:{options.folder}", n=options.images, size=options.size, workers=options.workers
    )
    loaded, computing = time.process_time() - began, Computing(batch_size=32)
    fitted = issl.fit(
        encoder,
        images.subset(range(min(1000, len(images)))),
        curvature=LoGra(4),
        computing=computing,
    )
    began, wall = time.process_time(), time.monotonic()
    fitted.score(images, computing=computing)
    cpu, wall = time.process_time() - began, time.monotonic() - wall
    print(
        f"{len(images)} images at {options.size} px: peak {peak_mb():.0f} MB (imports "
        f"{imports:.0f} MB)"
    )
    print(f"found and checked in {loaded:.1f} CPU s")
    print(
        f"scored {len(images) / cpu:.0f} images per CPU second, {len(images) / wall:.0f} per second"
    )


if __name__ == "__main__":
    main()
