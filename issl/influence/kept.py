"""Fit a curvature once, keep it, and score any images under it later or elsewhere, in one pass.

    H = mean over the fitted images,   influence_i = Σ_l g_iᵀ (H_l + λ_l I)⁻¹ g_i for any image i

On the fitted images themselves, this is `issl.self_influence`. H may be fitted on a part of the
images. For the ranking to settle, that part needs several times as many images as numbers are kept
of each layer.

The file holds one sum per layer, in double precision: for LoGra and Exact Σ_i g_i g_iᵀ, for EKFAC
and Diagonal Σ_i g_i². It also holds the projections of the gradients and the settings of these
sums. H is the sum divided by the number of images, so the sums of two sets add up to those of both.
It is a safetensors file: nothing in it is executed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from issl.data.images import Images
from issl.devices import free_memory, full_precision
from issl.errors import IsslError
from issl.files import read_safetensors, write_safetensors
from issl.influence.curvature import EKFAC, Curvature, DenseSum, Diagonal, Exact, LoGra
from issl.influence.losses import CrossEntropy, Loss, stability_loss
from issl.influence.per_example import Sketch
from issl.influence.perturbation import (
    Augmentation,
    ClippedNoise,
    GaussianNoise,
    Perturb,
    Perturbation,
    describe,
)
from issl.influence.scorer import Computing, Measurement, Pass, Scorer, as_images, open_scorer
from issl.influence.scores import (
    Sums,
    check_sweep,
    every_score,
    highest_scores,
    prepare,
    score,
    train_and_queries,
)
from issl.keyed_random import uniform
from issl.pretraining.checkpoint import weights_digest

VERSION = 4
HEADER = "issl_curvature"  # the entry in the file's metadata


@dataclass(frozen=True)
class Fitted:
    """An encoder with the curvature of the images it was fitted on; made by `issl.fit` and
    `issl.load_fitted`.

    Attributes:
        scorer: The encoder, and what is measured of it.
        settings: What the sums depend on, as JSON values: encoder (digest), computes, layers
            (name → numbers kept), size (h, w), curvature, perturbation, seed, draws, loss, skip,
            untrained.
        parts: The sets of images that were added: name, n, digest of their indices.
        sums: By layer, float64: (r, r) or (r,).
        bases: What gradients are projected onto: "LAYER.in" (k_in, d_in) and "LAYER.out"
            (k_out, c_out). Exact and Diagonal have none.
    """

    scorer: Scorer
    settings: Mapping[str, Any]
    parts: tuple[Mapping[str, Any], ...]
    sums: Mapping[str, Tensor]
    bases: Mapping[str, Tensor]

    @property
    def n(self) -> int:
        """How many images H is averaged over."""
        return sum(part["n"] for part in self.parts)

    def score(
        self,
        images: Images | Tensor,
        *,
        sweep: Sequence[float] = (),
        computing: Computing = Computing(),
    ) -> pd.DataFrame:
        """The influence of each image, fitted or not: the table of `issl.self_influence`.

        An image's noise depends on its index, so give new images the indices that they are to keep.
        """
        check_sweep(sweep)
        with full_precision():
            return score(self._pass(images, computing), self._curvature(), sweep)

    def cross(
        self, train: Images | Tensor, query: Images | Tensor, *, computing: Computing = Computing()
    ) -> Float[Tensor, "q n"]:
        """I(i → j) of every image i of `train` on every query j, as in `issl.cross_influence`."""
        images, queries = train_and_queries(train, query)
        with full_precision():
            return every_score(self._pass(images, computing), self._curvature(), queries)

    def top(
        self,
        train: Images | Tensor,
        query: Images | Tensor,
        k: int = 10,
        *,
        computing: Computing = Computing(),
    ) -> pd.DataFrame:
        """The k images of `train` with the highest influence on each query, as in
        `issl.top_influences`."""
        images, queries = train_and_queries(train, query, k)
        with full_precision():
            return highest_scores(self._pass(images, computing), self._curvature(), queries, k)

    @full_precision()
    def extend(self, images: Images | Tensor, *, computing: Computing = Computing()) -> Fitted:
        """The same curvature with these images added to H. Raises IsslError for a set of images
        that was added before."""
        rows = self._pass(images, computing)
        self._check_new([part_of(rows.images)])  # before the pass
        return self.add(replace(self, parts=(part_of(rows.images),), sums=summed(rows)))

    def add(self, other: Fitted) -> Fitted:
        """The same curvature with H over the images of both. The two must have the same settings
        and no image in common. (Sets that overlap in part are not noticed.)"""
        if different := first_difference(other.settings, self.settings):
            raise IsslError(
                f"curvatures cannot be added: {different}; fit both with the same encoder, "
                "settings and size"
            )
        self._check_new(other.parts)
        for name, basis in self.bases.items():
            # machines may round the same random projection differently
            if not torch.allclose(basis, other.bases[name], rtol=0, atol=1e-4):
                raise IsslError(
                    f"curvatures cannot be added: they project onto different bases ({name}), made "
                    "from other images or by another torch; fit the second with "
                    "`fitted.extend(images)`"
                )
        sums = {name: self.sums[name] + other.sums[name] for name in self.sums}
        return replace(self, parts=(*self.parts, *other.parts), sums=sums)

    def save(self, path: str | Path) -> None:
        """Write a .safetensors file for `issl.load_fitted`, atomically. It holds sums over images,
        but no images."""
        path = Path(path)
        if path.suffix != ".safetensors":
            raise IsslError(f"curvature file {path}: give a name that ends in .safetensors")
        header = {"version": VERSION, "settings": self.settings, "parts": self.parts}
        tensors = {f"sum.{name}": value for name, value in self.sums.items()}
        tensors |= {f"basis.{name}": value for name, value in self.bases.items()}
        for name, value in tensors.items():  # layers may share a basis, but not in the file
            tensors[name] = value.clone(memory_format=torch.contiguous_format)
        write_safetensors(path, tensors, {HEADER: json.dumps(header)})

    def _check_new(self, parts: Sequence[Mapping[str, Any]]) -> None:
        for part in parts:
            if part in self.parts:
                raise IsslError(
                    f"curvature: the same {part['n']} images of {part['images']} were added before "
                    "and would count twice; add each set once"
                )

    def _curvature(self) -> Sums:
        sums = {}
        for name, total in self.sums.items():
            sums[name] = found = self.scorer.what.curvature.accumulator()
            assert found is not None  # `fit` refused it
            found.total, found.count = total.to(self.scorer.device), self.n
        return sums

    def _pass(self, images: Images | Tensor, computing: Computing) -> Pass:
        """A single pass over the images."""
        data, (height, width) = as_images(images), self.settings["size"]
        if tuple(data.pixels.shape[2:]) != (height, width):
            raise IsslError(
                f"images {data.name!r} are {tuple(data.pixels.shape[2:])} px, but the curvature "
                f"was fitted at {height, width} px; load them at that size"
            )
        asked = torch.device(computing.device or self.scorer.device)
        if asked.type != self.scorer.device.type:
            raise IsslError(
                f"device={str(asked)!r}: the encoder is on {self.scorer.device}; pass the device "
                "to load_fitted"
            )
        # an encoder with a replaced forward or hooks is not copied; the last two numbers are losses
        now, then = self.scorer.computes([height, width])[:-2], self.settings["computes"][:-2]
        if not np.allclose(now, then, rtol=1e-3, atol=1e-6):
            raise IsslError(
                "encoder gives other features than when it was fitted; restore it, or fit again"
            )
        return Pass(self.scorer, data, replace(computing, memory="recomputed"))


def fit(
    encoder: nn.Module,
    images: Images | Tensor,
    perturbation: Perturbation | Perturb = GaussianNoise(0.05, 0.2),
    curvature: Curvature = LoGra(rank=16, damping=0.1),
    seed: int = 0,
    *,
    draws: int = 1,
    loss: Loss | CrossEntropy = stability_loss,
    skip: Sequence[str] = (),
    untrained: bool = False,
    computing: Computing = Computing(),
) -> Fitted:
    """The curvature of these images' losses, from one pass that stores no gradients.

    Args:
        encoder: As in `issl.self_influence`, as are all arguments not listed here.
        curvature: LoGra, EKFAC, Diagonal or Exact.

    Raises:
        IsslError: As in `issl.self_influence`; also for a curvature that sums nothing over images
            (Identity, RandomProjection), and if its sums do not fit into memory.
    """
    what = Measurement(perturbation, curvature, seed, draws, loss, skip, untrained)
    if curvature.accumulator() is None:
        raise IsslError(
            f"curvature {curvature} sums nothing over images, so there is nothing to keep; "
            "call self_influence on the images that you want to score"
        )
    with full_precision():
        rows = prepare(encoder, images, what, replace(computing, memory="recomputed"))
        bases: dict[str, Tensor] = {}
        for name, s in rows.scorer.sketches.items():
            for side, p in (("in", s.p_in), ("out", s.p_out)):
                if p is not None:
                    bases[f"{name}.{side}"] = p.cpu()
        size = [int(side) for side in rows.images.pixels.shape[2:]]
        settings = settings_of(rows.scorer, weights_digest(encoder), size)
        return Fitted(rows.scorer, settings, (part_of(rows.images),), summed(rows), bases)


@full_precision()
def load_fitted(
    path: str | Path,
    encoder: nn.Module,
    *,
    perturbation: Perturbation | Perturb | None = None,
    curvature: Curvature | None = None,
    loss: Loss | CrossEntropy | None = None,
    device: str | torch.device | None = None,
) -> Fitted:
    """What `Fitted.save` wrote, with the encoder that it was fitted on.

    Args:
        encoder: The one that it was fitted on.
        perturbation: Needed only if it is not one of this library's own, because a function cannot
            be kept in a file. It must be the one that the file was made with.
        curvature: Likewise.
        loss: Likewise.
        device: Where to compute; default: where the encoder is.

    Raises:
        IsslError: For a missing, damaged or foreign file, and for a file of another version,
            encoder or settings.
    """
    header, tensors = read_file(Path(path))
    settings, bases = header["settings"], tensors["basis"]
    if (here := weights_digest(encoder)) != settings["encoder"]:
        raise IsslError(
            f"curvature file {path} belongs to another encoder (hash of its weights "
            f"{settings['encoder']}, of these {here}); open the encoder that it was fitted on, or "
            "fit again"
        )
    given = {"perturbation": perturbation, "curvature": curvature, "loss": loss}
    what: dict[str, Any] = {name: settings[name] for name in ("seed", "draws", "skip", "untrained")}
    what |= {name: build(path, name, settings, own) for name, own in given.items()}
    some = as_images((255 * uniform(2, torch.arange(2), (3, *settings["size"]))).byte())
    scorer = open_scorer(encoder, Measurement(**what), some, device)
    placed = {name: basis.to(scorer.device) for name, basis in bases.items()}
    sketches = {
        name: Sketch(placed.get(f"{name}.in"), placed.get(f"{name}.out")) for name in scorer.layers
    }
    scorer = replace(scorer, sketches=sketches)
    now = settings_of(scorer, here, settings["size"])
    if different := first_difference(now, settings):
        raise IsslError(
            f"curvature file {path} does not fit: {different}; has its forward changed, or a "
            "function of the same name? Give what it was fitted with, or fit again"
        )
    return Fitted(scorer, settings, tuple(header["parts"]), tensors["sum"], bases)


def summed(rows: Pass) -> dict[str, Tensor]:
    """Run the pass; returns each layer's sum."""
    scorer, curvature, widths = rows.scorer, rows.scorer.what.curvature, rows.scorer.widths
    need, free = sum(8 * r * r for r in widths.values()), free_memory(scorer.device)
    if isinstance(curvature.accumulator(), DenseSum) and need > free:
        raise IsslError(
            f"curvature {curvature}: its sums take {need / 1e9:.1f} GB, but {free / 1e9:.1f} GB "
            "are free; keep fewer numbers with LoGra at a lower rank, or use EKFAC or Diagonal"
        )
    totals = {}
    for name, found in rows.accumulate().items():
        total, r = None if found is None else found.total, widths[name]
        if total is None or tuple(total.shape) not in ((r,), (r, r)):
            raise IsslError(
                f"curvature {curvature} cannot be kept: its accumulator must have a `total` of "
                f"shape ({r},) or ({r}, {r}) once all images are added"
            )
        totals[name] = total.cpu()
    return totals


# --- the settings that sums belong to: to JSON values, and back ---

KNOWN = (GaussianNoise, ClippedNoise, Augmentation, LoGra, EKFAC, Diagonal, Exact, CrossEntropy)
BUILDS: dict[str, Any] = {c.__name__: c for c in KNOWN}
BUILDS[describe(stability_loss)] = lambda: stability_loss


def settings_of(scorer: Scorer, encoder: str, size: Sequence[int]) -> dict[str, Any]:
    """All that the sums under this scorer depend on, for images of that size (h, w)."""
    what = scorer.what
    return {
        "encoder": encoder,
        "curvature": as_setting(what.curvature),
        "perturbation": as_setting(what.perturbation),
        "loss": as_setting(what.loss),
        "seed": what.seed,
        "draws": what.draws,
        "skip": list(what.skip),
        "untrained": what.untrained,
        "size": size,
        "layers": scorer.widths,
        "computes": scorer.computes(size),
    }


def as_setting(value: object) -> dict[str, Any]:
    """A frozen dataclass as its name and fields; a function by its name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = json.loads(json.dumps(dataclasses.asdict(value)))  # as a file gives it back
        return {"kind": type(value).__name__, "fields": fields}
    return {"kind": describe(value), "fields": {}}


def build(path: str | Path, name: str, settings: Mapping[str, Any], given: Any) -> Any:
    """The object that was given, or else the one that the file describes."""
    kind = settings[name]["kind"]
    if given is not None:
        return given
    if kind not in BUILDS:
        raise IsslError(
            f"curvature file {path} was fitted with {name} {kind}, which this library cannot "
            f"build: give it as {name}=…"
        )
    fields = settings[name]["fields"].items()
    return BUILDS[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in fields})


def first_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The first setting that differs, in words."""
    for key, one in ours.items():
        other = theirs[key]
        if key == "computes":
            if not np.allclose(one, other, rtol=1e-3, atol=1e-6):
                return "the encoder, the perturbation or the loss makes other numbers of the images"
        elif one != other:
            texts = (json.dumps(value)[:120] for value in (other, one))
            return f"{key} is {' in one and '.join(texts)} in the other"
    return None


def part_of(data: Images) -> dict[str, Any]:
    """A set of images, as a file records it."""
    index = hashlib.sha256(data.index.numpy().tobytes()).hexdigest()[:16]
    return {"images": data.name, "n": len(data), "index": index}


# --- the file ---


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The header of a curvature file, and its tensors by kind and layer."""
    if not path.is_file():
        raise IsslError(
            f"curvature file {str(path)!r} does not exist; make one with issl.fit(…).save, or "
            "`issl fit`"
        )
    metadata, tensors = read_safetensors(path, "curvature file")
    header: dict[str, Any] = json.loads(metadata.get(HEADER, "{}"))
    if header.get("version") != VERSION:
        raise IsslError(
            f"curvature file {path} has version {header.get('version')}; this library reads "
            f"{VERSION}; give one that Fitted.save or `issl fit` wrote, or fit it again"
        )
    kinds: dict[str, dict[str, Tensor]] = {"sum": {}, "basis": {}}
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        kinds[kind][name] = value
    return header, kinds
