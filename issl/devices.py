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

import torch

from issl.errors import IsslError

T = TypeVar("T")

NODES = Path("/dev")  # of NVIDIA's driver, on Linux


def pick_device(name: str) -> torch.device:
    """The device of that name; auto is the GPU if there is one.

    Raises IsslError for other names, for cuda without a GPU, and for auto if the machine has a GPU
    that torch cannot use.
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
    """That torch cannot use the machine's GPU, with the remedy. None if the machine has no GPU or
    hides it (CUDA_VISIBLE_DEVICES is empty)."""
    nodes = sorted(NODES.glob("nvidia[0-9]*"))
    if not nodes or os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return None
    built = "CPUs" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
    return (
        f"there is a GPU ({nodes[0]}), but torch {torch.__version__}, built for {built}, cannot "
        "use it; install a torch that fits its driver, or update the driver"
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's kind with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def computes_bf16(device: torch.device, precision: str) -> bool:
    """Whether to use bf16. With auto, only if the device computes it natively, because otherwise
    autocast would only cost time."""
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
    return flag in _text(Path("/proc/cpuinfo")).split()  # Linux only; other systems use fp32


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute in true fp32 and reproducibly: no TF32 in matrix products or convolutions on the GPU,
    and cuDNN's deterministic algorithms. The caller's settings are restored, whichever of torch's
    names set them."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    wanted: list[tuple[Any, str, Any]] = [
        (cudnn, "benchmark", False),
        (cudnn, "deterministic", True),
    ]
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 and later: the old names may raise
        wanted += [(place, "fp32_precision", "ieee") for place in (matmul, cudnn.conv)]
    else:
        wanted += [(place, "allow_tf32", False) for place in (matmul, cudnn)]
    before = [(place, name, getattr(place, name)) for place, name, _ in wanted]
    try:
        for place, name, value in wanted:
            setattr(place, name, value)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


@contextmanager
def without_onednn() -> Iterator[None]:
    """Use torch's own convolutions: in NHWC and fp32, oneDNN's weight gradient of a narrow
    convolution can crash a process on a CPU (oneDNN issue 6035)."""
    before = torch.backends.mkldnn.set_flags(_enabled=False)[0]
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=before)


def no_memory(error: BaseException) -> IsslError:
    """The error for when not even the smallest batch fits."""
    return IsslError(
        f"memory does not suffice for one image and its view ({type(error).__name__}); use smaller "
        "images (--size), or a machine with more"
    )


@dataclass
class Batches:
    """Runs a function on positions, `size` at a time. If memory runs out, it halves `size`, from
    there on and in later calls. Only for results that do not depend on the batch size."""

    size: int

    def __call__(self, positions: slice, run: Callable[[slice], T]) -> Iterator[T]:
        """The result of `run` for each batch. Raises IsslError if not even one image fits."""
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
            # outside the handler, which keeps the failed step's tensors alive
            self.size = (part.stop - part.start) // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            print(
                f"too little memory for {part.stop - part.start} images at once; "
                f"going on with {self.size}",
                file=sys.stderr,
            )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a CPU or a GPU."""
    return isinstance(
        error, MemoryError | torch.OutOfMemoryError
    ) or "can't allocate memory" in str(error)


MEMINFO, CGROUPS = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def free_memory(device: torch.device | None = None) -> int:
    """Bytes that this process can still allocate: on a GPU, or on the machine within the limit of
    its container or job (Linux's cgroups)."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = re.search(r"^MemAvailable: *(\d+) kB", _text(MEMINFO), re.MULTILINE)
    if found is not None:
        return min([1024 * int(found[1]), *_cgroup_rooms()])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # not Linux: all memory


def _cgroup_rooms() -> Iterator[int]:
    """The bytes left in this process's cgroup and in each cgroup above it, where there is a
    limit."""
    own = {}
    for line in _text(OWN_CGROUP).splitlines():
        _, kind, path = line.split(":", 2)
        own[kind] = path.strip("/")
    for kind, limit, usage in (
        ("", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        inside = Path(own.get(kind, ""))
        for folder in [CGROUPS / kind / path for path in (inside, *inside.parents)]:
            most, used = _text(folder / limit).strip(), _text(folder / usage).strip()
            if most.isdigit() and used.isdigit():
                statistics = _text(folder / "memory.stat")
                cached = re.search(r"^(?:total_)?inactive_file (\d+)", statistics, re.MULTILINE)
                spare = 0 if cached is None else int(cached[1])  # reclaimed when needed
                yield max(0, int(most) - int(used) + spare)


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor instead of handing it back to the system.

    Each step allocates and frees the same large tensors; without this, each is mapped again page by
    page, which on virtual machines costs more than the arithmetic. No effect without glibc.
    """
    # Dask sets this in its workers and notebook kernels inherit it: they run five times as slow.
    os.environ.pop("MALLOC_TRIM_THRESHOLD_", None)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # malloc.h
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_max, 0)
        mallopt(m_arena_max, 1)  # per-thread arenas would still map large tensors
