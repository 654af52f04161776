"""`issl doctor`: what is installed, which data are here, what the profiles need."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch

from issl import __version__
from issl.audit import RELEASED
from issl.audit.cache import Artifacts, released_index
from issl.audit.profiles import ProfileOptions, all_stages
from issl.data import datasets
from issl.data.published import ENVIRONMENT
from issl.devices import device_name, free_memory, pick_device
from issl.errors import IsslError
from issl.files import PACKAGE, provided

NEEDED_GB = 2.0  # of free memory, for the default run
COUNTED = (RELEASED, "quick", "overnight")  # the others have thousands of stages
SETS = ["scenes", "cifar10", "cifar100", "fairface", "cifair10"]


def doctor(data_root: Path | None = None, out: Path | None = None, device: str = "auto") -> int:
    """Print what was found; the exit code is 1 if the default run cannot work here."""
    options = ProfileOptions(data_root=data_root, out=out, device=device)
    wrong = _problems(options)
    print(f"issl        {__version__}, {PACKAGE}")
    print(f"python      {platform.python_version()}, {sys.executable}")
    print(f"torch       {torch.__version__}, torchvision {metadata.version('torchvision')}")
    print(f"GPU         {_gpu()}")
    print(f"CPU         {device_name(torch.device('cpu'))} of {os.cpu_count()}")
    print(f"memory      {free_memory() / 1e9:.1f} GB free")
    free = shutil.disk_usage(_there(options.folder)).free
    print(f"disk        {free / 1e9:.0f} GB free at {options.folder}")
    root = options.root
    print(f"data root   {root or 'none: give --data-root DIR, or set ' + ENVIRONMENT}")
    for name in SETS:
        print(f"  {name:18} {_found(name, root)}")
    for profile in COUNTED:
        print(f"  {profile:18} {_stages(replace(options, profile=profile))}")
    for text in wrong:
        print(f"WRONG       {text}")
    print("It can run: ./run_all.sh" if not wrong else "Fix this first.")
    return int(bool(wrong))


def _problems(options: ProfileOptions) -> list[str]:
    """Why the default run cannot work here."""
    wrong = []
    try:
        pick_device(options.device)
    except IsslError as error:
        wrong.append(str(error))
    if free_memory() < NEEDED_GB * 1e9:
        wrong.append(f"free memory is below {NEEDED_GB:.0f} GB; close other programs")
    for folder in (options.folder / name for name in ("artifacts", "figures", "results")):
        if not os.access(_there(folder), os.W_OK):
            wrong.append(f"{folder} cannot be written; choose another place with --out DIR")
    return wrong


def _gpu() -> str:
    if not torch.cuda.is_available():
        return f"none that torch sees (CUDA of this torch: {torch.version.cuda})"
    free, total = torch.cuda.mem_get_info()
    return f"{torch.cuda.get_device_name()}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"


def _found(name: str, root: str | None) -> str:
    """How many images of a set are here, and which they are."""
    try:
        count = datasets.count(name, "train", root)
        which = datasets.identity(name, "train", root)
    except IsslError as error:
        return f"not here: {str(error).split('. ')[0]}"
    number = "drawn, any number" if count is None else f"{count:,} training images"
    return f"{number}, identity {which.digest}{' ' + which.about if which.about else ''}"


def _stages(options: ProfileOptions) -> str:
    """How many stages a profile has, and how many of them are released or already made."""
    try:
        stages = all_stages(options.plans().values())
    except IsslError as error:
        return f"cannot run: {str(error).splitlines()[0]}"
    artifacts = Artifacts(options.folder / "artifacts")
    made = sum(artifacts.folder(stage).is_dir() for stage in stages)
    released = sum(stage.label in released_index(provided("released")) for stage in stages)
    return f"{len(stages):6,} stages: {released} released, {made} made here"


def _there(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.parents) if p.exists())
