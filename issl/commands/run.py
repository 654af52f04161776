"""`issl run`: compute the stages of a profile, then execute its notebooks, one line each."""

from __future__ import annotations

import os
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from issl.commands.notebooks import execute, fingerprint, is_current, note_made
from issl.commands.progress import Overview
from issl.data import published
from issl.devices import device_name, pick_device
from issl.errors import IsslError, OutOfTime
from issl.experiments.cache import Artifacts, Stage
from issl.experiments.plan import Plan
from issl.experiments.plans import EXPLORER, PLANS
from issl.experiments.settings import Data
from issl.files import REPOSITORY
from issl.reporting.verdicts import MARKS, decided, good_for, read_records

AT_ONCE = 2  # notebooks that run while further stages are computed: their kernels mostly import and draw


def notebooks_folder() -> Path:
    """The notebooks of this checkout."""
    folder = REPOSITORY / "notebooks"
    if not folder.is_dir():
        raise IsslError(f"no notebooks at {folder}: `issl run` needs the repository (git clone, then ./run_all.sh)")
    return folder


def profiles() -> dict[str, Path]:
    return {p.stem: p for p in sorted((notebooks_folder() / "profiles").glob("*.yaml"))}


def select(only: str | None) -> list[str]:
    """Notebook names from a list such as `03,00_method`; all of them where there is none."""
    if only is None:
        return list(PLANS)
    chosen = []
    for want in (w.strip() for w in only.split(",") if w.strip()):
        found = [name for name in PLANS if name == want or name.split("_")[0] == want]
        if not found:
            raise IsslError(f"notebook {want!r}: there are {', '.join(PLANS)} (a number is enough)")
        chosen += found
    if not chosen:
        raise IsslError(f"--only {only!r} names no notebook; there are {', '.join(PLANS)}")
    return sorted(set(chosen))


def read_profile(profile: str, names: Sequence[str], **common: str | None) -> dict[str, Plan]:
    """The plans of the named notebooks under a profile; every field is checked.

    A profile's file has `common` (for all notebooks) and one entry a notebook, both field: value.
    """
    paths = profiles()
    if profile not in paths:
        raise IsslError(f"profile {profile!r}: there are {', '.join(paths)}")
    content = yaml.safe_load(paths[profile].read_text()) or {}
    known: dict[str, type[Plan]] = {**PLANS, EXPLORER.notebook: EXPLORER}
    unknown = set(content) - {"common", *known}
    if unknown:
        raise IsslError(
            f"{paths[profile].name}: unknown entry {sorted(unknown)[0]!r}; allowed are common, {', '.join(known)}"
        )
    plans = {}
    for name in names:
        fields = {**(content.get("common") or {}), **(content.get(name) or {}), "profile": profile, **common}
        try:
            plans[name] = known[name](**fields)
        except IsslError as error:
            raise IsslError(f"{paths[profile].name}, notebook {name}: {error}") from error
    return plans


def where(out: Path | None, data_root: Path | None) -> tuple[Path, str | None]:
    """The output folder and the data root that are meant, as absolute paths."""
    root = published.data_root(data_root)
    return (REPOSITORY if out is None else out).resolve(), None if root is None else str(root.resolve())


def check(plans: dict[str, Plan], out: Path) -> None:
    """All that can be wrong before any long work: device, output folder, data present and large enough."""
    for folder in ("artifacts", "figures", "results"):
        try:
            (out / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise IsslError(
                f"output folder {out / folder} cannot be written ({error}); choose another with --out DIR"
            ) from error
        if not os.access(out / folder, os.W_OK):
            raise IsslError(f"output folder {out / folder} is not writable; choose another with --out DIR")
    for plan in plans.values():
        pick_device(plan.device)
        for stage in plan.stages():
            for data in _data_of(stage):
                try:
                    available = data.available()
                except IsslError as error:
                    raise IsslError(f"notebook {plan.notebook}: {error}") from error
                if data.n is not None and available is not None and data.n > available:
                    raise IsslError(
                        f"n={data.n} for {plan.notebook}: data set {data.name!r} ({data.split}) has {available} here; "
                        "lower n in the profile"
                    )


def _data_of(stage: Stage) -> list[Data]:
    return [v for k in type(stage).model_fields if isinstance(v := getattr(stage, k), Data)]


@dataclass(frozen=True)
class Computed:
    """How the stages of a notebook ended: the error as the reader should see it, if any."""

    error: str | None = None
    late: bool = False  # the error is that the time budget was spent
    anew: bool = False  # something had to be made


def run(
    profile: str = "quick",
    only: str | None = None,
    data_root: Path | None = None,
    device: str = "auto",
    out: Path | None = None,
    again: bool = False,
    minutes: float | None = None,
) -> int:
    """Run a profile; returns the exit code: 0 where every notebook ended well, 3 where time was too short for some
    (none failed), else 1.

    The stages are computed one after another; a notebook starts when its own are there. One whose outputs
    were made from the same notebook, plan, artifacts and code is left as it is, unless `again`.

    minutes   the time budget: a training that would exceed it writes a checkpoint and ends, no stage begins after it
    Raises IsslError for input that is wrong, before any long work.
    """
    began, names = time.monotonic(), select(only)
    out, root = where(out, data_root)
    common = {"out": str(out), "data_root": root, "device": device}
    plans = read_profile(profile, names, **common)
    explorer = read_profile(profile, [EXPLORER.notebook] if only is None else [], **common)
    check(plans | explorer, out)
    target = pick_device(device)
    print(f"profile {profile} on {target}: {', '.join(names)}", flush=True)
    artifacts = next(iter(plans.values())).artifacts(progress=sys.stderr.isatty())
    artifacts.deadline = None if minutes is None else began + 60 * minutes
    overview = Overview(plans.values(), artifacts, explorer.values())
    if overview.cost:
        print(f"{overview.told()} (a first guess)", flush=True)
    with overview.shown(), _notebooks_beside_us() as start:
        waiting = [
            start(_notebook, name, plan, artifacts, _compute(plan, artifacts, overview), again, overview)
            for name, plan in plans.items()
            if not plan.last
        ]
        pictured = [_compute(plan, artifacts, overview) for plan in explorer.values()]
        ends = [ended() for ended in waiting]
        # what reads the others' records waits for them
        late_ones = [
            start(_notebook, name, plan, artifacts, Computed(), again, overview)
            for name, plan in plans.items()
            if plan.last
        ]
        ends += [ended() for ended in late_ones]
    failed, late = ends.count("FAILED"), ends.count("LATE")
    page = _report(profile, pictured, artifacts, out, **common)
    print(
        f"{len(plans) - failed - late} of {len(plans)} notebooks ended well in {time.monotonic() - began:.0f} s; "
        f"stages: {len(artifacts.computed)} computed, {len(artifacts.cached)} found in the cache\n"
        f"figures: {out / 'figures' / profile}\nresults: {out / 'results' / profile}\nreport:  {page}",
        flush=True,
    )
    try:
        _tell_verdicts(out / "results" / profile)
    except IsslError as error:  # a record of a claim that is no longer stated
        print(f"verdicts: {error}", flush=True)
    return 1 if failed else 3 if late else 0


def _tell_verdicts(results: Path) -> None:
    """What the records that lie there come to, in a few lines."""
    records = read_records(sorted(results.glob("claim_*.json")))
    if not records:
        return
    reached = [r["verdict"] for r in records]
    counts = ", ".join(
        f"{mark} {reached.count(verdict)} {verdict}" for verdict, mark in MARKS.items() if verdict in reached
    )
    print(f"verdicts: {counts} ({len(records)} tests of {len({r['name'] for r in records})} claims)")
    for outcome, uses in good_for(decided(records)).items():
        if uses:
            print(f"  {outcome}: {textwrap.shorten('; '.join(uses), 150, placeholder=' …')}", flush=True)


def _report(
    profile: str, pictured: Sequence[Computed], artifacts: Artifacts, folder: Path, **common: str | None
) -> str:
    """Write the site of all that this profile has left so far, with the image explorer where its stages are there.
    Returns where it is, or why there is none."""
    from issl.reporting.site import build  # slow to import

    plan = read_profile(profile, [EXPLORER.notebook], **common)[EXPLORER.notebook]
    assert isinstance(plan, EXPLORER)
    there = all(artifacts.has(stage) for stage in plan.stages())
    try:
        index = build(profile, read_profile(profile, list(PLANS), **common), plan if there else None, artifacts, folder)
    except IsslError as error:
        return f"none ({error})"
    return str(index) + "".join(f" (without its images: {c.error})" for c in pictured if c.error is not None)


@contextmanager
def _notebooks_beside_us() -> Iterator[Callable[..., Callable[[], str]]]:
    """Gives start(function, *arguments), which returns the wait for its result. Interrupted, it ends the kernels."""
    pool = ThreadPoolExecutor(AT_ONCE)
    # a kernel with as many threads as the training beside it has slows both many times over: threads that share a core
    # wait for each other. Kernels take their environment from here
    few = {name: str(max(1, (os.cpu_count() or 1) // 4)) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    given = {name: os.environ[name] for name in few if name in os.environ}
    os.environ.update({**few, **given})
    try:
        yield lambda *call: pool.submit(*call).result
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for kernel in psutil.Process().children(recursive=True):
            kernel.kill()
        raise
    finally:
        pool.shutdown()
        for name in set(few) - set(given):
            os.environ.pop(name, None)


def _compute(plan: Plan, artifacts: Artifacts, overview: Overview | None = None) -> Computed:
    """Make what the notebook will read."""
    before = len(artifacts.computed)
    try:
        for stage in plan.stages():
            known, start = len(artifacts.computed), time.monotonic()
            artifacts.get(stage)
            if overview is not None and len(artifacts.computed) > known:
                overview.stage(stage, time.monotonic() - start)
    except IsslError as error:
        return Computed(str(error), isinstance(error, OutOfTime))
    except Exception:  # noqa: BLE001 (the other notebooks go on; this one's error is shown whole)
        return Computed(traceback.format_exc())
    return Computed(anew=len(artifacts.computed) > before)


def _notebook(name: str, plan: Plan, artifacts: Artifacts, computed: Computed, again: bool, overview: Overview) -> str:
    """Execute a notebook where it must be, and print its line; returns how it ended: ok, current, LATE or FAILED."""
    start, error = time.monotonic(), computed.error
    word = "LATE" if computed.late else "FAILED"
    if error is None:
        source, target = notebooks_folder() / f"{name}.ipynb", plan.results / f"{name}.ipynb"
        key = fingerprint(source, plan, device_name(artifacts.device))
        if not computed.anew and not again and is_current(name, plan, key):
            overview.notebook(f"current {name:24} nothing that it depends on has changed (--again runs it anyway)")
            return "current"
        plan.results.mkdir(parents=True, exist_ok=True)
        error = execute(source, target, plan)
        if error is None:
            note_made(name, plan, key)
            word = "ok"
    line = f"{word:7} {name:24} {time.monotonic() - start:6.1f} s"
    if error is not None:
        line += "\n        " + error.replace("\n", "\n        ")
    overview.notebook(line)
    return word
