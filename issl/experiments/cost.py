"""What stages cost: a rough model, for remaining times and for `issl doctor`.

Seconds on the machine the model was fitted on (two cores of a server CPU with bf16), by what a stage does to how many
images. On another machine they are off by a factor, which is measured (`speed`) or follows from the stages that are
done. ResNet-18's convolutions cost width² and each image has a fixed cost too, hence a + b·width².
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch

from issl.data import scenes
from issl.errors import IsslError
from issl.experiments import stages
from issl.experiments.cache import Stage, in_dependency_order
from issl.experiments.given import Given
from issl.experiments.plan import Plan
from issl.experiments.settings import Data
from issl.pretraining.loop import Execution, pretrain
from issl.pretraining.recipes import recipe

OVERHEAD = 0.05  # s a stage: loading, writing, checksums
NOTEBOOK = 4.0  # s a notebook, of which two run at once
AFTER = 10.0  # s for the notebook that waits for all others, and the report


def seconds(stage: Stage) -> float:
    """The cost of this stage alone, when what it reads is there. Raises IsslError for a kind without a known cost."""
    match stage:
        case stages.Pretrain():
            passes = _count(stage.data) * stage.epochs * (1.0 if stage.recipe.small > 0.5 else 2.5)
            work = passes * (0.35e-3 + 5.5e-6 * stage.width**2)
            work += _count(stage.data) * _forward(stage.width) if stage.calibrated else 0.0
        case stages.Influence():
            others = 0 if stage.others is None else _count(stage.others)
            work = (_count(stage.data) + others) * stage.draws * _gradient(stage.pretrain.width)
        case stages.Cross():
            work = (_count(stage.data) + _count(stage.query)) * stage.draws * _gradient(stage.pretrain.width)
        case stages.TrainingEffect():  # both views, there and back in fp32, for each image of the batch
            passes = 6 * 2 * stage.batch_size * stage.view_draws * max(1, len(stage.after))
            work = _count(stage.data) * passes * _forward(stage.pretrain.width)
        case stages.SubsetEffect():
            passes = 3 * 2 * stage.view_draws * len(stage.left_out)
            work = _count(stage.data) * passes * _forward(stage.pretrain.width)
        case stages.StatisticsEffect():
            work = 2 * _count(stage.data) * _forward(stage.pretrain.width)
        case stages.Lists():
            work = 2 * _count(stage.features.data) * _gradient(stage.features.pretrain.width)
        case stages.Embed():
            work = _count(stage.data) * _forward(stage.pretrain.width)
        case stages.Stability():
            work = _count(stage.data) * (1 + stage.draws) * _forward(stage.pretrain.width)
        case stages.Evaluate() | stages.Nearness():
            work = 0.5 + 3e-4 * _count(stage.train.data)
        case Given():
            work = 0.5  # its file is read
        case stages.Prune() | stages.Thin() | stages.Pick() | stages.Draw() | stages.Top():
            work = 0.0  # they sort or draw numbers
        case _:
            raise IsslError(f"stage {stage.name!r}: issl/experiments/cost.py does not say what it costs; add it there")
    return OVERHEAD + work


def _gradient(width: int) -> float:
    return 1.2e-3 + 1.2e-5 * width**2


def _forward(width: int) -> float:
    return 0.15e-3 + 2e-6 * width**2


def _count(data: Data) -> int:
    known = data.n if data.n is not None else data.available()
    n = scenes.DEFAULT_SIZE[data.split] if known is None else known
    n = n * len(scenes.BACKGROUNDS) if data.name == "scenes-swapped" else n
    return n if data.first is None else min(n, data.first)


def all_stages(plans: Iterable[Plan]) -> list[Stage]:
    """The stages of these plans and all that they depend on, each once, in dependency order."""
    return list(in_dependency_order(stage for plan in plans for stage in plan.stages()))


def speed(device: torch.device, width: int = 8) -> float:
    """How many times longer a training takes here than the model says, measured on a short one (a few seconds)."""
    images = scenes.draw(512)
    how = recipe("simclr", "short")
    settings: dict[str, Any] = {"width": width, "batch_size": 64, "execution": Execution(device, progress=False)}
    pretrain(images, how, epochs=1, **settings)  # the first steps include one-time set-up
    began = time.monotonic()
    pretrain(images, how, epochs=2, **settings)
    model = stages.Pretrain(data=Data(name="scenes", n=512), recipe=how, width=width, epochs=2, batch_size=64)
    return (time.monotonic() - began) / (seconds(model) - OVERHEAD)
