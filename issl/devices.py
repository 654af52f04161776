"""The machine: which device computes, in which precision, and how memory is kept."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

from issl.errors import IsslError


def pick_device(name: str) -> torch.device:
    """The device of that name; auto is the GPU if there is one. Raises IsslError for other names, and without a GPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise IsslError(f"device {name!r}: choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise IsslError("device 'cuda': torch sees no GPU here; use --device auto, or check the driver")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's kind with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def computes_bf16(device: torch.device, precision: str) -> bool:
    """Is bf16 used? auto: if the device computes it natively; otherwise autocast would only cost time."""
    if precision not in ("auto", "fp32", "bf16"):
        raise IsslError(f"precision {precision!r}: choose auto, fp32 or bf16")
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and "AVX512" in torch.backends.cpu.get_cpu_capability() and _cpu_flag("avx512_bf16")


@lru_cache
def _cpu_flag(flag: str) -> bool:
    info = Path("/proc/cpuinfo")  # Linux only; other systems train in fp32
    return info.is_file() and flag in info.read_text().split()


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 means fp32: no TF32 in matrix products or convolutions on the GPU."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor instead of handing it back to the system.

    Each step allocates and frees the same large tensors; without this, each is mapped again page by page, which on
    virtual machines costs more than the arithmetic. No effect without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # malloc.h
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_max, 0)
        mallopt(m_arena_max, 1)  # arenas of single threads would still map large tensors
