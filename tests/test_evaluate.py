"""kNN and linear probe against brute force and on features whose answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import issl
from issl.audit.cache import Artifacts
from issl.audit.settings import Data
from issl.audit.stages import Embed, Evaluate, Pretrain
from issl.audit.stats.evaluate import PENALTIES, knn_hits, knn_votes, probe_hits
from issl.pretraining.recipes import recipe


def clusters(n: int, seed: int, noise: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten classes around the axes of a space of 16 dimensions, of which one is much larger."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (n,), generator=generator)
    centres = 4 * torch.nn.functional.one_hot(labels, 16)
    x = centres + noise * torch.randn(n, 16, generator=generator)
    return x * torch.tensor([100.0] + [1.0] * 15), labels


def test_knn_is_brute_force() -> None:
    (train, labels), (test, truth) = clusters(60, 0, 2.0), clusters(30, 1, 2.0)
    votes = torch.zeros(30, 10)
    for x, own in zip(test, votes, strict=True):
        s, near = torch.nn.functional.cosine_similarity(x[None], train).topk(7)
        own.index_add_(0, labels[near], (s / 0.1).exp())
    shares = votes / votes.sum(1, keepdim=True)
    torch.testing.assert_close(knn_votes(train, labels, test, k=7), shares)
    got, want = knn_hits(train, labels, test, truth, k=7), (votes.argmax(1) == truth).numpy()
    np.testing.assert_array_equal(got, want)
    assert 0 < got.sum() < 30
    # in parts or at once, and with more neighbours asked for than there are
    many = knn_hits(train, labels, test.repeat(50, 1), truth.repeat(50), k=7)
    np.testing.assert_array_equal(many, np.tile(want, 50))
    assert len(knn_hits(train, labels, test, truth, k=1000)) == 30


def test_probe_finds_linear_classes_and_chooses_its_penalty_without_the_test_set() -> None:
    (train, labels), (test, truth) = clusters(800, 0, 0.5), clusters(300, 1, 0.5)
    hits, c = probe_hits(train, labels, test, truth)
    assert hits.mean() > 0.98 and c in PENALTIES
    wrong = (truth + 1) % 10
    again, same = probe_hits(train, labels, test, wrong)
    assert same == c and again.mean() < 0.02  # the same model, whatever the truth is said to be
    blind, _ = probe_hits(torch.randn(800, 16), labels, torch.randn(300, 16), truth)
    assert blind.mean() < 0.25
    with pytest.raises(issl.IsslError, match="one class"):
        probe_hits(train, torch.zeros_like(labels), test, truth)


def test_evaluation_as_a_stage(tmp_path: Path) -> None:
    train, test = Data(name="scenes", n=300), Data(name="scenes", split="test", n=100)
    encoder = Pretrain(data=train, recipe=recipe("simclr", "short"), width=2, epochs=0)
    sets = [Embed(pretrain=encoder, data=data) for data in (train, test)]
    stage, artifacts = Evaluate(train=sets[0], test=sets[1], k=20), Artifacts(tmp_path)
    table = stage.read(artifacts)
    assert table["index"].tolist() == test.load().index.tolist()
    known = [t for part in sets for t in (part.read(artifacts), part.data.load().labels)]
    np.testing.assert_array_equal(table["knn"], knn_hits(*known, k=20))
    hits, c = probe_hits(*known)
    np.testing.assert_array_equal(table["probe"], hits)
    assert table.attrs["C"] == c
