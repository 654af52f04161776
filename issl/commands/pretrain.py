"""`issl pretrain`: train an encoder on your own images, in one process or in several (torchrun)."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import get_args

from issl.commands.arguments import finite, whole
from issl.data import datasets
from issl.devices import pick_device
from issl.evaluate import knn_watch
from issl.files import atomic, writable
from issl.pretraining.checkpoint import Checkpoint
from issl.pretraining.encoder import save_encoder
from issl.pretraining.learner import Learner, save_learner
from issl.pretraining.loop import Execution, pretrain
from issl.pretraining.recipes import Method, Variant, recipe
from issl.shards import from_torchrun


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `issl pretrain`."""
    add = command.add_argument
    add(
        "--data",
        required=True,
        metavar="SET",
        help="folder:PATH, cifar10, cifar100, fairface or scenes",
    )
    add(
        "--out",
        required=True,
        type=Path,
        metavar="FILE",
        help="the encoder, .safetensors; beside it its history, .csv",
    )
    add("--method", default="simclr", choices=get_args(Method), help="default: simclr")
    add(
        "--recipe",
        default="published",
        choices=get_args(Variant),
        help="published (default), short or long",
    )
    add("--width", type=int, default=64, help="of ResNet-18's first stage (64)")
    add("--epochs", type=whole(0), default=200, help="default: 200")
    add("--batch-size", type=int, default=256, help="of all processes together (256)")
    add("--seed", type=int, default=0, help="of weights, order and views (0)")
    add("--split", default="train", help="train (default) or test")
    add(
        "--images",
        "--n",
        dest="n",
        type=int,
        metavar="N",
        help="how many (default: all); under torchrun use --images",
    )
    add(
        "--size",
        type=int,
        metavar="PX",
        help="side of the images (folders and fairface; default: 32)",
    )
    add(
        "--watch",
        type=whole(1),
        metavar="M",
        help="add the kNN accuracy on M test images to the history (labelled sets)",
    )
    add("--watch-every", type=whole(1), default=10, metavar="E", help="how often, in epochs (10)")
    add(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="folder of the data sets (default: $ISSL_DATA)",
    )
    add("--device", default="auto", help="auto (default), cpu or cuda")
    add(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16"],
        help="of the networks (auto)",
    )
    add(
        "--compile",
        default="auto",
        choices=["auto", "on", "off"],
        help="torch.compile (auto: long runs on a GPU)",
    )
    add(
        "--time-budget",
        type=finite,
        metavar="MIN",
        help="stop in time, with a checkpoint; the same command continues",
    )
    add(
        "--timeout",
        type=finite,
        default=600.0,
        metavar="S",
        help="how long processes wait for each other (600 s)",
    )


def main(options: argparse.Namespace) -> int:
    """Run the command; raises IsslError for bad input, before any long work."""
    began, out = time.monotonic(), options.out
    writable(out, (".safetensors",))
    # 32 px: what the encoder's stem is made for
    size = 32 if options.size is None and datasets.is_resized(options.data) else options.size
    how, device = recipe(options.method, options.recipe), pick_device(options.device)
    images = datasets.load(
        options.data, options.split, options.n, options.data_root, size=size
    ).in_memory()
    watch = None
    if options.watch is not None:
        test = datasets.load(options.data, "test", options.watch, options.data_root, size=size)
        watch = knn_watch(images, test, device, options.epochs, options.watch_every)
    about = {"recipe": how.model_dump(mode="json"), "data": images.name, "n": len(images)}

    def after_epoch(done: int, learner: Learner) -> dict[str, float] | None:
        if done == options.epochs:  # the whole learner: what training-aware influence needs
            save_learner(out, learner, about, half=False)
        return None if watch is None else watch(done, learner)

    deadline = None if options.time_budget is None else began + 60 * options.time_budget
    saved = out.with_name(out.name + ".checkpoint")
    with from_torchrun(device, options.timeout) as shards:
        first = shards.rank == 0
        if first:
            many = f" on {shards.world} processes" if shards.world > 1 else ""
            print(
                f"{options.method} ({options.recipe} recipe) on {len(images)} images of {images.name}, {device}{many}",
                flush=True,
            )
        execution = Execution(
            shards.device if shards.world > 1 else device,
            options.precision,
            options.compile,
            shards,
            progress=first and sys.stderr.isatty(),
        )
        encoder, history = pretrain(
            images,
            how,
            width=options.width,
            epochs=options.epochs,
            batch_size=options.batch_size,
            seed=options.seed,
            execution=execution,
            checkpoint=Checkpoint(saved, deadline=deadline),
            after_epoch=after_epoch,
        )
        if first:
            with atomic(out.with_suffix(".csv")) as part:
                history.to_csv(part, index=False)
            if options.epochs == 0:
                save_encoder(out, encoder, about)
            from issl.audit import figures  # slow to import

            figures.style(screen=False)
            title = f"{options.method}, {options.recipe} recipe, {len(images):,} images of {images.name}"
            figures.write(figures.training(history, title), out.with_suffix(".png"))
            saved.unlink(missing_ok=True)
            print(f"{out}: {len(history)} epochs in {time.monotonic() - began:.0f} s", flush=True)
    return 0
