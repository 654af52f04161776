"""A training run with fixed seeds, and the states that it passes through.

The steps are those of `pretrain`, taken with its loop and optimizer.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from issl.data.images import Images
from issl.errors import IsslError
from issl.files import read_safetensors, write_json, write_safetensors
from issl.pretraining.checkpoint import State, restore, snapshot, weights_digest
from issl.pretraining.learner import Learner
from issl.pretraining.loop import Course, optimizer_of, take
from issl.pretraining.recipes import plain


@dataclass(frozen=True)
class Run:
    """A training run with fixed seeds: the same steps as in `pretrain`, in fp32 or the precision
    of `start`.

    Attributes:
        start: The learner before its first step.
        images: The n training images; epochs, batch_size and seed are as in `pretrain`.
    """

    start: Learner
    images: Images
    epochs: int
    batch_size: int
    seed: int

    def course(self, without: Sequence[int] = ()) -> Course:
        """The run's steps, with the places of some images left empty."""
        keep = torch.ones(len(self.images), dtype=torch.bool)
        keep[list(without)] = False
        how = (self.start.recipe, self.epochs, self.batch_size, self.seed)
        device = next(self.start.parameters()).device
        return Course(self.images, *how, keep, gaps=True, device=device)

    def learners(
        self, course: Course, first: int = 0, state: State | None = None
    ) -> Iterator[tuple[Learner, torch.optim.Optimizer]]:
        """The learner before step `first`, restored from `state` if given, and after each step."""
        learner = copy.deepcopy(self.start).for_training()
        optimizer = optimizer_of(learner, self.batch_size)
        if state is not None:
            restore(state, learner, optimizer)
        yield learner, optimizer
        for number in range(first, course.steps):
            loss, _ = take(course.step(number), learner, optimizer, "fp32")
            if not loss.isfinite():
                raise IsslError(
                    f"the training diverged at step {number}: its loss is {loss}; lower the "
                    f"recipe's lr={learner.recipe.lr:g}"
                )
            yield learner, optimizer

    def trained(self, without: Sequence[int] = ()) -> Learner:
        """The learner at the end of a training run without some images."""
        *_, (learner, _) = self.learners(self.course(without))
        return learner


@dataclass
class States:
    """The states before each step and after the last. One in `every` is kept, in memory or in a
    folder; the others are recomputed from it."""

    run: Run
    course: Course
    folder: Path | None
    every: int
    bytes: int = 0
    kept: dict[int, State] = field(default_factory=dict)
    again: dict[int, State] = field(default_factory=dict)  # recomputed, between two that are kept

    def __post_init__(self) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        run, path = self.run, self.folder / "training.json"
        identity = {
            "recipe": plain(run.start.recipe),
            "start": weights_digest(run.start),
            "images": self.course.images_digest(),
            "epochs": run.epochs,
            "batch_size": run.batch_size,
            "seed": run.seed,
            "every": self.every,
        }
        saved = json.loads(path.read_text()) if path.exists() else identity
        if saved != identity:
            differing = ", ".join(k for k in identity if saved.get(k) != identity[k])
            raise IsslError(
                f"{self.folder} holds another training: {differing} differ; delete it, or use "
                "another folder"
            )
        write_json(path, identity)

    def forward(self, progress: bool) -> tuple[Learner, float]:
        """Train; returns the learner at the end, and the seconds that it took."""
        steps, began, first = self.course.steps, time.monotonic(), 0
        while self.folder is not None and self._path(first + self.every).exists():
            first += self.every
        state = self._read(first) if first else None
        numbers = tqdm(
            range(first, steps + 1), initial=first, desc="training", disable=not progress
        )
        learner = self.run.start
        for number, (learner, optimizer) in zip(
            numbers, self.run.learners(self.course, first, state), strict=True
        ):
            if number % self.every == 0 and number < steps:
                state = snapshot(learner, optimizer)
                if self.folder is None:
                    self.kept[number] = state
                elif not self._path(number).exists():
                    write_safetensors(self._path(number), state)
        self.bytes = sum(v.nbytes for v in (state or {}).values()) * -(-steps // self.every)
        return learner, time.monotonic() - began

    def before(self, number: int) -> State:
        """The state before a step."""
        at = number - number % self.every
        if number == at:
            return self._read(at)
        if number not in self.again:
            self.again = {}
            learners = self.run.learners(self.course, at, self._read(at))
            for k, (learner, optimizer) in zip(range(at, number + 1), learners, strict=False):
                self.again[k] = snapshot(learner, optimizer)
        return self.again.pop(number)

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"state-{number:07}.safetensors"

    def _read(self, number: int) -> State:
        if self.folder is None:
            return self.kept[number]
        device = next(self.run.start.parameters()).device
        found = read_safetensors(self._path(number), "state")[1]
        layout = {4: self.run.start.layout}  # of kernels, as the learner has them
        return {
            name: value.to(device, memory_format=layout.get(value.ndim, torch.contiguous_format))
            for name, value in found.items()
        }
