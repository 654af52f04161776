"""What training on an image does to an encoder: the derivative of the training itself.

A training run is a function of the weights w that its images have in the loss. Step t takes state
s_t (weights, momenta, BatchNorm's running statistics, BYOL's target) to s_{t+1} = F_t(s_t, w). A
measure is read from the last state, m_q(s_T). By the chain rule, from the last step to the first,

    λ_T = ∇m_q(s_T),   ∂m_q/∂w_i = Σ_t λ_{t+1}ᵀ ∂F_t/∂w_i,   λ_t = (∂F_t/∂s)ᵀ λ_{t+1},

at w = 1 (Engstrom et al. 2025, arXiv 2503.13751, §3; Ilyas & Engstrom 2025, arXiv 2504.16430). The
derivative is exact for this one run and its seeds. Without image i, the measure changes by
−∂m_q/∂w_i to first order. How good this prediction is depends on how smooth the training is in w;
`removals` measures it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from issl.data.images import Images
from issl.devices import full_precision
from issl.errors import IsslError, is_whole
from issl.files import read_safetensors, write_safetensors
from issl.influence.scorer import as_images
from issl.measures import Measure, stability_measures
from issl.pretraining.batchnorm import STATISTICS, differentiable_statistics
from issl.pretraining.checkpoint import MOMENTUM, State
from issl.pretraining.encoder import Encoder
from issl.pretraining.learner import Learner, load_learner
from issl.pretraining.loop import Course, Step
from issl.pretraining.optimizer import moved
from issl.pretraining.recipes import Recipe
from issl.pretraining.states import Run, States

SAVED = 30.0  # seconds between two saves of the backward pass


@dataclass(frozen=True)
class Effects:
    """What training on each image did to each measure.

    Attributes:
        derivatives: ∂m_q/∂w_i, in double precision on the CPU. Negative: training on image i
            lowers the measure.
        value: m_q at the end of the training.
        learner: The learner at the end of the training.
        growth: ‖λ_t‖ / ‖λ_T‖ over the weights before each step t. If it rises by orders of
            magnitude from the last step to the first, the training is chaotic.
        state_bytes: The size of all states that were kept.
        seconds: The duration of the training, and of the backward pass.
    """

    derivatives: Float[Tensor, "q n"]
    value: Float[Tensor, " q"]
    learner: Learner
    growth: Float[Tensor, "t q"]
    state_bytes: int
    seconds: tuple[float, float]
    run: Run
    measures: list[Measure]

    def removals(self, subsets: Iterable[Sequence[int]], progress: bool = False) -> pd.DataFrame:
        """Test the predictions: repeat the training without each subset of the images.

        Args:
            subsets: Positions of the images that are left out.

        Returns:
            A row for each subset and query: subset, left_out (how many), query, predicted and
            measured (changes of the measure). See `agreement`.

        Raises:
            IsslError: For positions that no image has, and for a batch left with a single image.
        """
        rows, n = [], len(self.run.images)
        subsets = [list(subset) for subset in subsets]
        if wrong := {i for subset in subsets for i in subset} - {*range(n)}:
            raise IsslError(f"removals: {min(wrong)} is no position; give 0 to {n - 1}")
        for number, out in enumerate(tqdm(subsets, desc="removals", disable=not progress)):
            with full_precision():
                measured = values_of(self.run.trained(out), self.measures) - self.value
            predicted = -self.derivatives[:, out].sum(1)
            rows.append(
                pd.DataFrame(
                    {
                        "subset": number,
                        "left_out": len(out),
                        "query": range(len(predicted)),
                        "predicted": predicted.numpy(),
                        "measured": measured.numpy(),
                    }
                )
            )
        return pd.concat(rows, ignore_index=True)


def random_subsets(n: int, share: float, subsets: int, seed: int = 0) -> list[list[int]]:
    """`subsets` random sets, each with this share of the n images and at least one image."""
    generator = torch.Generator().manual_seed(seed)
    count = max(1, round(share * n))
    return [sorted(torch.randperm(n, generator=generator)[:count].tolist()) for _ in range(subsets)]


def agreement(removals: pd.DataFrame) -> pd.DataFrame:
    """One row for each number of images left out. `lds` is the rank correlation over subsets of
    predicted and measured changes, averaged over queries (Park et al. 2023, arXiv 2303.14186,
    Definition 2.3). `slope` is that of measured on predicted changes, through the origin."""
    rows = []
    for left_out, part in removals.groupby("left_out"):
        ranks = [
            q["predicted"].corr(q["measured"], method="spearman") for _, q in part.groupby("query")
        ]
        slope = (part["predicted"] * part["measured"]).sum() / part["predicted"].pow(2).sum()
        rows.append({"left_out": left_out, "lds": float(np.mean(ranks)), "slope": slope})
    return pd.DataFrame(rows)


def influence_through_training(
    start: Learner | Encoder | str | Path | int,
    train: Images | Tensor,
    measures: Images | Tensor | Measure | Sequence[Measure],
    recipe: Recipe | None = None,
    *,
    epochs: int,
    batch_size: int = 256,
    seed: int = 0,
    width: int = 64,
    folder: str | Path | None = None,
    every: int = 1,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Effects:
    """∂m_q/∂w_i of every training image i on every measure m_q, through each step of a training.

    The training is that of `pretrain` with the same arguments. For each query, the backward pass
    costs a few times as much.

    Args:
        start: What training continues from, as in `pretrain`; or the seed of fresh weights.
        train: The n images that it is trained on.
        measures: Images, to measure their stability loss under `GaussianNoise(0.05, 0.2)`; or
            measures, see `issl.measures`. The graph of one measure is held at a time.
        recipe: The recipe of the training; default: that of the learner or of its file.
        epochs: As in `pretrain`; so are batch_size, seed and, for fresh weights, width.
        folder: Where states and the backward pass are saved, so that an interrupted run continues;
            default: in memory. It may be deleted afterwards.
        every: A state is kept every `every` steps; the others are recomputed.

    Raises:
        IsslError: For settings that do not fit, a folder of another training, a training that
            diverges, and a derivative that is not finite.
    """
    learner = learner_of(start, recipe, width, train).to(device)
    run = Run(learner, as_images(train), epochs, batch_size, seed)
    course = run.course()
    if not is_whole(every, 1, max(1, course.steps)):
        raise IsslError(f"every={every!r}: give a whole number from 1 to {course.steps}, the steps")
    if isinstance(measures, Images | Tensor):
        measures = stability_measures(as_images(measures))
    measures = [measures] if callable(measures) else list(measures)
    with full_precision():
        states = States(run, course, None if folder is None else Path(folder), every)
        trained, seconds = states.forward(progress)
        values = values_of(trained, measures)
        back = Back(states, values)
        if back.number == course.steps:
            back.adjoint = gradients_of(trained, measures)
        spent = back.walk(progress)
    growth = torch.stack(back.norms[::-1])
    return Effects(
        back.derivatives,
        values,
        trained,
        growth / growth[-1],
        states.bytes,
        (seconds, spent),
        run,
        measures,
    )


def learner_of(
    start: Learner | Encoder | str | Path | int,
    recipe: Recipe | None,
    width: int,
    train: Images | Tensor,
) -> Learner:
    """A copy of the learner that training starts from."""
    if isinstance(start, str | Path):
        start = load_learner(start, recipe)
    if isinstance(start, Learner):  # in its own precision, and of its own layers
        made = copy.deepcopy(start)
        made.recipe = recipe or start.recipe
        if made.recipe.method != made.method.name:
            raise IsslError(
                f"start is a {made.method.name} learner, but recipe is of {made.recipe.method}; "
                "give its encoder to train it by another method"
            )
        return made
    if recipe is None:
        raise IsslError("influence_through_training: give the recipe, such as recipe('simclr')")
    classes = Course(as_images(train), recipe, 0, 2, 0).classes
    if isinstance(start, int):
        return Learner(recipe, width, classes, start)
    return Learner(recipe, start.width, classes, 0, start)


# --- a step, and the backward pass through all steps ---


def after_step(learner: Learner, state: State, step: Step, weights: Float[Tensor, " b"]) -> State:
    """F_t(s_t, w): the state after a step, as a differentiable function of state and weights."""
    own = {k: v for k, v in state.items() if not k.startswith(MOMENTUM)}
    trained = [k.removeprefix(MOMENTUM) for k in state if k.startswith(MOMENTUM)]
    views = (step.xa, step.xb, step.labels, "fp32", weights)
    loss, _ = torch.func.functional_call(learner, own, views)
    slopes = torch.autograd.grad(loss, [state[k] for k in trained], create_graph=True)
    for name, slope in zip(trained, slopes, strict=True):
        now = (state[name], slope, state[MOMENTUM + name])
        own[name], own[MOMENTUM + name] = moved(learner.recipe, *now, step.lr)
    learned = {name: own[name] for name, _ in learner.named_parameters()}
    return {**own, **learner.method.followed(learner.recipe, learned, step.done)}


class Back:
    """The backward pass: λ_t of each query, one per row, and the derivatives found so far."""

    def __init__(self, states: States, values: Float[Tensor, " q"]):
        self.states, self.value = states, values
        self.number = states.course.steps  # the state that λ belongs to
        self.adjoint: State = {}  # by name, (q, …)
        self.norms: list[Tensor] = []
        n = len(states.run.images)
        self.derivatives = torch.zeros(len(values), n, dtype=torch.float64)
        self.path = None if states.folder is None else states.folder / "back.safetensors"
        if self.path is not None and self.path.exists():
            header, found = read_safetensors(self.path, "way back")
            before = found.pop("values")
            if before.shape != values.shape or not torch.allclose(before, values, rtol=1e-4):
                raise IsslError(
                    f"{self.path} belongs to other measures: their values differ; delete this file"
                )
            self.number, self.derivatives = int(header["number"]), found.pop("derivatives")
            self.norms = list(found.pop("norms"))
            device = next(states.run.start.parameters()).device
            self.adjoint = {k: v.to(device) for k, v in found.items()}

    def save(self) -> None:
        """Save the backward pass, to continue from here."""
        if self.path is None:
            return
        found = {"values": self.value, "derivatives": self.derivatives}
        found["norms"] = torch.stack(self.norms)
        write_safetensors(self.path, {**self.adjoint, **found}, {"number": str(self.number)})

    def walk(self, progress: bool) -> float:
        """Go back to the first step; returns the seconds that it took."""
        steps, began = self.states.course.steps, time.monotonic()
        learner = copy.deepcopy(self.states.run.start).for_training()
        if not self.norms:
            self._note()
        saved = time.monotonic()
        numbers = tqdm(
            range(self.number)[::-1],
            initial=steps - self.number,
            total=steps,
            desc="back",
            disable=not progress,
        )
        for number in numbers:
            self._through(learner, self.states.course.step(number))
            self.number = number
            self._note()
            if time.monotonic() - saved > SAVED or number == 0:
                self.save()
                saved = time.monotonic()
        return time.monotonic() - began

    def _through(self, learner: Learner, step: Step) -> None:
        """Turn λ_{t+1} into λ_t, and add step t's part of the derivatives."""
        state = self.states.before(step.number)
        state = {k: v.requires_grad_(v.is_floating_point()) for k, v in state.items()}
        dtype = next(learner.parameters()).dtype
        weights = torch.ones(len(step.rows), dtype=dtype, device=step.xa.device, requires_grad=True)
        after = after_step(learner, dict(state), step, weights)
        names = [k for k in self.adjoint if after[k].requires_grad]
        inputs = [k for k, v in state.items() if v.requires_grad]
        outputs, rows = [after[k] for k in names], step.rows.cpu()
        found: list[State] = []
        for q in range(len(self.value)):
            parts = torch.autograd.grad(
                outputs,
                [weights, *(state[k] for k in inputs)],
                [self.adjoint[k][q] for k in names],
                retain_graph=q + 1 < len(self.value),
                allow_unused=True,
            )
            assert parts[0] is not None  # every loss is a function of them
            self.derivatives[q, rows] += parts[0].double().cpu()
            found.append({k: v for k, v in zip(inputs, parts[1:], strict=True) if v is not None})
        self.adjoint = {k: torch.stack([each[k] for each in found]) for k in found[0]}

    def _note(self) -> None:
        """Record the norm of λ, which must be finite."""
        learned = [v for k, v in self.adjoint.items() if not k.startswith((MOMENTUM, "target."))]
        squares = [v.double().flatten(1).square().sum(1) for v in learned]
        norm = torch.stack(squares).sum(0).sqrt().cpu()
        if not norm.isfinite().all():
            raise IsslError(
                f"the derivative is not finite before step {self.number}: the training is not "
                "smooth there; lower the learning rate, take larger batches, or start later"
            )
        self.norms.append(norm)


# --- the measures at the end of the training ---


@contextmanager
def backbone_of(learner: Learner) -> Iterator[nn.Module]:
    """A copy of the backbone in eval mode, differentiable also in its BatchNorm statistics."""
    backbone = copy.deepcopy(learner.encoder.backbone).eval()
    for name, value in backbone.named_buffers():
        if name.endswith(STATISTICS[:2]):
            value.requires_grad_()
    with differentiable_statistics(backbone):
        yield backbone


def values_of(learner: Learner, measures: Sequence[Measure]) -> Float[Tensor, " q"]:
    """The measures' values, in double precision on the CPU."""
    with torch.no_grad(), backbone_of(learner) as backbone:
        return torch.cat([measure(backbone).double().cpu() for measure in measures])


def gradients_of(learner: Learner, measures: Sequence[Measure]) -> State:
    """∇m_q with respect to the backbone's weights and statistics, (q, …) by the name in a state."""
    rows: list[tuple[Tensor, ...]] = []
    with backbone_of(learner) as backbone:
        values = (*backbone.named_parameters(), *backbone.named_buffers())
        leaves = {f"encoder.backbone.{k}": v for k, v in values if v.requires_grad}
        inputs = list(leaves.values())
        for measure in measures:
            rows += [
                torch.autograd.grad(
                    value, inputs, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                for value in measure(backbone)
            ]
    return {name: torch.stack(found) for name, *found in zip(leaves, *rows, strict=True)}
