"""`issl attribute`: what training on each image did to others, through every step of a training."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd

from issl.data import datasets
from issl.data.images import Images
from issl.devices import pick_device
from issl.engine import whole
from issl.errors import IsslError
from issl.files import atomic, writable, write_safetensors
from issl.influence.scores import as_queries
from issl.pretraining.learner import load_learner
from issl.through_training import Effects, agreement, influence_through_training, random_subsets


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    text = "a file that `issl pretrain` wrote; training continues from it"
    add("--encoder", required=True, type=Path, metavar="FILE", help=text)
    add(
        "--images", required=True, metavar="SET", help="training set: folder:PATH, PATH, cifar10, …"
    )
    add("--queries", required=True, metavar="SET", help="images to ask about: folder:PATH, PATH, …")
    out = "each query's highest and lowest derivatives, .csv; all of them beside it, .safetensors"
    add("--out", type=Path, default=Path("attribute.csv"), metavar="FILE", help=out)
    add("--n", type=int, metavar="N", help="how many training images (default: all)")
    add("--asked", type=int, default=8, metavar="Q", help="how many queries, from the first (8)")
    add("--k", type=whole(1), default=8, help="images in each list (8)")
    add("--epochs", type=whole(1), default=1, help="of the continued training (1)")
    add("--batch-size", type=whole(2), default=256, help="its batch size (256)")
    add("--lr", type=float, default=0.05, help="its learning rate, for a batch of 256 (0.05)")
    add("--seed", type=int, default=0, help="of its order and views (0)")
    add("--folder", type=Path, metavar="DIR", help="keep states here, to continue later")
    text = "training runs without 5%% of the images, to test the predictions (8; 0: none)"
    add("--check", type=whole(0), default=8, metavar="N", help=text)
    add("--size", type=int, default=32, metavar="PX", help="side of the images of folders (32)")
    add("--data-root", type=Path, metavar="DIR", help="folder of the data sets ($ISSL_DATA)")
    add("--device", default="auto", help="auto (default), cpu or cuda")


def main(options: argparse.Namespace) -> int:
    began, out, shown = time.monotonic(), options.out, sys.stderr.isatty()
    writable(out, (".csv",))
    device, learner = pick_device(options.device), load_learner(options.encoder)
    # plain steps from a trained encoder, on views of the size that its training ended on
    small = 1.0 if learner.recipe.small == 1 else 0.0
    recipe = replace(learner.recipe, optimizer="sgd", lr=options.lr, small=small)
    images = _read(options.images, "train", options.n, options)
    queries = _read(options.queries, "test", options.asked, options)
    batch = min(options.batch_size, len(images))
    print(
        f"{recipe.method}, {options.epochs} more epochs of {len(images)} images in batches of "
        f"{batch}; {len(queries)} queries, {device}",
        flush=True,
    )
    effects = influence_through_training(
        learner,
        images,
        as_queries(queries),
        recipe,
        epochs=options.epochs,
        batch_size=batch,
        seed=options.seed,
        folder=options.folder,
        device=device,
        progress=shown,
    )
    kept = {"derivatives": effects.derivatives, "index": images.index}
    write_safetensors(out.with_suffix(".safetensors"), kept)
    with atomic(out) as part:
        lists(effects, images, options.k).to_csv(part, index=False)
    print(f"{effects.growth[0].median():.3g} times: growth of the adjoint to the first step")
    if options.check:
        subsets = random_subsets(len(images), 0.05, options.check, options.seed)
        found = agreement(effects.removals(subsets, shown)).iloc[0]
        print(
            f"without {found['left_out']:.0f} images: LDS {found['lds']:.2f}, slope "
            f"{found['slope']:.2f} (1: it predicts what the same training without them changes)"
        )
    print(f"{out}: {time.monotonic() - began:.0f} s", flush=True)
    return 0


def lists(effects: Effects, images: Images, k: int) -> pd.DataFrame:
    """The k images that lowered each query's stability loss most and the k that raised it most:
    query, list (helped or hurt), rank, index, derivative, and the image's path if it has one."""
    tables = []
    for q, row in enumerate(effects.derivatives.numpy()):
        order = row.argsort(kind="stable")
        for which, best in (("helped", order[:k]), ("hurt", order[::-1][:k])):
            table = pd.DataFrame({"query": q, "list": which, "rank": range(1, len(best) + 1)})
            table["index"], table["derivative"] = images.index.numpy()[best], row[best]
            if "path" in images.attributes:
                table["path"] = images.attributes["path"].to_numpy()[best]
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _read(name: str, split: str, n: int | None, options: argparse.Namespace) -> Images:
    """A set by its name, or a folder by its path."""
    name = f"folder:{name}" if Path(name).is_dir() else name
    size = options.size if datasets.is_resized(name) else None
    split = "train" if name.startswith("folder:") else split  # a folder has no test set
    found = datasets.load(name, split, None, options.data_root, size=size)
    if n is not None and not 1 <= n <= len(found):
        raise IsslError(f"{name}: {n} images are asked for; ask for 1 to {len(found)}")
    return found.subset(range(n or len(found))).in_memory()
