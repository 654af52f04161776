"""All that computes on a GPU, on a counterfeit one (see `counterfeit`): the same numbers, no mixed
devices, few waits.

What this shows is that every tensor is where it should be; a real GPU's speed and rounding it does
not show.
"""

from __future__ import annotations

import copy
import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import counterfeit
import nets
import numpy as np
import pytest
import torch
from device_cases import scores_and_cross_influence

import issl
from issl import GaussianNoise, evaluate
from issl.audit.settings import KINDS
from issl.data import image_operations
from issl.influence import curvature, losses, perturbation
from issl.influence.computing import Computing
from issl.influence.losses import CrossEntropy
from issl.influence.perturbation import Augmentation
from issl.influence.self_influence import self_influence
from issl.pretraining import loop, objectives
from issl.pretraining.learner import Learner
from issl.pretraining.loop import Execution
from issl.pretraining.recipes import SSL, Method, recipe
from issl.training_influence import training_influence

pytestmark = pytest.mark.skipif(not counterfeit.HOOKS, reason=counterfeit.WHY_NOT)
METHODS: tuple[Method, ...] = (*SSL, "supervised")


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    return counterfeit.device()


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    return nets.make("batchnorm", torch.float32)


def trained(
    device: torch.device | str,
    method: Method = "simclr",
    n: int = 16,
    epochs: int = 1,
    variant="short",
):
    images = issl.load("scenes", n=n, size=None)
    return loop.pretrain(
        images,
        recipe(method, variant),
        width=1,
        epochs=epochs,
        batch_size=8,
        execution=Execution(device, "fp32", progress=False),
    )


# --- the same numbers as on the CPU
# ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_cross_influence(kind: str, gpu: torch.device, net: torch.nn.Module) -> None:
    scores_and_cross_influence(kind, net, gpu, relative=1e-4, smallest=1e-6)


@pytest.mark.parametrize(
    ("method", "variant"), [*((m, "short") for m in METHODS), ("byol", "published")]
)
def test_training_takes_the_same_steps(method: Method, variant: str, gpu: torch.device) -> None:
    (encoder, history), (same, again) = (trained(d, method, variant=variant) for d in ("cpu", gpu))
    np.testing.assert_allclose(again["loss"], history["loss"], rtol=1e-3)
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(same.state_dict()[name], value, rtol=1e-2, atol=1e-3)


def test_features_losses_and_votes(gpu: torch.device, net: torch.nn.Module) -> None:
    images, labels = nets.pictures(20), torch.arange(20) % 3
    here, there = (
        evaluate.embed(copy.deepcopy(net), images, d) for d in (torch.device("cpu"), gpu)
    )
    torch.testing.assert_close(there, here)
    here, there = (
        evaluate.stability_losses(copy.deepcopy(net), images, GaussianNoise(), 0, 2, d)
        for d in (torch.device("cpu"), gpu)
    )
    np.testing.assert_allclose(there, here, rtol=1e-4)
    rows = evaluate.embed(copy.deepcopy(net), images)
    here, there = (
        evaluate.knn_hits(rows, labels, rows, labels, k=3, device=d)
        for d in (torch.device("cpu"), gpu)
    )
    assert (here == there).all() and not here.all()


@pytest.mark.parametrize(("method", "share"), [("byol", "marginal"), ("simclr", "own")])
def test_training_aware_influence(method: Method, share: Any, gpu: torch.device) -> None:
    images = issl.load("scenes", n=4)
    learner = Learner(recipe(method, "short"), 1, None, 0)
    here, there = (
        training_influence(
            learner,
            images,
            images.subset([0]),
            share=share,
            batch_size=4,
            size=(16, 16),
            computing=Computing(device=d),
        )
        for d in ("cpu", gpu)
    )
    torch.testing.assert_close(there, here, rtol=1e-2, atol=1e-3 * float(here.abs().max()))


# --- how often the host waits
# ------------------------------------------------------------------------------


def waits(run: Callable[[], object]) -> dict[str, int]:
    with counterfeit.watched() as seen:
        run()
    return dict(seen.waits)


@pytest.mark.parametrize("method", METHODS)
def test_a_training_waits_for_the_device_once_an_epoch(method: Method, gpu: torch.device) -> None:
    assert not grown(lambda steps: trained(gpu, method, n=8 * steps))


def grown(run: Callable[[int], object]) -> dict[str, int]:
    """The lines at which the host waits more often in a run of four steps than in one of two."""
    few, many = (waits(lambda steps=steps: run(steps)) for steps in (2, 4))  # type: ignore[misc]
    return {
        line: count - few.get(line, 0) for line, count in many.items() if count > few.get(line, 0)
    }


def test_a_batch_of_scores_waits_a_few_times(gpu: torch.device, net: torch.nn.Module) -> None:
    def score(batches: int) -> None:
        self_influence(
            net, nets.pictures(4 * batches), computing=Computing(device=gpu, batch_size=4)
        )

    found = grown(score)
    layers = 4
    # the noise goes over, the view and the features and the gradients are checked, the rows come
    # back: each once more # for each of two more batches
    assert sum(v for k, v in found.items() if "gradient_store" in k) == 2 * (layers + 1)
    others = {k: v for k, v in found.items() if "gradient_store" not in k}
    assert max(others.values()) == 2 and len(others) <= 5, others


# --- planted bugs
# ------------------------------------------------------------------------------------------


def scored(gpu: torch.device, **settings: Any) -> None:
    net = nets.make("batchnorm", torch.float32)
    images = nets.pictures(8)
    images = issl.Images(
        images.pixels, torch.arange(8) % 3, images.attributes.assign(label_name="a"), "pictures"
    )
    self_influence(net, images, computing=Computing(device=gpu), **settings)


# where, which function, what is there, what a careless hand writes, and what then runs
BUGS: dict[str, tuple[Any, str, str, str, Callable[[torch.device], object]]] = {
    "noise stays on the CPU": (
        perturbation.GaussianNoise,
        "keyed",
        ".to(x.device, x.dtype)",
        ".to(x.dtype)",
        scored,
    ),
    "uniform numbers stay on the CPU": (
        perturbation.Augmentation,
        "keyed",
        ".to(x.device, x.dtype)",
        ".to(x.dtype)",
        lambda gpu: scored(gpu, perturbation=Augmentation("flip")),
    ),
    "positions of a kernel are made on the CPU": (
        image_operations,
        "blur",
        "device=x.device, ",
        "",
        lambda gpu: image_operations.blur(
            torch.rand(2, 3, 8, 8).to(gpu),
            torch.ones(2).to(gpu),
            torch.ones(2, dtype=torch.bool).to(gpu),
        ),
    ),
    "a mask is made on the CPU": (
        objectives,
        "simclr",
        "dtype=torch.bool, device=z.device",
        "dtype=torch.bool",
        trained,
    ),
    "an identity matrix is made on the CPU": (
        objectives,
        "barlow_twins",
        "device=za.device, ",
        "",
        lambda gpu: trained(gpu, "barlow_twins"),
    ),
    "labels stay on the CPU": (
        losses.CrossEntropy,
        "on",
        "labels.to(scores.device)",
        "labels",
        lambda gpu: scored(gpu, loss=CrossEntropy()),
    ),
    "a projection stays on the CPU": (
        curvature.LoGra,
        "sketch",
        ".to(layer.weight)",
        ".to(layer.weight.dtype)",
        scored,
    ),
    "features of the device become an array": (
        evaluate,
        "stability_losses",
        ".mean(0).cpu()",
        ".mean(0)",
        lambda gpu: evaluate.stability_losses(
            nets.make("stride", torch.float32), nets.pictures(4), GaussianNoise(), device=gpu
        ),
    ),
    "an order on the CPU indexed by a mask of the device": (
        loop,
        "epoch_batches",
        ".to(keep.device)",
        "",
        trained,
    ),
}


def plant(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, right: str, wrong: str) -> None:
    """Put the function with `wrong` in the place of `right` where it was."""
    function = vars(owner)[name]
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    assert right in source, f"{name}: {right} is not in it any more"
    home = owner if inspect.ismodule(owner) else sys.modules[owner.__module__]
    namespace = dict(vars(home))
    file = inspect.getsourcefile(inspect.unwrap(function))  # where its waits are counted
    exec(
        compile(
            "from __future__ import annotations\n" + source.replace(right, wrong), file, "exec"
        ),
        namespace,
    )
    monkeypatch.setattr(owner, name, namespace[name])


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(
    bug: str, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, right, wrong, run = BUGS[bug]
    plant(monkeypatch, owner, name, right, wrong)
    with pytest.raises(
        (RuntimeError, TypeError, issl.IsslError), match=r"same device|numpy|generator"
    ):
        run(gpu)


WAITS = {
    "a number is read at each step": (
        loop,
        "pretrain",
        "losses.append(loss.detach())",
        "losses.append(loss.detach()); float(loss.detach())",
    ),
    "a mask chooses at each step": (
        loop,
        "pretrain",
        "spreads.append(spread(features))",
        "spreads.append(spread(features[features[:, 0] > -9]))",
    ),
    "a tensor is made from numbers at each step": (
        image_operations,
        "hue",
        "torch.arange(5, 0, -2, device=x.device, dtype=x.dtype)",
        "x.new_tensor([5, 3, 1])",
    ),
}


@pytest.mark.parametrize("bug", WAITS)
def test_planted_waits_are_counted(
    bug: str, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, *WAITS[bug])
    images = issl.load("scenes", n=32)

    def steps(count: int) -> None:
        loop.pretrain(
            images.subset(range(8 * count)),
            recipe("simclr", "short"),
            width=1,
            epochs=1,
            batch_size=8,
            execution=Execution(gpu, "fp32", progress=False),
        )

    assert sum(grown(steps).values()) >= 2
