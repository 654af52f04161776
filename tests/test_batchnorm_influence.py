"""Influence through BatchNorm's running statistics: against a change of the statistics, and against
single layers."""

from __future__ import annotations

import torch
from nets import pictures
from test_training_influence import brightness_of_features, learner
from torch import nn

from issl.audit.stats.batchnorm_influence import batchnorm_influence, by_buffers, shares_of_images
from issl.training_aware import batches, two_views


def test_the_copy_is_the_network_in_eval_mode() -> None:
    backbone = learner("simclr").encoder.backbone.eval()
    x = pictures(5).pixels.double() / 255
    torch.testing.assert_close(by_buffers(backbone)(x), backbone(x))


def test_statistics_of_a_part_of_the_images_change_a_query_by_their_influence() -> None:
    trained, train, query = learner("simclr"), pictures(12), pictures(3, seed=1)
    measure = brightness_of_features(query)
    found = batchnorm_influence(trained, train, [measure], batch_size=12)
    assert found.shape == (3, 12)
    own = shares_of_images(trained, train, 12)
    part, step = own[[0, 2, 5]].mean(0) - own.mean(0), 1e-5
    moved = by_buffers(trained.encoder.backbone)
    before = measure(moved).detach()
    statistics = [p for p in moved.parameters() if p.requires_grad]
    nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(statistics) + step * part, statistics
    )
    change = (measure(moved).detach() - before) / step
    torch.testing.assert_close(
        -found[:, [0, 2, 5]].mean(1), change, rtol=1e-3, atol=1e-6 * float(found.abs().max())
    )


def test_the_first_layers_shares_are_those_of_its_inputs() -> None:
    trained, train = learner("simclr"), pictures(9)
    own = shares_of_images(trained, train, 4, seed=2)
    first = next(m for m in trained.encoder.backbone if isinstance(m, nn.BatchNorm2d))
    for rows in batches(train, 4, 2, 0):
        a, b = (
            trained.encoder.backbone[:2](view)
            for view in two_views(trained, train, rows, 2, 0, None)
        )
        mean = (a.mean((2, 3)) + b.mean((2, 3))) / 2
        centre = first.running_mean[:, None, None]
        square = ((a - centre).square().mean((2, 3)) + (b - centre).square().mean((2, 3))) / 2
        torch.testing.assert_close(own[rows, : 2 * mean.shape[1]], torch.cat([mean, square], 1))
