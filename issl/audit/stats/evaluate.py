"""Does a frozen encoder know the classes? Weighted kNN and a linear probe, image by image.

Both say for each test image whether its class is found; `issl.audit.stats.statistics.proportion`
turns that into an accuracy with its interval.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from issl.devices import full_precision
from issl.errors import IsslError

PENALTIES = (0.001, 0.01, 0.1, 1.0)  # of the probe: C, the inverse of the L2 penalty's weight
HELD_OUT = 0.2  # the share of train on which the penalty is chosen
TEMPERATURE = 0.1  # of the votes


def knn_votes(
    train: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    test: Float[Tensor, "m d"],
    k: int = 200,
    device: torch.device | None = None,
) -> Float[Tensor, "m c"]:
    """Each class's share in the weighted vote of the k nearest training images.

    A neighbour of cosine similarity s votes with weight exp(s / TEMPERATURE), as in Wu et al. 2018,
    arXiv 1805.01978, §3.4. Computed on `device`.
    """
    device = torch.device("cpu") if device is None else device
    classes, shares = int(labels.max()) + 1, []
    train, labels = F.normalize(train.to(device), dim=1), labels.to(device)
    with full_precision():
        for rows in F.normalize(test.to(device), dim=1).split(1024):
            near, which = (rows @ train.T).topk(min(k, len(train)), dim=1)
            votes = near.new_zeros(len(rows), classes)
            votes.scatter_add_(1, labels[which], (near / TEMPERATURE).exp())
            shares.append(votes / votes.sum(1, keepdim=True))
    return torch.cat(shares).cpu()


def knn_hits(
    train: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    test: Float[Tensor, "m d"],
    truth: Int64[Tensor, " m"],
    k: int = 200,
    device: torch.device | None = None,
) -> np.ndarray:
    """Does this vote give each test image's class?"""
    return (knn_votes(train, labels, test, k, device).argmax(1) == truth).numpy()


def probe_hits(
    train: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    test: Float[Tensor, "m d"],
    truth: Int64[Tensor, " m"],
    seed: int = 0,
) -> tuple[np.ndarray, float]:
    """Does a linear probe on the frozen features find each test image's class? Also returns the
    chosen C.

    Scikit-learn's multinomial logistic regression of standardised features, on the CPU. The C of
    PENALTIES that does best on a held-out part of `train` is used to fit all of `train`; `test` is
    used once.
    """
    from sklearn.linear_model import LogisticRegression  # slow to import, and few need it
    from sklearn.model_selection import train_test_split

    if len(labels.unique()) < 2:
        raise IsslError(
            "linear probe: all training images are of one class; take a set with two or more"
        )
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    x, y, z = ((train - mean) / std).numpy(), labels.numpy(), ((test - mean) / std).numpy()
    fit, held = train_test_split(np.arange(len(y)), test_size=HELD_OUT, random_state=seed)

    def predicted(c: float, rows: np.ndarray, of: np.ndarray) -> np.ndarray:
        """The classes of `of`, from a fit to these rows of `train`."""
        found = LogisticRegression(C=c, max_iter=200, tol=1e-3).fit(x[rows], y[rows]).predict(of)
        return np.asarray(found)

    # the strongest penalty among equally good ones
    scores = [float((predicted(c, fit, x[held]) == y[held]).mean()) for c in PENALTIES]
    c = PENALTIES[int(np.argmax(scores))]
    return predicted(c, np.arange(len(y)), z) == truth.numpy(), c
