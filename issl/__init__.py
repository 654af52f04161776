"""Influence-SSL: how much each training image shaped a self-supervised encoder, without labels.

An open reproduction of arXiv 2412.17170. Start with `issl.load`, `issl.load_encoder` and
`issl.self_influence`; the notebooks show each step.

The names below are imported when they are first used (PEP 562), so `issl --help` does not wait for
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from issl.data.datasets import load as load
    from issl.data.images import Images as Images
    from issl.data.torch_dataset import from_dataset as from_dataset
    from issl.errors import IsslError as IsslError
    from issl.influence.curvature import EKFAC as EKFAC
    from issl.influence.curvature import Curvature as Curvature
    from issl.influence.curvature import Diagonal as Diagonal
    from issl.influence.curvature import Exact as Exact
    from issl.influence.curvature import Identity as Identity
    from issl.influence.curvature import LoGra as LoGra
    from issl.influence.curvature import RandomProjection as RandomProjection
    from issl.influence.kept import Fitted as Fitted
    from issl.influence.kept import fit as fit
    from issl.influence.kept import load_fitted as load_fitted
    from issl.influence.perturbation import Augmentation as Augmentation
    from issl.influence.perturbation import ClippedNoise as ClippedNoise
    from issl.influence.perturbation import GaussianNoise as GaussianNoise
    from issl.influence.scorer import Computing as Computing
    from issl.influence.scores import cross_influence as cross_influence
    from issl.influence.scores import self_influence as self_influence
    from issl.influence.scores import top_influences as top_influences
    from issl.measures import knn_margins as knn_margins
    from issl.measures import mean_of as mean_of
    from issl.measures import stability_measures as stability_measures
    from issl.pretraining.encoder import load_encoder as load_encoder
    from issl.through_training import influence_through_training as influence_through_training

__version__ = "0.3.0"
# names by module; none equals its module's name, since importing the module would then hide it
_MODULES = {
    "data.datasets": "load",
    "data.images": "Images",
    "data.torch_dataset": "from_dataset",
    "errors": "IsslError",
    "influence.curvature": "Curvature Diagonal EKFAC Exact Identity LoGra RandomProjection",
    "influence.kept": "Fitted fit load_fitted",
    "influence.scorer": "Computing",
    "influence.perturbation": "Augmentation ClippedNoise GaussianNoise",
    "influence.scores": "cross_influence self_influence top_influences",
    "pretraining.encoder": "load_encoder",
    "measures": "knn_margins mean_of stability_measures",
    "through_training": "influence_through_training",
}
__all__ = [name for names in _MODULES.values() for name in names.split()]

if not TYPE_CHECKING:  # else a type checker would accept every attribute

    def __getattr__(name: str) -> object:
        module = next((m for m, names in _MODULES.items() if name in names.split()), None)
        if module is None:
            raise AttributeError(f"module 'issl' has no attribute {name!r}")
        globals()[name] = value = getattr(import_module(f"issl.{module}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
