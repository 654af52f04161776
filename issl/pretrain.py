"""Self-supervised pretraining: one plain loop, the objective a function of two views' projections.

All randomness is a function of (seed, epoch): the order of the images and a table of uniform numbers, one
row per image and view, both drawn over the whole data set. So a run that is killed and resumed takes the
same steps, and leaving an image out (`keep`) changes neither the order nor the views of the others.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from issl.encoder import Encoder, new_encoder
from issl.errors import IsslError
from issl.files import atomic, read_safetensors
from issl.images import Images
from issl.views import VIEW_UNIFORMS, SimCLRView

Objective = Callable[[Tensor, Tensor, float], Tensor]
History = list[dict[str, int | float]]  # one entry an epoch


def simclr(za: Float[Tensor, "b p"], zb: Float[Tensor, "b p"], temperature: float) -> Float[Tensor, ""]:
    """NT-Xent: −log exp(s(z_i, z_j)/τ) / Σ_{k≠i} exp(s(z_i, z_k)/τ), s the cosine, j the other view of i,
    mean over all 2b views (Chen et al. 2020, arXiv 2002.05709, eq. 1)."""
    z = F.normalize(torch.cat([za, zb]).float(), dim=1)
    logits = z @ z.T / temperature
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    other = torch.arange(len(z), device=z.device).roll(len(za))
    return F.cross_entropy(logits, other)


# the seam for further methods: name → objective(za, zb, temperature)
OBJECTIVES: dict[str, Objective] = {"simclr": simclr}


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up to `peak`, then half a cosine down to zero (Loshchilov & Hutter 2017)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


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
    *,
    method: str = "simclr",
    width: int = 64,
    projection: int = 128,
    epochs: int = 200,
    batch_size: int = 256,
    peak_lr: float = 0.5,
    weight_decay: float = 1e-4,
    temperature: float = 0.5,
    warmup_epochs: int = 5,
    seed: int = 0,
    view: SimCLRView | None = None,
    keep: Bool[Tensor, " n"] | None = None,
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 20.0,
    progress: bool = True,
) -> tuple[Encoder, pd.DataFrame]:
    """Train an encoder on `images` without labels; returns it (on the CPU, eval mode) and its history.

    peak_lr     the learning rate at the end of the warm-up (SGD, momentum 0.9, Nesterov)
    keep        False leaves an image out and changes nothing else
    checkpoint  a file to resume from and to write to, at most every `checkpoint_seconds`; with it, a killed
                run continues where it was and ends with the same weights
    history     one row an epoch: epoch, loss, feature_std (mean over dimensions of the unit features' standard
                deviation; near 0 = collapse), lr, images_per_second
    Raises IsslError: unknown method, too few images for two batches' worth, loss not finite, a foreign or
    damaged checkpoint.
    """
    if method not in OBJECTIVES:
        raise IsslError(f"method {method!r}: known are {', '.join(OBJECTIVES)}")
    n = len(images)
    keep = torch.ones(n, dtype=torch.bool) if keep is None else keep
    kept = int(keep.sum())
    if not 2 <= batch_size <= kept:
        raise IsslError(f"batch_size={batch_size}: need 2 to {kept}, the number of images trained on")
    device = torch.device(device)
    objective, view = OBJECTIVES[method], view or SimCLRView()
    encoder = new_encoder(width, projection, seed).to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(_groups(encoder, weight_decay), lr=peak_lr, momentum=0.9, nesterov=True, foreach=True)
    steps_per_epoch = kept // batch_size
    identity = {
        "method": method, "width": width, "projection": projection, "epochs": epochs, "batch_size": batch_size,
        "peak_lr": peak_lr, "weight_decay": weight_decay, "temperature": temperature,
        "warmup_epochs": warmup_epochs, "seed": seed, "view": repr(view), "n": n, "kept": kept,
    }  # fmt: skip
    history: History = []
    if checkpoint is not None and checkpoint.exists():
        history = _resume(checkpoint, encoder, optimizer, identity)
    pixels, saved_at = images.pixels.to(device), time.monotonic()
    bar = tqdm(
        total=epochs * steps_per_epoch * batch_size, initial=len(history) * steps_per_epoch * batch_size,
        unit="img", unit_scale=True, desc=f"pretrain {method} seed {seed}", disable=not progress,
    )  # fmt: skip
    with bar:
        for epoch in range(len(history), epochs):
            began = time.monotonic()
            order = epoch_order(n, seed, epoch)
            order, uniforms = order[keep[order]], epoch_uniforms(n, seed, epoch)
            losses, spread = [], []
            for k in range(steps_per_epoch):
                lr = learning_rate(
                    epoch * steps_per_epoch + k,
                    epochs * steps_per_epoch,
                    warmup_epochs * steps_per_epoch,
                    peak_lr,
                )
                for group in optimizer.param_groups:
                    group["lr"] = lr
                rows = order[k * batch_size : (k + 1) * batch_size]
                loss, std = _step(
                    encoder,
                    optimizer,
                    objective,
                    view,
                    pixels[rows.to(device)],
                    uniforms[rows].to(device),
                    temperature,
                )
                losses.append(loss)
                spread.append(std)
                bar.update(batch_size)
            mean_loss = float(torch.stack(losses).mean())  # the one wait for the device in an epoch
            if not math.isfinite(mean_loss):
                raise IsslError(
                    f"pretraining diverged in epoch {epoch}: loss is {mean_loss}; lower peak_lr={peak_lr} or lengthen "
                    f"warmup_epochs={warmup_epochs}"
                )
            seconds = time.monotonic() - began
            history.append(
                {
                    "epoch": epoch, "loss": mean_loss, "feature_std": float(torch.stack(spread).mean()), "lr": lr,
                    "images_per_second": steps_per_epoch * batch_size / seconds,
                }
            )  # fmt: skip
            bar.set_postfix(loss=f"{mean_loss:.3f}")
            if checkpoint is not None and time.monotonic() - saved_at >= checkpoint_seconds:
                _save(checkpoint, encoder, optimizer, identity, history)
                saved_at = time.monotonic()
    return encoder.to("cpu").to(memory_format=torch.contiguous_format).eval(), pd.DataFrame(history)


def _step(
    encoder: Encoder,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    view: SimCLRView,
    raw: Tensor,
    uniforms: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """One update; returns the loss and the spread of the features, on the device."""
    x = raw.float().div_(255)
    both = torch.cat([view(x, uniforms[:, 0]), view(x, uniforms[:, 1])])
    # bf16 convolutions in NHWC: 3 to 4 times faster than plain fp32 on CPUs that have them, and on GPUs
    with torch.autocast(both.device.type, torch.bfloat16, enabled=has_bf16(both.device)):
        features = encoder.backbone(both.contiguous(memory_format=torch.channels_last))
        projected = encoder.projector(features)
    za, zb = projected.float().chunk(2)
    loss = objective(za, zb, temperature)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach(), F.normalize(features.detach().float(), dim=1).std(0).mean()


def has_bf16(device: torch.device) -> bool:
    """Does the device compute in bfloat16 natively? Without that, autocast would only cost."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and "AVX512" in torch.backends.cpu.get_cpu_capability() and _cpu_flag("avx512_bf16")


@lru_cache
def _cpu_flag(flag: str) -> bool:
    info = Path("/proc/cpuinfo")  # Linux; elsewhere we train in fp32
    return info.is_file() and flag in info.read_text().split()


def _groups(encoder: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels, none for biases and normalisation (Chen et al. 2020, §2.2)."""
    decayed = [p for p in encoder.parameters() if p.ndim > 1]
    rest = [p for p in encoder.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def _save(
    path: Path,
    encoder: Encoder,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    history: History,
) -> None:
    """All that the loop needs to go on: weights, momenta, history. One file, replaced in one step."""
    tensors = {f"model.{k}": v.contiguous() for k, v in encoder.state_dict().items()}
    for name, p in encoder.named_parameters():
        tensors[f"momentum.{name}"] = optimizer.state[p]["momentum_buffer"].contiguous()
    with atomic(path) as part:
        save_file(tensors, part, {"identity": json.dumps(identity), "history": json.dumps(history)})


def _resume(path: Path, encoder: Encoder, optimizer: torch.optim.Optimizer, identity: dict[str, Any]) -> History:
    header, tensors = read_safetensors(path, "checkpoint")
    theirs = json.loads(header.get("identity", "{}"))
    if theirs != identity:
        differing = sorted(k for k in {*theirs, *identity} if theirs.get(k) != identity.get(k))
        raise IsslError(f"checkpoint {path} belongs to another run: {', '.join(differing)} differ; delete or move it")
    encoder.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    for name, p in encoder.named_parameters():
        buffer = torch.empty_like(p).copy_(tensors[f"momentum.{name}"])
        optimizer.state[p]["momentum_buffer"] = buffer
    history: History = json.loads(header["history"])
    return history
