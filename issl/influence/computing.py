"""How scores are computed: device, batches, precision, memory, processes. None of it changes what
is measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from issl.errors import IsslError, is_whole, number_or_nan
from issl.shards import ONE, Shards

Memory = Literal["auto", "ram", "mapped", "recomputed"]


@dataclass(frozen=True)
class Computing:
    """How to compute scores; they stay the same up to rounding. Raises IsslError for settings that
    make no sense.

    device      where to compute; default: where the encoder is
    batch_size  images per forward and backward pass; "auto": what fits into the free memory, by a
                trial with two. Halved where memory runs out
    precision   "bf16" computes the features under autocast, which rounds to 3 digits; curvature and
                sums do not change
    memory      where the projected gradients stay between their two uses: "ram", "mapped" (in
                files), or nowhere, "recomputed"; "auto" takes the first that fits into `memory_gb`
                or the free disk
    memory_gb   gigabytes that the gradients may take (default: half of the free memory)
    store       a folder in which gradients are kept in files, while the call lasts; default: the
                system's for such
    shards      this process's share of the images, see `issl.shards`; every process returns all
                scores
    progress    show a progress bar
    """

    device: str | torch.device | None = None
    batch_size: int | Literal["auto"] = 256
    precision: Literal["fp32", "bf16"] = "fp32"
    memory: Memory = "auto"
    memory_gb: float | None = None
    store: str | Path | None = None
    shards: Shards = ONE
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
        if self.memory_gb is not None and not number_or_nan(self.memory_gb) > 0:
            raise IsslError(
                f"memory_gb={self.memory_gb}: must be > 0, the gigabytes that gradients may take in memory"
            )
        if self.store is not None and self.memory not in ("auto", "mapped"):
            raise IsslError(
                f"store={str(self.store)!r} keeps gradients in files, memory={self.memory!r} does not; drop one of them"
            )
        try:
            device = torch.device(self.device or "cpu")
        except RuntimeError as error:
            raise IsslError(
                f"device={self.device!r}: torch knows no such device; try cpu or cuda"
            ) from error
        if device.type == "meta":
            raise IsslError("device='meta' holds no values; try cpu or cuda")
