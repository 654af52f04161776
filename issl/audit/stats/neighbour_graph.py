"""The graph of nearest neighbours in feature space: semantic bridges between classes (arXiv
2412.17170, §4)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from issl.audit.stats.lists import overlap
from issl.errors import IsslError


def nearest(features: Float[Tensor, "n d"], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest other images of each: positions (n, k), cosine distances (n, k) in [0, 2]."""
    if not 1 <= k < len(features):
        raise IsslError(
            f"k={k} neighbours among {len(features)} images: must lie between 1 and "
            f"{len(features) - 1}"
        )
    unit, places, distances = F.normalize(features, dim=1), [], []
    for start in range(0, len(unit), 1024):
        similar = unit[start : start + 1024] @ unit.T
        rows = range(len(similar))
        similar[rows, range(start, start + len(similar))] = -np.inf  # not itself
        best = similar.topk(k, dim=1)
        places.append(best.indices.numpy())
        distances.append((1 - best.values).clamp(min=0).numpy())
    return np.concatenate(places), np.concatenate(distances)


def knn_graph(places: Int[np.ndarray, "n k"]) -> sparse.csr_array:
    """Symmetric 0/1 matrix (n, n): an edge where either image is among the other's k `nearest`."""
    n, k = places.shape
    edges = sparse.csr_array(
        (np.ones(n * k), (np.repeat(np.arange(n), k), places.ravel())), shape=(n, n)
    )
    return edges.maximum(edges.T).tocsr()


def cross_class_share(graph: sparse.csr_array, labels: np.ndarray) -> np.ndarray:
    """The share of each image's edges that lead to another class, in [0, 1]."""
    i, j = graph.nonzero()
    different = np.bincount(i, weights=labels[i] != labels[j], minlength=graph.shape[0])
    return different / np.maximum(np.bincount(i, minlength=graph.shape[0]), 1)


def share_of_cross(
    graph: sparse.csr_array,
    labels: np.ndarray,
    chosen: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """Of each image's edges to other classes, the share that `chosen` selects, given the two ends
    of all edges; NaN for an image without edges to other classes."""
    i, j = graph.nonzero()
    cross = labels[i] != labels[j]
    count, found = (
        np.bincount(i, weights=edges, minlength=graph.shape[0])
        for edges in (cross, cross & chosen(i, j))
    )
    return np.divide(found, count, out=np.full(len(count), np.nan), where=count > 0)


def betweenness(graph: sparse.csr_array, sources: int = 256, seed: int = 0) -> np.ndarray:
    """The share of shortest paths between other images that pass through each, (n,).

        δ_s(v) = Σ_w σ_s(v) / σ_s(w) · (1 + δ_s(w))

    over the neighbours w of v that are one step further from s (Brandes 2001, theorem 6). σ_s is
    the number of shortest paths from s. Estimated from `sources` random images (Brandes & Pich
    2007); exact if these are all. Several sources advance together, as matrix products. This is a
    hundred times faster than networkx, with the same result (tested).
    """
    n, at_once = graph.shape[0], 8
    every = chosen = np.arange(n)
    if sources < n:
        chosen = np.random.default_rng(seed).choice(n, sources, replace=False)
    through = np.zeros(n)
    for start in range(0, len(chosen), at_once):
        batch = chosen[start : start + at_once]
        at_source = batch, range(len(batch))
        paths = np.zeros((n, len(batch)))
        paths[at_source] = 1
        levels, seen = [paths], paths > 0  # σ, separately for each distance from the source
        while levels[-1].any():
            further = graph @ levels[-1]
            further[seen] = 0
            seen |= further > 0
            levels.append(further)
        delta = np.zeros_like(paths)
        for near, far in zip(levels[-2::-1], levels[:0:-1], strict=True):
            delta += near * (
                graph @ np.divide(1 + delta, far, out=np.zeros_like(far), where=far > 0)
            )
        delta[at_source] = 0
        through += delta.sum(1)
    return through / ((len(chosen) - np.isin(every, chosen)) * (n - 2))


def modularity(graph: sparse.csr_array, labels: np.ndarray) -> float:
    """How much more often edges join images of one class than by chance (Newman 2006).

    Σ_c (edges within c) / m − (degrees of c / 2m)². networkx takes a hundred times as long.
    """
    (i, j), degree = graph.nonzero(), np.asarray(graph.sum(1)).ravel()
    by_class = np.array([degree[labels == c].sum() for c in np.unique(labels)]) / degree.sum()
    return float(np.mean(labels[i] == labels[j]) - (by_class**2).sum())


def spectrum(
    graph: sparse.csr_array, k: int
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, "n k"]]:
    """The k smallest eigenvalues of the normalised Laplacian I − D^−½ A D^−½, and eigenvectors.

    There are as many zeros as connected components. A small value after them is a bottleneck, and
    its eigenvector shows where (von Luxburg 2007, §3). k must be less than the number of images.
    """
    n = graph.shape[0]
    laplacian = sparse.csgraph.laplacian(graph, normed=True)
    # the largest eigenvalues of 2I − L give the smallest of L, and need no factorisation
    shifted = 2 * sparse.eye_array(n) - laplacian
    values, vectors = sparse.linalg.eigsh(shifted, k, v0=np.ones(n) / np.sqrt(n), maxiter=20 * n)
    order = np.argsort(-values)
    return np.maximum(2 - values[order], 0.0), vectors[:, order]


def bottlenecks(
    graph: sparse.csr_array, k: int = 10
) -> tuple[Float[np.ndarray, " e"], Float[np.ndarray, " n"]]:
    """The nonzero eigenvalues among the k smallest of `spectrum`, and each image's part in the
    first three bottlenecks: its mean distance to its neighbours in the coordinates of their
    eigenvectors. A graph of many pieces uses the first three eigenvectors of all instead."""
    values, vectors = spectrum(graph, k)
    pieces = int((values < 1e-8).sum())
    place = vectors[:, pieces : pieces + 3] if pieces <= k - 3 else vectors[:, :3]
    i, j = graph.nonzero()
    distances = np.linalg.norm(place[i] - place[j], axis=1)
    return values[pieces:], np.bincount(i, distances, graph.shape[0]) / np.bincount(i)


def separability(features: Float[Tensor, "n d"], labels: np.ndarray) -> float:
    """Mean silhouette of the classes by cosine distance, in [−1, 1] (Rousseeuw 1987).

        s_i = (b_i − a_i) / max(a_i, b_i)
        a_i = 1 − (u_i·S_own − 1) / (n_own − 1),   b_i = min_c 1 − u_i·S_c / n_c

    u: unit features, S_c: their sum over class c. The mean distance to a class only needs that sum,
    so this is linear in n. Scikit-learn's is quadratic and gives the same (tested). 0 for an image
    that is alone in its class.
    """
    unit = F.normalize(features.double(), dim=1)
    classes, of = np.unique(labels, return_inverse=True)
    sums = torch.stack([unit[torch.from_numpy(of == c)].sum(0) for c in range(len(classes))])
    sizes, rows = np.bincount(of), np.arange(len(of))
    near = (unit @ sums.T).numpy()
    own = 1 - (near[rows, of] - 1) / np.maximum(sizes[of] - 1, 1)
    others = 1 - near / sizes
    others[rows, of] = np.inf
    best = others.min(1)
    silhouette = (best - own) / np.maximum(own, best)
    return float(np.where(sizes[of] > 1, silhouette, 0.0).mean())


def neighbours_kept(
    before: Float[Tensor, "n d"], after: Float[Tensor, "n e"], k: int = 10
) -> np.ndarray:
    """The share of each image's k nearest under one encoder that remain so under the other.

    Unlike a distance between features, it is unchanged when an encoder rotates them all.
    """
    return overlap(nearest(before, k)[0], nearest(after, k)[0])


def matched(labels: np.ndarray, chosen: np.ndarray, seed: int, by: np.ndarray) -> np.ndarray:
    """For each chosen position, a random one of the same class that was not chosen.

    Drawn with replacement from the images with the same value of `by` (such as the number of
    neighbours), or else the nearest value. Raises IsslError if all images of a class were chosen.
    """
    rng, free = np.random.default_rng(seed), np.setdiff1d(np.arange(len(labels)), chosen)
    controls = np.empty(len(chosen), int)
    for label in np.unique(labels[chosen]):
        pool, rows = free[labels[free] == label], np.flatnonzero(labels[chosen] == label)
        if not len(pool):
            raise IsslError(
                f"matched controls: every image of class {label} was chosen; choose a smaller share"
            )
        pool = pool[np.argsort(by[pool], kind="stable")]
        have, want = by[pool], by[chosen[rows]]
        after = np.minimum(np.searchsorted(have, want), len(have) - 1)
        before = np.maximum(after - 1, 0)
        below = want - have[before] < have[after] - want
        nearest_value = np.where(below, have[before], have[after])
        first, last = (np.searchsorted(have, nearest_value, side) for side in ("left", "right"))
        controls[rows] = pool[rng.integers(first, last)]
    return controls
