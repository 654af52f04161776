"""Numbers that a change must not move: the engine's, on a released encoder.

`python tests/test_goldens.py` writes them again. (Those of a training are no such numbers: another
processor rounds otherwise, which two epochs make 1% of.)
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import issl
from issl.pretraining.learner import load_learner

HERE = Path(__file__).parent
ENGINE = HERE / "goldens_engine.json"
ENCODER = HERE.parent / "released/encoders/cifar10-simclr-w16-0.safetensors"
CURVATURES: dict[str, issl.Curvature] = {
    "LoGra": issl.LoGra(4),
    "LoGra, PCA": issl.LoGra(4, projection="pca"),
    "EK-FAC": issl.EKFAC(),
    "diagonal": issl.Diagonal(),
    "identity": issl.Identity(),
    "random projection": issl.RandomProjection(64, 0),
}


def engine() -> dict[str, list[float]]:
    """Scores of drawn images, a few numbers of each kind."""
    images, encoder = issl.load("scenes", n=24), issl.load_encoder(ENCODER)
    queries = issl.load("scenes", "test", n=3)
    found: dict[str, Any] = {}
    for name, curvature in CURVATURES.items():
        for seed in (0, 1) if name == "LoGra" else (0,):
            scores = issl.self_influence(encoder, images, curvature=curvature, seed=seed)
            found[f"self, {name}, noise {seed}"] = scores["influence"]
        cross = issl.cross_influence(encoder, images, queries, curvature=curvature)
        found[f"cross, {name}"] = cross
    others = [n for n, m in encoder.named_modules() if isinstance(m, nn.Conv2d)][1:]
    found["self, exact, first layer"] = issl.self_influence(
        encoder, images, curvature=issl.Exact(), skip=others
    )["influence"]
    top = issl.top_influences(encoder, images, queries, 5, curvature=issl.LoGra(4))
    found["top"] = top["influence"]
    found["top, index"] = top["index"]
    fitted = issl.fit(encoder, images, curvature=issl.LoGra(4))
    found["fitted"] = fitted.score(queries)["influence"]
    learner = load_learner(ENCODER)
    effects = issl.influence_through_training(
        learner,
        images.subset(range(12)),
        queries.subset([0]),
        replace(learner.recipe, lr=0.05),
        epochs=1,
        batch_size=6,
    )
    found["through training"] = effects.derivatives
    return {
        name: [float(f"{v:.7g}") for v in np.asarray(values, dtype=float).ravel()]
        for name, values in found.items()
    }


def test_the_engine_gives_the_same_numbers() -> None:
    wanted = json.loads(ENGINE.read_text())
    found = engine()
    assert found.keys() == wanted.keys()
    for name, numbers in wanted.items():
        share = 2e-2 if name == "through training" else 1e-4
        atol = share * np.abs(numbers).max()
        np.testing.assert_allclose(found[name], numbers, rtol=1e-3, atol=atol, err_msg=name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    ENGINE.write_text(json.dumps(engine(), indent=0))
