"""On a GPU (`pytest -m gpu`): the same numbers as on the CPU, and the host does not wait."""

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import nets
import numpy as np
import pytest
import torch

import issl
from issl import Augmentation, Computing, GaussianNoise, cross_influence, measures, self_influence
from issl.audit.stats.evaluate import knn_hits
from issl.devices import full_precision
from issl.influence.curvature import KINDS, named_curvature
from issl.pretraining import loop
from issl.pretraining.encoder import resnet18
from issl.pretraining.loop import Execution
from issl.pretraining.recipes import SSL, Method, recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
METHODS: tuple[Method, ...] = (*SSL, "supervised")
CUDA = torch.device("cuda")
FOLDER = str(Path(issl.__file__).parent)


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    return nets.make("batchnorm", torch.float32)


def trained(device: torch.device | str, method: Method, n: int = 256):
    images, how = issl.load("scenes", n=n, size=None), recipe(method, "short")
    execution = Execution(device, "fp32", progress=False)
    with full_precision():
        return loop.pretrain(images, how, width=4, epochs=2, batch_size=64, execution=execution)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_cross_influence(kind: str, net: torch.nn.Module) -> None:
    images, weighing = nets.pictures(20), named_curvature(kind, 3)
    for settings in ({"draws": 2, "sweep": [1.0]}, {"perturbation": Augmentation("chain")}):
        here, there = (
            self_influence(net, images, curvature=weighing, computing=computing, **settings)
            for computing in (Computing(device=d, batch_size=8) for d in ("cpu", CUDA))
        )
        np.testing.assert_allclose(there["influence"], here["influence"], rtol=1e-3)
    query = nets.pictures(5, 1)
    here, there = (
        cross_influence(net, images, query, curvature=weighing, computing=Computing(device=d))
        for d in ("cpu", CUDA)
    )
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-5 * float(here.abs().max()))


def test_scores_of_a_resnet_and_the_same_each_time() -> None:
    torch.manual_seed(0)
    encoder, images = resnet18(8).train(), issl.load("scenes", n=200)
    with torch.no_grad():
        encoder(images.pixels[:64].float() / 255)
    cpu, one, two = (
        self_influence(encoder.eval(), images, computing=Computing(device=d))
        for d in ("cpu", CUDA, CUDA)
    )
    np.testing.assert_allclose(one["influence"], cpu["influence"], rtol=1e-2)
    assert (one == two).all(axis=None)


@pytest.mark.parametrize("method", METHODS)
def test_training_takes_the_same_steps_and_the_same_each_time(method: Method) -> None:
    (_, here), (one, there), (two, again) = (trained(d, method) for d in ("cpu", CUDA, CUDA))
    np.testing.assert_allclose(there["loss"], here["loss"], rtol=2e-2)
    assert (there["loss"] == again["loss"]).all()
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())


def test_features_losses_and_votes(net: torch.nn.Module) -> None:
    images, labels, found = nets.pictures(60), torch.arange(60) % 3, []
    for d in (torch.device("cpu"), CUDA):
        features = measures.embed(copy.deepcopy(net), images, d)
        losses = measures.stability_losses(copy.deepcopy(net), images, GaussianNoise(), 0, 2, d)
        known = found[0][0] if found else features
        hits = knn_hits(known, labels, known, labels, k=3, device=d)
        found.append((features, losses, hits))
    here, there = found
    torch.testing.assert_close(there[0], here[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(there[1], here[1], rtol=1e-3, atol=1e-6)
    assert (here[2] == there[2]).all() and not here[2].all()


def waits(run: Callable[[], object]) -> Counter[str]:
    """How often torch had to wait for the device, by line of issl."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    lines = (f"{w.filename}:{w.lineno}" for w in seen if "synchroniz" in str(w.message))
    return Counter(line.removeprefix(f"{FOLDER}/") for line in lines)


@pytest.mark.parametrize("method", METHODS)
def test_a_training_waits_once_an_epoch(method: Method) -> None:
    trained(CUDA, method)  # what is made at the first use
    few, many = (waits(lambda steps=steps: trained(CUDA, method, n=64 * steps)) for steps in (2, 6))  # type: ignore[misc]
    assert not many - few


def test_influence_through_a_training() -> None:
    images, how = issl.load("scenes", n=12), recipe("byol", "short")
    here, there = (
        issl.influence_through_training(
            0, images, images.subset([0, 1]), how, epochs=2, batch_size=6, width=2, device=d
        ).derivatives
        for d in ("cpu", CUDA)
    )
    torch.testing.assert_close(there, here, rtol=2e-2, atol=2e-2 * float(here.abs().max()))
