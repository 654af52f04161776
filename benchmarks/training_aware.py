"""Training-aware influence: its time over that of one plain pass, by number of images, batch size
and width.

python benchmarks/training_aware.py            # minutes; leaves a table in benchmarks/measured/ and
RESULTS.md
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts its threads
os.environ["MKL_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]

import argparse
import json
import time
from pathlib import Path

import torch
from report import machine, write_report

import issl
from issl.devices import keep_freed_memory
from issl.pretraining.learner import Learner
from issl.pretraining.recipes import recipe
from issl.training_aware import Share, batch_gradient, batches, measuring_copy, two_views

HERE = Path(__file__).parent
CASES: tuple[tuple[Share, int, int, int], ...] = (  # share, width, batch size, images
    ("marginal", 16, 32, 64),
    ("marginal", 16, 32, 128),
    ("marginal", 16, 16, 128),
    ("marginal", 16, 64, 128),
    ("marginal", 8, 32, 128),
    ("marginal", 32, 32, 64),
    ("own", 16, 32, 128),
)


def measure(share: Share, width: int, batch_size: int, n: int, queries: int) -> dict[str, object]:
    """Seconds of the effects of n images on some queries, and of one pass over the batches' own
    gradients."""
    name = "cifar10" if os.environ.get("ISSL_DATA") else "scenes"
    train, query = issl.load(name, n=n), issl.load(name, "test").subset(range(queries))
    learner = Learner(recipe("simclr", "short"), width, None, 0)
    model = measuring_copy(learner)
    began = time.perf_counter()
    for rows in batches(train, batch_size, 0, 0):
        batch_gradient(model, *two_views(model, train, rows, 0, 0, None))
    plain = time.perf_counter() - began
    began = time.perf_counter()
    issl.training_influence(learner, train, query, draws=1, share=share, batch_size=batch_size)
    seconds = time.perf_counter() - began
    return {
        "share": share,
        "width": width,
        "batch_size": batch_size,
        "images": n,
        "seconds": seconds,
        "ratio": seconds / plain,
        "data": name,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=8)
    options = parser.parse_args()
    keep_freed_memory()
    measure("marginal", 8, 16, 32, 2)  # the first call of every kernel is slow
    rows = [measure(*case, options.queries) for case in CASES]
    for row in rows:
        print(row, flush=True)
    part = {"rows": rows, "queries": options.queries, **machine("", torch.get_num_threads())}
    (HERE / "measured" / "training.json").write_text(json.dumps(part, indent=1) + "\n")
    write_report(HERE / "measured", HERE / "RESULTS.md")


if __name__ == "__main__":
    main()
