"""Who finds the pairs that people judged duplicates? cleanlab's near-duplicate score, distances, and low influence.

    pip install "cleanlab[datalab]"          # never needed to use or test issl
    ISSL_DATA=DIR python benchmarks/duplicates.py

2,000 training images of CIFAR-10, the judged ones among them, with their partners (ciFAIR), under the SimCLR encoder
that comes with the repository. A member of a pair counts as found where it ranks high. docs/compare.md has the table.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from cleanlab import Datalab
from torch import Tensor
from torch.nn.functional import normalize

import issl
from issl.analysis import baselines, statistics
from issl.analysis.evaluate import embed
from issl.files import provided

ENCODER = "pretrain/e5fc9138317555fc/encoder.safetensors"


def by_cleanlab(features: Tensor) -> np.ndarray:
    """Higher for images that are nearer to another one (its own score is lower there)."""
    lab = Datalab(data={"image": list(range(len(features)))}, verbosity=0)
    lab.find_issues(features=normalize(features, dim=1).numpy(), issue_types={"near_duplicate": {}})
    return 1 - lab.get_issues("near_duplicate")["near_duplicate_score"].to_numpy()


def main() -> None:
    encoder, images = issl.load_encoder(provided("released") / ENCODER), issl.load("cifair10", n=2000)
    partner = images.attributes["duplicate_of"].to_numpy()
    member = (partner >= 0) | np.isin(images.index.numpy(), partner[partner >= 0])
    features, scores = embed(encoder, images).double(), issl.self_influence(encoder, images)
    detectors: Mapping[str, np.ndarray] = {
        "cleanlab, near duplicates, on the encoder's features": by_cleanlab(features),
        "nearest neighbour in the encoder's features": baselines.embedding_closeness(features),
        "perceptual hash": baselines.hash_closeness(images),
        "nearest neighbour in pixels": baselines.pixel_closeness(images),
        "low influence": -scores["influence"].to_numpy(),
        "low stability loss": -scores["stability_loss"].to_numpy(),
    }
    print(f"{len(images)} images, {member.sum()} of them in judged pairs\n")
    print("| by | average precision | AUC |\n|---|---|---|")
    for name, found in detectors.items():
        print(f"| {name} | {statistics.average_precision(found, member)} | {statistics.auc(found, member)} |")


if __name__ == "__main__":
    main()
