"""Encoders: networks from float pixels in [0, 1] to features, normalisation included.

Ours is ResNet-18 for small images: 3×3 stem, no max-pooling (Chen et al. 2020, arXiv 2002.05709,
B.9), with a chosen width. `issl.self_influence` takes any other nn.Module of the same kind.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from issl.errors import IsslError, is_whole
from issl.files import read_safetensors, write_safetensors

# channel statistics of natural images (ImageNet's, the usual choice); every data set here uses them
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WIDEST = 1024  # channels of the first stage: 11 GB of weights
Output = Literal["features", "projector"]  # of an encoder
OWN = ("backbone.", "projector.")  # an encoder's tensors; a file may hold others beside them


class Normalize(nn.Module):
    """(x − mean) / std per channel, as a layer: an encoder carries its own normalisation."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...] = PIXEL_MEAN, std: tuple[float, ...] = PIXEL_STD):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        return (x - self.mean) / self.std


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), 3×3 convolutions (He et al. 2016, arXiv
    1512.03385, §4.1).

    It has the parameter names of torchvision's block and gives the same numbers (tested). Importing
    torchvision takes longer than importing torch, and every notebook would wait for it.
    """

    def __init__(self, inside: int, outside: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.downsample: nn.Module | None = None
        if stride != 1 or inside != outside:
            self.downsample = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        shortcut = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        result: Tensor = self.relu(out + shortcut)
        return result


def resnet18(width: int = 64) -> nn.Sequential:
    """ResNet-18 for small images: (b, 3, h, w) pixels to (b, 8·width) features."""
    if not is_whole(width, 1, WIDEST):
        raise IsslError(
            f"width={width!r}: the first stage needs 1 to {WIDEST} channels (64 is ResNet-18's own)"
        )
    stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    stages, inside = [], width
    for outside, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        first, second = BasicBlock(inside, outside, stride), BasicBlock(outside, outside)
        stages.append(nn.Sequential(first, second))
        inside = outside
    return nn.Sequential(Normalize(), *stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())


@dataclass(frozen=True)
class Head:
    """A projector or predictor of `layers` linear layers. The last has `out` outputs. The others
    are `hidden` wide and followed by ReLU, with BatchNorm before the ReLU if `norm`."""

    hidden: int = 2048
    out: int = 256
    layers: int = 2
    norm: bool = False

    def build(self, inside: int) -> nn.Sequential:
        """The network, from `inside` values to `out`."""
        parts: list[nn.Module] = []
        for _ in range(self.layers - 1):
            # BatchNorm would subtract the bias again
            parts.append(nn.Linear(inside, self.hidden, bias=not self.norm))
            parts += [nn.BatchNorm1d(self.hidden)] if self.norm else []
            parts.append(nn.ReLU(inplace=True))
            inside = self.hidden
        return nn.Sequential(*parts, nn.Linear(inside, self.out))


class Encoder(nn.Module):
    """`backbone` (pixels to features) and `projector` (features to the space of the SSL loss);
    calling it gives the projector's output. Downstream tasks and influence use the backbone."""

    def __init__(self, width: int = 64, head: Head = Head()):
        super().__init__()
        self.width, self.head = width, head
        self.backbone = resnet18(width)
        self.projector = head.build(8 * width)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b p"]:
        projected: Tensor = self.projector(self.backbone(x))
        return projected


def new_encoder(width: int, head: Head, seed: int) -> Encoder:
    """A freshly initialised encoder; `seed` decides its weights, and the global generator is not
    changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Encoder(width, head)
    for module in encoder.modules():
        # the last normalisation of a residual block starts at zero: each block starts as the
        # identity
        if isinstance(module, BasicBlock):
            nn.init.zeros_(module.bn2.weight)
    return encoder


def save_encoder(
    path: Path,
    encoder: Encoder,
    about: dict[str, Any],
    beside: dict[str, Tensor] | None = None,
    half: bool = False,
) -> None:
    """Write one safetensors file: the weights, and a header with what rebuilds the network.

    Args:
        path: The file, which is replaced atomically.
        about: Further entries of the header.
        beside: Further tensors: what a learner has beside its encoder.
        half: Store kernels and matrices in float16, at half the size; vectors and BatchNorm's
            statistics stay as they are.
    """
    header = {"width": encoder.width, "head": asdict(encoder.head), **about}
    tensors = encoder.state_dict() | (beside or {})
    for name, value in tensors.items():
        kept = value.half() if half and value.is_floating_point() and value.ndim > 1 else value
        tensors[name] = kept.detach().cpu()
    write_safetensors(path, tensors, {"issl": json.dumps(header)})


def load_encoder(path: str | Path, output: Output = "features") -> nn.Module:
    """An encoder that this library trained, in eval mode, ready for `issl.self_influence`.

    Args:
        path: A file that `issl pretrain` or `save_encoder` wrote.
        output: `features` gives only the backbone, whose weights are scored; `projector` gives the
            whole Encoder.

    Raises:
        IsslError: For a missing or damaged file, and for one that this library did not write.
    """
    header, state = read_encoder(path)
    encoder = Encoder(header["width"], Head(**header["head"]))
    encoder.load_state_dict({k: v for k, v in state.items() if k.startswith(OWN)})
    return (encoder if output == "projector" else encoder.backbone).eval()


def read_encoder(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file that `save_encoder` wrote; raises IsslError for any other, and
    if the tensors are not those that the header promises."""
    path = Path(path)
    if not path.is_file():
        raise IsslError(f"encoder {str(path)!r} does not exist; `issl pretrain` writes such files")
    metadata, state = read_safetensors(path, "encoder")
    header = read_header(metadata, path)
    if header is None:
        raise IsslError(
            f"encoder {str(path)!r} was not written by this library: its header has no entry `issl`"
        )
    width, head = header.get("width"), header.get("head")
    try:
        promised = Head(**header["head"])
        if promised.layers > len(state):
            raise IsslError(f"{promised.layers} layers")
        own = {k: v for k, v in state.items() if k.startswith(OWN)}
        with torch.device("meta"):  # nothing of the promised size is allocated
            Encoder(header["width"], promised).load_state_dict(own, assign=True)
    except (KeyError, TypeError, RuntimeError, IsslError) as error:
        raise IsslError(
            f"encoder {path}: its tensors are not those of its header, width {width!r} and head "
            f"{head} ({shorten(str(error), 200)}); get it again"
        ) from error
    return header, state


def read_header(metadata: dict[str, str], path: Path) -> dict[str, Any] | None:
    """What `save_encoder` wrote about an encoder; None for another file. Raises IsslError for a
    damaged entry."""
    try:
        header = json.loads(metadata.get("issl", "null"))
    except ValueError:
        header = "what cannot be read"
    if header is not None and not isinstance(header, dict):
        raise IsslError(f"encoder {path}: its header's entry `issl` is damaged; get it again")
    return header
