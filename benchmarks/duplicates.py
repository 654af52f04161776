"""Who finds the pairs that people judged duplicates? cleanlab's near-duplicate score, fastdup's
similarity, distances, and low influence.

    pip install "cleanlab[datalab]"          # never needed to use or test issl
    python -m venv apart && apart/bin/pip install fastdup     # it pins an older numpy
    ISSL_DATA=DIR python benchmarks/duplicates.py --fastdup apart/bin/python

The images are 2,000 training images of CIFAR-10, including the judged ones, and their partners
(ciFAIR). The encoder is the SimCLR one that comes with the repository. A member of a pair should
rank high. The numbers go to measured/duplicates.json; docs/compare.md has the table.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from cleanlab import Datalab
from PIL import Image
from report import keep, machine
from torch import Tensor
from torch.nn.functional import normalize

import issl
from issl.audit.stats import baselines, statistics
from issl.audit.stats.neighbour_graph import nearest
from issl.files import provided
from issl.measures import embed

ENCODER = "encoders/cifar10-simclr-w16-0.safetensors"


def by_cleanlab(features: Tensor) -> np.ndarray:
    """1 − cleanlab's score: higher for images that are nearer to another one."""
    lab = Datalab(data={"image": list(range(len(features)))}, verbosity=0)
    lab.find_issues(features=normalize(features, dim=1).numpy(), issue_types={"near_duplicate": {}})
    return 1 - lab.get_issues("near_duplicate")["near_duplicate_score"].to_numpy()


FASTDUP = """
import sys, fastdup
found = fastdup.create(work_dir=sys.argv[2], input_dir=sys.argv[1])
found.run(nearest_neighbors_k=2, threshold=0.0)
found.similarity()[["filename_from", "filename_to", "distance"]].to_csv(sys.argv[3], index=False)
"""


def by_fastdup(images: issl.Images, python: str) -> np.ndarray:
    """The similarity to the most similar other image, in fastdup's own features; 0 where it lists
    none."""
    best = np.zeros(len(images))
    with tempfile.TemporaryDirectory() as place:
        pictures, work, table = (Path(place) / name for name in ("pictures", "work", "found.csv"))
        pictures.mkdir()
        for k, pixels in enumerate(images.pixels):
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(pictures / f"{k:05}.png")
        subprocess.run([python, "-c", FASTDUP, pictures, work, table], check=True, cwd=place)
        found = pd.read_csv(table)
    for side in ("filename_from", "filename_to"):
        at = [int(Path(name).stem) for name in found[side]]
        np.maximum.at(best, at, found["distance"].to_numpy(float))  # in fact a similarity
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fastdup", metavar="PYTHON", help="Python that has fastdup (optional)")
    options = parser.parse_args()
    encoder = issl.load_encoder(provided("released") / ENCODER)
    images = issl.load("cifair10", n=2000)
    partner = images.attributes["duplicate_of"].to_numpy()
    member = (partner >= 0) | np.isin(images.index.numpy(), partner[partner >= 0])
    features, scores = embed(encoder, images).double(), issl.self_influence(encoder, images)
    detectors: dict[str, np.ndarray] = {
        "cleanlab, near duplicates, on the encoder's features": by_cleanlab(features),
        "nearest neighbour in the encoder's features": -nearest(features, 1)[1][:, 0],
        "perceptual hash": baselines.hash_closeness(images),
        "nearest neighbour in pixels": baselines.pixel_closeness(images),
        "low influence": -scores["influence"].to_numpy(),
        "low stability loss": -scores["stability_loss"].to_numpy(),
    }
    if options.fastdup:
        detectors["fastdup's similarity, its own features"] = by_fastdup(
            images, str(Path(options.fastdup).absolute())
        )
    rows = []
    for name, found in detectors.items():
        precision, auc = statistics.average_precision(found, member), statistics.auc(found, member)
        rows.append({"by": name, "precision": str(precision), "auc": str(auc)})
    part = {"images": len(images), "in_pairs": int(member.sum()), "encoder": ENCODER, "rows": rows}
    peers = f"cleanlab {version('cleanlab')}"
    if options.fastdup:
        told = [options.fastdup, "-c", "import fastdup; print(fastdup.__version__)"]
        peers += f", fastdup {subprocess.check_output(told, text=True).split()[-1]}"
    keep("duplicates", part | machine(peers))


if __name__ == "__main__":
    main()
