"""Batches that follow the memory there is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nets import make, pictures

import issl
from issl import Computing, LoGra
from issl.influence import passes
from issl.influence.passes import choose_batch_size, peak_bytes

CPU = torch.device("cpu")


def test_the_peak_is_counted() -> None:
    def work() -> None:
        a = torch.zeros(1000)  # 4000 bytes
        b = a + 1  # 8000
        a = b * 2  # 12000, then 8000
        b.add_(1)  # in place, nothing new
        a.view(10, 100).sum()  # a view of a, and one number

    assert peak_bytes(work, CPU) == 12_000


@pytest.mark.parametrize(("free", "want"), [(10**12, 64), (100 * 4000, 32), (4000, 1), (0, 1)])
def test_the_batch_fits_into_what_is_free(
    free: int, want: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "free_memory", lambda _: free)
    assert choose_batch_size(lambda count: torch.zeros(count, 1000), CPU) == want


def test_auto_gives_the_same_scores() -> None:
    net, images = make("residual"), pictures(40)
    want = issl.self_influence(net, images, curvature=LoGra(4))
    auto = Computing(batch_size="auto")
    got = issl.self_influence(net, images, curvature=LoGra(4), computing=auto)
    np.testing.assert_allclose(got["influence"], want["influence"], rtol=1e-9)
