"""A pass over images: their losses and gradients, batch by batch, and where these are kept.

The rows of all images (what is kept of their gradients) are needed twice: for the curvature, then
for the scores. So a pass can be repeated, in one of two ways that give the same numbers:

    ram         the rows are kept in memory
    recomputed  nothing is kept; each time costs a forward and backward pass
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from issl.data.images import Images
from issl.devices import Batches, free_memory
from issl.errors import IsslError, is_whole
from issl.influence.curvature import Accumulator
from issl.influence.scorer import Scorer

Memory = Literal["auto", "ram", "recomputed"]
Rows = Mapping[str, Tensor]  # those of a chunk, on the CPU: see `Scorer.rows`
CHUNK = 512  # the most images whose rows are computed together;
CHUNK_BYTES = 2**30  # fewer if their rows would take more than this


@dataclass(frozen=True)
class Computing:
    """How scores are computed. No setting here changes them beyond rounding.

    Args:
        device: Where to compute; default: where the encoder is.
        batch_size: Images per forward and backward pass. It is halved if memory runs out.
        precision: "bf16" computes the features under autocast, which rounds to 3 digits; curvature
            and sums do not change.
        memory: Where the projected gradients are kept between their two uses: "ram", or nowhere if
            "recomputed". "auto" keeps them in memory if they take at most half of what is free.
        progress: Show a progress bar.

    Raises:
        IsslError: For settings that make no sense.
    """

    device: str | torch.device | None = None
    batch_size: int = 256
    precision: Literal["fp32", "bf16"] = "fp32"
    memory: Memory = "auto"
    progress: bool = False

    def __post_init__(self) -> None:
        if not is_whole(self.batch_size, 1):
            raise IsslError(f"batch_size={self.batch_size!r}: must be a whole number, 1 or more")
        if self.precision not in ("fp32", "bf16"):
            raise IsslError(f"precision={self.precision!r}: choose fp32 or bf16")
        if self.memory not in ("auto", "ram", "recomputed"):
            raise IsslError(f"memory={self.memory!r}: choose auto, ram or recomputed")


class Pass:
    """The rows of some images under a scorer, chunk by chunk, as often as they are needed.

    Iterating gives, for each chunk, its positions and its rows by name. Rows that are kept live as
    long as this object. If `memory` is "auto", the choice is made when this object is created.
    """

    def __init__(self, scorer: Scorer, images: Images, computing: Computing):
        self.scorer, self.images, self.computing = scorer, images, computing
        row_bytes = scorer.dtype.itemsize * scorer.what.draws * sum(scorer.widths.values())
        step, n = max(1, min(CHUNK, CHUNK_BYTES // row_bytes)), len(images)
        self.chunks = [slice(k, min(k + step, n)) for k in range(0, n, step)]
        if computing.memory == "auto":
            self.computing = replace(computing, memory=choose_memory(row_bytes * n))
        self._in_batches, self._kept = Batches(computing.batch_size), dict[int, Rows]()

    def __iter__(self) -> Iterator[tuple[slice, Rows]]:
        n, shown = len(self.images), self.computing.progress and len(self._kept) < len(self.chunks)
        with tqdm(total=n, unit="img", desc="influence", disable=not shown) as bar:
            for k, chunk in enumerate(self.chunks):
                rows = self._kept.get(k) or self._computed(chunk)
                if self.computing.memory == "ram":
                    self._kept[k] = rows
                bar.update(chunk.stop - chunk.start)
                yield chunk, rows

    def accumulate(self, gram: bool = False) -> dict[str, Accumulator | None]:
        """Each layer's sum over these images, from which its curvature is made; for `gram` see
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
                    total.add(rows[f"layer.{name}"].to(self.scorer.device).mean(1))
        return sums

    def _computed(self, chunk: slice) -> Rows:
        def run(batch: slice) -> Rows:
            rows = self.scorer.rows(self.images, batch, self.computing.precision == "bf16")
            return {name: value.cpu() for name, value in rows.items()}

        parts = list(self._in_batches(chunk, run))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def choose_memory(need: int) -> Memory:
    """Where rows that take `need` bytes are kept."""
    return "ram" if need <= 0.5 * free_memory() else "recomputed"
