"""What else explains the score? A regression of its ranks on features of pixels and of a forward
pass.

    R² of all features together;   unique_j = R²(all) − R²(all but j)

Ranks of the score and of each feature become normal scores (van der Waerden). So no outlier
dominates, and any monotone relation counts in full. Boosted trees, tested on images that they were
not fitted to, show how much a linear regression misses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import scipy  # its parts are imported when they are first used
from jaxtyping import Float
from threadpoolctl import threadpool_limits

from issl.audit.stats.resampling import RESAMPLES, times_drawn
from issl.audit.stats.statistics import Estimate, correlation, mean, percentiles, spearman
from issl.errors import IsslError

PIXELS = ("brightness", "contrast", "edge density", "background flatness", "JPEG size")
FORWARD = ("stability loss", "feature norm", "kNN distance")  # a forward pass, but no gradient


def table(
    pixels: pd.DataFrame, geometry: pd.DataFrame, stability_loss: pd.Series | np.ndarray
) -> pd.DataFrame:
    """Columns PIXELS and FORWARD, one row per image.

    Args:
        pixels: As `pixel_features` and `texture` give them. A background is flat where the
            standard deviation of colour in the outer frame is small.
        geometry: The encoder's, with the columns feature_norm and knn_distance.
        stability_loss: Under the same noise as the score, (n,).
    """
    flatness = -pixels["border_std"]
    seen = (*(pixels[c] for c in ("brightness", "contrast", "edge_density")), flatness)
    seen = (*seen, pixels["jpeg_size"])
    forward = (stability_loss, geometry["feature_norm"], geometry["knn_distance"])
    columns = zip((*PIXELS, *FORWARD), (*seen, *forward), strict=True)
    return pd.DataFrame({name: np.asarray(column, float) for name, column in columns})


def of_one_encoder(
    scores: Float[np.ndarray, "2 n"], tables: Sequence[pd.DataFrame], seed: int = 0
) -> dict[str, dict[str, Estimate]]:
    """What notebook 13 reports about an encoder: each statistic alone, what only it explains, and
    all together.

    Args:
        scores: Influence under two noise seeds.
        tables: As `table` makes them, with the stability loss under each noise seed.
        seed: Seed of the folds and the resampling.
    """
    score, every = scores[0], tables[0]
    unique = explained(score, every, seed)
    together = {
        "pixels, linear": explained(score, every[list(PIXELS)], seed)["all"],
        "pixels, trees": explained_by_trees(score, every[list(PIXELS)], seed),
        "forward pass, trees": explained_by_trees(score, every[list(FORWARD)], seed),
        "all, linear": unique.pop("all"),
        "all, trees": explained_by_trees(score, every, seed),
        "repeatable": correlation(normal_scores(scores[0]), normal_scores(scores[1])),
        "left, and repeatable": repeatable_beyond(scores, tables, seed),
    }
    alone = {name: spearman(every[name].to_numpy(), score) for name in map(str, every)}
    return {"alone": alone, "unique": unique, "together": together}


def normal_scores(values: np.ndarray) -> np.ndarray:
    """Φ⁻¹(rank / (n + 1)) along the first axis."""
    return scipy.stats.norm.ppf(scipy.stats.rankdata(values, axis=0) / (len(values) + 1))


def explained(score: np.ndarray, by: pd.DataFrame, seed: int = 0) -> dict[str, Estimate]:
    """R² of a linear regression on all columns (`all`), and what each column adds to the others.

    At most 1, adjusted for the number of columns. Intervals are from a percentile bootstrap over
    images, which does not recompute the normal scores.
    """
    x, y = normal_scores(by.to_numpy(float)), normal_scores(np.asarray(score, float))
    if len(x) < 10 * (x.shape[1] + 1):
        raise IsslError(
            f"{len(x)} images for a regression on {x.shape[1]} features; take at least ten for each"
        )
    n = len(y)
    columns = np.column_stack([np.ones(n), x, y])
    with threadpool_limits(1):  # thousands of small products
        drawn = times_drawn(n, seed)
        draws = np.array([_parts(columns.T @ (columns * c[:, None])) for c in drawn])
    whole = zip(("all", *by.columns), _parts(columns.T @ columns), draws.T, strict=True)
    return {name: percentiles(value, drawn, n) for name, value, drawn in whole}


def explained_by_trees(score: np.ndarray, by: pd.DataFrame, seed: int = 0) -> Estimate:
    """R² of boosted trees on held-out folds (below 0: worse than the mean); bootstrap."""
    y, guess = _held_out(score, by, seed)

    def r2(rows: np.ndarray | slice) -> float:
        return float(1 - np.mean((y[rows] - guess[rows]) ** 2) / np.var(y[rows]))

    rng, n = np.random.default_rng(seed), len(y)
    draws = np.array([r2(rng.integers(0, n, n)) for _ in range(RESAMPLES)])
    return percentiles(r2(slice(None)), draws, n)


def repeatable_beyond(
    scores: Float[np.ndarray, "2 n"], by: Sequence[pd.DataFrame], seed: int = 0
) -> Estimate:
    """The share of variance of two scores of the same images that the columns leave in both.

        Σ_i r_i r'_i / n / √(var y · var y'),   r, r': residuals of boosted trees on held-out folds

    Noise of only one score is not shared, so it drops out. Student's interval over images.
    """
    (y, guess), (again, other) = (_held_out(s, b, seed) for s, b in zip(scores, by, strict=True))
    return mean((y - guess) * (again - other) / np.sqrt(np.var(y) * np.var(again)))


def share_of(part: Estimate, whole: Estimate) -> Estimate:
    """A part of the variance divided by the whole that it could be. The interval is the part's,
    divided by the end of the whole's interval that makes it wider, as the whole is known far
    better. Undefined where the whole may be 0 or less."""
    if whole.low <= 0:
        return Estimate(np.nan, -np.inf, np.inf, part.n)
    low = part.low / (whole.high if part.low > 0 else whole.low)
    high = part.high / (whole.low if part.high > 0 else whole.high)
    return Estimate(part.value / whole.value, low, high, part.n)


def _held_out(
    score: np.ndarray, by: pd.DataFrame, seed: int, folds: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """The score's normal scores, and their predictions by boosted trees fitted to other folds."""
    from sklearn.ensemble import HistGradientBoostingRegressor  # slow to import
    from sklearn.model_selection import KFold, cross_val_predict

    y = normal_scores(np.asarray(score, float))
    # trees are added while they help on a held-out tenth of the images that they are fitted to
    trees = HistGradientBoostingRegressor(max_iter=1000, early_stopping=True, random_state=seed)
    folded = KFold(folds, shuffle=True, random_state=seed)
    # thousands of tiny parallel regions: several threads would mostly wait for each other
    with threadpool_limits(1):
        return y, cross_val_predict(trees, by.to_numpy(float), y, cv=folded)


def _parts(products: Float[np.ndarray, "m m"]) -> list[float]:
    """Adjusted R² of all columns, and the drop in R² without each, from the products of the columns
    1, x and y."""
    every = range(1, len(products) - 1)
    whole = _r2(products, list(every))
    return [whole, *(whole - _r2(products, [k for k in every if k != j]) for j in every)]


def _r2(products: Float[np.ndarray, "m m"], columns: Sequence[int]) -> float:
    design, n, k = [0, *columns], products[0, 0], len(columns)
    along = products[design, -1]
    # normal equations: a few well-scaled columns, solved thousands of times
    weights = np.linalg.lstsq(products[np.ix_(design, design)], along, rcond=None)[0]
    left = (products[-1, -1] - weights @ along) / (products[-1, -1] - products[0, -1] ** 2 / n)
    return float(1 - left * (n - 1) / (n - k - 1))
