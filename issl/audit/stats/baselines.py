"""Baselines that find duplicates or atypical images without influence. Each score is high for such
an image."""

from __future__ import annotations

import imagehash
import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from issl.audit.stats.neighbour_graph import nearest
from issl.data.images import Images


def embedding_closeness(features: Float[Tensor, "n d"]) -> np.ndarray:
    """1 − cosine distance to the nearest other image, (n,): near 1 for duplicates."""
    return 1 - nearest(features, 1)[1][:, 0]


def pixel_closeness(images: Images) -> np.ndarray:
    """Minus the root mean square pixel distance to the nearest other image, (n,), pixels in [0,
    1]."""
    from sklearn.neighbors import NearestNeighbors  # slow to import

    flat = images.tensor().flatten(1).numpy().astype(np.float32) / 255
    distances, _ = NearestNeighbors(n_neighbors=2, algorithm="brute").fit(flat).kneighbors(flat)
    return -distances[:, 1] / np.sqrt(flat.shape[1])


def hash_closeness(images: Images) -> np.ndarray:
    """Minus the Hamming distance (of 64 bits) of the perceptual hash to the nearest other image's,
    (n,)."""
    bits = np.stack(
        [
            imagehash.phash(Image.fromarray(p.permute(1, 2, 0).numpy())).hash.ravel()
            for p in images.pixels
        ]
    ).astype(np.float32)
    signs, best = 2 * bits - 1, np.empty(len(bits), np.float32)
    for start in range(0, len(signs), 2048):
        agree = signs[start : start + 2048] @ signs.T  # bits that agree minus bits that differ
        agree[np.arange(len(agree)), start + np.arange(len(agree))] = -np.inf
        best[start : start + 2048] = agree.max(1)
    return -(signs.shape[1] - best) / 2


def isolation(features: Float[Tensor, "n d"], seed: int = 0) -> np.ndarray:
    """How few random splits isolate an image's features (isolation forest, Liu et al. 2008),
    (n,)."""
    from sklearn.ensemble import IsolationForest  # slow to import

    forest = IsolationForest(random_state=seed).fit(features.numpy())
    return -np.asarray(forest.score_samples(features.numpy()))


def knn_distance(features: Float[Tensor, "n d"], k: int = 10) -> np.ndarray:
    """Mean cosine distance to the k nearest other images, (n,)."""
    return nearest(features, k)[1].mean(1)
