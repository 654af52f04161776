"""Influence-SSL: how much each training image shaped a self-supervised encoder, without labels.

An open reproduction of arXiv 2412.17170. Start with `issl.load`, `issl.load_encoder` and
`issl.self_influence`; the notebooks show each step.
"""

import os

# libgomp reads it when torch is imported: threads that wait for each other should soon sleep. By default they spin, and
# where processes share the cores (notebooks beside a training) each slows the others several times.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from issl.data.datasets import load
from issl.data.images import Images
from issl.errors import IsslError
from issl.influence.computing import Computing
from issl.influence.cross import cross_influence, top_influences
from issl.influence.curvature import EKFAC, Diagonal, Exact, Identity, LoGra
from issl.influence.perturbation import Augmentation, GaussianNoise
from issl.influence.self_influence import self_influence
from issl.pretraining.encoder import load_encoder

__version__ = "0.1.0"
__all__ = [
    "EKFAC", "Augmentation", "Computing", "Diagonal", "Exact", "GaussianNoise", "Identity", "Images", "IsslError",
    "LoGra", "cross_influence", "load", "load_encoder", "self_influence", "top_influences",
]  # fmt: skip
