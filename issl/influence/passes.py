"""A pass over images: their losses and gradients, batch by batch, and where these stay meanwhile.

The rows of all images (what is kept of their gradients) are needed twice: for the curvature, then
for the scores. So a pass can be repeated, in one of three ways with the same numbers:

    ram         the rows are kept in memory
    mapped      they are kept in files, one per chunk
    recomputed  nothing is kept; each time costs a forward and backward pass
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from issl.data.images import Images
from issl.devices import Batches, free_memory
from issl.errors import IsslError, is_whole
from issl.files import atomic, scratch_folder
from issl.influence.curvature import Accumulator
from issl.influence.scorer import Scorer

Memory = Literal["auto", "ram", "mapped", "recomputed"]
Read = Callable[[str], Tensor]  # "loss" or "layer.NAME" to the rows of a chunk, on the CPU
CHUNK = 512  # the most images whose rows are kept, and saved, together;
CHUNK_BYTES = 2**30  # fewer if their rows are longer than this
MOST = {"cpu": 64, "cuda": 512}  # images at once: more are not faster
SHARE = 0.4  # of the free memory: kernels need workspaces beside the tensors that are counted


@dataclass(frozen=True)
class Computing:
    """How scores are computed. None of it changes them beyond rounding.

    Args:
        device: Where to compute; default: where the encoder is.
        batch_size: Images per forward and backward pass; "auto": what fits into the free memory, by
            a trial with two. It is halved where memory runs out.
        precision: "bf16" computes the features under autocast, which rounds to 3 digits; curvature
            and sums do not change.
        memory: Where the projected gradients stay between their two uses: "ram", "mapped" (in
            files), or nowhere, "recomputed"; "auto" takes the first that fits into half of the free
            memory, or of the free disk.
        store: The folder of those files while the call lasts; default: the system's for such.
        progress: Show a progress bar.

    Raises:
        IsslError: For settings that make no sense.
    """

    device: str | torch.device | None = None
    batch_size: int | Literal["auto"] = 256
    precision: Literal["fp32", "bf16"] = "fp32"
    memory: Memory = "auto"
    store: str | Path | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        if self.batch_size != "auto" and not is_whole(self.batch_size, 1):
            raise IsslError(
                f"batch_size={self.batch_size!r}: must be 1 or more, a whole number, or auto"
            )
        if self.precision not in ("fp32", "bf16"):
            raise IsslError(f"precision={self.precision!r}: choose fp32 or bf16")
        if self.memory not in ("auto", "ram", "mapped", "recomputed"):
            raise IsslError(f"memory={self.memory!r}: choose auto, ram, mapped or recomputed")
        if self.store is not None and self.memory not in ("auto", "mapped"):
            raise IsslError(
                f"store={str(self.store)!r} keeps gradients in files, memory={self.memory!r} does "
                "not; drop one of them"
            )


class Pass:
    """The rows of some images under a scorer, chunk by chunk, as often as they are asked for.

    Iterating gives, for each chunk, its positions and its rows by name. What is kept lives as long
    as this object. A batch size and a memory that are "auto" are decided as it is made.
    """

    def __init__(self, scorer: Scorer, images: Images, computing: Computing):
        self.scorer, self.images, self.computing = scorer, images, computing
        row_bytes = scorer.dtype.itemsize * scorer.what.draws * sum(scorer.widths.values())
        step, n = max(1, min(CHUNK, CHUNK_BYTES // row_bytes)), len(images)
        self.chunks = [slice(k, min(k + step, n)) for k in range(0, n, step)]
        memory, size = computing.memory, computing.batch_size
        if memory == "auto":
            memory = "mapped" if computing.store else choose_memory(row_bytes * n)
        if size == "auto":
            size = choose_batch_size(lambda m: self._compute(slice(0, min(m, n))), scorer.device)
        self.computing = replace(computing, memory=memory, batch_size=size)
        self._in_batches, self._kept, self._folder = Batches(size), dict[int, Read](), Path()
        if memory == "mapped":
            self._folder, lock = scratch_folder("issl-rows-", computing.store)
            weakref.finalize(self, _remove, self._folder, lock)

    def __iter__(self) -> Iterator[tuple[slice, Read]]:
        total = len(self.images) if len(self._kept) < len(self.chunks) else 0
        shown = self.computing.progress and total > 0
        with tqdm(total=total, unit="img", desc="influence", disable=not shown) as bar:
            for k, chunk in enumerate(self.chunks):
                read = self._kept.get(k) or self._rows(k, chunk)
                bar.update(chunk.stop - chunk.start)
                yield chunk, read

    def accumulate(self, gram: bool = False) -> dict[str, Accumulator | None]:
        """What each layer's curvature is made from, over these images; for `gram` see
        `Curvature.accumulator`."""
        curvature, n = self.scorer.what.curvature, len(self.images)
        sums = {
            name: curvature.accumulator(gram and width > n)
            for name, width in self.scorer.widths.items()
        }
        if not any(sums.values()):
            return sums  # no curvature, so no pass
        for _, rows in self:
            for name, total in sums.items():
                if total is not None:
                    total.add(rows(f"layer.{name}").to(self.scorer.device).mean(1))
        return sums

    def _compute(self, batch: slice) -> dict[str, Tensor]:
        rows = self.scorer.rows(self.images, batch, self.computing.precision == "bf16")
        return {name: value.cpu() for name, value in rows.items()}

    def _rows(self, k: int, chunk: slice) -> Read:
        """Compute a chunk, and keep it as it was asked."""
        parts = list(self._in_batches(chunk, self._compute))
        rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        read: Read = rows.__getitem__
        if self.computing.memory == "mapped":
            path = self._folder / f"{k:06}.safetensors"
            with atomic(path) as part:
                save_file(rows, part)
            read = partial(_read_rows, path)
        if self.computing.memory != "recomputed":
            self._kept[k] = read
        return read


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _read_rows(path: Path, name: str) -> Tensor:
    """One tensor of a chunk, without reading the others."""
    with safe_open(path, framework="pt") as file:
        return cast(Tensor, file.get_tensor(name))


# --- how much fits into memory ---


def choose_memory(need: int) -> Memory:
    """Where rows of `need` bytes stay."""
    if need <= 0.5 * free_memory():
        return "ram"
    fits = need <= 0.5 * shutil.disk_usage(tempfile.gettempdir()).free
    return "mapped" if fits else "recomputed"


def choose_batch_size(work: Callable[[int], object], device: torch.device) -> int:
    """The batch size, a power of two, for work that is a function of the number of images."""
    few = 2
    each = max(1, peak_bytes(lambda: work(few), device) // few)
    fits = int(SHARE * free_memory(device) / each)
    return 1 << (max(1, min(fits, MOST.get(device.type, 64))).bit_length() - 1)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that this work holds at one time, beyond those there are."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    with _Counted() as counted:
        work()
    return counted.peak


class _Counted(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside, until they are freed; torch keeps no such
    count on CPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and (own := value.untyped_storage()) not in self._known:
                self._known.add(own)
                weakref.finalize(own, self._count, -own.nbytes())
                self._count(own.nbytes())
        return out

    def _count(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)
