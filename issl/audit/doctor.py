"""`issl doctor`: what is installed, what is missing, and how long each profile would take on this
machine."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import psutil
import torch

from issl import __version__
from issl.audit.cache import Artifacts, Stage
from issl.audit.cost import CPU, H200, NOTEBOOK, all_stages, gigabytes, machine, seconds
from issl.audit.plans import PLANS
from issl.audit.profiles import ProfileOptions, profiles
from issl.audit.progress import in_words
from issl.audit.scheduler import Scheduler
from issl.data import datasets
from issl.data.published import ENVIRONMENT
from issl.devices import computes_bf16, device_name, free_memory, pick_device
from issl.errors import IsslError
from issl.files import PACKAGE

COUNTED = (
    "quick",
    "overnight",
)  # the profiles whose stages are looked for one by one; others have up to 24,000
NEEDED_GB = 2.0  # of free memory, for the quick profile


def doctor(data_root: Path | None = None, out: Path | None = None, device: str = "auto") -> int:
    """Print what was found; exit code 1 where the quick profile could not run here."""
    wrong, lacking = [], []
    try:
        target = pick_device(device)
    except IsslError as error:  # reported with the rest
        wrong.append(str(error))
        target, device = torch.device("cpu"), "cpu"
    options = ProfileOptions(data_root=data_root, out=out, device=device)
    folder, root = options.folder, options.root
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(_there(folder))
    print(f"issl        {__version__}, {PACKAGE}")
    print(f"python      {platform.python_version()}, {sys.executable}")
    print(f"torch       {torch.__version__}, torchvision {metadata.version('torchvision')}")
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        print(
            f"GPU         {torch.cuda.get_device_name()}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"
        )
    else:
        built = (
            f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        )
        print(f"GPU         none that torch sees ({built}); everything runs on the CPU")
    bf16 = "with" if computes_bf16(torch.device("cpu"), "auto") else "without"
    print(f"CPU         {device_name(torch.device('cpu'))} of {os.cpu_count()}, {bf16} bf16")
    print(f"memory      {free_memory() / 1e9:.1f} of {memory.total / 1e9:.1f} GB free")
    print(f"disk        {disk.free / 1e9:.0f} GB free at {folder}")
    if free_memory() < NEEDED_GB * 1e9:
        wrong.append(f"free memory is below {NEEDED_GB:.0f} GB; close other programs")
    for name in ("artifacts", "figures", "results"):
        if not os.access(_there(folder / name), os.W_OK):
            wrong.append(f"{folder / name} cannot be written; choose another place with --out DIR")
    print(f"data root   {root or 'none: give --data-root DIR, or set ' + ENVIRONMENT}")
    for name in ("scenes", "cifar10", "cifar100", "fairface", "cifair10"):
        try:
            count = datasets.count(name, "train", root)
            print(
                f"  {name:9} {'drawn, any number' if count is None else f'{count:,} training images'}"
            )
        except IsslError as error:
            lacking.append(name)
            print(f"  {name:9} not here" + (f": {str(error).split('. ')[0]}" if root else ""))
    if lacking:
        print(
            "            to get one: issl download NAME --data-root DIR (cifar10, cifar100, fairface); cifair10 is "
            "cifar10 and cifair/duplicates_cifar10.csv (docs/data.md)"
        )
    for profile in profiles():
        print(f"  {profile:18} {_cost(replace(options, profile=profile), lacking, target)}")
    for text in wrong:
        print(f"WRONG       {text}")
    print(
        "The quick profile can run: ./run_all.sh"
        if not wrong
        else "The quick profile cannot run before this is fixed."
    )
    return 1 if wrong else 0


def stage_list(profile: str) -> int:
    """Print a profile's stages by kind: how many, hours of a GPU and of a CPU, the peak of the
    GPU's memory; no data is needed. All by arithmetic, see `issl.audit.cost`."""
    plans = ProfileOptions(profile).plans()
    kinds: dict[str, list[Stage]] = {}
    for stage in all_stages(plans.values()):
        kinds.setdefault(stage.name, []).append(stage)
    print(
        f"profile {profile}: {', '.join(name for name in plans if name in PLANS)}\n\n{'stage':20}{'number':>8}"
        f"{'H200 hours':>12}{'CPU hours':>12}{'GPU GB':>8}"
    )
    total = [0, 0.0, 0.0, 0.0]
    for name, found in kinds.items():
        gpu, cpu = (sum(seconds(stage, on) for stage in found) / 3600 for on in (H200, CPU))
        peak = max(map(gigabytes, found))
        print(f"{name:20}{len(found):8,}{gpu:12.2f}{cpu:12,.0f}{peak:8.1f}")
        total = [total[0] + len(found), total[1] + gpu, total[2] + cpu, max(total[3], peak)]
    print(f"{'all':20}{total[0]:8,}{total[1]:12.2f}{total[2]:12,.0f}{total[3]:8.1f}")
    print(
        "\nBy arithmetic (issl/audit/cost.py): FLOP and kernels that are launched; in one process, after another."
    )
    return 0


def _cost(options: ProfileOptions, lacking: list[str], target: torch.device) -> str:
    """Which data sets are needed and missing; or how many stages are missing, and how long they
    would take."""
    plans = options.plans()
    needs = sorted({plan.dataset for plan in plans.values()} & set(lacking))
    if needs:
        return f"needs {', '.join(needs)}"
    if options.profile not in COUNTED:
        return f"its data are here; `issl doctor --profile {options.profile}` counts its stages and hours"
    about = Artifacts(options.folder / "artifacts").about
    try:
        scheduler = Scheduler(
            plans.values(),
            lambda stage: about(stage) is not None,
            other=NOTEBOOK * len(PLANS),
            on=machine(target),
        )
    except IsslError as error:
        return f"cannot run: {str(error).splitlines()[0]}"
    left, count = len(scheduler.to_do()), len(scheduler.tasks)
    if not left:
        return f"all {count} stages are there"
    return f"{left} of {count} stages to compute, about {in_words(scheduler.whole)} on a core of a server"


def _there(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.parents) if p.exists())
