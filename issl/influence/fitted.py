"""Fit a curvature once, keep it, and score any images under it: later, elsewhere, one pass each
with nothing stored.

    H = mean over the fitted images,   influence_i = Σ_l g_iᵀ (H_l + λ_l I)⁻¹ g_i   for any image i

On the fitted images themselves this is `issl.self_influence`. H may be fitted on a part of the
images; of each layer it needs several times as many images as numbers are kept there before the
ranking settles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import psutil
import torch
from jaxtyping import Float
from torch import Tensor, nn

from issl.data.images import Images
from issl.devices import full_precision
from issl.errors import IsslError
from issl.influence import kept_curvature
from issl.influence.computing import Computing
from issl.influence.cross import check_sizes, every_score, highest_scores
from issl.influence.curvature import (
    EKFAC,
    Curvature,
    DenseSum,
    Diagonal,
    Exact,
    LoGra,
    NoSum,
    Projected,
    Sketch,
    Whitening,
    kept_width,
)
from issl.influence.kept_curvature import (
    COMPUTES,
    KeptCurvature,
    as_setting,
    encoder_digest,
    first_difference,
)
from issl.influence.losses import CrossEntropy, Loss, stability_loss
from issl.influence.measurement import (
    Measurement,
    Probe,
    Run,
    as_images,
    describe_loss,
    not_empty,
    open_probe,
    prepare,
    set_up,
    whitenings,
)
from issl.influence.perturbation import Augmentation, GaussianNoise, Perturb, Perturbation, describe
from issl.influence.self_influence import scores
from issl.keyed_random import uniform
from issl.shards import ONE


@dataclass(frozen=True)
class Fitted:
    """An encoder with the curvature of the images it was fitted on; made by `issl.fit` and
    `issl.load_fitted`."""

    probe: Probe
    sketches: dict[str, Sketch]
    kept: KeptCurvature

    @property
    def n(self) -> int:
        """How many images H is the mean of."""
        return self.kept.n

    @property
    def damping(self) -> dict[str, float]:
        """λ of each layer."""
        return {name: w[0].damping for name, w in self._whitenings(()).items()}

    def score(
        self,
        images: Images | Tensor,
        *,
        sweep: Sequence[float] = (),
        computing: Computing = Computing(),
    ) -> pd.DataFrame:
        """The influence of each image, fitted or not: the table of `issl.self_influence`, by one
        pass over the images.

        An image's noise depends on its index, so give new images the indices that they are to keep.
        """
        with full_precision():
            return scores(self._run(images, computing), self._whitenings(sweep), sweep)

    def cross(
        self, train: Images | Tensor, query: Images | Tensor, *, computing: Computing = Computing()
    ) -> Float[Tensor, "q n"]:
        """I(i → j) of every image i of `train` on every query j, as `issl.cross_influence` gives
        it."""
        with full_precision():
            run = self._run(train, computing)
            check_sizes(run.data, not_empty(query, "query images"))
            return every_score(run, self._whitenings(()), query)

    def top(
        self,
        train: Images | Tensor,
        query: Images | Tensor,
        k: int = 10,
        *,
        computing: Computing = Computing(),
    ) -> pd.DataFrame:
        """The k images of `train` of the highest influence on each query, as `issl.top_influences`
        gives them."""
        with full_precision():
            run = self._run(train, computing)
            check_sizes(run.data, not_empty(query, "query images"))
            return highest_scores(run, self._whitenings(()), query, k)

    def extend(self, images: Images | Tensor, *, computing: Computing = Computing()) -> Fitted:
        """The same with H over these images, too. Raises IsslError for images that it was fitted on
        before."""
        with full_precision():
            run = self._run(images, computing)
            self.kept.check_new([part_of(run.data)])  # before the pass
            return replace(self, kept=self.kept.add(_keep(run, self.kept.settings["encoder"])))

    def add(self, other: Fitted) -> Fitted:
        """The same with H over the images of both, which must be different ones under the same
        settings."""
        return replace(self, kept=self.kept.add(other.kept))

    def save(self, path: str | Path) -> None:
        """Write a .safetensors file for `issl.load_fitted`, in one step. It holds sums over images,
        and no image."""
        self.kept.save(path)

    def _whitenings(self, sweep: Sequence[float]) -> dict[str, list[Whitening]]:
        curvature, sums = self.probe.what.curvature, {}
        for name, layer in self.probe.layers.items():
            statistic = curvature.statistic(
                kept_width(layer, self.sketches[name]), self.kept.rows, foreign=True
            )
            statistic.total = self.kept.sums[name].to(self.probe.device)
            sums[name] = statistic
        return whitenings(sums, curvature, [curvature.damping, *sweep])

    def _run(self, images: Images | Tensor, computing: Computing) -> Run:
        """A single pass over the images."""
        data, (height, width) = not_empty(images), self.kept.settings["size"]
        if tuple(data.pixels.shape[2:]) != (height, width):
            raise IsslError(
                f"images {data.name!r} are {tuple(data.pixels.shape[2:])} px, the curvature is of images of "
                f"{height, width} px; load them at that size"
            )
        asked = torch.device(computing.device or self.probe.device)
        if asked.type != self.probe.device.type:
            raise IsslError(
                f"device={str(asked)!r}: the encoder is on {self.probe.device}; name the device in load_fitted"
            )
        probe = self.probe.checked(data, computing.shards)
        return set_up(probe, data, self.sketches, _one_pass(computing))


def fit(
    encoder: nn.Module,
    images: Images | Tensor,
    perturbation: Perturbation | Perturb = GaussianNoise(0.05, 0.2),
    curvature: Curvature = LoGra(rank=16, damping=0.1),
    seed: int = 0,
    *,
    draws: int = 1,
    average: Literal["gradients", "scores"] = "gradients",
    loss: Loss | CrossEntropy = stability_loss,
    fisher: Loss | CrossEntropy | None = None,
    skip: Sequence[str] = (),
    untrained: bool = False,
    computing: Computing = Computing(),
) -> Fitted:
    """The curvature of these images' losses, by one pass that stores no gradients; the arguments
    are those of `issl.self_influence`.

    Raises IsslError as `self_influence` does, and for a curvature that sums nothing over images
    (Identity, RandomProjection) or whose sums do not fit into memory.
    """
    what = Measurement(perturbation, curvature, seed, draws, average, loss, fisher, skip, untrained)
    return _fit(encoder, images, what, _one_pass(computing))[0]


def fit_and_score(
    encoder: nn.Module,
    images: Images | Tensor,
    what: Measurement,
    computing: Computing = Computing(),
) -> tuple[Fitted, pd.DataFrame]:
    """`fit`, and the scores of the same images from the same gradients, which are kept as
    `computing` says."""
    fitted, run = _fit(encoder, images, what, computing)
    with full_precision():
        return fitted, scores(run, fitted._whitenings(()))


def load_fitted(
    path: str | Path,
    encoder: nn.Module,
    *,
    perturbation: Perturbation | Perturb | None = None,
    curvature: Curvature | None = None,
    loss: Loss | CrossEntropy | None = None,
    fisher: Loss | CrossEntropy | None = None,
    device: str | torch.device | None = None,
) -> Fitted:
    """What `Fitted.save` wrote, with the encoder that it was fitted on.

    perturbation, curvature, loss, fisher   only needed where they are not this library's own (a
                                            function cannot be kept in a file); they must be those
                                            of the file
    device                                  where to compute; default: where the encoder is

    Raises IsslError for a missing, damaged or foreign file, another version, another encoder, other
    settings.
    """
    kept = kept_curvature.read(path)
    settings = kept.settings
    if (here := encoder_digest(encoder)) != settings["encoder"]:
        raise IsslError(
            f"curvature file {path} belongs to another encoder (sha256 of its weights {settings['encoder'][:12]}…, of "
            f"these {here[:12]}…); open the encoder that it was fitted on, or fit again"
        )
    own = {
        "perturbation": (perturbation, _as_perturbation, _perturbation),
        "curvature": (curvature, _as_curvature, _curvature),
        "loss": (loss, _as_loss, _loss),
        "fisher": (fisher, _as_loss, _loss),
    }
    chosen = {
        name: _chosen(path, name, given, settings[name], *both)
        for name, (given, *both) in own.items()
    }
    what = Measurement(
        seed=settings["seed"],
        draws=settings["draws"],
        average=settings["average"],
        skip=settings["skip"],
        untrained=settings.get("untrained", False),
        **chosen,
    )
    some = (255 * uniform(2, torch.arange(2), (3, *settings["size"]))).byte()
    probe = open_probe(encoder, what, Computing(device=device)).checked(as_images(some), ONE)
    now = {COMPUTES: probe.computes(settings["size"])}
    if different := first_difference({COMPUTES: settings[COMPUTES]}, now):
        raise IsslError(
            f"curvature file {path}: {different}; is it another forward, or a function of the same name? Give what it "
            "was fitted with, or fit again"
        )
    sketches: dict[str, Sketch] = (
        {
            name: Projected(
                *(kept.bases[f"{name}.{side}"].to(layer.weight) for side in ("in", "out"))
            )
            for name, layer in probe.layers.items()
        }
        if kept.bases
        else probe.sketches(dict.fromkeys(probe.layers), norms_only=False)
    )
    fitted = Fitted(probe, sketches, kept)
    widths = {name: kept_width(layer, sketches[name]) for name, layer in probe.layers.items()}
    if different := first_difference({"layers": settings["layers"]}, {"layers": widths}):
        raise IsslError(f"curvature file {path} does not fit this encoder: {different}")
    found = _marks(sketches)
    for name, value in settings["marks"].items():
        if abs(value - found[name]) > 1e-4:
            raise IsslError(
                f"curvature file {path}: the projections of layer {name} that follow from its seed are others here "
                f"(their sum is {found[name]:.6f}, not {value:.6f}); fit again with this version of torch"
            )
    return fitted


def _fit(
    encoder: nn.Module, images: Images | Tensor, what: Measurement, computing: Computing
) -> tuple[Fitted, Run]:
    curvature = what.curvature
    if isinstance(curvature.statistic(1, 1, foreign=True), NoSum):
        raise IsslError(
            f"curvature {curvature} sums nothing over images, so there is nothing to keep; call self_influence on the "
            "images that you want to score"
        )
    with full_precision():
        run = prepare(encoder, images, what, computing)
        _check_memory(run)
        return Fitted(run.probe, run.sketches, _keep(run, encoder_digest(encoder))), run


def _keep(run: Run, digest: str) -> KeptCurvature:
    """Make the pass, and put its sums together with all that they depend on."""
    sums, what, data = run.sums(foreign=True), run.what, run.data
    totals: dict[str, Tensor] = {}
    for name, statistic in sums.items():
        width = kept_width(run.probe.layers[name], run.sketches[name])
        if statistic.total is None or tuple(statistic.total.shape) not in (
            (width,),
            (width, width),
        ):
            raise IsslError(
                f"curvature {what.curvature} cannot be kept: its statistic must have a `total` of shape ({width},) or "
                f"({width}, {width}), and no rows, once all images are added"
            )
        totals[name] = statistic.total.cpu()
    settings: dict[str, Any] = {
        "encoder": digest,
        COMPUTES: run.probe.computes(data.pixels.shape[2:]),
        "layers": {
            name: kept_width(layer, run.sketches[name]) for name, layer in run.probe.layers.items()
        },
        "size": [int(side) for side in data.pixels.shape[2:]],
        "curvature": _as_curvature(what.curvature),
        "perturbation": _as_perturbation(what.perturbation),
        "seed": what.seed,
        "draws": what.draws,
        "average": what.average,
        "loss": _as_loss(what.loss),
        "fisher": _as_loss(what.fisher),
        "skip": list(what.skip),
        "marks": _marks(run.sketches),
    }
    bases = _bases(run.sketches) if _from_images(what.curvature) else {}
    if what.untrained:  # older files have no such entry
        settings["untrained"] = True
    if bases:
        settings["marks"] = {}
    rows = len(data) * (what.draws if what.pooled else 1)
    return KeptCurvature(settings, (part_of(data),), rows, totals, bases)


def part_of(data: Images) -> dict[str, Any]:
    """What a curvature file says about a set of images."""
    return {
        "images": data.name,
        "n": len(data),
        "index": sha256(data.index.numpy().tobytes()).hexdigest()[:16],
    }


def _one_pass(computing: Computing) -> Computing:
    if computing.store is not None:
        raise IsslError(
            f"store={str(computing.store)!r}: with a curvature that is kept, each image is needed once and no gradient "
            "is stored; drop it"
        )
    return replace(computing, memory="recomputed")


def _check_memory(run: Run) -> None:
    """Dense sums of whole gradients can be far too large; say so before the pass."""
    widths = [kept_width(layer, run.sketches[name]) for name, layer in run.probe.layers.items()]
    if not isinstance(run.what.curvature.statistic(1, 1, foreign=True), DenseSum):
        return
    need, free = sum(8 * w * w for w in widths), psutil.virtual_memory().available
    if run.probe.device.type == "cuda":
        free = torch.cuda.mem_get_info(run.probe.device)[0]
    if need > free:
        raise IsslError(
            f"curvature {run.what.curvature}: its sums take {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; keep "
            "fewer numbers, with LoGra of a lower rank, or use EKFAC or Diagonal"
        )


# --- settings as JSON values and back
# ----------------------------------------------------------------------


def _from_images(curvature: Curvature) -> bool:
    """Whether what is kept of a gradient depends on the images."""
    return curvature.moment_images(torch.zeros(1, dtype=torch.int64)) is not None


def _bases(sketches: dict[str, Sketch]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, sketch in sketches.items():
        assert (
            isinstance(sketch, Projected) and sketch.p_in is not None and sketch.p_out is not None
        )
        found |= {f"{name}.in": sketch.p_in.cpu(), f"{name}.out": sketch.p_out.cpu()}
    return found


def _marks(sketches: dict[str, Sketch]) -> dict[str, float]:
    """One number for each layer's projections, by which others are noticed."""
    sides = {
        n: [p for p in (s.p_in, s.p_out) if p is not None]
        for n, s in sketches.items()
        if isinstance(s, Projected)
    }
    return {name: float(sum(float(p.double().sum()) for p in each)) for name, each in sides.items()}


def _as_perturbation(value: Perturbation | Perturb) -> dict[str, Any]:
    return as_setting(value, describe(value))


def _as_curvature(value: Curvature) -> dict[str, Any]:
    return as_setting(value, repr(value))


def _as_loss(value: Loss | CrossEntropy | None) -> dict[str, Any] | None:
    return None if value is None else as_setting(value, describe_loss(value))


def _perturbation(kind: str, fields: dict[str, Any]) -> Perturbation | None:
    classes: dict[str, Any] = {c.__name__: c for c in (GaussianNoise, Augmentation)}
    return classes[kind](**fields) if kind in classes else None


def _curvature(kind: str, fields: dict[str, Any]) -> Curvature | None:
    classes: dict[str, Any] = {c.__name__: c for c in (LoGra, EKFAC, Diagonal, Exact)}
    return classes[kind](**fields) if kind in classes else None


def _loss(kind: str, fields: dict[str, Any]) -> Loss | CrossEntropy | None:
    known: dict[str, Loss | CrossEntropy] = {
        "stability_loss": stability_loss,
        "CrossEntropy": CrossEntropy(),
    }
    return known.get(kind)


def _chosen(
    path: str | Path, name: str, given: Any, setting: Any, describe: Any, build: Any
) -> Any:
    """The object of this setting: what was given, if the file has the same, or else one built from
    the file."""
    if given is not None:
        if different := first_difference({name: setting}, {name: describe(given)}):
            raise IsslError(
                f"curvature file {path}: {different}; leave it out, or fit again with it"
            )
        return given
    if setting is None:
        return None
    built = build(setting["kind"], setting["fields"])
    if built is None:
        raise IsslError(
            f"curvature file {path} was fitted with {name} {setting['kind']}, which this library cannot build: give it "
            f"as {name}=…"
        )
    return built
