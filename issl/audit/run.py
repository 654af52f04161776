"""`issl run`: compute the stages of a profile, then execute its notebooks, one line each."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil

from issl.audit import first_look_command as first_looks
from issl.audit.cache import Artifacts
from issl.audit.compute import made_by_workers
from issl.audit.cost import AFTER, NOTEBOOK, gigabytes, machine
from issl.audit.guide import guide
from issl.audit.notebooks import execute, fingerprint, is_current, note_made
from issl.audit.plan import Plan
from issl.audit.plans import EXPLORER
from issl.audit.profiles import ProfileOptions, check, notebooks_folder
from issl.audit.progress import Overview
from issl.audit.scheduler import Scheduler, Task, make
from issl.audit.verdicts import decided, good_for, read_records
from issl.audit.workers import Job, default_workers, threads_each, visible_gpus
from issl.devices import device_name, pick_device
from issl.errors import IsslError

WIDE = 110  # columns of the text at the end
AT_ONCE = 2  # notebooks at once, beside the stages: their kernels mostly import and draw


def run(options: ProfileOptions, again: bool = False, jobs: int | None = None) -> int:
    """Run a profile; returns the exit code: 0 where every notebook ended well, 3 where time was too
    short for some (none failed), else 1.

    The stages are made in dependency order, `jobs` at once (`default_workers`; 1: in this process);
    a notebook starts when its own stages have ended. A notebook whose outputs were made from the
    same cells, plan, artifacts and code is not run, unless `again`.
    Raises IsslError for input that is wrong, before any long work.
    """
    if jobs is not None and jobs < 1:
        raise IsslError(f"--jobs {jobs}: need 1 or more")
    began, plans, out = time.monotonic(), options.plans(), options.folder
    check(plans, out)
    first_look, said = first_looks.find(options)
    notebooks = {name: plan for name, plan in plans.items() if name != EXPLORER.notebook}
    print(
        f"profile {options.profile} on {pick_device(options.device)}: {', '.join(notebooks)}",
        flush=True,
    )
    _print_given(next(iter(notebooks.values())), options.left_out())
    print(*said, sep="\n", end="\n" if said else "", flush=True)
    artifacts = next(iter(notebooks.values())).artifacts(progress=sys.stderr.isatty())
    artifacts.deadline = None if options.minutes is None else began + 60 * options.minutes
    after = AFTER if any(plan.last for plan in notebooks.values()) else 0.0
    other = NOTEBOOK * len(notebooks) + after
    before = [] if first_look is None else [first_look.plan]
    scheduler = Scheduler(
        [*before, *plans.values()], artifacts.has, other=other, on=machine(artifacts.device)
    )
    peak = max((gigabytes(task.stage) for task in scheduler.to_do()), default=0.0)
    scheduler.jobs = jobs or default_workers(artifacts.device.type, scheduler.remaining(), peak)
    overview = Overview(scheduler, len(notebooks))
    if scheduler.to_do():
        print(f"{overview.status()} (a first guess)", flush=True)
    with overview.shown(), _notebooks_beside_us(overview) as start:
        waiting_look = first_look
        first, last = (
            {n: p for n, p in notebooks.items() if p.last == late} for late in (False, True)
        )
        ends: list[Callable[[], str]] = []

        def start_settled(waiting: dict[str, Plan]) -> None:
            nonlocal waiting_look
            if waiting_look is not None:
                if not scheduler.settled(waiting_look.plan):
                    return  # so that no notebook takes its core
                # here and not beside us: its imports and those of a notebook would meet half-way
                _look(waiting_look, scheduler, artifacts, again, overview, began)
                waiting_look = None
            for name in [name for name, plan in waiting.items() if scheduler.settled(plan)]:
                ends.append(
                    start(_notebook, name, waiting.pop(name), scheduler, artifacts, again, overview)
                )

        start_settled(first)
        for task in _made(scheduler, artifacts):
            if task.state == "done":
                overview.stage(task)
            start_settled(first)
        words = [ended() for ended in ends]
        start_settled(last)  # they read what the others left
        words += [ended() for ended in ends[len(words) :]]
    failed, late = words.count("FAILED"), words.count("LATE")
    problem = scheduler.problem(plans[EXPLORER.notebook]) if EXPLORER.notebook in plans else None
    page = _report(options, artifacts) + (
        f" (without its images: {problem.error})" if problem else ""
    )
    states, well = [task.state for task in scheduler.tasks.values()], len(words) - failed - late
    print(
        f"{well} of {len(words)} notebooks ended well in {time.monotonic() - began:.0f} s; "
        f"stages: {states.count('done')} computed, {states.count('cached')} found in the cache\n"
        f"figures: {out / 'figures' / options.profile}\nresults: {out / 'results' / options.profile}\nreport:  {page}",
        flush=True,
    )
    try:
        _print_guide(options.profile, out / "results" / options.profile)
    except IsslError as error:  # a record of a claim that is no longer stated
        print(f"verdicts: {error}", flush=True)
    return 1 if failed else 3 if late else 0


def _made(scheduler: Scheduler, artifacts: Artifacts) -> Iterator[Task]:
    """Make all stages, `scheduler.jobs` at once; yields each that has ended, well or not."""
    if scheduler.jobs == 1:
        while ready := scheduler.ready():
            scheduler.start(task := ready[0])
            scheduler.end(task, make(task.stage, artifacts))
            yield task
        return
    late = (
        None if artifacts.deadline is None else time.time() + artifacts.deadline - time.monotonic()
    )
    job = partial(
        Job,
        root=artifacts.root,
        device=str(artifacts.device),
        released=artifacts.released is not None,
        deadline=late,
        threads=threads_each(scheduler.jobs),
    )
    yield from made_by_workers(scheduler, job, visible_gpus(str(artifacts.device)))


def _print_given(plan: Plan, left_out: list[str]) -> None:
    """Which encoders are scored instead of trained, and which notebooks that leaves out."""
    for method, files in plan.checkpoints.items():
        for file in files:
            print(
                f"given   {method}: {file.file.name}, {file.open().about}, sha256 {file.sha256[:16]}…",
                flush=True,
            )
    if left_out:
        print(f"left out, for they train encoders themselves: {', '.join(left_out)}", flush=True)


def _print_guide(profile: str, results: Path) -> None:
    """What this run was, what it decided, what to open first and how to go on."""
    records = read_records(sorted(results.glob("claim_*.json")))
    found = guide(profile, records, [p.stem for p in sorted(results.glob("*.ipynb"))])
    if found.what:
        print(textwrap.fill(" ".join(found.what), WIDE, initial_indent="\n"))
    if not found.rehearsal:
        for outcome, uses in good_for(decided(records)).items():
            if uses:
                print(f"  {outcome}: {textwrap.shorten('; '.join(uses), 150, placeholder=' …')}")
    if found.first:
        print("\nOpen first, in the report:")
    picture = results.parents[1] / "figures" / profile / "first_look.png"
    looked = (
        [("first_look", "real photos, by their influence under a released encoder")]
        if picture.is_file()
        else []
    )
    for name, why in (*looked, *found.first):
        print(
            textwrap.fill(f"{name:24} {why}", WIDE, initial_indent="  ", subsequent_indent=" " * 27)
        )
    if found.further:
        print("\nThen:")
    for what, commands in found.further:
        print("\n".join([f"  {what}:", *(f"    {command}" for command in commands)]))
    sys.stdout.flush()


def _report(options: ProfileOptions, artifacts: Artifacts) -> str:
    """Write the site of what this profile has produced so far, with the image explorer if its
    artifacts are there.
    Returns where it is, or why there is none."""
    from issl.audit.site import build  # slow to import

    plans = replace(options, only=None).plans()
    explorer = plans.pop(EXPLORER.notebook)
    assert isinstance(explorer, EXPLORER)
    there = all(artifacts.has(stage) for stage in explorer.stages())
    try:
        return str(
            build(options.profile, plans, explorer if there else None, artifacts, options.folder)
        )
    except IsslError as error:
        return f"none ({error})"


@contextmanager
def _notebooks_beside_us(overview: Overview) -> Iterator[Callable[..., Callable[[], str]]]:
    """Yields start(function, *arguments), which returns a function that waits for the result.

    An error or interrupt inside the block ends the kernels at once.
    """
    pool = ThreadPoolExecutor(AT_ONCE)
    # a kernel with as many threads as the training beside it slows both many times over: threads
    # that share a core wait # for each other. Kernels inherit this environment
    few = {
        name: str(max(1, (os.cpu_count() or 1) // 4))
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    }
    given = {name: os.environ[name] for name in few if name in os.environ}
    os.environ.update({**few, **given})
    try:
        yield lambda *call: pool.submit(*call).result
    except BaseException:
        overview.stopped = True
        pool.shutdown(wait=False, cancel_futures=True)
        for kernel in psutil.Process().children(recursive=True):
            kernel.kill()
        raise
    finally:
        pool.shutdown()
        for name in set(few) - set(given):
            os.environ.pop(name, None)


def _look(
    found: first_looks.Found,
    scheduler: Scheduler,
    artifacts: Artifacts,
    again: bool,
    overview: Overview,
    began: float,
) -> None:
    """Draw the first look and print its line. What is wrong with the photos or their scores is
    said, and fails nothing: the notebooks need neither."""
    try:
        problem = scheduler.problem(found.plan)
        if problem is not None:
            raise IsslError(problem.error)
        picture, seen = first_looks.show(found, artifacts, again)
        how = (
            f"{time.monotonic() - began:.0f} s after the start\n            {seen}"
            if seen
            else "current"
        )
        overview.say(f"first look: {picture}, {how}")
    except IsslError as error:
        overview.say(f"first look: left out, {error}")


def _notebook(
    name: str,
    plan: Plan,
    scheduler: Scheduler,
    artifacts: Artifacts,
    again: bool,
    overview: Overview,
) -> str:
    """Execute a notebook unless it is current, print its line, and return how it ended: ok,
    current, LATE or FAILED."""
    start, problem, error, word = time.monotonic(), scheduler.problem(plan), None, "ok"
    if problem is not None:
        error, word = problem.error, "LATE" if problem.late else "FAILED"
    else:
        source, target = notebooks_folder() / f"{name}.ipynb", plan.results / f"{name}.ipynb"
        key = fingerprint(source, plan, device_name(artifacts.device))
        if not scheduler.renewed(plan) and not again and is_current(name, plan, key):
            overview.notebook(
                f"current {name:24} nothing that it depends on has changed (--again runs it anyway)"
            )
            return "current"
        plan.results.mkdir(parents=True, exist_ok=True)
        error = execute(source, target, plan)
        if error is None:
            note_made(name, plan, key)
        else:
            word = "FAILED"
    line = f"{word:7} {name:24} {time.monotonic() - start:6.1f} s"
    if error is not None:
        line += "\n        " + error.replace("\n", "\n        ")
    overview.notebook(line)
    return word
