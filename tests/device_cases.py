"""What must be the same on another device as on the CPU, for the counterfeit GPU and for a real
one."""

from __future__ import annotations

import nets
import numpy as np
import torch

from issl.audit.settings import named_curvature
from issl.influence.computing import Computing
from issl.influence.cross import cross_influence
from issl.influence.perturbation import Augmentation
from issl.influence.self_influence import self_influence


def scores_and_cross_influence(
    kind: str, net: torch.nn.Module, device: torch.device, relative: float, smallest: float
) -> None:
    """relative: of the scores; smallest: of the cross-influence, as a part of the largest."""
    images, weighing = nets.pictures(20), named_curvature(kind, 3)
    for settings in ({"draws": 2, "sweep": [1.0]}, {"perturbation": Augmentation("chain")}):
        here, there = (
            self_influence(
                net,
                images,
                curvature=weighing,
                computing=Computing(device=d, batch_size=8),
                **settings,
            )
            for d in ("cpu", device)
        )
        np.testing.assert_allclose(there["influence"], here["influence"], rtol=relative)
    here, there = (
        cross_influence(
            net, images, nets.pictures(5, 1), curvature=weighing, computing=Computing(device=d)
        )
        for d in ("cpu", device)
    )
    torch.testing.assert_close(there, here, rtol=1e-3, atol=smallest * float(here.abs().max()))
