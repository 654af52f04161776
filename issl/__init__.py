"""Influence-SSL: how much each training image shaped a self-supervised encoder, without labels.

An open reproduction of arXiv 2412.17170. Start with `issl.load`, `issl.load_encoder` and
`issl.self_influence`; the notebooks show each step.

The names below are imported when they are first used (PEP 562), so `issl --help` does not wait for
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from issl.data.datasets import load
    from issl.data.images import Images
    from issl.data.torch_dataset import from_dataset
    from issl.errors import IsslError
    from issl.influence.computing import Computing
    from issl.influence.cross import cross_influence, top_influences
    from issl.influence.curvature import (
        EKFAC,
        Curvature,
        Diagonal,
        Exact,
        Identity,
        LoGra,
        RandomProjection,
    )
    from issl.influence.fitted import Fitted, fit, load_fitted
    from issl.influence.perturbation import Augmentation, GaussianNoise
    from issl.influence.self_influence import self_influence
    from issl.pretraining.encoder import load_encoder
    from issl.training_influence import training_influence

__version__ = "0.3.0"
__all__ = [
    "EKFAC",
    "Augmentation",
    "Computing",
    "Curvature",
    "Diagonal",
    "Exact",
    "Fitted",
    "GaussianNoise",
    "Identity",
    "Images",
    "IsslError",
    "LoGra",
    "RandomProjection",
    "cross_influence",
    "fit",
    "from_dataset",
    "load",
    "load_encoder",
    "load_fitted",
    "self_influence",
    "top_influences",
    "training_influence",
]
_NAMES = {  # of each module
    "training_influence": ("training_influence",),
    "data.datasets": ("load",),
    "data.images": ("Images",),
    "data.torch_dataset": ("from_dataset",),
    "errors": ("IsslError",),
    "influence.computing": ("Computing",),
    "influence.cross": ("cross_influence", "top_influences"),
    "influence.curvature": (
        "EKFAC",
        "Curvature",
        "Diagonal",
        "Exact",
        "Identity",
        "LoGra",
        "RandomProjection",
    ),
    "influence.fitted": ("Fitted", "fit", "load_fitted"),
    "influence.perturbation": ("Augmentation", "GaussianNoise"),
    "influence.self_influence": ("self_influence",),
    "pretraining.encoder": ("load_encoder",),
}

if not TYPE_CHECKING:  # a type checker would take every attribute for known

    def __getattr__(name: str) -> object:
        module = next((module for module, names in _NAMES.items() if name in names), None)
        if module is None:
            raise AttributeError(f"module 'issl' has no attribute {name!r}")
        globals()[name] = value = getattr(import_module(f"issl.{module}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
