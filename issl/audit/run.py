"""`issl run`: make what a profile's notebooks read, execute the notebooks, write the report."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from issl.audit.again import compared
from issl.audit.cache import Artifacts, Stage, missing
from issl.audit.given import Given
from issl.audit.notebooks import fingerprint, is_current, make_notebook
from issl.audit.plan import Plan
from issl.audit.profiles import ProfileOptions, check, in_words_left_out, notebooks_folder
from issl.audit.settings import Data
from issl.audit.stages import Pretrain
from issl.data import datasets
from issl.devices import device_name, pick_device
from issl.engine import Ended, Engine, Task
from issl.errors import IsslError

AT_MOST = 4  # processes by default: each holds its images
WORTH_IT = 4  # tasks for each process: starting one takes as long as some stages


def run(
    options: ProfileOptions,
    again: bool = False,
    engine: Engine | None = None,
    notebooks: bool = True,
) -> int:
    """Run a profile.

    What exists already is not made again, and a notebook is executed only if something that it
    depends on has changed since. A failure blocks only what needs the failed part.

    Args:
        options: which profile, and where.
        again: execute notebooks even if nothing they depend on has changed.
        engine: where the work is done; None: here, in as many processes as seem worth it.
        notebooks: execute them and write the report; else only make what they read.

    Returns:
        The exit code: 0 if all ended well, else 1.

    Raises:
        IsslError: for input that is wrong, before any long work.
    """
    began, device = time.monotonic(), pick_device(options.device)
    plans = options.plans()
    if not plans:
        raise IsslError(
            f"--from {options.door}: nothing of profile {options.profile} is released for the "
            "images at hand (see `issl doctor`); --from images makes it from them"
        )
    check(plans, options.folder)
    books = plans if notebooks else {}
    print(f"profile {options.profile} on {device}: {', '.join(plans)}", flush=True)
    _print_given(next(iter(plans.values())), options.left_out())
    _print_door(options, plans)
    artifacts = next(iter(plans.values())).artifacts(progress=sys.stderr.isatty())
    stages = {
        s.label: s for s in missing((s for p in plans.values() for s in p.stages()), artifacts)
    }
    failed: list[Ended] = []
    for last in (False, True):  # the last read what the others left, and are executed here
        chosen = {name: plan for name, plan in books.items() if plan.last == last}
        tasks = {} if last else _stage_tasks(stages, artifacts, options.device)
        tasks |= dict(_notebook_tasks(chosen, set(tasks), artifacts.device, again))
        where = Engine() if last else engine or default_engine(len(tasks), artifacts.device)
        for done, ended in enumerate(where.run(tasks), 1):
            what = summary(stages[ended.name]) if ended.name in stages else ""
            print(f"{done:4} of {len(tasks)}  {line(ended, what)}", flush=True)
            failed += [ended] if ended.error else []
    lost = {ended.name for ended in failed}
    again_made = [s for label, s in stages.items() if label not in lost]
    differ = 0
    for text, same in compared(again_made, artifacts) if options.door == "encoders" else ():
        print(text, flush=True)
        differ += not same
    count, made = len(lost & set(books)), len(stages) - len(lost & set(stages))
    print(
        f"{len(books) - count} of {len(books)} notebooks ended well, {made} of {len(stages)} "
        f"missing stages made, in {time.monotonic() - began:.0f} s: {artifacts.root}"
    )
    if notebooks:
        print(f"figures: {options.folder / 'figures' / options.profile}")
        print(f"report:  {_report(options)}", flush=True)
    if options.door is not None:
        print("to start from the encoders or the images: ./run_all.sh --help")
    return int(bool(failed or differ))


def make(stage: Stage, artifacts: Artifacts, device: str) -> None:
    """Make a stage's artifact, on the device of this name on the machine that does the work."""
    replace(artifacts, device=pick_device(device)).get(stage)


def default_engine(tasks: int, device: torch.device) -> Engine:
    """As many processes as seem worth it for so many tasks: one per core or GPU, at most four."""
    places = torch.cuda.device_count() if device.type == "cuda" else (os.cpu_count() or 1)
    return Engine(max(1, min(AT_MOST, places, tasks // WORTH_IT)))


def _stage_tasks(stages: dict[str, Stage], artifacts: Artifacts, device: str) -> dict[str, Task]:
    def task(stage: Stage) -> Task:
        needs = [need.label for need in stage.needs() if need.label in stages]
        return Task(partial(make, stage, artifacts, device), needs)

    return {label: task(stage) for label, stage in stages.items()}


def _notebook_tasks(
    plans: dict[str, Plan], missing: set[str], device: torch.device, again: bool
) -> Iterator[tuple[str, Task]]:
    """The notebooks that are not current; each needs its missing stages."""
    for name, plan in plans.items():
        source = notebooks_folder() / f"{name}.ipynb"
        key = fingerprint(source, plan, device_name(device))
        needs = [stage.label for stage in plan.stages() if stage.label in missing]
        if not needs and not again and is_current(plan, key):
            print(f"current {name:24} (--again executes it anyway)", flush=True)
        else:
            yield name, Task(partial(make_notebook, source, plan, key), needs)


def line(ended: Ended, what: str) -> str:
    """How a task ended, in a line, with its error below it."""
    word = "blocked" if ended.blocked else "FAILED" if ended.error else "ok"
    below = "".join(f"\n        {text}" for text in ended.error.strip().splitlines())
    return f"{word:7} {ended.name:28} {ended.seconds:6.1f} s  {what}".rstrip() + below


def summary(stage: Stage) -> str:
    """The settings that distinguish a stage from its neighbours: its encoder's and its images."""
    encoder, data, parts = _encoder(stage), getattr(stage, "data", None), []
    if isinstance(encoder, Given):
        parts.append(f"{encoder.method} {encoder.checkpoint.file.name}")
    elif encoder is not None:
        parts.append(f"{encoder.method} seed {encoder.seed}")
    if isinstance(data, Data):
        parts.append(f"{data.name} {data.split} n={data.n}")
    return ", ".join(parts)


def _encoder(stage: Stage) -> Pretrain | Given | None:
    if isinstance(stage, Pretrain | Given):
        return stage
    found = (_encoder(need) for need in stage.needs())
    return next((encoder for encoder in found if encoder is not None), None)


def _print_given(plan: Plan, left_out: list[str]) -> None:
    """Print which encoders are scored instead of trained, and which notebooks that leaves out."""
    for method, files in plan.checkpoints.items():
        for file in files:
            about = f"{file.file.name}, {file.open().about}, sha256 {file.sha256[:16]}…"
            print(f"given   {method}: {about}", flush=True)
    if left_out:
        print(f"left out, for they train encoders themselves: {', '.join(left_out)}", flush=True)


def _print_door(options: ProfileOptions, plans: dict[str, Plan]) -> None:
    """Print which images these are, if a data folder is known, and what is not released yet."""
    sets = {p.dataset: p for p in plans.values() if p.dataset not in datasets.DRAWN}
    for name, plan in sets.items() if options.root is not None else ():
        try:
            for split, which in plan.identities().items():
                found = f"{plan.data(split).available():,} images"
                known = f"identity {which['digest']}, {which['about'] or 'as published'}"
                print(f"data    {name} ({split}): {found}, {known}", flush=True)
        except IsslError as error:
            if options.data_root is not None:
                raise
            print(f"data    {error}", flush=True)  # the folder may be meant for other sets
    for text in in_words_left_out(options.not_released()):
        print(f"not released yet: {text}", flush=True)


def _report(options: ProfileOptions) -> Path | str:
    """Write the site of what this profile has produced so far; returns where it is, or why there
    is none."""
    from issl.audit.site import build  # slow to import

    chosen = replace(options, only=None)
    try:
        plans, missing = chosen.plans(), chosen.not_released()
        return build(options.profile, plans, options.folder, missing)
    except IsslError as error:
        return f"none ({error})"
