"""The graph of nearest neighbours in feature space: who bridges classes? (arXiv 2412.17170, §4: semantic bridges)"""

from __future__ import annotations

import networkx
import numpy as np
import torch.nn.functional as F
from jaxtyping import Float
from scipy import sparse
from torch import Tensor

from issl.errors import IsslError


def nearest(features: Float[Tensor, "n d"], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest other images of each by cosine distance: positions (n, k) and distances (n, k) in [0, 2]."""
    if not 1 <= k < len(features):
        raise IsslError(f"k={k} neighbours among {len(features)} images: must lie between 1 and {len(features) - 1}")
    unit, places, distances = F.normalize(features, dim=1), [], []
    for start in range(0, len(unit), 1024):
        similar = unit[start : start + 1024] @ unit.T
        rows = range(len(similar))
        similar[rows, range(start, start + len(similar))] = -np.inf  # not itself
        best = similar.topk(k, dim=1)
        places.append(best.indices.numpy())
        distances.append((1 - best.values).clamp(min=0).numpy())
    return np.concatenate(places), np.concatenate(distances)


def knn_graph(features: Float[Tensor, "n d"], k: int = 10) -> sparse.csr_array:
    """Undirected: an edge where either image is among the other's k nearest; symmetric 0/1 matrix (n, n)."""
    places, _ = nearest(features, k)
    n = len(places)
    edges = sparse.csr_array((np.ones(n * k), (np.repeat(np.arange(n), k), places.ravel())), shape=(n, n))
    return edges.maximum(edges.T).tocsr()


def cross_class_share(graph: sparse.csr_array, labels: np.ndarray) -> np.ndarray:
    """Of each image's edges, the share that leads to another class, in [0, 1]."""
    i, j = graph.nonzero()
    different = np.bincount(i, weights=labels[i] != labels[j], minlength=graph.shape[0])
    return different / np.maximum(np.bincount(i, minlength=graph.shape[0]), 1)


def betweenness(graph: sparse.csr_array, sources: int | None = 256, seed: int = 0) -> np.ndarray:
    """The share of shortest paths between others that pass each image (Brandes & Pich 2007), from so many sources."""
    net = networkx.from_scipy_sparse_array(graph)
    k = None if sources is None or sources >= len(net) else sources
    values = networkx.betweenness_centrality(net, k=k, seed=seed)
    return np.array([values[i] for i in range(len(net))])


def matched(labels: np.ndarray, chosen: np.ndarray, seed: int = 0) -> np.ndarray:
    """For each chosen position, another one of its class that was not chosen, drawn at random (with replacement).

    Raises IsslError where all images of a class were chosen.
    """
    rng, free = np.random.default_rng(seed), np.setdiff1d(np.arange(len(labels)), chosen)
    controls = np.empty(len(chosen), int)
    for label in np.unique(labels[chosen]):
        pool, rows = free[labels[free] == label], np.flatnonzero(labels[chosen] == label)
        if not len(pool):
            raise IsslError(f"matched controls: every image of class {label} was chosen; choose a smaller share")
        controls[rows] = rng.choice(pool, len(rows))
    return controls
