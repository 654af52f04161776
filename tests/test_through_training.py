"""The derivative of a training, against central differences of whole trainings."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from nets import same_weights
from torch import Tensor, nn

import issl
from issl import through_training
from issl.measures import knn_margins, mean_of, stability_measures
from issl.pretraining.encoder import resnet18
from issl.pretraining.learner import Learner, save_learner
from issl.pretraining.loop import Execution, Step, optimizer_of, pretrain, take
from issl.pretraining.methods import METHODS
from issl.pretraining.recipes import Recipe, recipe
from issl.pretraining.states import Run
from issl.through_training import agreement, influence_through_training, random_subsets, values_of

N, BATCH = 12, 6
SMALL = {"epochs": 2, "batch_size": BATCH, "seed": 3}
QUIET = Execution(precision="fp32", progress=False)


def drawn(split: str, n: int) -> issl.Images:
    found = issl.load("scenes", split, n=n)
    return replace(found, pixels=found.tensor()[:, :, 8:24, 8:24], masks=None)


IMAGES, QUERY = drawn("train", N), drawn("test", 3)


def how(method: str, optimizer: str = "sgd") -> Recipe:
    """A recipe under which a few steps move the weights."""
    rate = {"sgd": 0.5, "lars": 3.0}[optimizer]
    return replace(recipe(method, "short"), optimizer=optimizer, lr=rate, small=0.0, trust=0.02)


def tiny() -> nn.Module:
    """A backbone without kinks, within which a finite difference would be of two functions."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            *(nn.Conv2d(3, 4, 3, 2, bias=False), nn.BatchNorm2d(4), nn.Tanh()),
            *(nn.Conv2d(4, 8, 3, 2), nn.BatchNorm2d(8), nn.Tanh()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )


def smooth(net: nn.Module) -> nn.Module:
    """The same, its ReLUs replaced."""
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.Tanh())
    return net


def learner(how: Recipe, backbone: nn.Module | None = None) -> Learner:
    """In double precision, and smooth."""
    made = Learner(how, 1, 10 if how.method == "supervised" else None, 0)
    made.encoder.backbone = tiny() if backbone is None else backbone
    if how.method == "byol":
        made.target.backbone = copy.deepcopy(made.encoder.backbone).requires_grad_(False)
    return smooth(made).double()


def trained_with(run: Run, weights: Tensor) -> Learner:
    """The project's own loop on weighted images."""
    course, made = run.course(), copy.deepcopy(run.start).train()
    optimizer = optimizer_of(made, run.batch_size)
    for number in range(course.steps):
        step = course.step(number)
        take(step, made, optimizer, "fp32", weights[step.rows])
    return made


CASES = [*((method, "sgd") for method in METHODS), ("simclr", "lars"), ("byol", "lars")]


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("method", "optimizer"), CASES)
def test_the_derivative_is_that_of_the_whole_training(
    method: str, optimizer: str, whole: bool
) -> None:
    """Of a small network, or of a whole ResNet: the central difference of trainings."""
    start = learner(how(method, optimizer), resnet18(1) if whole else None)
    found = influence_through_training(start, IMAGES, QUERY, **SMALL)

    def difference(i: int, eps: float) -> Tensor:
        ends = []
        for side in (1, -1):
            weights = torch.ones(N, dtype=torch.float64)
            weights[i] += side * eps
            ends.append(values_of(trained_with(found.run, weights), found.measures))
        return (ends[0] - ends[1]) / (2 * eps)

    for i in [0, 5]:
        # Of fourth order: the plain difference of a whole ResNet is off by up to 1e-5.
        want = (4 * difference(i, 1e-6) - difference(i, 2e-6)) / 3
        error = (found.derivatives[:, i] - want).norm() / want.norm()
        assert error < 1e-6, (i, float(error))
    assert found.derivatives.abs().gt(0).all()  # every image counts


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_of_zero_is_the_training_without_the_image(method: str) -> None:
    run = Run(learner(how(method)), IMAGES, **SMALL)
    weights = torch.ones(N, dtype=torch.float64)
    weights[4] = 0
    by_weight, left_out, whole = (
        values_of(trained, stability_measures(QUERY))
        for trained in (trained_with(run, weights), run.trained([4]), run.trained())
    )
    torch.testing.assert_close(by_weight, left_out, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(whole, left_out)


@pytest.mark.parametrize(("method", "optimizer"), [("simclr", "sgd"), ("byol", "lars")])
def test_the_training_is_pretrains(method: str, optimizer: str) -> None:
    recipe = replace(how(method, optimizer), lr=0.2, small=0.5)
    found = influence_through_training(3, IMAGES, QUERY, recipe, width=1, **SMALL)
    encoder, _ = pretrain(IMAGES, recipe, width=1, **SMALL, execution=QUIET)
    same_weights(encoder, found.learner.encoder)
    kept = torch.ones(N, dtype=torch.bool)
    kept[[1, 8]] = False
    without, _ = pretrain(IMAGES, recipe, width=1, **SMALL, keep=kept, gaps=True, execution=QUIET)
    same_weights(without, found.run.trained([1, 8]).encoder)


def test_kept_states_are_memory_or_files_or_computed_again_and_runs_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Learner(how("byol"), 1, None, 0)
    want = influence_through_training(start, IMAGES, QUERY, **SMALL)
    again = influence_through_training(start, IMAGES, QUERY, **SMALL, every=3)
    torch.testing.assert_close(again.derivatives, want.derivatives, rtol=0, atol=0)
    assert again.state_bytes == want.state_bytes // 2  # steps 0 and 3 of four

    monkeypatch.setattr(through_training, "SAVED", 0.0)
    through, taken = through_training.Back._through, []

    def interrupted(self: object, learner: object, step: Step) -> None:
        if step.number == 1 and len(taken) == 2:
            raise KeyboardInterrupt
        taken.append(step.number)
        through(self, learner, step)

    monkeypatch.setattr(through_training.Back, "_through", interrupted)
    with pytest.raises(KeyboardInterrupt):
        influence_through_training(start, IMAGES, QUERY, **SMALL, folder=tmp_path)
    taken.append(-1)
    on_disk = influence_through_training(start, IMAGES, QUERY, **SMALL, folder=tmp_path)
    assert taken == [3, 2, -1, 1, 0]
    torch.testing.assert_close(on_disk.derivatives, want.derivatives, rtol=0, atol=0)
    torch.testing.assert_close(on_disk.growth, want.growth)
    others = IMAGES.subset(range(2))
    with pytest.raises(issl.IsslError, match="other measures"):
        influence_through_training(start, IMAGES, others, **SMALL, folder=tmp_path)
    turned = replace(IMAGES, pixels=IMAGES.tensor().flip(3))
    with pytest.raises(issl.IsslError, match="images differ"):
        influence_through_training(start, turned, QUERY, **SMALL, folder=tmp_path)
    with pytest.raises(issl.IsslError, match="seed differ"):
        influence_through_training(start, IMAGES, QUERY, **SMALL | {"seed": 4}, folder=tmp_path)


def test_removals_are_trainings_and_small_ones_are_predicted() -> None:
    start = learner(replace(how("simclr"), lr=0.02))
    found = influence_through_training(start, IMAGES, QUERY, **SMALL)
    subsets = random_subsets(N, 0.1, 8)
    table = found.removals(subsets)
    measured = values_of(found.run.trained(subsets[2]), found.measures) - found.value
    of_third = table[table["subset"] == 2]
    np.testing.assert_array_equal(of_third["measured"], measured)
    np.testing.assert_allclose(of_third["predicted"], -found.derivatives[:, subsets[2][0]].numpy())
    said = agreement(table).iloc[0]
    assert said["lds"] > 0.8
    assert 0.5 < said["slope"] < 2


def test_agreement_of_known_tables() -> None:
    """A query whose order is predicted, and one whose order is reversed."""
    queries = {"query": [0] * 3 + [1] * 3, "subset": [0, 1, 2] * 2, "left_out": 5}
    losses = {"predicted": [1.0, 2.0, 3.0] * 2, "measured": [2.0, 4.0, 6.0, 6.0, 4.0, 2.0]}
    found = agreement(pd.DataFrame(queries | losses))
    assert found["lds"].tolist() == [0.0]  # 1 and -1
    assert found["slope"].tolist() == pytest.approx([(28 + 20) / 28])


def test_a_mean_is_the_mean_and_a_vote_of_a_bank_is_by_hand() -> None:
    net = learner(how("simclr")).encoder.backbone.eval()
    each = stability_measures(QUERY, together=2)
    with torch.no_grad():
        values = torch.cat([measure(net) for measure in each])
        torch.testing.assert_close(mean_of(each)(net), values.mean()[None])
        bank = net(IMAGES.pixels.double() / 255)
        labels = torch.arange(N) % 2
        asked = replace(QUERY, labels=torch.tensor([0, 1, 1]))
        found = torch.cat([m(net) for m in knn_margins(asked, bank, labels, 0.5)])
        features = net(asked.pixels.double() / 255)
    cosines = nn.functional.cosine_similarity(features[:, None], bank[None], dim=2)
    votes = (cosines / 0.5).exp()
    shares = votes @ nn.functional.one_hot(labels).double() / votes.sum(1, keepdim=True)
    want = (shares[:, 0] - shares[:, 1]) * torch.tensor([1, -1, -1])
    torch.testing.assert_close(found, want)
    with pytest.raises(issl.IsslError, match="classes"):
        knn_margins(replace(QUERY, labels=torch.tensor([0, 1, 2])), bank, labels)


def test_a_learner_in_a_file_and_bad_input(tmp_path: Path) -> None:
    file, other = tmp_path / "learner.safetensors", Learner(how("simclr"), 2, None, 0)
    save_learner(file, other, {}, half=False)
    by_file = influence_through_training(file, IMAGES, QUERY, how("simclr"), **SMALL)
    by_learner = influence_through_training(other, IMAGES, QUERY, **SMALL)
    torch.testing.assert_close(by_file.derivatives, by_learner.derivatives)
    with pytest.raises(issl.IsslError, match="12 is no position"):
        by_learner.removals([[N]])
    broken = replace(how("simclr"), lr=1e30)
    for used, changes, named in [
        (None, {}, "give the recipe"),
        (how("simclr"), {"batch_size": 13}, "batch_size=13"),
        (broken, {"width": 1}, "diverged at step"),
    ]:
        with pytest.raises(issl.IsslError, match=named):
            influence_through_training(0, IMAGES, QUERY, used, **SMALL | changes)
