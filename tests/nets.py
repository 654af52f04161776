"""Small networks and images that the influence engine is tested on."""

from collections.abc import Callable, Mapping

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from issl import Curvature, Images
from issl.influence.layers import Layer


class Reused(nn.Module):
    """One convolution called twice, one Linear called twice on two different inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1, bias=False)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.twice(F.relu(self.twice(x)))).mean((2, 3))
        return self.head(F.silu(self.head(x)))


class Tokens(nn.Module):
    """Linear layers on sequences, LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 6, 4, 4), nn.LayerNorm(6)
        self.mlp, self.out = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        t = self.patch(x).flatten(2).mT
        return self.out((t + F.gelu(self.mlp(self.norm(t)))).mean(1))


class Residual(nn.Module):
    """BatchNorm after convolutions with bias and groups; one's output is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6)
        self.conv, self.norm = nn.Conv2d(6, 6, 3, 1, 1, groups=3), nn.BatchNorm2d(6)
        self.out = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.norm0(self.stem(x)))
        y = self.conv(x)
        return self.out(F.relu(self.norm(y) + y + x).mean((2, 3)))


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "stride": lambda: nn.Sequential(
        *(nn.Conv2d(3, 5, 3, 2, 1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(5, 6, (3, 2), (1, 2), (0, 1)), nn.Tanh()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)),
    ),
    "dilated": lambda: nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding="same", dilation=2, padding_mode="reflect"), nn.ReLU(True)),
        *(nn.Conv2d(6, 6, 3, 2, 1, groups=6, padding_mode="circular"), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ),
    "batchnorm": lambda: nn.Sequential(
        *(nn.Conv2d(3, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        *(nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 6)),
    ),
    "residual": Residual,
    "reused": Reused,
    "tokens": Tokens,
}


def make(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A network by name: random weights, BatchNorm statistics taken from images, eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net: nn.Module = BUILDS[name]()
        net = net.to(dtype).train()
        with torch.no_grad():
            for _ in range(30):
                net(torch.rand(16, 3, 12, 12, dtype=dtype))
    return net.eval()


def same_weights(one: nn.Module, other: nn.Module) -> None:
    """Bit for bit."""
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def projections(
    curvature: Curvature, layers: Mapping[str, Layer]
) -> dict[str, tuple[Tensor, Tensor]]:
    """(P_out, P_in) that LoGra draws for each layer, in double precision."""
    sketches = {name: curvature.sketch(m, k) for k, (name, m) in enumerate(layers.items())}
    return {name: (s.p_out.double(), s.p_in.double()) for name, s in sketches.items()}


def pictures(n: int, seed: int = 0, side: int = 12) -> Images:
    fixed = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=fixed)
    return Images(pixels, None, pd.DataFrame({"index": range(n)}), "random pictures")
