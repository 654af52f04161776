"""Several processes on one computation: each has its share of the images, and sums are taken over
all.

They are started by torchrun and use torch.distributed (nccl on GPUs, gloo on CPUs). The results are
those of one process up to rounding: only the order of the sums differs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from issl.errors import IsslError

T = TypeVar("T")


@runtime_checkable
class Summed(Protocol):
    """A sum over the images: a total, or the rows themselves while they are few."""

    total: Tensor | None
    rows: list[Tensor]


@dataclass(frozen=True)
class Shards:
    """Process `rank` of `world`; a single process sends nothing."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    def share(self, n: int) -> slice:
        """The positions of this process: contiguous, and at most one more or less than
        another's."""
        if n < self.world:
            raise IsslError(
                f"{n} images on {self.world} processes: start at most as many processes as there are images"
            )
        return slice(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes; same shape, same device."""
        if self.world == 1:
            return value
        sent = value.to(self.device).contiguous()
        self.call(lambda: dist.all_reduce(sent))
        return sent.to(value.device)

    def reduce(self, sums: Sequence[Summed]) -> None:
        """Complete each of these over all processes, in place; every process must bring the same
        ones."""
        if self.world == 1:
            return
        for item in sums:
            if item.total is not None:
                item.total = self.sum(item.total)
            elif item.rows:
                parts: list[list[Tensor]] = [[] for _ in range(self.world)]
                mine = [r.cpu() for r in item.rows]
                self.call(lambda parts=parts, mine=mine: dist.all_gather_object(parts, mine))  # type: ignore[misc]
                item.rows = [r.to(item.rows[0].device) for part in parts for r in part]

    def gather(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The complete arrays, where each process filled its own positions and left 0 elsewhere."""
        return [self.sum(torch.from_numpy(a)).numpy() for a in arrays]

    def objects(self, mine: T) -> list[T]:
        """The objects of all processes, in order of rank."""
        if self.world == 1:
            return [mine]
        every: list[T] = [mine] * self.world
        self.call(lambda: dist.all_gather_object(every, mine))
        return every

    def call(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0]
            raise IsslError(
                f"process {self.rank} of {self.world}: another process died or did not answer in time ({first}); see "
                "its own error, then start the same command again"
            ) from error


ONE = Shards()


@contextmanager
def from_torchrun(device: torch.device, timeout_s: float = 600.0) -> Iterator[Shards]:
    """The shards of this run: `ONE` if torchrun did not start it.

    timeout_s   how long a process waits for the others before it gives up
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ONE
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device.type == "cuda":
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= gpus:
            raise IsslError(
                f"process {local + 1} on a machine with {gpus} GPUs: start one a GPU, --nproc-per-node {gpus}"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise IsslError(
            f"process {rank} of {world}: the others were not found in {timeout_s:g} s ({error})"
        ) from error
    try:
        yield Shards(rank, world, device)
    finally:
        dist.destroy_process_group()
