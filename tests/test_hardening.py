"""What people hand to the library by mistake, and what they then read; and unusual things that are
scored all the same.

One row a case. A message names the thing, the value and the remedy; it comes before any long work.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hostile import (
    GOOD,
    PICTURE,
    PIXELS,
    declaring,
    encoded,
    ours,
    parquet,
    sparse_image,
    tar,
    tar_declaring,
    two_parquets,
    with_text_of,
)
from hostile import folder as images_in
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import issl
from issl.commands import cli
from issl.influence.losses import CrossEntropy
from issl.pretraining.other_encoders import open_encoder

IMAGES = issl.load("scenes", n=6)
Case = Callable[[Path], Any]


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    parts = (
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )
    return nn.Sequential(*parts).eval()


class Gives(nn.Module):
    """An encoder whose features are changed by a function."""

    def __init__(self, change: Callable[[Tensor], Any], inner: nn.Module | None = None):
        super().__init__()
        self.inner, self.change = inner or net(), change
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.change(self.inner(x))


class WithoutGradient(Gives):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


class Counting(Gives):
    def __init__(self) -> None:
        super().__init__(lambda f: f)
        self.calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.inner(x) * (1 + 0.1 * self.calls)


class Checkpointed(Gives):
    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3072, 3072, bias=False), nn.Linear(3072, 3072, bias=False)
        self.b.weight = self.a.weight
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x.flatten(1))))


def spoiled(value: float) -> nn.Module:
    model = net()
    with torch.no_grad():
        model[4].weight[0, 0] = value
    return model


def fresh_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()


def over_the_batch() -> nn.Module:
    parts = (
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return nn.Sequential(*parts).eval()


def transposed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def score(encoder: Any = None, images: Any = IMAGES, *arguments: Any, **more: Any) -> Any:
    return issl.self_influence(net() if encoder is None else encoder, images, *arguments, **more)


def noise_in_place(x: Tensor, index: Tensor) -> Tensor:
    return x.add_(0.1 * torch.sin(torch.arange(x[0].numel(), dtype=x.dtype)).view_as(x[0]))


def the_same_noise(x: Tensor, index: Tensor) -> Tensor:
    return x + 0.1 * torch.sin(torch.arange(x[0].numel(), dtype=x.dtype)).view_as(x[0])


def with_older_weight_norm() -> nn.Module:
    model = net()
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        nn.utils.weight_norm(model[0])
    return model


def with_spectral_norm() -> nn.Module:
    """A network whose last weight is already of norm 1, near enough, times what it was."""
    model = net()
    norm = float(torch.linalg.matrix_norm(model[4].weight.detach(), 2))
    parametrizations.spectral_norm(model[4], n_power_iterations=50)
    parametrize.register_parametrization(model[4], "weight", Times(norm), unsafe=True)
    return model.eval()


class Times(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        return self.factor * weight


class Low(nn.Module):
    """The weight and a product of low rank, which is 0 at the start of a fine-tuning."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.a, self.b = (
            nn.Parameter(torch.randn(2, weight.shape[1])),
            nn.Parameter(torch.zeros(len(weight), 2)),
        )

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


class LowLinear(nn.Linear):
    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features)
        self.load_state_dict(layer.state_dict())
        self.low = Low(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.low(self.weight), self.bias)


def with_lora() -> nn.Module:
    model = net()
    parametrize.register_parametrization(model[4], "weight", Low(model[4].weight))
    return model.eval()


def with_lora_layer() -> nn.Module:
    model = net()
    model[4] = LowLinear(model[4])
    return model.eval()


class Keeps(Gives):
    """An encoder that keeps its last features, as many do for their plots."""

    def forward(self, x: Tensor) -> Any:
        self.last = self.inner(x)
        return self.last


@dataclass(frozen=True)
class InDouble:
    """The usual noise, added in double precision."""

    def keyed(self, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
        shake = issl.GaussianNoise().keyed(seed)
        return lambda x, index: shake(x, index).double()


def in_inference_mode() -> Any:
    with torch.inference_mode():
        return score()


def with_weight_norm() -> nn.Module:
    model = net()
    parametrizations.weight_norm(model[0])
    return model


def transposed_with_norm() -> nn.Module:
    model = transposed()
    parametrizations.weight_norm(model[0])
    return model.eval()


def quantised() -> nn.Module:
    model = net()
    model[4] = torch.ao.nn.quantized.dynamic.Linear(4, 5)
    return model.eval()


def for_one_channel() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def for_16_px() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4)).eval()


def with_hook(hook: Callable[..., Any]) -> nn.Module:
    model = net()
    model[0].register_forward_hook(hook)
    return model


def fails(*_: Any) -> None:
    raise ValueError("I was left over")


def cross(query: Any) -> Any:
    return issl.cross_influence(net(), IMAGES, query)


def load(name: str, size: Any = 16) -> Tensor:
    return issl.load(name, size=size).tensor()


def command(folder: Path, *words: str) -> None:
    """Run a command that must fail at once, in one line and with nothing left behind; raises what
    it said.

    ENCODER stands for an encoder's file, OUT for a place in the folder.
    """
    known = {"ENCODER": str(ours(folder)), "OUT": str(folder / "out")}
    before = sorted(folder.rglob("*"))
    said = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        for place in (
            "issl.pretraining.loop.epoch_batches",
            "issl.influence.gradient_store.Batches.__call__",
        ):
            patch.setattr(place, lambda *_: pytest.fail("work was begun"))
        try:
            code = cli.main(
                [
                    *(
                        functools.reduce(lambda w, k: w.replace(k, known[k]), known, word)
                        for word in words
                    )
                ]
            )
        except SystemExit as stop:  # argparse's
            code = stop.code
    error = said.getvalue()
    assert code == 2 and error.startswith("issl: error: ") and error.count("\n") == 1, (code, error)
    assert sorted(folder.rglob("*")) == before
    raise issl.IsslError(error)


TWO = {"image": [GOOD, GOOD]}
NAMES = {b"huggingface": json.dumps({"info": {"features": {"label": {"names": ["cat"]}}}}).encode()}

BROKEN_IMAGES: list[tuple[str, bytes, str]] = [
    (
        "of no bytes",
        b"",
        r"1 of 2 images .*b.png .not an image, or damaged at its start.; repair or remove",
    ),
    (
        "text",
        b"hello",
        "b.png .not an image, or damaged at its start.; repair or remove them, or add --skip-broken",
    ),
    ("half", GOOD[:60], "b.png .image file is truncated.; repair"),
    ("without its end", GOOD[:-30], "b.png .image file is truncated.; repair"),
    (
        "of 3,600 million pixels",
        declaring(60_000, 60_000),
        "exceeds limit .*decompression bomb.*; repair",
    ),
    ("of 2³¹ pixels a side", declaring(2**31 - 1, 2**31 - 1), "exceeds limit .*decompression bomb"),
    ("of no pixels", declaring(0, 0), "b.png .not an image, or damaged at its start"),
    (
        "with too little inside",
        declaring(9000, 9000),
        "b.png cannot be decoded .image file is truncated",
    ),
    ("with a text of 30 MB", with_text_of(30_000_000), "Decompressed data too large"),
    (
        "of floats",
        encoded(Image.fromarray(PIXELS[0].astype(np.float32)), "TIFF"),
        "mode F, whose range",
    ),
]

CHECKPOINTS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("not there", lambda f: f / "no.pt", "is not a file; give one, or torchvision:NAME"),
    ("a folder", lambda f: f, "is not a file; give one, or torchvision:NAME"),
    (
        "of no bytes",
        lambda f: written(f / "a.pt", b""),
        "is no checkpoint; give a .safetensors file, or what",
    ),
    (
        "junk",
        lambda f: written(f / "a.pt", b"PK\3\4" + b"x" * 100),
        "cannot be read as weights .*damaged: get it",
    ),
    ("a pickle of junk", lambda f: written(f / "a.pt", b"\x80\x02" + b"x" * 99), "a.pt "),
    ("a list", lambda f: saved(f / "a.pt", [1, 2]), "holds a list, not a state dict"),
    ("no entries", lambda f: saved(f / "a.pt", {}), "holds no state dict; its entries are"),
    (
        "a whole module",
        lambda f: saved(f / "a.pt", net()),
        "holds more than tensors .*save its weights alone",
    ),
    (
        "of something else",
        lambda f: saved(f / "a.pt", {"w": torch.zeros(3)}),
        "no ResNet among its keys .w.; known",
    ),
    (
        "with numbers for names",
        lambda f: saved(f / "a.pt", {1: torch.zeros(3)}),
        "no ResNet among its keys",
    ),
    (
        "of no bytes, safe",
        lambda f: written(f / "a.safetensors", b""),
        "is damaged .*; delete it and run again",
    ),
    (
        "with a huge header",
        lambda f: written(f / "a.safetensors", struct.pack("<Q", 2**60) + b"{}"),
        "is damaged",
    ),
    ("cut off", lambda f: cut(ours(f)), "is damaged .*; delete it and run again"),
    (
        "with a header of text",
        lambda f: ours(f, lambda h: "x"),
        "header's entry `issl` cannot be read .*get it ag",
    ),
    (
        "with a header that is a list",
        lambda f: ours(f, lambda h: [1]),
        "header's entry `issl` is a list; get it",
    ),
    (
        "of width 10⁹",
        lambda f: ours(f, lambda h: {**h, "width": 10**9}),
        "not those of its header .width 1000000000",
    ),
    (
        "of another width",
        lambda f: ours(f, lambda h: {**h, "width": 2}),
        "width 2.*backbone.1.weight is missing or",
    ),
    (
        "of 10⁷ layers",
        lambda f: ours(f, lambda h: {**h, "head": {"layers": 10**7}}),
        "not those of its header",
    ),
    (
        "of a layer of 10¹²",
        lambda f: ours(f, lambda h: {**h, "head": {"hidden": 10**12}}),
        "not those of its header",
    ),
    (
        "of torchvision's that is not",
        lambda f: "torchvision:nope",
        "torchvision has no model 'nope'; see",
    ),
]

SMALL = ("--data", "scenes", "--n", "32", "--batch-size", "16", "--width", "1")
PRETRAIN = ("pretrain", *SMALL, "--out", "OUT.safetensors")
INFLUENCE = (
    "influence",
    "--data",
    "scenes",
    "--n",
    "8",
    "--encoder",
    "ENCODER",
    "--out",
    "OUT.csv",
)
EXPLAIN = (
    "explain",
    "test:3",
    "--data",
    "scenes",
    "--any-data",
    "--n",
    "8",
    "--encoder",
    "ENCODER",
    "--out",
    "OUT.png",
)
COMMANDS: list[tuple[tuple[str, ...], str]] = [
    ((), "the following arguments are required: command; see issl --help"),
    (("fly",), "invalid choice: 'fly'"),
    ((*PRETRAIN, "--n", "a"), "argument --images/--n: invalid int value: 'a'"),
    (
        (*PRETRAIN, "--n", "0"),
        "n=0: data set 'scenes': ask for a whole number of images, 1 or more",
    ),
    ((*PRETRAIN, "--width", "0"), "width=0: the first stage needs 1 to 1024 channels"),
    ((*PRETRAIN, "--width", "1000000"), "width=1000000: the first stage needs 1 to 1024 channels"),
    ((*PRETRAIN, "--epochs", "-1"), "argument --epochs: '-1': need a whole number, 0 or more"),
    ((*PRETRAIN, "--batch-size", "0"), "batch_size=0: need 2 to 32"),
    (
        (*PRETRAIN, "--batch-size", "64"),
        "batch_size=64: need 2 to 32, the number of images trained on",
    ),
    ((*PRETRAIN, "--seed", "-1"), "seed=-1: give whole numbers, 0 or more"),
    ((*PRETRAIN, "--size", "8"), "size=8: 'scenes' has a fixed size"),
    ((*PRETRAIN, "--device", "tpu"), "device 'tpu': choose auto, cpu or cuda"),
    ((*PRETRAIN, "--out", "OUT.pt"), "give a file name that ends in .safetensors"),
    (
        (*PRETRAIN, "--out", "/proc/x.safetensors"),
        "--out /proc/x.safetensors: cannot be written there .*choose",
    ),
    (
        (*PRETRAIN, "--data", "folder:OUT/none"),
        "image folder '.*out/none' does not exist; write folder:PATH",
    ),
    ((*INFLUENCE, "--out", "OUT.txt"), "give a file name that ends in .parquet or .csv"),
    (
        (*INFLUENCE, "--rank", "x"),
        "argument --rank: 'x': need a whole number, or with a point a fraction",
    ),
    ((*INFLUENCE, "--damping", "inf"), r"LoGra\(damping=inf\): must be a finite number > 0"),
    ((*INFLUENCE, "--noise-std", "nan"), r"GaussianNoise\(std=nan\): .* a finite number ≥ 0"),
    (
        (*INFLUENCE, "--batch-size", "x"),
        "argument --batch-size: 'x': need a whole number, 1 or more, or auto",
    ),
    ((*INFLUENCE, "--workers", "0"), "workers=0: give a whole number of threads, 1 or more"),
    ((*INFLUENCE, "--size", "64"), "size=64: 'scenes' has a fixed size"),
    ((*INFLUENCE, "--mean", "a,b,c"), "argument --mean: 'a,b,c': three numbers, R,G,B"),
    ((*INFLUENCE, "--std", "0,0,0"), "std=.0.0, 0.0, 0.0.: need finite numbers, above 0"),
    ((*INFLUENCE, "--timeout", "nan"), "argument --timeout: 'nan': need a finite number"),
    ((*INFLUENCE, "--store", "/proc/x"), "folder /proc/x cannot be written .*choose another"),
    (
        (*INFLUENCE, "--weights", "x"),
        "weights 'x': go with torchvision:NAME or timm:NAME, not with the file",
    ),
    (
        (*INFLUENCE, "--curvature-from", "ENCODER"),
        "is no curvature file: its header has no entry issl_curvature",
    ),
    (
        (*INFLUENCE, "--save-curvature", "OUT.pt"),
        "--save-curvature .*: give a file name that ends in .safetensors",
    ),
    ((*INFLUENCE, "--cluster", "slurm"), "--cluster slurm: give a folder with --out"),
    ((*EXPLAIN, "--k", "0"), "--k 0: must be 1 or more"),
    ((*EXPLAIN, "--out", "OUT.gif"), "give a file name that ends in .png or .pdf"),
    (
        ("explain", "test:99999", *EXPLAIN[2:]),
        "test:99999: the test set of scenes has 2000 images, numbered from 0",
    ),
    (
        ("explain", "train:x", *EXPLAIN[2:]),
        "train:x: the encoder's 8 training images have no index x",
    ),
    (
        ("explain", "ENCODER", *EXPLAIN[2:]),
        "is not an image that can be read .not an image, or damaged at its",
    ),
    (
        ("explain", "no.png", *EXPLAIN[2:]),
        "image 'no.png' does not exist; give an image file, or test:17",
    ),
    (("merge", "ENCODER", "--out", "OUT.safetensors"), "is no curvature file"),
    (("run", "--only", "09", "--jobs", "0"), "--jobs 0: need 1 or more"),
    (("run", "--profile", "../../etc/passwd"), "profile '../../etc/passwd': there are mini"),
    (("run", "--only", ","), "--only ',' names no notebook"),
    (
        ("run", "--time-budget", "-5"),
        "argument --time-budget: '-5': need a finite number, 0 or more",
    ),
    (("run", "--only", "03", "--checkpoint", "simclr"), "--checkpoint simclr: write METHOD=FILE"),
    (
        ("run", "--only", "03", "--checkpoint", "simclr=no.pt"),
        "no.pt' is not a file; check the path in --checkpoint",
    ),
    (("run", "--only", "03", "--out", "ENCODER"), "output folder .* cannot be written .*--out DIR"),
    (
        ("download", "imagenet", "--data-root", "OUT"),
        "only cifar10, cifar100, fairface can be downloaded",
    ),
    (("doctor", "--profile", "nope"), "profile 'nope': there are mini"),
]


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def cut(path: Path) -> Path:
    return written(path, path.read_bytes()[: path.stat().st_size // 2])


BAD: list[tuple[str, Case, str]] = [
    # the encoder
    (
        "none",
        lambda _: issl.self_influence(None, IMAGES),
        "encoder is None; give a torch.nn.Module",
    ),
    (
        "a function",
        lambda _: score(lambda x: x.mean((2, 3))),
        "encoder is a function; give a torch.nn.Module",
    ),
    (
        "without values",
        lambda _: score(net().to("meta")),
        "0.weight has no values .device meta.; load its weights",
    ),
    ("in train mode", lambda _: score(net().train()), "in train mode .*call encoder.eval"),
    (
        "weights NaN",
        lambda _: score(spoiled(float("nan"))),
        "4.weight holds NaN or infinite values; load an intact",
    ),
    (
        "weights infinite",
        lambda _: score(spoiled(float("inf"))),
        "4.weight holds NaN or infinite values",
    ),
    (
        "never trained",
        lambda _: score(fresh_norm()),
        "1 was never trained .running mean 0, variance 1.; load trained",
    ),
    (
        "normalises the batch",
        lambda _: score(over_the_batch()),
        "normalises by the batch .*use running statistics",
    ),
    (
        "nothing to score",
        lambda _: score(nn.Flatten().eval()),
        "no Linear or Conv2d layer to score",
    ),
    ("shares a weight", lambda _: score(Tied()), "a and b share one weight; .*skip both"),
    (
        "transposed",
        lambda _: score(transposed()),
        r"0.weight .is a weight of ConvTranspose2d.; leave .* skip=",
    ),
    (
        "no gradient",
        lambda _: score(WithoutGradient(lambda f: f)),
        "cuts its features off .*remove no_grad or detach",
    ),
    (
        "detached",
        lambda _: score(Gives(lambda f: f.detach())),
        "cuts its features off .*remove no_grad or detach",
    ),
    ("stateful", lambda _: score(Counting()), "other features alone than in a batch"),
    (
        "random",
        lambda _: score(Gives(lambda f: f + 0.1 * torch.randn_like(f))),
        "other features alone than in a batch",
    ),
    (
        "mixes the batch",
        lambda _: score(Gives(lambda f: f + f.mean(0))),
        "other features alone than in a batch",
    ),
    (
        "parametrised, in train mode",
        lambda _: score(with_weight_norm()),
        "in train mode .0.parametrizations",
    ),
    (
        "lazy",
        lambda _: score(nn.Sequential(nn.Flatten(), nn.LazyLinear(4)).eval()),
        "1.weight has no values .a lazy",
    ),
    (
        "complex",
        lambda _: score(net().to(torch.complex64)),
        "0.weight is torch.complex64; only real weights",
    ),
    (
        "traced",
        lambda _: score(torch.jit.trace(net(), IMAGES.pixels[:1] / 255)),
        "give the module as it was before",
    ),
    (
        "quantised",
        lambda _: score(quantised()),
        "4 is a Linear, whose weights cannot be followed; give the module",
    ),
    (
        "parametrised transposed",
        lambda _: score(transposed_with_norm()),
        r"0.weight .is a weight of ConvTranspose2d.;",
    ),
    (
        "for one channel",
        lambda _: score(for_one_channel()),
        r"fails on pixels of shape \(3, 3, 32, 32\).*images of",
    ),
    (
        "for another size",
        lambda _: score(for_16_px()),
        "fails on pixels .*give images of the size that it was made",
    ),
    (
        "a hook that is left over",
        lambda _: score(with_hook(fails)),
        "fails on pixels .*left over.*remove hooks",
    ),
    # what it gives
    (
        "a tuple",
        lambda _: score(Gives(lambda f: (f, f))),
        r"gives tuple for 3 images; it must give .*\(3, d\)",
    ),
    ("a dictionary", lambda _: score(Gives(lambda f: {"x": f})), "gives dict for 3 images"),
    ("nothing", lambda _: score(Gives(lambda f: None)), "gives NoneType for 3 images"),
    (
        "tokens",
        lambda _: score(Gives(lambda f: f[:, None].repeat(1, 3, 1))),
        r"gives \(3, 3, 5\) for 3 images",
    ),
    ("one number", lambda _: score(Gives(lambda f: f.mean())), r"gives \(\) for 3 images"),
    # the images
    ("no image", lambda _: score(images=IMAGES.subset([])), "images 'scenes': the set is empty"),
    (
        "floats",
        lambda _: score(images=torch.rand(4, 3, 32, 32)),
        r"pixels are torch.float32; give uint8.*255 \* x",
    ),
    (
        "one channel",
        lambda _: score(images=torch.zeros(4, 1, 32, 32).byte()),
        r"got \(4, 1, 32, 32\), need",
    ),
    (
        "one image alone",
        lambda _: score(images=torch.zeros(3, 32, 32).byte()),
        r"got \(3, 32, 32\), need",
    ),
    ("a list", lambda _: score(images=[1, 2]), "got list, need issl.Images or a tensor"),
    (
        "numpy",
        lambda _: score(images=np.zeros((4, 3, 32, 32), np.uint8)),
        "got ndarray, need issl.Images or a tensor",
    ),
    (
        "16-bit pixels",
        lambda _: score(images=torch.zeros(4, 3, 32, 32).short()),
        "pixels are torch.int16; give uint8",
    ),
    (
        "channels last",
        lambda _: score(images=torch.zeros(4, 32, 32, 3).byte()),
        r"need issl.Images or a tensor \(n",
    ),
    (
        "of no size",
        lambda _: score(images=torch.zeros(4, 3, 0, 0).byte()),
        "holds no pixels; give images with values",
    ),
    (
        "without pixels",
        lambda _: score(images=IMAGES.pixels.to("meta")),
        r"on meta holds no pixels",
    ),
    (
        "the name of a set",
        lambda _: score(images="folder:x"),
        "got str, need issl.Images or a tensor",
    ),
    ("a position too far", lambda _: IMAGES.subset([99]), "position 99 in a set of 6"),
    (
        "a position in words",
        lambda _: IMAGES.subset(["a"]),
        r"\['a'\]; give positions .whole numbers. or a mask",
    ),
    (
        "queries of another size",
        lambda _: cross(torch.zeros(2, 3, 16, 16).byte()),
        r"query images are \(16, 16\) px",
    ),
    ("no query", lambda _: cross(IMAGES.subset([])), "query images 'scenes': the set is empty"),
    (
        "no neighbour",
        lambda _: issl.top_influences(net(), IMAGES, IMAGES, k=0),
        "k=0: must be a whole number, 1 or",
    ),
    (
        "neighbours in words",
        lambda _: issl.top_influences(net(), IMAGES, IMAGES, k="a"),
        "k='a': must be a whole",
    ),
    # the perturbation
    (
        "no object",
        lambda _: score(None, IMAGES, issl.GaussianNoise),
        "need an object with .keyed.seed., such as Gauss",
    ),
    ("no perturbation", lambda _: score(None, IMAGES, None), "perturbation None: need an object"),
    (
        "negative noise",
        lambda _: issl.GaussianNoise(0.0, -1.0),
        r"std=-1.0\): .* a finite number ≥ 0",
    ),
    (
        "infinite noise",
        lambda _: issl.GaussianNoise(0.0, float("inf")),
        r"std=inf\): .* a finite number ≥ 0",
    ),
    ("noise in words", lambda _: issl.GaussianNoise(0.0, "a"), "std='a'"),
    (
        "another shape",
        lambda _: score(None, IMAGES, lambda x, i: x[:, :, :16]),
        "it must keep the shape",
    ),
    (
        "no tensor",
        lambda _: score(None, IMAGES, lambda x, i: x.numpy()),
        "perturbation gives ndarray",
    ),
    (
        "NaN pixels",
        lambda _: score(None, IMAGES, lambda x, i: x / 0 * 0),
        r"NaN or infinite pixels for image index \[",
    ),
    (
        "bytes",
        lambda _: score(None, IMAGES, lambda x, i: (255 * x).byte()),
        "gives torch.uint8 for pixels .*return",
    ),
    (
        "it fails",
        lambda _: score(None, IMAGES, lambda x, i: 1 / 0),
        r"fails .ZeroDivisionError.*called with pixels",
    ),
    (
        "it takes one",
        lambda _: score(None, IMAGES, lambda x: x),
        "fails .TypeError.*called with pixels .*and the",
    ),
    ("another kind", lambda _: issl.Augmentation("rotate"), "the kinds are crop, flip"),
    ("too strong", lambda _: issl.Augmentation("crop", 2), r"strength=2\): must lie in \(0, 1\]"),
    # the loss
    (
        "loss in words",
        lambda _: score(loss="cos"),
        "loss='cos': need a function .features, perturbed features.",
    ),
    (
        "one loss",
        lambda _: score(loss=lambda a, b: (a - b).square().mean()),
        r"loss gives shape \(\) for 6 images",
    ),
    (
        "loss of nothing",
        lambda _: score(loss=lambda a, b: torch.zeros(len(a))),
        "loss does not depend on .*remove",
    ),
    (
        "loss without labels",
        lambda _: score(images=IMAGES.pixels, loss=CrossEntropy()),
        "have no labels; use a",
    ),
    # the curvature
    ("a class", lambda _: score(curvature=issl.LoGra), r"need an object such as LoGra\(rank=16\)"),
    (
        "a name",
        lambda _: score(curvature="logra"),
        r"curvature 'logra': need an object such as LoGra",
    ),
    (
        "no damping",
        lambda _: issl.LoGra(damping=0.0),
        r"damping=0.0\): must be a finite number > 0",
    ),
    (
        "infinite damping",
        lambda _: issl.LoGra(damping=float("inf")),
        r"damping=inf\): must be a finite number > 0",
    ),
    (
        "NaN damping",
        lambda _: issl.LoGra(damping=float("nan")),
        r"damping=nan\): must be a finite number > 0",
    ),
    ("damping in words", lambda _: issl.LoGra(damping="x"), "damping='x'"),
    (
        "rank 0",
        lambda _: issl.LoGra(rank=0),
        r"rank=0\): a whole number of 1 or more, or a fraction",
    ),
    ("rank in words", lambda _: issl.LoGra(rank="x"), "rank='x'"),
    (
        "infinite sweep",
        lambda _: score(sweep=[float("inf")]),
        "sweep: damping inf must be a finite number > 0",
    ),
    (
        "a fraction above 1",
        lambda _: issl.LoGra(rank=1.5),
        r"rank=1.5\): a whole number of 1 or more, or a fraction",
    ),
    (
        "another projection",
        lambda _: issl.LoGra(projection="svd"),
        "projection='svd'.: choose 'random' or 'pca'",
    ),
    (
        "a huge seed of projections",
        lambda _: issl.LoGra(seed=2**70),
        "seed=1180591620717411303424.: must be a whole",
    ),
    (
        "no image to fit",
        lambda _: issl.LoGra(projection="pca", fit=0),
        r"fit=0\): must be a number of images",
    ),
    (
        "no projection",
        lambda _: issl.RandomProjection(rank=0),
        r"rank=0\): must be a whole number, 1 or more",
    ),
    (
        "one damping as a sweep",
        lambda _: score(sweep=0.1),
        r"sweep=0.1: give a list of dampings, such as \[0.01",
    ),
    # numbers
    (
        "a huge seed",
        lambda _: score(seed=2**70),
        "seed=1180591620717411303424: give a whole number from 0 to",
    ),
    ("a negative seed", lambda _: score(seed=-1), "seed=-1: give a whole number"),
    ("a fractional seed", lambda _: score(seed=1.5), "seed=1.5: give a whole number"),
    ("a seed in words", lambda _: score(seed="a"), "seed='a': give a whole number"),
    ("no draw", lambda _: score(draws=0), "draws=0: must be a whole number, 1 or more"),
    ("draws in words", lambda _: score(draws="2"), "draws='2': must be a whole number"),
    (
        "draws of a function",
        lambda _: score(None, IMAGES, the_same_noise, draws=2),
        "several draws need a",
    ),
    (
        "another average",
        lambda _: score(average="mean"),
        "average='mean': choose gradients or scores",
    ),
    # what to leave out
    (
        "skip everything",
        lambda _: score(skip=["0", "4"]),
        r"layer to score left after skip=\['0', '4'\]",
    ),
    (
        "skip nothing there",
        lambda _: score(skip=["zzz"]),
        r"skip=\['zzz'\]: the encoder has no module or parameter",
    ),
    ("skip a word", lambda _: score(skip="0"), r"skip='0': give a list of names, such as \['0'\]"),
    (
        "skip None",
        lambda _: score(skip=None),
        r"skip=None: give a list of names, such as \['head'\]",
    ),
    # how to compute
    ("inference mode", lambda _: in_inference_mode(), "call this outside of torch.inference_mode"),
    ("batch size 0", lambda _: issl.Computing(batch_size=0), "batch_size=0: must be 1 or more"),
    (
        "another precision",
        lambda _: issl.Computing(precision="fp8"),
        "precision='fp8': choose fp32 or bf16",
    ),
    (
        "no such device",
        lambda _: issl.Computing(device="tpu9"),
        "device='tpu9': torch knows no such device; try cpu",
    ),
    (
        "a store nowhere",
        lambda _: score(computing=issl.Computing(store="/proc/none/x")),
        "cannot be written .*another",
    ),
    ("no memory", lambda _: issl.Computing(memory_gb=0.0), "memory_gb=0.0: must be > 0"),
    (
        "a fractional batch",
        lambda _: issl.Computing(batch_size=1.5),
        "batch_size=1.5: must be 1 or more, a whole",
    ),
    (
        "a device of another machine",
        lambda _: score(computing=issl.Computing(device="mps")),
        "'mps' cannot be used",
    ),
    (
        "a device without values",
        lambda _: issl.Computing(device="meta"),
        "device='meta' holds no values; try cpu or",
    ),
    ("memory NaN", lambda _: issl.Computing(memory_gb=float("nan")), "memory_gb=nan: must be > 0"),
    (
        "a store that is a file",
        lambda f: score(computing=issl.Computing(store=ours(f))),
        "cannot be written .*oth",
    ),
    # image files
    *(
        (f"image: {name}", lambda f, c=content: load(images_in(f, a__png=GOOD, b__png=c)), message)
        for name, content, message in BROKEN_IMAGES
    ),
    (
        "image: half a gigabyte",
        lambda f: load(sparse_image(f, 2**40)),
        "more than 537 MB; an image has far less",
    ),
    (
        "image: a name with a newline",
        lambda f: load(images_in(f, **{"a\nb__png": b""})),
        r"images/a\\nb.png' \(not an",
    ),
    (
        "image: a name in no encoding",
        lambda f: load(images_in(f, **{"a\udcff__png": GOOD})),
        "is not in UTF-8",
    ),
    ("a folder of nothing", lambda f: load(images_in(f, a__txt=b"x")), "has no images .looked for"),
    (
        "images too small",
        lambda f: load(images_in(f, a__png=GOOD), 4),
        "size=4: images need a side of 8 px",
    ),
    (
        "images too large",
        lambda f: load(images_in(f, a__png=GOOD), 10**9),
        "at most 8192: a whole number",
    ),
    (
        "a size in words",
        lambda f: load(images_in(f, a__png=GOOD), "a"),
        "size='a': images need a side",
    ),
    (
        "no thread",
        lambda f: issl.load(images_in(f, a__png=GOOD), workers=0),
        "workers=0: give a whole num",
    ),
    # archives and tables
    (
        "tar: compressed",
        lambda f: load(tar(f, [("a.png", GOOD)], "w:gz")),
        "compressed .gzip.*unpack it",
    ),
    ("tar: empty", lambda f: load(tar(f, [])), "its archives hold no images"),
    (
        "tar: one name twice",
        lambda f: load(tar(f, [("a.png", GOOD)] * 2)),
        "set.tar/a.png occurs twice",
    ),
    (
        "tar: no class",
        lambda f: load(tar(f, [("a.png", GOOD), ("a.cls", b"x")])),
        "a.cls holds 'x'; a cl",
    ),
    (
        "tar: a huge class",
        lambda f: load(tar(f, [("a.cls", b"9" * 10**5)])),
        "a.cls holds '9999.*; a class number",
    ),
    (
        "tar: declares a terabyte",
        lambda f: load(tar_declaring(f, "a.png", 2**40)),
        "unexpected end of data.; repair",
    ),
    (
        "tar: a class of a terabyte",
        lambda f: load(tar_declaring(f, "a.cls", 2**40)),
        "unexpected end of data",
    ),
    (
        "table: no image",
        lambda f: load(parquet(f, x=[1])),
        "no column of images .*its columns are x",
    ),
    (
        "table: no row",
        lambda f: load(parquet(f, image=pa.array([], pa.binary()))),
        "its files hold no rows",
    ),
    (
        "table: numbers",
        lambda f: load(parquet(f, image=[1, 2])),
        "holds no encoded image but 1; write the set",
    ),
    (
        "table: a path alone",
        lambda f: load(parquet(f, image=[{"bytes": None, "path": "/etc/passwd"}])),
        "but None",
    ),
    (
        "table: a class below 0",
        lambda f: load(parquet(f, **TWO, label=[-1, 5])),
        "label holds -1; drop the column",
    ),
    (
        "table: half a class",
        lambda f: load(parquet(f, **TWO, label=[0.5, 1.0])),
        "holds .*0.5.*; need whole num",
    ),
    (
        "table: too few names",
        lambda f: load(parquet(f, NAMES, **TWO, label=[0, 3])),
        "label 3, but its metadata",
    ),
    (
        "table: metadata",
        lambda f: load(parquet(f, {b"huggingface": b"x"}, **TWO, label=[0, 1])),
        "`huggingface`",
    ),
    (
        "tables that differ",
        lambda f: load(two_parquets(f, TWO, {"x": [1]})),
        "no column image, as a.parquet has",
    ),
    # data sets
    (
        "no such set",
        lambda _: issl.load("imagenet"),
        "data set 'imagenet': known are scenes, cifar10",
    ),
    (
        "no name",
        lambda _: issl.load(None),
        "data set None: give its name, such as cifar10 or folder:PATH",
    ),
    (
        "no such part",
        lambda _: issl.load("scenes", "val"),
        "split 'val': scenes has train and test",
    ),
    (
        "images by halves",
        lambda _: issl.load("scenes", n=1.5),
        "n=1.5: data set 'scenes': ask for a whole number",
    ),
    (
        "how many in words",
        lambda _: issl.load("scenes", n="ten"),
        "n='ten': data set 'scenes': ask for a whole number",
    ),
    (
        "a set's negative seed",
        lambda _: issl.load("scenes", n=4, seed=-1),
        "seed=-1: give a whole number from 0",
    ),
    (
        "a size that it has not",
        lambda _: issl.load("scenes", n=4, size=64),
        "size=64: 'scenes' has a fixed size",
    ),
    (
        "a data root that is a file",
        lambda f: issl.load("cifar10", root=ours(f)),
        "is not a folder; check --data-root",
    ),
    # encoders in files
    *(
        (f"checkpoint: {name}", lambda f, m=make: open_encoder(str(m(f))), message)
        for name, make, message in CHECKPOINTS
    ),
    (
        "pixels of no spread",
        lambda f: open_encoder(str(ours(f)), std=(0.0, 1.0, 1.0)),
        "std=.0.0.*above 0, one a",
    ),
    (
        "pixels around NaN",
        lambda f: open_encoder(str(ours(f)), mean=(math.nan,) * 3),
        "mean=.nan.*need finite numbers",
    ),
    # the command line
    *(
        (f"issl {' '.join(words)}", lambda f, w=words: command(f, *w), message)
        for words, message in COMMANDS
    ),
]


@pytest.mark.parametrize(("case", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input_is_one_clear_error(
    case: Case, message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(
        jaxtyping.config, "jaxtyping_disable", True
    )  # what a user without beartype gets
    with pytest.raises(issl.IsslError, match=message) as error:
        case(tmp_path)
    assert str(error.value).strip().count("\n") == 0 and " object at 0x" not in str(error.value)


def test_there_are_more_than_a_hundred_and_no_two_alike() -> None:
    assert len({row[0] for row in BAD}) == len(BAD) >= 100


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_said() -> None:
    with pytest.raises(issl.IsslError, match=r"device 'cuda'.*--device cpu"):
        score(computing=issl.Computing(device="cuda"))


UNUSUAL: list[tuple[str, Callable[[], Any]]] = [
    ("frozen", lambda: score(net().requires_grad_(False))),
    ("compiled", lambda: score(torch.compile(net(), backend="eager"))),
    ("DataParallel", lambda: score(nn.DataParallel(net()).eval())),
    ("checkpointed", lambda: score(Checkpointed(lambda f: f))),
    ("under no_grad", torch.no_grad()(score)),
    ("one at a time", lambda: score(computing=issl.Computing(batch_size=1))),
    ("weight_norm", lambda: score(with_weight_norm().eval())),
    ("the older weight_norm", lambda: score(with_older_weight_norm())),
    ("spectral_norm", lambda: score(with_spectral_norm())),
    ("LoRA as a parametrisation", lambda: score(with_lora())),
    ("LoRA as a layer", lambda: score(with_lora_layer(), skip=["4.low"])),
    ("a hook that keeps what it sees", lambda: score(Keeps(lambda f: f))),
    ("seeds of numpy", lambda: score(seed=np.int64(0), draws=np.int64(1))),
    ("noise in double precision", lambda: score(None, IMAGES, InDouble())),
]


@pytest.mark.parametrize("case", [row[1] for row in UNUSUAL], ids=[row[0] for row in UNUSUAL])
def test_unusual_encoders_and_callers_get_the_same_scores(
    case: Callable[[], Any], monkeypatch: Any
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    np.testing.assert_allclose(case()["influence"], score()["influence"], rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_rank_alike(dtype: torch.dtype) -> None:
    found = score(net().to(dtype))["influence"]
    assert found.notna().all() and found.corr(score()["influence"], method="spearman") > 0.8


def test_a_perturbation_that_works_in_place_changes_no_image() -> None:
    before = IMAGES.pixels.clone()
    here, there = (
        score(None, IMAGES, how)["influence"] for how in (noise_in_place, the_same_noise)
    )
    assert (here > 0).all() and torch.equal(IMAGES.pixels, before)
    np.testing.assert_allclose(here, there, rtol=1e-6)


def test_scores_that_say_nothing_are_said() -> None:
    with pytest.warns(
        UserWarning, match="every influence is 0: the perturbation does not move the features"
    ):
        score(None, IMAGES, issl.GaussianNoise(0.0, 0.0))


def test_fewer_images_than_directions_and_no_damping_is_said() -> None:
    with pytest.warns(
        UserWarning, match="every influence is 12: there are fewer images than dir.*raise the damp"
    ):
        score(curvature=issl.LoGra(damping=1e-30))


def test_an_encoder_as_initialised_is_a_control_where_it_is_asked_for(tmp_path: Path) -> None:
    found = score(fresh_norm(), untrained=True)
    assert (
        found.attrs["untrained"]
        and (found["influence"] > 0).all()
        and not score().attrs["untrained"]
    )
    issl.fit(fresh_norm(), IMAGES, untrained=True).save(tmp_path / "c.safetensors")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = fresh_norm()
        issl.fit(encoder, IMAGES, untrained=True).save(tmp_path / "c.safetensors")
    later = issl.load_fitted(tmp_path / "c.safetensors", encoder).score(IMAGES)
    pd.testing.assert_frame_equal(later, score(encoder, untrained=True), rtol=1e-6)
    assert later.attrs["untrained"]


GREY = PIXELS[0]
STRANGE_IMAGES: list[tuple[str, bytes, np.ndarray]] = [
    ("grey", encoded(Image.fromarray(GREY), "PNG"), np.stack([GREY] * 3)),
    (
        "grey of 16 bits",
        encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"),
        np.stack([GREY] * 3),
    ),
    (
        "black and white",
        encoded(Image.fromarray(GREY > 100), "PNG"),
        np.stack([(GREY > 100) * np.uint8(255)] * 3),
    ),
    ("with transparency", encoded(PICTURE.convert("RGBA"), "PNG"), PIXELS),
    ("CMYK", encoded(PICTURE.convert("CMYK"), "TIFF"), PIXELS),
    (
        "animated: the first",
        encoded(PICTURE, "WEBP", lossless=True, save_all=True, append_images=[PICTURE.rotate(90)]),
        PIXELS,
    ),
    ("of one pixel", encoded(Image.new("RGB", (1, 1), (8, 8, 8)), "PNG"), np.full((3, 16, 16), 8)),
    ("long", encoded(Image.new("RGB", (1, 900), (9, 9, 9)), "PNG"), np.full((3, 16, 16), 9)),
]


@pytest.mark.parametrize(
    ("content", "want"), [row[1:] for row in STRANGE_IMAGES], ids=[row[0] for row in STRANGE_IMAGES]
)
def test_strange_images_are_read_as_they_look(
    content: bytes, want: np.ndarray, tmp_path: Path
) -> None:
    np.testing.assert_array_equal(load(images_in(tmp_path, a__png=content))[0], want)


def test_odd_names_are_only_names(tmp_path: Path) -> None:
    names = [
        "a b.png",
        "q'\"uote.png",
        "<script>.png",
        "ünï😀.png",
        "-rf.png",
        "; rm.png",
        "new\nline.png",
        "{0}%s.png",
    ]
    images = issl.load(images_in(tmp_path, **dict.fromkeys(names, GOOD)), size=16)
    assert sorted(images.attributes["path"]) == sorted(names) and len(images.tensor()) == len(names)


def test_texts_as_classes(tmp_path: Path) -> None:
    images = issl.load(parquet(tmp_path, **TWO, label=["dog", "cat"]))
    assert images.labels.tolist() == [1, 0] and images.attributes["label_name"].tolist() == [
        "dog",
        "cat",
    ]
