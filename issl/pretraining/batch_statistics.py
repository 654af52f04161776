"""BatchNorm's running statistics, apart from the weights: copied from another encoder, or
re-estimated.

Training on other images changes them even where no weight is trained, and an encoder's features
with them. No gradient of weights sees that, so what a score of weights predicts is measured with
the statistics held.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from issl.data.images import Images
from issl.data.views import VIEW_UNIFORMS, View
from issl.errors import IsslError
from issl.keyed_random import uniform

ESTIMATED = (
    1 << 33
)  # the seed of the views that statistics are estimated on: no training draws these


@torch.no_grad()
def copy_statistics(source: nn.Module, target: nn.Module) -> nn.Module:
    """Give `target` the running statistics of `source`, a network of the same build; returns it."""
    theirs, own = (dict(_layers(net)) for net in (source, target))
    if theirs.keys() != own.keys():
        differing = sorted(theirs.keys() ^ own.keys())
        raise IsslError(
            f"statistics: the encoders differ in their BatchNorm layers ({', '.join(differing[:4])})"
        )
    for name, layer in own.items():
        for buffer in ("running_mean", "running_var", "num_batches_tracked"):
            getattr(layer, buffer).copy_(getattr(theirs[name], buffer))
    return target


def estimate_statistics(
    backbone: nn.Module,
    images: Images,
    view: View,
    size: tuple[int, int] | None = None,
    batch_size: int = 256,
) -> nn.Module:
    """Set the running statistics to those of one fixed view of each image, the mean over batches in
    the order of the images' indices; returns the network, in eval mode."""
    order = images.index.argsort()

    def views() -> Iterator[Tensor]:
        for rows in order.split(batch_size):
            u = uniform(ESTIMATED, images.index[rows], (VIEW_UNIFORMS,))
            yield view(images.pixels[rows].float() / 255, u, size)

    update_bn(views(), backbone)
    return backbone.eval()


def _layers(net: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    return ((name, m) for name, m in net.named_modules() if isinstance(m, _BatchNorm))
