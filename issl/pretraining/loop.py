"""Pretraining: one plain loop for every method.

All randomness is a function of (seed, epoch): the order of the images and a table of uniform numbers, one
row per image and view, both drawn over the whole data set. So a run that is killed and resumed takes the
same steps, and leaving an image out (`keep`) changes neither the order nor the views of the others.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from issl.data.images import Images
from issl.data.views import VIEW_UNIFORMS
from issl.devices import computes_bf16
from issl.errors import IsslError, OutOfTime
from issl.files import atomic, read_safetensors
from issl.pretraining.data_parallel import batchnorm_over_all, sum_gradients
from issl.pretraining.encoder import Encoder
from issl.pretraining.learner import Learner, Precision, spread
from issl.pretraining.optimizer import LARS, groups, learning_rate
from issl.pretraining.recipes import Recipe
from issl.pretraining.recipes import recipe as published
from issl.shards import ONE, Shards

COLLAPSED = 0.02  # feature_std below this: all features point the same way (a random encoder has 0.1 or more)
WORTH_COMPILING = 2_000_000  # images passed, from which the minute of compilation is taken to pay on a GPU
COLUMNS = ("epoch", "loss", "feature_std", "lr", "images_per_second")  # of the history; what is watched comes after
History = list[dict[str, int | float]]  # one entry an epoch
Watch = Callable[[nn.Module], dict[str, float]]
AfterEpoch = Callable[[int, Learner], None]


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order of all n images in this epoch."""
    return torch.randperm(n, generator=_generator(seed, epoch, 0))


def epoch_uniforms(n: int, seed: int, epoch: int) -> Float[Tensor, "n 2 u"]:
    """The uniform numbers of both views of all n images in this epoch."""
    return torch.rand(n, 2, VIEW_UNIFORMS, generator=_generator(seed, epoch, 1))


def _generator(seed: int, epoch: int, what: int) -> torch.Generator:
    # three numbers into one seed without collisions for epochs < 2^20 and seeds < 2^40
    return torch.Generator().manual_seed((seed << 21 | epoch << 1 | what) & 0x7FFF_FFFF_FFFF_FFFF)


def pretrain(
    images: Images,
    recipe: Recipe | None = None,
    *,
    width: int = 64,
    epochs: int = 200,
    batch_size: int = 256,
    seed: int = 0,
    order_seed: int | None = None,
    view_seed: int | None = None,
    keep: Bool[Tensor, " n"] | None = None,
    gaps: bool = False,
    start: Encoder | None = None,
    device: str | torch.device = "cpu",
    precision: Precision = "auto",
    compiled: Literal["auto", "on", "off"] = "auto",
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 20.0,
    deadline: float | None = None,
    watch: Watch | None = None,
    watch_every: int = 1,
    after_epoch: AfterEpoch | None = None,
    shards: Shards = ONE,
    progress: bool = True,
) -> tuple[Encoder, pd.DataFrame]:
    """Train an encoder on `images`; returns it (on the CPU, eval mode) and its history. No labels are used but by
    the recipe `supervised`.

    recipe      default: SimCLR's published one, see `issl.pretraining.recipes`
    seed        of the initial weights; of the order and the views too where theirs are not given
    keep        False leaves an image out and changes neither the order nor the views of the others
    gaps        what becomes of its place in its batch: it stays empty, so the other batches stay as they were, too
                (one image less is then the least change); default: the next images move up
    start       an encoder to go on from (left untouched) instead of fresh weights
    compiled    torch.compile; auto: on a GPU, where the run is long enough to pay for it
    checkpoint  a file to resume from and to write to, at most every `checkpoint_seconds`; with it, a killed
                run continues where it was and ends with the same weights
    deadline    as of time.monotonic(): an epoch that would end later is not begun, the checkpoint is written and
                OutOfTime raised
    watch       called with the backbone in eval mode after every `watch_every` epochs and the last; what it
                returns joins the history
    after_epoch called with the number of epochs done and the learner, before the checkpoint of that epoch is written
                (what it leaves on disk is there whenever a run goes on from a later epoch)
    shards      processes that train together: batch_size is that of all, each takes its part
    history     one row an epoch: epoch, loss, feature_std (see `issl.pretraining.learner.spread`; near 0 = collapse),
                lr, images_per_second, and what `watch` gave
    Raises IsslError: too few images for a batch, missing labels, a loss that is not finite or features that
    collapsed (with the epoch and what to try), a foreign or damaged checkpoint.
    """
    recipe = published("simclr") if recipe is None else recipe
    n = len(images)
    keep = torch.ones(n, dtype=torch.bool) if keep is None else keep
    if len(keep) != n:
        raise IsslError(f"keep has {len(keep)} entries for {n} images")
    kept, labels, device = int(keep.sum()), None, torch.device(device)
    if not 2 <= batch_size <= kept:
        raise IsslError(f"batch_size={batch_size}: need 2 to {kept}, the number of images trained on")
    if batch_size % shards.world or batch_size // shards.world < 2:
        raise IsslError(
            f"batch_size={batch_size} on {shards.world} processes: need a multiple of it, two images a process or more"
        )
    if recipe.method == "supervised":
        labels = images.require_labels().to(device)
    if gaps and shards.world > 1:
        raise IsslError(f"gaps=True on {shards.world} processes: their shares would differ; use one process")
    learner = Learner(recipe, width, None if labels is None else int(labels.max()) + 1, seed, start)
    learner = learner.to(device).to(memory_format=torch.channels_last).train()
    optimizer = _optimizer(learner, recipe, batch_size)
    identity = {
        "recipe": recipe.model_dump(mode="json"), "width": width, "epochs": epochs, "batch_size": batch_size,
        "seed": seed, "order_seed": order_seed, "view_seed": view_seed, "n": n,
        "left_out": (~keep).nonzero().squeeze(1).tolist(),
        "bf16": computes_bf16(device, precision), "gaps": gaps, "start": None if start is None else _digest(start),
    }  # fmt: skip
    history: History = []
    if checkpoint is not None and checkpoint.exists():
        history = _resume(checkpoint, learner, optimizer, identity)
    order_seed, view_seed = (seed if s is None else s for s in (order_seed, view_seed))
    pixels, steps = images.pixels.to(device), (n if gaps else kept) // batch_size
    half = (pixels.shape[2] // 2, pixels.shape[3] // 2)
    warmup = min(recipe.warmup, max(1, epochs // 10)) * steps if recipe.warmup else 0
    view_a, view_b, call = recipe.view_a.__call__, recipe.view_b.__call__, learner.__call__
    if compiled == "on" and shards.world > 1:
        raise IsslError(f"compiled='on' on {shards.world} processes: choose auto or off, or one process")
    pays = device.type == "cuda" and shards.world == 1 and epochs * kept >= WORTH_COMPILING
    if compiled == "on" or (compiled == "auto" and pays):
        view_a, view_b, call = (torch.compile(f, dynamic=False) for f in (view_a, view_b, call))
    bar = tqdm(
        total=epochs * steps * batch_size, initial=len(history) * steps * batch_size, unit="img", unit_scale=True,
        desc=f"pretrain {recipe.method} seed {seed}", disable=not progress or shards.rank > 0,
    )  # fmt: skip
    saved_at, took = time.monotonic(), 0.0
    mine = slice(batch_size // shards.world * shards.rank, batch_size // shards.world * (shards.rank + 1))

    def save() -> None:
        if checkpoint is not None and shards.rank == 0:
            _save(checkpoint, learner, optimizer, identity, history)

    with bar, batchnorm_over_all(learner, shards):
        for epoch in range(len(history), epochs):
            began = time.monotonic()
            late = deadline is not None and began + took > deadline
            if float(shards.sum(torch.tensor(float(late)))):  # one process' clock decides for all
                save()
                raise OutOfTime(f"pretraining stopped after {epoch} of {epochs} epochs", checkpoint is not None)
            order = epoch_order(n, order_seed, epoch)
            order = order.to(device) if gaps else order[keep[order]].to(device)
            batches = order.split(batch_size)[:steps]
            if gaps:
                present = keep.to(device)
                batches = [_without(rows, present) for rows in batches]
            uniforms = epoch_uniforms(n, view_seed, epoch).to(device)
            losses, spreads = [], []
            for k in range(steps):
                at = epoch * steps + k
                lr = learning_rate(at, epochs * steps, warmup, recipe.lr * batch_size / 256)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                rows = batches[k][mine]
                x, u = pixels[rows].float().div_(255), uniforms[rows]
                size = half if at < recipe.small * epochs * steps else None
                xa, xb = view_a(x, u[:, 0], size), None if labels is not None else view_b(x, u[:, 1], size)
                loss, features = call(xa, xb, None if labels is None else labels[rows], precision, shards)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                sum_gradients(learner, shards)
                optimizer.step()
                learner.follow(at / (epochs * steps))
                losses.append(loss.detach())
                spreads.append(spread(features))
                bar.update(batch_size)
            # the one wait for the device in an epoch
            mean_loss, std = float(torch.stack(losses).mean()), float(torch.stack(spreads).mean())
            trained = time.monotonic() - began
            _check(recipe, epoch, mean_loss, std, batch_size)
            history.append(
                {
                    "epoch": epoch, "loss": mean_loss, "feature_std": std, "lr": lr,
                    "images_per_second": steps * batch_size / trained,
                }
            )  # fmt: skip
            if watch is not None and ((epoch + 1) % watch_every == 0 or epoch + 1 == epochs):
                history[-1] |= watch(learner.encoder.backbone.eval())
                learner.encoder.backbone.train()
            took = time.monotonic() - began
            bar.set_postfix(loss=f"{mean_loss:.3f}")
            if after_epoch is not None and shards.rank == 0:
                after_epoch(epoch + 1, learner)
            if time.monotonic() - saved_at >= checkpoint_seconds:
                save()
                saved_at = time.monotonic()
    encoder = learner.encoder.to("cpu").to(memory_format=torch.contiguous_format)
    return encoder.eval(), pd.DataFrame(history, columns=None if history else list(COLUMNS))


def _without(rows: Tensor, keep: Tensor) -> Tensor:
    """A batch less the images that are left out."""
    rows = rows[keep[rows]]
    if len(rows) < 2:
        raise IsslError(
            f"gaps=True: {len(rows)} image of a batch is left; leave out fewer, or take a larger batch_size"
        )
    return rows


def _digest(encoder: Encoder) -> str:
    """The hash of an encoder's weights."""
    digest = hashlib.sha256()
    for name, value in encoder.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _optimizer(learner: Learner, recipe: Recipe, batch_size: int) -> torch.optim.Optimizer:
    parts, peak = groups(learner, recipe.weight_decay), recipe.lr * batch_size / 256
    if recipe.optimizer == "lars":
        return LARS(parts, lr=peak, momentum=recipe.momentum, trust=recipe.trust, clip=recipe.clip)
    return torch.optim.SGD(parts, lr=peak, momentum=recipe.momentum, nesterov=recipe.momentum > 0, foreach=True)


def _check(recipe: Recipe, epoch: int, loss: float, std: float, batch_size: int) -> None:
    """Has the run diverged or collapsed?"""
    advice = f"lower the recipe's lr={recipe.lr:g} (for a batch of 256; {batch_size} here) or lengthen its warm-up"
    if not math.isfinite(loss) or not math.isfinite(std):
        raise IsslError(f"pretraining diverged in epoch {epoch}: loss is {loss}; {advice}")
    if std < COLLAPSED:
        more = {
            "byol": f", or let the target follow more slowly (tau={recipe.tau:g})",
            "barlow_twins": f", or raise off_diagonal={recipe.off_diagonal:g}",
        }.get(recipe.method, "")
        raise IsslError(
            f"pretraining collapsed in epoch {epoch}: all features point the same way (spread {std:.4f}, below "
            f"{COLLAPSED}); lower weight_decay={recipe.weight_decay:g}{more}, or {advice}"
        )


def _save(
    path: Path, learner: Learner, optimizer: torch.optim.Optimizer, identity: dict[str, Any], history: History
) -> None:
    """All that the loop needs to go on: weights, momenta, history. One file, replaced in one step."""
    tensors = {f"model.{k}": v.contiguous() for k, v in learner.state_dict().items()}
    for name, p in learner.named_parameters():
        if p.requires_grad and "momentum_buffer" in optimizer.state[p]:
            tensors[f"momentum.{name}"] = optimizer.state[p]["momentum_buffer"].contiguous()
    with atomic(path) as part:
        save_file(tensors, part, {"identity": json.dumps(identity), "history": json.dumps(history)})


def _resume(path: Path, learner: Learner, optimizer: torch.optim.Optimizer, identity: dict[str, Any]) -> History:
    header, tensors = read_safetensors(path, "checkpoint")
    theirs = json.loads(header.get("identity", "{}"))
    if theirs != identity:
        differing = sorted(k for k in {*theirs, *identity} if theirs.get(k) != identity.get(k))
        raise IsslError(f"checkpoint {path} belongs to another run: {', '.join(differing)} differ; delete or move it")
    learner.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    for name, p in learner.named_parameters():
        if f"momentum.{name}" in tensors:
            optimizer.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(tensors[f"momentum.{name}"])
    history: History = json.loads(header["history"])
    return history
