"""Self-influence: how strongly each training image's stability loss pulls on the encoder's weights.

    influence_i = Σ_l g_iᵀ (H_l + λ_l I)⁻¹ g_i ≥ 0,   g_i = ∇ ℓ_i,   ℓ_i = 1 − cos(f(x_i), f(x̂_i))

The paper (arXiv 2412.17170, §3) defines I = −g_iᵀH⁻¹g_i; we store the magnitude, so "high" is large.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Int64
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from issl.curvature import Curvature, LoGra
from issl.errors import IsslError
from issl.files import atomic
from issl.gradients import check_features, frozen_copy, full_precision, per_example, scored_layers
from issl.images import Images
from issl.views import GaussianNoise, Perturb, Perturbation, as_perturb, describe

Chunk = Callable[[str], Tensor]  # a chunk's rows by name: `stability_loss`, `layer.NAME`

CHUNK = 512  # images whose gradients are kept together, and saved together where there is a store


def self_influence(
    encoder: nn.Module,
    images: Images | Tensor,
    perturbation: Perturbation | Perturb = GaussianNoise(0.05, 0.2),
    curvature: Curvature = LoGra(rank=16, damping=0.1),
    seed: int = 0,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    *,
    skip: Sequence[str] = (),
    store: str | Path | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """The influence of each image on the encoder; one row an image, in the order given.

    encoder       any nn.Module, eval mode, from float pixels in [0, 1] to features (n, d); left untouched
    images        `issl.Images`, or a uint8 tensor (n, 3, H, W), indexed 0 … n−1
    perturbation  GaussianNoise, or a callable (pixels, index) → pixels that treats each image by itself
    curvature     LoGra, Exact or Identity
    seed          of the perturbation; an image's draw depends on (seed, its index) and nothing else
    device        where to compute; default: where the encoder is
    skip          names of layers or parameters to leave out of the score
    store         a folder for the projected gradients: an interrupted call resumes from it

    Columns: index; influence (dimensionless, ≥ 0, sum over layers); stability_loss (in [0, 2]); grad_norm
    (‖g_i‖ over all scored weights; for LoGra below full rank the unbiased estimate from the projection).
    `.attrs` holds the effective damping per layer and the settings.

    Raises IsslError for an encoder that cannot be scored, bad images or settings, NaN.
    """
    data = images if isinstance(images, Images) else _as_images(images)
    if len(data) == 0:
        raise IsslError(f"images {data.name!r}: the set is empty")
    if batch_size < 1:
        raise IsslError(f"batch_size={batch_size}: must be 1 or more")
    scored_layers(encoder, skip)  # before any work
    first = next(encoder.parameters())
    target = torch.device(device) if device is not None else first.device
    model = frozen_copy(encoder, target)
    layers = scored_layers(model, skip)
    sketches = {name: curvature.sketch(layer, k) for k, (name, layer) in enumerate(layers.items())}
    perturb = as_perturb(perturbation, seed)
    with full_precision():
        _check_independent(model, data, target, first.dtype)

        def measure(rows: slice) -> dict[str, Tensor]:
            x = data.pixels[rows].to(target).to(first.dtype) / 255
            index = data.index[rows]
            shaken = perturb(x, index)
            _check_view(shaken, x, index)
            losses, kept = per_example(model, layers, sketches, x, shaken)
            for name, value in {"stability loss": losses, **kept}.items():
                if not bool(torch.isfinite(value).all()):
                    bad = index[~torch.isfinite(value.flatten(1) if value.ndim > 1 else value[:, None]).all(1).cpu()]
                    raise IsslError(f"{name} is not finite for image index {bad[:5].tolist()}")
            return {"stability_loss": losses, **{f"layer.{k}": v for k, v in kept.items()}}

        identity = ""
        if store is not None:
            identity = _identity(model, data, describe(perturbation), repr(curvature), seed, list(skip))
        chunks = list(_chunks(measure, data, batch_size, Path(store) if store else None, identity, progress))
        loss = torch.cat([c("stability_loss") for c in chunks]).double()
        influence, square = torch.zeros_like(loss), torch.zeros_like(loss)
        damping = {}
        for name, layer in layers.items():

            def rows(name: str = name) -> Iterator[Tensor]:
                return (c(f"layer.{name}").to(target) for c in chunks)

            block = curvature.weigh(rows)
            influence += block.scores.cpu()
            damping[name] = block.damping
            square += block.squares.cpu() * curvature.norm_scale(layer)
    result = pd.DataFrame(
        {
            "index": data.index.numpy(), "influence": influence.numpy(), "stability_loss": loss.numpy(),
            "grad_norm": square.sqrt().numpy(),
        }
    )  # fmt: skip
    result.attrs = {
        "curvature": repr(curvature), "perturbation": describe(perturbation), "seed": seed, "images": data.name,
        "n": len(data), "damping": damping, "skip": list(skip),
    }  # fmt: skip
    return result


def _chunks(
    measure: Callable[[slice], dict[str, Tensor]],
    data: Images,
    batch_size: int,
    store: Path | None,
    identity: str,
    progress: bool,
) -> Iterator[Chunk]:
    """Each chunk's rows: measured, or found in the store as an earlier, interrupted call left them."""
    if store is not None:
        _open_store(store, identity)
    with tqdm(total=len(data), unit="img", desc="influence", disable=not progress) as bar:
        for at in range(0, len(data), CHUNK):
            stop = min(at + CHUNK, len(data))
            path = store / f"rows-{at:08d}-{stop:08d}.safetensors" if store is not None else None
            tensors = {}
            if path is None or not path.exists():
                parts = [measure(slice(k, min(k + batch_size, stop))) for k in range(at, stop, batch_size)]
                tensors = {name: torch.cat([p[name].cpu() for p in parts]) for name in parts[0]}
                if path is not None:
                    with atomic(path) as part:
                        save_file(tensors, part)
            bar.update(stop - at)
            yield tensors.__getitem__ if path is None else partial(_read_rows, path)


def _read_rows(path: Path, name: str) -> Tensor:
    """One tensor of a chunk in the store, without the others."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _open_store(store: Path, identity: str) -> None:
    """A store belongs to one measurement; another one's rows must not be mixed in."""
    mark = store / "identity.json"
    if mark.exists() and json.loads(mark.read_text())["identity"] != identity:
        raise IsslError(f"store {store} holds gradients of another encoder, images or setting; use another folder")
    if not mark.exists():
        with atomic(mark) as part:
            part.write_text(json.dumps({"identity": identity}))


def _identity(model: nn.Module, data: Images, *settings: object) -> str:
    digest = hashlib.sha256(repr(settings).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(data.pixels.numpy().tobytes())
    digest.update(data.index.numpy().tobytes())
    return digest.hexdigest()


def _as_images(pixels: Tensor) -> Images:
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[1] != 3:
        shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise IsslError(f"images: got {shape}, need issl.Images or a tensor (n, 3, H, W)")
    if pixels.dtype != torch.uint8:
        raise IsslError(
            f"images: pixels are {pixels.dtype}; give uint8, 0 to 255 (for floats: (255 * x).round().byte())"
        )
    return Images(pixels.cpu(), None, pd.DataFrame({"index": range(len(pixels))}), "tensor")


def _check_view(shaken: Tensor, x: Tensor, index: Int64[Tensor, " b"]) -> None:
    if not isinstance(shaken, Tensor) or shaken.shape != x.shape:
        shape = tuple(shaken.shape) if isinstance(shaken, Tensor) else type(shaken).__name__
        raise IsslError(f"perturbation gives {shape} for pixels {tuple(x.shape)}; it must keep the shape")
    finite = torch.isfinite(shaken).flatten(1).all(1).cpu()
    if not bool(finite.all()):
        raise IsslError(f"perturbation gives NaN or infinite pixels for image index {index[~finite][:5].tolist()}")


@torch.no_grad()
def _check_independent(model: nn.Module, data: Images, device: torch.device, dtype: torch.dtype) -> None:
    """The loss must be per example: an image's features may not depend on its neighbours in the batch."""
    x = data.pixels[:4].to(device).to(dtype) / 255
    together = model(x)
    check_features(together, len(x))
    alone = model(x[:1])
    check_features(alone, 1)
    if not torch.allclose(together[:1], alone, rtol=1e-2, atol=1e-3 * float(alone.abs().max())):
        raise IsslError(
            "encoder gives an image other features alone than in a batch, so its loss is not per example; remove what "
            "mixes the batch"
        )
