"""What stages cost, by arithmetic: passes through the encoder, their FLOP, the kernels that are
launched, memory.

    seconds = max(FLOP / rate, launches · launch) + passes · pass_time + fixed

A *pass* is one forward pass of one image. A convolution costs 2 · inputs · 9 · outputs · positions
FLOP, which grows as width² and as the image's area. A backward pass through weights and activations
costs two forward ones, one through activations alone costs one. Launches were counted on the
counterfeit GPU of the tests (tests/counterfeit.py): a step of SimCLR launches 655 kernels whatever
the batch, so small trainings take a GPU as long as larger ones.

A machine's constants are in `CPU` (fitted to two cores of a server with bf16) and `H200` (a sixth
of the peak in bf16, a third in fp32; not measured yet). On another machine they are off by a
factor, which is measured (`speed`) or follows from the stages that are done.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch

from issl.audit import stages
from issl.audit.cache import Stage, in_dependency_order
from issl.audit.given import Given
from issl.audit.plan import Plan
from issl.audit.settings import Data
from issl.data import published, scenes
from issl.errors import IsslError
from issl.influence.curvature import LoGra, RandomProjection

Number = int | float
OVERHEAD = 0.05  # s a stage: loading, writing, checksums
NOTEBOOK = 4.0  # s a notebook, of which two run at once
AFTER = 10.0  # s for the notebook that waits for all others, and the report


@dataclass(frozen=True)
class Machine:
    """half, full   FLOP a second of trainings (in bf16), and of everything else (fp32)
    launch          s a kernel, from Python
    pass_time       s a pass of an image of 32 px beside its FLOP: memory, and Python on a CPU
    evaluation      s a training image of kNN and probe
    """

    half: float
    full: float
    launch: float
    pass_time: float
    evaluation: float


CPU = Machine(half=1.1e11, full=1.1e11, launch=0.0, pass_time=0.15e-3, evaluation=3e-4)
H200 = Machine(half=150e12, full=20e12, launch=8e-6, pass_time=0.0, evaluation=5e-5)


def machine(device: torch.device) -> Machine:
    """The constants for a device."""
    return H200 if device.type == "cuda" else CPU


@dataclass(frozen=True)
class Work:
    """passes   forward passes of one image, or what costs as much
    launches    kernels
    half        in bf16
    fixed       s, on any machine
    evaluated   training images of a kNN and a probe
    """

    passes: Number = 0
    launches: Number = 0
    half: bool = False
    fixed: float = 0.0
    evaluated: int = 0


# kernels of a training step and, in eager mode, of a batch that is scored (counted, see above)
LAUNCHES = {"simclr": 655, "byol": 795, "barlow_twins": 702, "supervised": 241}
SCORED, FORWARD, BATCH = 400, 71, 256
SCORING = 5.0  # passes: two views forward, and back through activations; the projections
WHOLE = 6.0  # the same with whole gradients
# passes of a training step, an image: two views forward and back; BYOL's target sees both; a
# supervised one sees one
STEP = {"simclr": 6.0, "byol": 8.0, "barlow_twins": 6.0, "supervised": 3.0}


def seconds(stage: Stage, on: Machine = CPU) -> float:
    """The cost of this stage alone, when what it reads is there. Raises IsslError for a kind
    without a known cost."""
    found = work(stage)
    compute = (
        found.passes * flop(_width(stage), _side(stage)) / (on.half if found.half else on.full)
    )
    memory = found.passes * on.pass_time * (_side(stage) / 32) ** 2
    return (
        OVERHEAD
        + max(compute, found.launches * on.launch)
        + memory
        + found.fixed
        + found.evaluated * on.evaluation
    )


def work(stage: Stage) -> Work:
    """What a stage computes, by its kind."""
    match stage:
        case stages.Pretrain():
            steps = _count(stage.data) // stage.batch_size * stage.epochs
            share = 1 - 0.75 * stage.recipe.small  # views of half the side cost a quarter
            if (
                stage.calibrated
            ):  # not trained: BatchNorm's statistics are those of one view of each image
                return _forward(_count(stage.data))
            return Work(
                steps * stage.batch_size * share * STEP[stage.method],
                steps * LAUNCHES[stage.method],
                half=True,
            )
        case stages.Influence():
            others = 0 if stage.others is None else _count(stage.others)
            return _scored((_count(stage.data) + others) * stage.draws)
        case stages.Cross():
            whole = not isinstance(stage.curvature, LoGra | RandomProjection)
            passes = 2 if whole else 1  # `stages.Cross` recomputes whole gradients
            return _scored(
                (passes * _count(stage.data) + _count(stage.query)) * stage.draws,
                WHOLE if whole else SCORING,
            )
        # the batch anew without each of its images, both views, there and back
        case stages.TrainingEffect():
            states, b = max(1, len(stage.after)), stage.batch_size
            again = b + 1 if stage.share == "marginal" else 2
            batches = _count(stage.data) / b * again * states * stage.view_draws
            queries = _count(stage.query) * stage.draws * states
            return Work(
                6 * (batches * b + queries), batches * LAUNCHES["simclr"] + queries * 3 * FORWARD
            )
        case stages.SubsetEffect():
            seen = _count(stage.data) * stage.view_draws * len(stage.left_out)
            return Work(6.0 * seen, seen / stage.batch_size * LAUNCHES["simclr"])
        case stages.StatisticsEffect():
            return Work(
                2.0 * _count(stage.data), _count(stage.data) / stage.batch_size * 3 * FORWARD
            )
        case stages.Lists():
            return _scored(2 * _count(stage.features.data))
        case stages.Embed():
            return _forward(_count(stage.data))
        case stages.Stability():
            return _forward(_count(stage.data) * (1 + stage.draws))
        case stages.Evaluate() | stages.Nearness():
            data: Data = stage.train.data
            return Work(fixed=0.5, evaluated=_count(data))
        # n² distances, of which the smallest are looked for: 30 s of a core for 50,000
        case stages.Neighbours():
            return Work(fixed=1e-8 * _count(stage.features.data) ** 2)
        case stages.Betweenness():  # 6 s for 256 sources among 50,000
            return Work(fixed=5e-7 * stage.sources * _count(stage.neighbours.features.data))
        case Given():
            return Work(fixed=0.5)  # its file is read
        case stages.Prune() | stages.Thin() | stages.Pick() | stages.Draw() | stages.Top():
            return Work()  # they sort or draw numbers
    raise IsslError(
        f"stage {stage.name!r}: issl/audit/cost.py does not say what it costs; add it there"
    )


def _scored(images: Number, each: float = SCORING) -> Work:
    return Work(each * images, max(1.0, images / BATCH) * SCORED)


def _forward(images: Number) -> Work:
    return Work(images, max(1.0, images / (4 * BATCH)) * FORWARD)


@dataclass(frozen=True)
class Shape:
    """Of an encoder, for one image: FLOP of a forward pass, numbers that its convolutions give,
    weights."""

    flop: float
    outputs: int
    weights: int


@lru_cache
def shape(width: int, side: int) -> Shape:
    """ResNet-18 for small images, convolution by convolution
    (`issl.pretraining.encoder.resnet18`)."""
    convolutions = [(3, width, 9, side)]  # inputs, outputs, taps, side of the output
    inside = width
    for stage in range(4):
        outside, side = width * 2**stage, side if stage == 0 else -(-side // 2)
        convolutions += [(inside, outside, 9, side), *[(outside, outside, 9, side)] * 3]
        convolutions += [(inside, outside, 1, side)] if inside != outside else []
        inside = outside
    weights = [i * o * taps for i, o, taps, _ in convolutions]
    outputs = [o * at * at for _, o, _, at in convolutions]
    return Shape(
        2.0 * sum(w * s * s for w, (*_, s) in zip(weights, convolutions, strict=True)),
        sum(outputs),
        sum(weights),
    )


def flop(width: int, side: int = 32) -> float:
    """FLOP of a forward pass of one image."""
    return shape(width, side).flop


def gigabytes(stage: Stage) -> float:
    """The peak on the device, roughly: activations of a batch of two views (three tensors a
    convolution), weights with gradients and momenta, the images of a training, the queries' whole
    gradients."""
    if isinstance(stage, Given) or not work(stage).passes:
        return 0.0
    of, number = (
        shape(_width(stage), _side(stage)),
        2 if isinstance(stage, stages.Pretrain) else 4,
    )  # bytes
    per_pass = 2 if isinstance(stage, stages.Embed | stages.Stability) else 3  # no graph is kept
    size = stage.batch_size if isinstance(stage, stages.Pretrain | stages.OfTraining) else BATCH
    held = 2 * size * per_pass * of.outputs * number + 16 * of.weights
    if isinstance(stage, stages.Pretrain):
        held += 3 * _side(stage) ** 2 * _count(stage.data)
    if isinstance(stage, stages.OfTraining):
        held += 4 * of.weights * (_count(stage.query) + 8)
    if isinstance(stage, stages.Cross) and not isinstance(
        stage.curvature, LoGra | RandomProjection
    ):
        held += 16 * of.weights * _count(stage.query) + 3 * 2**30
    return held / 1e9


def _encoder(stage: Stage) -> stages.Pretrain | Given | None:
    if isinstance(stage, stages.Pretrain | Given):
        return stage
    return next(
        (found for need in stage.needs().values() if (found := _encoder(need)) is not None), None
    )


def _width(stage: Stage) -> int:
    encoder = _encoder(stage)
    return 1 if encoder is None else encoder.width


def _side(stage: Stage) -> int:
    """Of the images, in pixels."""
    data = getattr(stage, "data", None)
    if not isinstance(data, Data):
        return next((_side(need) for need in stage.needs().values()), 32)
    if data.size is not None:
        return data.size
    return published.SOURCES[data.name].size if data.name in published.SOURCES else 32


def _count(data: Data) -> int:
    known = data.n if data.n is not None else data.available()
    n = scenes.DEFAULT_SIZE[data.split] if known is None else known
    n = n * len(scenes.BACKGROUNDS) if data.name == "scenes-swapped" else n
    return n if data.first is None else min(n, data.first)


def all_stages(plans: Iterable[Plan]) -> list[Stage]:
    """The stages of these plans and all that they depend on, each once, in dependency order."""
    return list(in_dependency_order(stage for plan in plans for stage in plan.stages()))
