"""The machine: which device computes, in which precision, and how memory is kept."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from issl.errors import IsslError

T = TypeVar("T")

NODES, DRIVER = Path("/dev"), Path("/proc/driver/nvidia/version")  # of NVIDIA's driver, on Linux
NEEDED_DRIVER = {
    "11": 450,
    "12": 525,
    "13": 580,
}  # the oldest for each CUDA (NVIDIA, CUDA compatibility guide)


def pick_device(name: str) -> torch.device:
    """The device of that name; auto is the GPU if there is one.

    Raises IsslError for other names, for cuda without a GPU, and for auto where there is one that
    torch cannot use.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if (problem := unusable_gpu()) is not None:
            raise IsslError(f"device 'auto': {problem}, or compute on the CPU with --device cpu")
        return torch.device("cpu")
    if name not in ("cpu", "cuda"):
        raise IsslError(f"device {name!r}: choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise IsslError(
            f"device 'cuda': {unusable_gpu() or 'torch sees no GPU here'}; or use --device cpu"
        )
    return torch.device(name)


def unusable_gpu() -> str | None:
    """Why torch sees no GPU though the machine has one, with the remedy; None where it has none, or
    hides it (CUDA_VISIBLE_DEVICES is empty)."""
    nodes = sorted(NODES.glob("nvidia[0-9]*"))
    if not nodes or os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return None
    found = (
        re.search(r"Kernel Module\D*(\d+)[.\d]*", DRIVER.read_text()) if DRIVER.is_file() else None
    )
    driver = "its driver" if found is None else f"its driver {found[0].split()[-1]}"
    if torch.version.cuda is None:
        return f"there is a GPU ({nodes[0]}), but this torch is built without CUDA; install a build with it"
    needed = NEEDED_DRIVER.get(torch.version.cuda.split(".")[0])
    least = "" if needed is None else f", which needs driver {needed} or newer"
    return (
        f"there is a GPU ({nodes[0]}), but torch cannot use {driver}: torch {torch.__version__} is built for CUDA "
        f"{torch.version.cuda}{least}; update the driver, install a torch built for an older CUDA"
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's kind with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def computes_bf16(device: torch.device, precision: str) -> bool:
    """Is bf16 used? auto: if the device computes it natively; otherwise autocast would only cost
    time."""
    if precision not in ("auto", "fp32", "bf16"):
        raise IsslError(f"precision {precision!r}: choose auto, fp32 or bf16")
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return (
        device.type == "cpu"
        and "AVX512" in torch.backends.cpu.get_cpu_capability()
        and _cpu_flag("avx512_bf16")
    )


@lru_cache
def _cpu_flag(flag: str) -> bool:
    info = Path("/proc/cpuinfo")  # Linux only; other systems train in fp32
    return info.is_file() and flag in info.read_text().split()


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 means fp32, and the same each time: no TF32 in matrix products or convolutions on the
    GPU, and cuDNN's deterministic algorithms. What the caller had set, by whichever of torch's
    names, is restored."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    wanted: list[tuple[Any, str, Any]] = [
        (cudnn, "benchmark", False),
        (cudnn, "deterministic", True),
    ]
    if hasattr(
        matmul, "fp32_precision"
    ):  # torch 2.9 and later: the old names raise where the new ones were used
        wanted += [(place, "fp32_precision", "ieee") for place in (matmul, cudnn.conv)]
    else:
        wanted += [(place, "allow_tf32", False) for place in (matmul, cudnn)]
    before: list[tuple[Any, str, Any]] = [
        (place, name, getattr(place, name)) for place, name, _ in wanted
    ]
    try:
        for place, name, value in wanted:
            setattr(place, name, value)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


@contextmanager
def without_onednn() -> Iterator[None]:
    """Convolutions by torch's own code on several threads of a CPU: there oneDNN's gradient of a
    narrow one's weight, in fp32, can crash the process (torch 2.15)."""
    before = torch.backends.mkldnn.set_flags(_enabled=torch.get_num_threads() == 1)[0]
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=before)


def no_memory(error: BaseException) -> IsslError:
    """What is said where not even the smallest batch fits."""
    return IsslError(
        f"memory does not suffice for one image and its view ({type(error).__name__}); use smaller images (--size), or "
        "a machine with more"
    )


@dataclass
class Batches:
    """Runs on positions, `size` at a time; where memory does not suffice, on half as many, from
    there on and in later calls. For what does not depend on the size of a batch."""

    size: int

    def __call__(self, positions: slice, run: Callable[[slice], T]) -> Iterator[T]:
        """What `run` gives for each batch. Raises IsslError where not even one image fits."""
        start = positions.start
        while start < positions.stop:
            part = slice(start, min(start + self.size, positions.stop))
            try:
                found = run(part)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if part.stop - part.start == 1:
                    raise no_memory(error) from None
            else:
                yield found
                start = part.stop
                continue
            self.size = (
                part.stop - part.start
            ) // 2  # outside of the handler, which keeps the failed step's tensors
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            print(
                f"too little memory for {part.stop - part.start} images at once; going on with {self.size}",
                file=sys.stderr,
            )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that no more memory could be had, on a CPU or a GPU."""
    return isinstance(
        error, MemoryError | torch.OutOfMemoryError
    ) or "can't allocate memory" in str(error)


CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its container or job (Linux's
    cgroups)."""
    return min([psutil.virtual_memory().available, *_cgroup_rooms()])


def _cgroup_rooms() -> Iterator[int]:
    """The room that is left in this process's cgroup and in those above it, where they have a
    limit."""
    lines = OWN_CGROUP.read_text().splitlines() if OWN_CGROUP.is_file() else []
    own = {kind: path.strip("/") for line in lines for _, kind, path in [line.split(":", 2)]}
    for kind, root, limit, usage in (
        ("", CGROUPS, "memory.max", "memory.current"),
        ("memory", CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        for folder in [root / own.get(kind, ""), *(root / own.get(kind, "")).parents]:
            if (
                not folder.is_relative_to(root)
                or not (folder / limit).is_file()
                or not (folder / usage).is_file()
            ):
                continue
            most = (folder / limit).read_text().strip()
            if most.isdigit():
                cached = re.search(
                    r"^(?:total_)?inactive_file (\d+)", _text(folder / "memory.stat"), re.MULTILINE
                )
                spare = 0 if cached is None else int(cached[1])  # given back when it is needed
                yield max(0, int(most) - int((folder / usage).read_text()) + spare)


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor instead of handing it back to the system.

    Each step allocates and frees the same large tensors; without this, each is mapped again page by
    page, which on virtual machines costs more than the arithmetic. No effect without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # malloc.h
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_max, 0)
        mallopt(m_arena_max, 1)  # arenas of single threads would still map large tensors
