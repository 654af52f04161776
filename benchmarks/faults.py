"""Kill a run at random moments, start it again in the same folder at once, and compare every number
with those of an undisturbed run.

    python benchmarks/faults.py --kills 50            # all stages of a notebook, one after another
    python benchmarks/faults.py --kills 5 --whole     # `issl run`: two stages at once, a notebook's
    kernel

With --whole what is killed is the run itself or one of the processes that it started. A run that
ends before its moment is compared and begun anew in an empty folder. What is compared: every
artifact by the checksums in its manifest (but for how long a training took), every table of a
figure, every number of a claim.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import multiprocessing.process
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
import yaml
from pydantic import Field

from issl.audit import profiles, run
from issl.audit.cache import Artifacts, in_dependency_order
from issl.audit.config import Config
from issl.audit.profiles import ProfileOptions
from issl.engine import Engine
from issl.files import PART

PROFILE = {
    "common": {
        "n": 96,
        "n_test": 48,
        "width": 1,
        "epochs": 3,
        "batch_size": 16,
        "duplicates": 0.1,
        "atypical": 0.1,
    },
    "04_duplicates": {"methods": ["byol"], "rank": 4},
}
NOTEBOOK = "04"
TIMES = ("images_per_second",)  # columns that no two runs share
CHECKPOINT_SECONDS = 0.2  # of the trainings, which take a second or two here

context = multiprocessing.get_context(
    "forkserver"
)  # a process that need not import everything again
context.set_forkserver_preload(["issl.audit.run", "issl.audit.plans"])


class Faults(Config):
    """How a run is disturbed."""

    kills: int = Field(50, ge=1)
    signal: str = Field("KILL", pattern="^(KILL|TERM|INT)$")
    whole: bool = False
    seed: int = 0


def work(folder: Path, whole: bool) -> None:
    """What is killed, in a process of its own."""
    profiles.profiles = lambda: {"tiny": folder.with_suffix(".yaml")}
    torch.set_num_threads(1)
    log = folder.with_suffix(".log").open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    options = ProfileOptions("tiny", only=NOTEBOOK, out=folder, from_scratch=True)
    if whole:
        sys.exit(run.run(options, engine=Engine(2)))
    artifacts = Artifacts(
        folder / "artifacts", checkpoint_seconds=CHECKPOINT_SECONDS, released=None
    )
    for stage in in_dependency_order(
        stage for plan in options.plans().values() for stage in plan.stages()
    ):
        artifacts.get(stage)


def start(folder: Path, whole: bool) -> multiprocessing.process.BaseProcess:
    folder.with_suffix(".yaml").write_text(yaml.safe_dump(PROFILE))
    process = context.Process(target=work, args=(folder, whole))
    process.start()
    return process


def numbers(folder: Path) -> dict[str, Any]:
    """Everything that a run has measured, by where it is."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("artifacts/*/*/manifest.json")):
        for name, digest in json.loads(path.read_text())["files"].items():
            file = path.parent / name
            place = str(file.relative_to(folder))
            found[place] = digest if "history" not in name else _without_times(pd.read_csv(file))
    for path in sorted(folder.glob("figures/**/*.csv")):
        found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.glob("results/**/claim_*.json")):
        record = json.loads(path.read_text())
        found[path.name] = json.dumps([record["metrics"], record["tests"], record["verdict"]])
    return found


def _without_times(table: pd.DataFrame) -> str:
    return table.drop(columns=[c for c in TIMES if c in table]).to_json(double_precision=15)


def leftovers(folder: Path) -> list[str]:
    """Files that are no one's: temporary ones, and artifacts that were begun and not ended."""
    return [
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if PART in p.name or p.suffix == ".part"
    ]


def disturbed(faults: Faults, folder: Path, usual: float) -> Iterator[dict[str, Any]]:
    """Kill and start again; yields one entry for each kill, and one for each run that came to its
    end."""
    chance, done = random.Random(faults.seed), 0
    while True:
        kept, process = finished(folder), start(folder, faults.whole)
        process.join(chance.uniform(0.0, 1.0) * usual if done < faults.kills else None)
        if process.exitcode is None:
            run_itself = psutil.Process(process.pid)
            parts = run_itself.children(recursive=True)
            victim = chance.choice(parts) if parts and chance.random() < 0.4 else run_itself
            if not victim.is_running():
                continue
            victim.send_signal(getattr(signal, f"SIG{faults.signal}"))
            done += 1
            process.join()
            lost = [place for place, when in kept.items() if finished(folder).get(place) != when]
            what = "run" if victim is run_itself else "part of it"
            yield {
                "killed": what,
                "code": process.exitcode,
                "lost": lost,
                "kept": len(finished(folder)),
            }
        elif process.exitcode == 0:
            yield {"ended": numbers(folder), "leftovers": leftovers(folder)}
            shutil.rmtree(folder)
            if done >= faults.kills:
                return
        elif done >= faults.kills:
            raise SystemExit(folder.with_suffix(".log").read_text())


def finished(folder: Path) -> dict[str, str]:
    """The artifacts that are whole, with the moment when they were."""
    found = folder.glob("artifacts/*/*/manifest.json")
    return {str(p.parent): json.loads(p.read_text())["made_with"]["finished"] for p in found}


def main() -> int:
    told = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    told.add_argument("--kills", type=int, default=50, help="how many (50)")
    told.add_argument("--signal", default="KILL", help="KILL (default), TERM or INT")
    told.add_argument(
        "--whole", action="store_true", help="`issl run` with its workers and kernels"
    )
    told.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    faults = Faults(**vars(told.parse_args()))
    with tempfile.TemporaryDirectory() as place:
        return measure(faults, Path(place))


def measure(faults: Faults, place: Path) -> int:
    """Print what became of the run; 0 where nothing changed, nothing was lost and nothing is left
    over."""
    start(place / "first", whole=False).join()  # the server's imports are not counted
    began, undisturbed = time.monotonic(), start(place / "whole", faults.whole)
    undisturbed.join()
    if undisturbed.exitcode != 0:
        raise SystemExit((place / "whole.log").read_text())
    usual, want = time.monotonic() - began, numbers(place / "whole")
    print(f"undisturbed: {usual:.0f} s, {len(want)} things to compare", flush=True)
    kills, runs, changed, lost, left = 0, 0, 0, 0, 0
    for entry in disturbed(faults, place / "killed", usual):
        if "ended" in entry:
            runs += 1
            different = [
                k for k in {*want, *entry["ended"]} if want.get(k) != entry["ended"].get(k)
            ]
            changed, left = changed + len(different), left + len(entry["leftovers"])
            print(
                f"  run {runs} ended: {len(different)} changed {different[:3]}, "
                f"{entry['leftovers'][:3]}",
                flush=True,
            )
        else:
            kills, lost = kills + 1, lost + len(entry["lost"])
            print(
                f"  kill {kills} of the {entry['killed']} after {entry['kept']} stages", flush=True
            )
    print(
        f"{kills} times SIG{faults.signal} in {time.monotonic() - began:.0f} s: {runs} runs came "
        "to their end, things "
        f"changed {changed} of {runs * len(want)}, finished stages lost {lost}, files left over "
        f"{left}"
    )
    return int(bool(changed or lost or left))


if __name__ == "__main__":
    sys.exit(main())
