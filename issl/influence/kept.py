"""Fit a curvature once, keep it, and score any images under it: later, elsewhere, by one pass.

    H = mean over the fitted images,   influence_i = Σ_l g_iᵀ (H_l + λ_l I)⁻¹ g_i for any image i

On the fitted images themselves this is `issl.self_influence`. H may be fitted on a part of the
images; of each layer it needs several times as many images as numbers are kept there before the
ranking settles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from issl.data.images import Images
from issl.devices import free_memory, full_precision
from issl.errors import IsslError
from issl.influence.accumulators import DenseSum
from issl.influence.curvature import EKFAC, Curvature, Diagonal, Exact, LoGra
from issl.influence.curvature_file import (
    COMPUTES,
    KeptCurvature,
    as_setting,
    encoder_digest,
    first_difference,
    read_curvature,
)
from issl.influence.losses import CrossEntropy, Loss, stability_loss
from issl.influence.passes import Computing, Pass
from issl.influence.perturbation import Augmentation, GaussianNoise, Perturb, Perturbation, describe
from issl.influence.projections import Projected, Sketch
from issl.influence.scorer import Measurement, Scorer, as_images, not_empty, open_scorer
from issl.influence.scores import Sums, check_sizes, every_score, highest_scores, prepare, score
from issl.keyed_random import uniform


@dataclass(frozen=True)
class Fitted:
    """An encoder with the curvature of the images it was fitted on; made by `issl.fit` and
    `issl.load_fitted`."""

    scorer: Scorer
    kept: KeptCurvature

    @property
    def n(self) -> int:
        """How many images H is the mean of."""
        return self.kept.n

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
        with full_precision():
            return score(self._pass(images, computing), self._sums(), sweep)

    def cross(
        self, train: Images | Tensor, query: Images | Tensor, *, computing: Computing = Computing()
    ) -> Float[Tensor, "q n"]:
        """I(i → j) of every image i of `train` on every query j, as `issl.cross_influence` has
        it."""
        with full_precision():
            rows, queries = self._pass(train, computing), not_empty(query, "query images")
            check_sizes(rows.images, queries)
            return every_score(rows, self._sums(), queries)

    def top(
        self,
        train: Images | Tensor,
        query: Images | Tensor,
        k: int = 10,
        *,
        computing: Computing = Computing(),
    ) -> pd.DataFrame:
        """The k images of `train` of the highest influence on each query, as `issl.top_influences`
        has them."""
        with full_precision():
            rows, queries = self._pass(train, computing), not_empty(query, "query images")
            check_sizes(rows.images, queries)
            return highest_scores(rows, self._sums(), queries, k)

    def extend(self, images: Images | Tensor, *, computing: Computing = Computing()) -> Fitted:
        """The same with H over these images, too. Raises IsslError for images that it was fitted on
        before."""
        with full_precision():
            rows = self._pass(images, computing)
            self.kept.check_new([_part_of(rows.images)])  # before the pass
            return self.add(_fitted(rows, self.kept.settings["encoder"]))

    def add(self, other: Fitted) -> Fitted:
        """The same with H over the images of both, which must be different ones under the same
        settings."""
        return replace(self, kept=self.kept.add(other.kept))

    def save(self, path: str | Path) -> None:
        """Write a .safetensors file for `issl.load_fitted`, in one step. It holds sums over images,
        and no image."""
        self.kept.save(path)

    def _sums(self) -> Sums:
        sums = {}
        for name, total in self.kept.sums.items():
            sums[name] = found = self.scorer.what.curvature.accumulator()
            assert found is not None  # `fit` refused it
            found.total, found.count = total.to(self.scorer.device), self.n
        return sums

    def _pass(self, images: Images | Tensor, computing: Computing) -> Pass:
        """A single pass over the images."""
        data, (height, width) = not_empty(images), self.kept.settings["size"]
        if tuple(data.pixels.shape[2:]) != (height, width):
            raise IsslError(
                f"images {data.name!r} are {tuple(data.pixels.shape[2:])} px, the curvature is of "
                f"images of {height, width} px; load them at that size"
            )
        asked = torch.device(computing.device or self.scorer.device)
        if asked.type != self.scorer.device.type:
            raise IsslError(
                f"device={str(asked)!r}: the encoder is on {self.scorer.device}; name the device "
                "in load_fitted"
            )
        return Pass(self.scorer.examined(data), data, _once(computing))


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
    """The curvature of these images' losses, by one pass that stores no gradients.

    Args:
        encoder: As in `issl.self_influence`, like all that are not named here.
        curvature: LoGra, EKFAC, Diagonal or Exact.

    Raises:
        IsslError: As `issl.self_influence` does, for a curvature that sums nothing over images
            (Identity, RandomProjection), and where its sums do not fit into memory.
    """
    what = Measurement(perturbation, curvature, seed, draws, loss, skip, untrained)
    return fit_measurement(encoder, images, what, computing)


def fit_measurement(
    encoder: nn.Module,
    images: Images | Tensor,
    what: Measurement,
    computing: Computing = Computing(),
) -> Fitted:
    """`fit` of a `Measurement`."""
    if what.curvature.accumulator() is None:
        raise IsslError(
            f"curvature {what.curvature} sums nothing over images, so there is nothing to keep; "
            "call self_influence on the images that you want to score"
        )
    with full_precision():
        rows = prepare(encoder, images, what, _once(computing))
        _check_memory(rows.scorer)
        return _fitted(rows, encoder_digest(encoder))


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
        path: The file.
        encoder: The one that it was fitted on.
        perturbation: Only needed where it is not this library's own, like `curvature` and `loss` (a
            function cannot be kept in a file). It must be that of the file.
        curvature: Likewise.
        loss: Likewise.
        device: Where to compute; default: where the encoder is.

    Raises:
        IsslError: For a missing, damaged or foreign file, another version, another encoder, other
            settings.
    """
    kept = read_curvature(path)
    settings = kept.settings
    if (here := encoder_digest(encoder)) != settings["encoder"]:
        raise IsslError(
            f"curvature file {path} belongs to another encoder (sha256 of its weights "
            f"{settings['encoder'][:12]}…, of these {here[:12]}…); open the encoder that it was "
            "fitted on, or fit again"
        )
    given = {"perturbation": perturbation, "curvature": curvature, "loss": loss}
    chosen: dict[str, Any] = {name: _chosen(path, name, v, settings) for name, v in given.items()}
    same = {name: settings[name] for name in ("seed", "draws", "skip", "untrained")}
    some = as_images((255 * uniform(2, torch.arange(2), (3, *settings["size"]))).byte())
    scorer = open_scorer(encoder, Measurement(**chosen, **same), device).examined(some)
    if kept.bases:
        sketches: dict[str, Sketch] = {}
        for name, layer in scorer.layers.items():
            p_in, p_out = (kept.bases[f"{name}.{s}"].to(layer.weight) for s in ("in", "out"))
            sketches[name] = Projected(p_in, p_out)
        scorer = replace(scorer, sketches=sketches)
    else:
        scorer = scorer.sketched(some)
    now = {COMPUTES: scorer.computes(settings["size"]), "layers": scorer.widths}
    if different := first_difference({name: settings[name] for name in now}, now):
        raise IsslError(
            f"curvature file {path} does not fit this encoder: {different}; is it another forward, "
            "or a function of the same name? Give what it was fitted with, or fit again"
        )
    found = _marks(scorer.sketches)
    for name, value in settings["marks"].items():
        if abs(value - found[name]) > 1e-4:
            raise IsslError(
                f"curvature file {path}: the projections of layer {name} that follow from its seed "
                f"are others here (their sum is {found[name]:.6f}, not {value:.6f}); fit again "
                "with this version of torch"
            )
    return Fitted(scorer, kept)


def _fitted(rows: Pass, digest: str) -> Fitted:
    """Make the pass, and put its sums together with all that they depend on."""
    scorer, what, data = rows.scorer, rows.scorer.what, rows.images
    widths, totals = scorer.widths, {}
    for name, found in rows.accumulate().items():
        total, r = None if found is None else found.total, widths[name]
        if total is None or tuple(total.shape) not in ((r,), (r, r)):
            raise IsslError(
                f"curvature {what.curvature} cannot be kept: its accumulator must have a `total` "
                f"of shape ({r},) or ({r}, {r}) once all images are added"
            )
        totals[name] = total.cpu()
    from_images = what.curvature.moment_images(torch.zeros(1, dtype=torch.int64)) is not None
    bases: dict[str, Tensor] = {}
    for name, s in scorer.sketches.items():
        if from_images and isinstance(s, Projected) and s.p_in is not None and s.p_out is not None:
            bases |= {f"{name}.in": s.p_in.cpu(), f"{name}.out": s.p_out.cpu()}
    size = [int(side) for side in data.pixels.shape[2:]]
    settings: dict[str, Any] = {
        "encoder": digest,
        COMPUTES: scorer.computes(size),
        "layers": widths,
        "size": size,
        "curvature": as_setting(what.curvature),
        "perturbation": as_setting(what.perturbation),
        "loss": as_setting(what.loss),
        "seed": what.seed,
        "draws": what.draws,
        "skip": list(what.skip),
        "untrained": what.untrained,
        "marks": {} if bases else _marks(scorer.sketches),
    }
    return Fitted(scorer, KeptCurvature(settings, (_part_of(data),), totals, bases))


def _part_of(data: Images) -> dict[str, Any]:
    index = hashlib.sha256(data.index.numpy().tobytes()).hexdigest()[:16]
    return {"images": data.name, "n": len(data), "index": index}


def _once(computing: Computing) -> Computing:
    if computing.store is not None:
        raise IsslError(
            f"store={str(computing.store)!r}: with a curvature that is kept, each image is needed "
            "once and no gradient is stored; drop it"
        )
    return replace(computing, memory="recomputed")


def _check_memory(scorer: Scorer) -> None:
    """Dense sums of whole gradients can be far too large; say so before the pass."""
    if not isinstance(scorer.what.curvature.accumulator(), DenseSum):
        return
    need, free = sum(8 * w * w for w in scorer.widths.values()), free_memory(scorer.device)
    if need > free:
        raise IsslError(
            f"curvature {scorer.what.curvature}: its sums take {need / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free; keep fewer numbers, with LoGra of a lower rank, or use "
            "EKFAC or Diagonal"
        )


# --- settings as JSON values and back ---

KNOWN = (GaussianNoise, Augmentation, LoGra, EKFAC, Diagonal, Exact, CrossEntropy)
BUILDS: dict[str, Any] = {c.__name__: c for c in KNOWN}
BUILDS[describe(stability_loss)] = lambda: stability_loss


def _chosen(path: str | Path, name: str, given: Any, settings: Mapping[str, Any]) -> Any:
    """What was given, if the file has the same, or else what the file says."""
    if given is not None:
        if different := first_difference({name: settings[name]}, {name: as_setting(given)}):
            raise IsslError(
                f"curvature file {path}: {different}; leave it out, or fit again with it"
            )
        return given
    kind = settings[name]["kind"]
    if kind not in BUILDS:
        raise IsslError(
            f"curvature file {path} was fitted with {name} {kind}, which this library cannot "
            f"build: give it as {name}=…"
        )
    return BUILDS[kind](**settings[name]["fields"])


def _marks(sketches: Mapping[str, Sketch]) -> dict[str, float]:
    """One number for each layer's projections, by which others are noticed."""
    return {
        name: sum((float(p.double().sum()) for p in (s.p_in, s.p_out) if p is not None), 0.0)
        for name, s in sketches.items()
        if isinstance(s, Projected)
    }
