"""Baselines that find duplicates or atypical images without influence.

Each function returns scores (n,) that are high for such images.
"""

from __future__ import annotations

import imagehash
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor

from issl.audit.stats.neighbour_graph import nearest
from issl.data.images import Images


def pixel_closeness(images: Images) -> np.ndarray:
    """Minus the RMS pixel distance to the nearest other image, pixels in [0, 1]."""
    flat = images.tensor().flatten(1).numpy().astype(np.float32) / 255
    return -_to_nearest(flat) / np.sqrt(flat.shape[1])


def hash_closeness(images: Images) -> np.ndarray:
    """Minus the Hamming distance from a 64-bit perceptual hash to the nearest other image's."""
    pictures = (Image.fromarray(p.permute(1, 2, 0).numpy()) for p in images.tensor())
    bits = np.stack([imagehash.phash(p).hash.ravel() for p in pictures]).astype(np.float32)
    return -np.rint(_to_nearest(bits) ** 2)  # of bits, the squared distance is Hamming's


def isolation(features: Float[Tensor, "n d"], seed: int = 0) -> np.ndarray:
    """How few random splits isolate an image's features (isolation forest, Liu et al. 2008)."""
    from sklearn.ensemble import IsolationForest  # slow to import

    forest = IsolationForest(random_state=seed).fit(features.numpy())
    return -np.asarray(forest.score_samples(features.numpy()))


def knn_distance(features: Float[Tensor, "n d"], k: int = 10) -> np.ndarray:
    """Mean cosine distance to the k nearest other images."""
    return nearest(features, k)[1].mean(1)


def vote_entropy(votes: Float[Tensor, "n c"]) -> np.ndarray:
    """Entropy, in nats, of the nearest training images' class votes (`evaluate.knn_votes`)."""
    return torch.special.entr(votes).sum(1).numpy()


def prototype_distance(
    features: Float[Tensor, "n d"], train: Float[Tensor, "m d"], labels: Int64[Tensor, " m"]
) -> np.ndarray:
    """Cosine distance to the nearest class prototype. A prototype is the mean of the unit features
    of the class's training images."""
    unit = F.normalize(train, dim=1)
    prototypes = torch.stack([unit[labels == c].mean(0) for c in labels.unique()])
    near = F.normalize(features, dim=1) @ F.normalize(prototypes, dim=1).T
    return (1 - near.amax(1)).numpy()


def _to_nearest(rows: Float[np.ndarray, "n d"]) -> np.ndarray:
    """Euclidean distance to the nearest other row. It is computed as a difference of the two rows,
    so it is exactly 0 for a copy."""
    from sklearn.neighbors import NearestNeighbors  # slow to import

    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(rows)
    nearest_other = search.kneighbors(return_distance=False)[:, 0]
    return np.linalg.norm(rows - rows[nearest_other], axis=1)
