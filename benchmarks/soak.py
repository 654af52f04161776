"""Many calls in one process: does the memory grow, and is anything left in the temporary folder or
the cache?

    python benchmarks/soak.py --calls 10000 --commands 100 --churn 2000

Influence and cross-influence of tiny images in turn; `issl influence` and `issl explain` as
commands, with their pictures; artifacts that are made, damaged, left half made and made again. The
slope is that of a line through the resident memory after the first fifth of the calls.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import psutil
import torch
from pydantic import Field
from torch import nn

import issl
from issl import cli
from issl.audit.cache import Artifacts, Stage
from issl.audit.config import Config
from issl.files import PART, atomic
from issl.pretraining.encoder import Head, new_encoder, save_encoder

WARM = 0.2  # the share of the calls that fill caches and pools


class Soak(Config):
    """How many times."""

    calls: int = Field(10_000, ge=20)
    commands: int = Field(100, ge=20)
    churn: int = Field(2_000, ge=20)


class Small(Stage):
    """An artifact of a kilobyte."""

    name: ClassVar[str] = "small"

    number: int

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        with atomic(folder / "value.json") as part:
            part.write_text(json.dumps([self.number] * 100))


def slope(work: Callable[[int], object], count: int) -> tuple[float, float, float]:
    """Bytes that the resident memory grows per call, megabytes at the end, seconds per call."""
    process, at, size, began = psutil.Process(), [], [], time.monotonic()
    for k in range(count):
        work(k)
        if k >= WARM * count and (k % max(1, count // 100) == 0):
            gc.collect()
            at.append(k)
            size.append(process.memory_info().rss)
    return float(np.polyfit(at, size, 1)[0]), size[-1] / 1e6, (time.monotonic() - began) / count


def influence_calls() -> Callable[[int], object]:
    torch.manual_seed(0)
    parts = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    encoder, pixels = (
        nn.Sequential(*parts).eval(),
        torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8),
    )

    def call(k: int) -> object:
        if k % 2:
            return issl.cross_influence(encoder, pixels, pixels[:1], curvature=issl.LoGra(2))
        memory = "mapped" if k % 20 == 0 else "auto"
        return issl.self_influence(
            encoder, pixels, curvature=issl.LoGra(2), computing=issl.Computing(memory=memory)
        )

    return call


def command_calls(place: Path) -> Callable[[int], object]:
    encoder = new_encoder(1, Head(hidden=4, out=4), seed=0)
    with torch.no_grad():
        encoder.train()(torch.rand(8, 3, 32, 32))
    save_encoder(place / "e.safetensors", encoder, {})
    shared = [
        "--data",
        "scenes",
        "--images",
        "8",
        "--encoder",
        str(place / "e.safetensors"),
        "--rank",
        "2",
        "--out",
    ]

    def call(k: int) -> object:
        words = ["influence", *shared, str(place / "s.csv")]
        if k % 2:
            words = [
                "explain",
                "train:3",
                *shared,
                str(place / "x.png"),
                "--k",
                "2",
                "--draws",
                "1",
            ]
        with contextlib.redirect_stdout(io.StringIO()):
            assert cli.main(words) == 0
        return None

    return call


def churn(root: Path) -> Callable[[int], object]:
    chance = random.Random(0)

    def call(k: int) -> object:
        artifacts, stage = Artifacts(root, released=None), Small(number=k % 20)
        folder, lost = artifacts.folder(stage), chance.random()
        if lost < 0.3 and folder.is_dir():
            (folder / "value.json").write_text("damaged")
        elif lost < 0.6 and folder.is_dir():
            for file in folder.iterdir():
                file.unlink()
            work = folder.with_name(folder.name + ".part")
            folder.rename(work)
            (work / f".value.json{PART}killed.json").write_text("half")
        return artifacts.get(stage)

    return call


def main() -> int:
    told = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, field in Soak.model_fields.items():
        told.add_argument(
            f"--{name}", type=int, default=field.default, help=f"how many ({field.default})"
        )
    soak = Soak(**vars(told.parse_args()))
    torch.set_num_threads(1)
    left: list[Path] = []
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stderr(io.StringIO()):
        tempfile.tempdir = place
        root = Path(place) / "artifacts"
        for what, count, work in (
            ("influence", soak.calls, influence_calls()),
            ("commands", soak.commands, command_calls(Path(place))),
            ("churn", soak.churn, churn(root)),
        ):
            grows, holds, seconds = slope(work, count)
            print(
                f"{what:10} {count:6} calls, {seconds * 1e3:7.1f} ms each: {grows:8.1f} bytes a "
                f"call, {holds:.0f} MB"
            )
            sys.stdout.flush()
        marks = (
            PART,
            ".part",
            "issl-rows-",
        )  # of a file being written, an artifact being made, stored gradients
        left = [p for p in Path(place).rglob("*") if any(mark in p.name for mark in marks)]
    print(f"left over: {len(left)} temporary files or folders")
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())
