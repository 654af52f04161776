"""CIFAR-10H: the classes that about fifty people each chose for every test image of CIFAR-10
(Peterson et al. 2019, arXiv 1908.07086).

ambiguity = − Σ_c p_c ln p_c, where p_c is the share of people who chose class c: 0 where all agree,
at most ln 10
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy  # its parts are imported when they are first used
from jaxtyping import Int

from issl.data import published
from issl.data.images import Images
from issl.errors import IsslError

FILE = Path("cifar10h") / "cifar10h-counts.npy"  # under the data root
SHAPE = (10_000, 10)  # CIFAR-10's test images, in the original order, and its classes


def missing(name: str, root: str | Path | None = None) -> str | None:
    """Why the ambiguity of a data set's test images is not known here; None if it is known."""
    if name != "cifar10":
        return f"people's choices are known of cifar10's test images, not of {name}"
    base = published.data_root(root)
    path = (base or Path("DIR")) / FILE
    if base is None or not path.is_file():
        return (
            f"{path} is not there: cifar10h-counts.npy of github.com/jcpeterson/cifar-10h belongs "
            f"under the data root (--data-root DIR or {published.ENVIRONMENT}=DIR)"
        )
    return None


def read(root: str | Path | None = None) -> Int[np.ndarray, "10000 10"]:
    """How many people chose each class, for each test image of CIFAR-10. Raises IsslError for a
    file that is missing or holds something else."""
    path = (published.data_root(root) or Path()) / FILE
    try:
        counts = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise IsslError(f"{path} is not a readable .npy file ({error}); copy it again") from error
    whole = counts.shape == SHAPE and counts.dtype.kind in "iu"
    if not whole or counts.min() < 0 or not counts.sum(1).all():
        raise IsslError(
            f"{path} holds {counts.dtype} {counts.shape}; need whole-number counts {SHAPE} and at "
            "least one person per image; copy it again"
        )
    return np.asarray(counts)


def ambiguity(images: Images, root: str | Path | None = None) -> np.ndarray:
    """The entropy of people's choices for each image (n,), in nats. The images must be from
    CIFAR-10's test set, with its numbering; raises IsslError for others."""
    if (why := missing(images.name, root)) is not None:
        raise IsslError(why)
    counts, index = read(root), images.index.numpy()
    if len(wrong := index[(index < 0) | (index >= len(counts))]):
        raise IsslError(
            f"{images.name}: index {wrong[0]}; people judged test images 0 to {len(counts) - 1}: "
            "ask about these"
        )
    return np.asarray(scipy.stats.entropy(counts[index], axis=1))
