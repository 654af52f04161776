"""How class structure changes when some images are removed, compared with as many random ones.

Three measures: the modularity of the graph of nearest neighbours (do edges stay within classes?),
the silhouette of the classes in feature space (separability), and a linear probe's accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy import sparse
from torch import Tensor

from issl.audit.stats import neighbour_graph
from issl.audit.stats.statistics import Estimate, mean, top

Mask = Bool[np.ndarray, " n"]


@dataclass(frozen=True)
class Seen:
    """Images as one encoder sees them.

    Attributes:
        graph: Of their nearest neighbours, see `neighbour_graph.knn_graph`.
        rankings: Scores by name, "influence" among them; the highest are removed first.
    """

    labels: np.ndarray
    features: Float[Tensor, "n d"]
    graph: sparse.csr_array
    rankings: Mapping[str, np.ndarray]

    def gone(self, share: float) -> dict[str, Mask]:
        """The images at the head of each ranking."""
        return {name: top(score, share) for name, score in self.rankings.items()}

    def of_those_left(self, keep: Mask) -> dict[str, float]:
        """Modularity and separability of the images that are kept."""
        graph, labels = self.graph[keep][:, keep], self.labels[keep]
        return {
            "modularity": neighbour_graph.modularity(graph, labels),
            "separability": neighbour_graph.separability(self.features[keep], labels),
        }

    def gains(
        self, share: float, draws: int, rng: np.random.Generator
    ) -> dict[str, dict[str, Estimate]]:
        """By ranking and measure, the mean difference from `draws` random removals, and the middle
        95% of the differences. "(matched)", for influence only: the random removals take as many
        images of each class."""
        gone, head = self.gone(share), top(self.rankings["influence"], share)
        by_chance = self._each(at_random(head, rng) for _ in range(draws))
        of_classes = self._each(of_each_class(head, self.labels, rng) for _ in range(draws))
        found = {name: self._less(~out, by_chance) for name, out in gone.items()}
        matched = self._less(~head, of_classes)
        found["influence"] |= {f"{measure} (matched)": e for measure, e in matched.items()}
        return found

    def _each(self, keeps: Iterable[Mask]) -> pd.DataFrame:
        return pd.DataFrame([self.of_those_left(keep) for keep in keeps])

    def _less(self, keep: Mask, chance: pd.DataFrame) -> dict[str, Estimate]:
        found = {}
        for measure, value in self.of_those_left(keep).items():
            differences = value - chance[measure]
            low, high = np.quantile(differences, [0.025, 0.975])
            found[measure] = Estimate(float(differences.mean()), float(low), float(high), len(keep))
        return found

    def probe_gains(
        self, share: float, probe: Callable[[Mask], np.ndarray], rng: np.random.Generator
    ) -> dict[str, dict[str, Estimate]]:
        """By ranking, under "probe", the accuracy without a ranking's top images, minus that
        without as many random ones: a paired difference over test images.

        Args:
            probe: Tells for each test image if a linear probe fitted to the kept images is right.
        """
        gone = self.gone(share)
        chance = probe(at_random(gone["influence"], rng)).astype(float)
        return {name: {"probe": mean(probe(~out) - chance)} for name, out in gone.items()}


def at_random(gone: Mask, rng: np.random.Generator) -> Mask:
    """What is kept if as many are removed at random."""
    return ~np.isin(np.arange(len(gone)), rng.permutation(len(gone))[: gone.sum()])


def of_each_class(gone: Mask, labels: np.ndarray, rng: np.random.Generator) -> Mask:
    """What is kept if as many of each class are removed at random."""
    keep = np.ones(len(gone), bool)
    for c in np.unique(labels[gone]):
        members = np.flatnonzero(labels == c)
        keep[rng.permutation(members)[: (gone & (labels == c)).sum()]] = False
    return keep
