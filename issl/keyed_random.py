"""Random numbers of one example: a function of (seed, example index) and of nothing else.

A score must not depend on batch size, order or device, so examples must not share a stream of
random numbers. Philox is a counter-based generator: a key selects an independent stream (Salmon et
al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), and the key here is (seed, index).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from issl.errors import IsslError

SEVERAL_THREADS = 2_000_000  # numbers in a batch from which several threads draw


def generator(seed: int, index: int) -> np.random.Generator:
    """The stream of example `index` under `seed`; both must be ≥ 0."""
    if seed < 0 or index < 0:
        raise IsslError(
            f"seed {seed}, index {index}: both must be ≥ 0, because they are the key of the random "
            "stream"
        )
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))


def normal(seed: int, index: Int[Tensor, " b"], shape: Sequence[int]) -> Float[Tensor, "b ..."]:
    """Standard normal values, one block of `shape` per example, drawn on the CPU in float32."""
    return _stack(
        index, shape, lambda i: generator(seed, i).standard_normal(shape, dtype=np.float32)
    )


def uniform(seed: int, index: Int[Tensor, " b"], shape: Sequence[int]) -> Float[Tensor, "b ..."]:
    """Uniform values in [0, 1), one block of `shape` per example, drawn on the CPU in float32."""
    return _stack(index, shape, lambda i: generator(seed, i).random(shape, dtype=np.float32))


def _stack(index: Tensor, shape: Sequence[int], draw: Callable[[int], np.ndarray]) -> Tensor:
    out = np.empty((len(index), *shape), dtype=np.float32)

    def fill(row: int, i: int) -> None:
        out[row] = draw(i)

    rows = range(len(index)), index.tolist()
    if out.size < SEVERAL_THREADS:
        list(map(fill, *rows))
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy releases the GIL
            list(pool.map(fill, *rows))
    return torch.from_numpy(out)
