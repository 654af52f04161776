"""A pass over the images: what is computed for each chunk, and how it is stored or recomputed.

The rows of all images (their projected gradients) are needed twice: for the curvature, then for the
scores. So a pass can be repeated, in one of three ways with the same numbers:

    ram         the rows are kept in memory
    mapped      they are kept in files, one per chunk
    recomputed  nothing is kept; each time costs a forward and backward pass
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from issl.data.images import Images
from issl.data.lazy_pixels import LazyPixels
from issl.devices import Batches, free_memory
from issl.errors import IsslError
from issl.files import atomic, scratch_folder
from issl.influence.computing import Computing

RowsOf = Callable[[slice], dict[str, Tensor]]  # computes the rows of these images, by name
Chunk = tuple[slice, Callable[[str], Tensor]]  # which images, and their rows by name
Pass = Callable[[], Iterator[Chunk]]  # may be repeated

CHUNK = 512  # the most images whose rows are kept, and saved, together;
CHUNK_BYTES = 2**30  # fewer if their rows are longer than this


def choose_memory(computing: Computing, need: int) -> Computing:
    """The same settings with `memory` decided: one of the three ways, for rows of `need` bytes."""
    if computing.store is not None:
        return replace(computing, memory="mapped")
    if computing.memory != "auto":
        return computing
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that share this machine
    gb = computing.memory_gb
    if need <= (0.5 * free_memory() / here if gb is None else gb * 1e9):
        return replace(computing, memory="ram")
    fits = 2 * need * here < shutil.disk_usage(tempfile.gettempdir()).free
    return replace(computing, memory="mapped" if fits else "recomputed")


def make_pass(rows_of: RowsOf, chunks: Sequence[slice], computing: Computing) -> Pass:
    """The pass over these chunks, with its rows on the CPU; `computing` from `choose_memory`.

    What is kept lives as long as the pass: no later call finds it, so no gradient is ever taken for
    one of another perturbation, loss or encoder.
    """

    assert computing.batch_size != "auto"  # decided by now
    in_batches = Batches(computing.batch_size)

    def on_cpu(batch: slice) -> dict[str, Tensor]:
        return {name: rows.cpu() for name, rows in rows_of(batch).items()}

    def compute(chunk: slice) -> dict[str, Tensor]:
        parts = list(in_batches(chunk, on_cpu))
        return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

    def shown(missing: Sequence[slice]) -> tqdm[NoReturn]:
        total = sum(c.stop - c.start for c in missing)
        return tqdm(
            total=total, unit="img", desc="influence", disable=not computing.progress or not missing
        )

    if computing.memory == "recomputed":

        def recompute() -> Iterator[Chunk]:
            with shown(chunks) as bar:
                for chunk in chunks:
                    yield chunk, compute(chunk).__getitem__
                    bar.update(chunk.stop - chunk.start)

        return recompute
    if computing.memory == "ram":
        kept: list[dict[str, Tensor]] = []

        def from_memory() -> Iterator[Chunk]:
            with shown(chunks[len(kept) :]) as bar:
                for k, chunk in enumerate(chunks):
                    if k == len(kept):
                        kept.append(compute(chunk))
                        bar.update(chunk.stop - chunk.start)
                    yield chunk, kept[k].__getitem__

        return from_memory

    folder, lock = scratch_folder("issl-rows-", computing.store)

    def from_disk() -> Iterator[Chunk]:
        with shown([c for c in chunks if not _rows_file(folder, c).exists()]) as bar:
            for chunk in chunks:
                path = _rows_file(folder, chunk)
                if not path.exists():
                    with atomic(path) as part:
                        save_file(compute(chunk), part)
                    bar.update(chunk.stop - chunk.start)
                yield chunk, partial(_read_rows, path)

    weakref.finalize(from_disk, _remove, folder, lock)
    return from_disk


def split(share: slice, row_bytes: int) -> list[slice]:
    """A process's share of the images, in chunks whose rows (`row_bytes` each) fit into memory
    together."""
    step = max(1, min(CHUNK, CHUNK_BYTES // row_bytes))
    return [slice(k, min(k + step, share.stop)) for k in range(share.start, share.stop, step)]


def fingerprint(model: nn.Module, data: Images, *settings: object) -> str:
    """A hash of everything that the rows depend on: weights, pixels, indices, settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    pixels = data.pixels
    digest.update(
        pixels.identity().encode()
        if isinstance(pixels, LazyPixels)
        else pixels.contiguous().numpy().data
    )
    digest.update(data.index.numpy().data)
    return digest.hexdigest()


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _rows_file(folder: Path, chunk: slice) -> Path:
    return folder / f"rows-{chunk.start:08d}-{chunk.stop:08d}.safetensors"


def _read_rows(path: Path, name: str) -> Tensor:
    """One tensor of a stored chunk, without reading the others."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise IsslError(
            f"stored gradients {path} are damaged ({error}); delete this file and run again"
        ) from error
