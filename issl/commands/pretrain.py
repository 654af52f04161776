"""`issl pretrain`: train an encoder on your own images."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import get_args

from issl.data import datasets
from issl.devices import pick_device
from issl.files import atomic, writable
from issl.pretraining.checkpoint import Checkpoint
from issl.pretraining.encoder import save_encoder
from issl.pretraining.learner import Learner, save_learner
from issl.pretraining.loop import Execution, pretrain
from issl.pretraining.recipes import NAMES, Variant, plain, recipe


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    sets = "folder:PATH, cifar10, cifar100, fairface or scenes"
    add("--data", required=True, metavar="SET", help=sets)
    file = "the encoder, .safetensors; its history goes to a .csv file beside it"
    add("--out", required=True, type=Path, metavar="FILE", help=file)
    add("--method", default="simclr", choices=NAMES, help="default: simclr")
    variants = get_args(Variant)
    add("--recipe", default="published", choices=variants, help="default: published")
    add("--width", type=int, default=64, help="of ResNet-18's first stage (64)")
    add("--epochs", type=int, default=200, help="default: 200")
    add("--batch-size", type=int, default=256, help="default: 256")
    add("--seed", type=int, default=0, help="of weights, order and views (0)")
    add("--split", default="train", help="train (default) or test")
    add("--images", "--n", dest="n", type=int, metavar="N", help="how many images (default: all)")
    size = "side of the images (folders and fairface; default: 32)"
    add("--size", type=int, metavar="PX", help=size)
    root = "folder of the data sets (default: $ISSL_DATA)"
    add("--data-root", type=Path, metavar="DIR", help=root)
    add("--device", default="auto", help="auto (default), cpu or cuda")
    precisions = ["auto", "fp32", "bf16"]
    add("--precision", default="auto", choices=precisions, help="of the networks (auto)")
    compiled = "torch.compile (auto: long runs on a GPU)"
    add("--compile", default="auto", choices=["auto", "on", "off"], help=compiled)


def main(options: argparse.Namespace) -> int:
    began, out = time.monotonic(), options.out
    writable(out, (".safetensors",))
    # 32 px: what the encoder's stem is made for
    size = 32 if options.size is None and datasets.is_resized(options.data) else options.size
    how, device = recipe(options.method, options.recipe), pick_device(options.device)
    images = datasets.load(
        options.data, options.split, options.n, options.data_root, size=size
    ).in_memory()
    about = {"recipe": plain(how), "data": images.name, "n": len(images)}
    about |= {"split": options.split, "size": images.pixels.shape[2]}
    what = f"{options.method} ({options.recipe} recipe) on {len(images)} images of {images.name}"
    print(f"{what}, {device}", flush=True)

    def after_epoch(done: int, learner: Learner) -> None:
        if done == options.epochs:  # the whole learner, so that training can continue
            save_learner(out, learner, about, half=False)

    saved = out.with_name(out.name + ".checkpoint")
    encoder, history = pretrain(
        images,
        how,
        width=options.width,
        epochs=options.epochs,
        batch_size=options.batch_size,
        seed=options.seed,
        execution=Execution(device, options.precision, options.compile, sys.stderr.isatty()),
        checkpoint=Checkpoint(saved),
        after_epoch=after_epoch,
    )
    if options.epochs == 0:
        save_encoder(out, encoder, about)
    with atomic(out.with_suffix(".csv")) as part:
        history.to_csv(part, index=False)
    saved.unlink(missing_ok=True)
    print(f"{out}: {len(history)} epochs in {time.monotonic() - began:.0f} s", flush=True)
    return 0
