"""What people hand to the library by mistake, and what they then read; and unusual things that are scored all the same.

One row a case. A message names the thing, the value and the remedy; it comes before any long work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import issl

IMAGES = issl.load("scenes", n=6)
Score = Callable[..., Any]


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    parts = (nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
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


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.attention = nn.Linear(96, 16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x.permute(0, 2, 1, 3).flatten(2))
        return self.attention(tokens, tokens, tokens)[0].mean(1)


def spoiled(value: float) -> nn.Module:
    model = net()
    with torch.no_grad():
        model[4].weight[0, 0] = value
    return model


def fresh_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def over_the_batch() -> nn.Module:
    parts = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*parts).eval()


def transposed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def score(encoder: Any = None, images: Any = IMAGES, *arguments: Any, **more: Any) -> Any:
    return issl.self_influence(net() if encoder is None else encoder, images, *arguments, **more)


def noise_in_place(x: Tensor, index: Tensor) -> Tensor:
    return x.add_(0.1 * torch.sin(torch.arange(x[0].numel(), dtype=x.dtype)).view_as(x[0]))


def the_same_noise(x: Tensor, index: Tensor) -> Tensor:
    return x + 0.1 * torch.sin(torch.arange(x[0].numel(), dtype=x.dtype)).view_as(x[0])


def in_inference_mode() -> Any:
    with torch.inference_mode():
        return score()


BAD: list[tuple[str, Callable[[], Any], str]] = [
    # the encoder
    ("none", lambda: issl.self_influence(None, IMAGES), "encoder is None; give a torch.nn.Module"),
    ("a function", lambda: score(lambda x: x.mean((2, 3))), "encoder is a function; give a torch.nn.Module"),
    ("without values", lambda: score(net().to("meta")), "0.weight has no values .device meta.; load its weights"),
    ("in train mode", lambda: score(net().train()), "in train mode .*call encoder.eval"),
    ("weights NaN", lambda: score(spoiled(float("nan"))), "4.weight holds NaN or infinite values; load an intact"),
    ("weights infinite", lambda: score(spoiled(float("inf"))), "4.weight holds NaN or infinite values"),
    ("never trained", lambda: score(fresh_norm()), "1 was never trained .running mean 0, variance 1.; load trained"),
    ("normalises the batch", lambda: score(over_the_batch()), "normalises by the batch .*use running statistics"),
    ("nothing to score", lambda: score(nn.Flatten().eval()), "no Linear or Conv2d layer to score"),
    ("shares a weight", lambda: score(Tied()), "a and b share one weight; .*skip both"),
    ("attention", lambda: score(Attention()), "attention.in_proj_weight .MultiheadAttention.; leave"),
    ("transposed", lambda: score(transposed()), "0.weight .ConvTranspose2d.; leave them out of the score with skip="),
    ("no gradient", lambda: score(WithoutGradient(lambda f: f)), "cuts its features off .*remove no_grad or detach"),
    ("detached", lambda: score(Gives(lambda f: f.detach())), "cuts its features off .*remove no_grad or detach"),
    ("stateful", lambda: score(Counting()), "other features alone than in a batch"),
    ("random", lambda: score(Gives(lambda f: f + 0.1 * torch.randn_like(f))), "other features alone than in a batch"),
    ("mixes the batch", lambda: score(Gives(lambda f: f + f.mean(0))), "other features alone than in a batch"),
    # what it gives
    ("a tuple", lambda: score(Gives(lambda f: (f, f))), r"gives tuple for 4 images; it must give .*\(4, d\)"),
    ("a dictionary", lambda: score(Gives(lambda f: {"x": f})), "gives dict for 4 images"),
    ("nothing", lambda: score(Gives(lambda f: None)), "gives NoneType for 4 images"),
    ("tokens", lambda: score(Gives(lambda f: f[:, None].repeat(1, 3, 1))), r"gives \(4, 3, 5\) for 4 images"),
    ("one number", lambda: score(Gives(lambda f: f.mean())), r"gives \(\) for 4 images"),
    # the images
    ("no image", lambda: score(images=IMAGES.subset([])), "images 'scenes': the set is empty"),
    ("floats", lambda: score(images=torch.rand(4, 3, 32, 32)), r"pixels are torch.float32; give uint8.*255 \* x"),
    ("one channel", lambda: score(images=torch.zeros(4, 1, 32, 32).byte()), r"got \(4, 1, 32, 32\), need"),
    ("one image alone", lambda: score(images=torch.zeros(3, 32, 32).byte()), r"got \(3, 32, 32\), need"),
    ("a list", lambda: score(images=[1, 2]), "got list, need issl.Images or a tensor"),
    ("numpy", lambda: score(images=np.zeros((4, 3, 32, 32), np.uint8)), "got ndarray, need issl.Images or a tensor"),
    # the perturbation
    ("no object", lambda: score(None, IMAGES, issl.GaussianNoise), "need an object with .keyed.seed., such as Gauss"),
    ("no perturbation", lambda: score(None, IMAGES, None), "perturbation None: need an object"),
    ("negative noise", lambda: issl.GaussianNoise(0.0, -1.0), r"std=-1.0\): .* a finite number ≥ 0"),
    ("infinite noise", lambda: issl.GaussianNoise(0.0, float("inf")), r"std=inf\): .* a finite number ≥ 0"),
    ("noise in words", lambda: issl.GaussianNoise(0.0, "a"), "std='a'"),
    ("another shape", lambda: score(None, IMAGES, lambda x, i: x[:, :, :16]), "it must keep the shape"),
    ("no tensor", lambda: score(None, IMAGES, lambda x, i: x.numpy()), "perturbation gives ndarray"),
    ("NaN pixels", lambda: score(None, IMAGES, lambda x, i: x / 0 * 0), r"NaN or infinite pixels for image index \["),
    # the curvature
    ("a class", lambda: score(curvature=issl.LoGra), r"need an object such as LoGra\(rank=16\)"),
    ("a name", lambda: score(curvature="logra"), r"curvature 'logra': need an object such as LoGra"),
    ("no damping", lambda: issl.LoGra(damping=0.0), r"damping=0.0\): must be a finite number > 0"),
    ("infinite damping", lambda: issl.LoGra(damping=float("inf")), r"damping=inf\): must be a finite number > 0"),
    ("NaN damping", lambda: issl.LoGra(damping=float("nan")), r"damping=nan\): must be a finite number > 0"),
    ("damping in words", lambda: issl.LoGra(damping="x"), "damping='x'"),
    ("rank 0", lambda: issl.LoGra(rank=0), r"rank=0\): a whole number of 1 or more, or a fraction"),
    ("rank in words", lambda: issl.LoGra(rank="x"), "rank='x'"),
    ("infinite sweep", lambda: score(sweep=[float("inf")]), "sweep: damping inf must be a finite number > 0"),
    # numbers
    ("a huge seed", lambda: score(seed=2**70), "seed=1180591620717411303424: give a whole number from 0 to"),
    ("a negative seed", lambda: score(seed=-1), "seed=-1: give a whole number"),
    ("a fractional seed", lambda: score(seed=1.5), "seed=1.5: give a whole number"),
    ("a seed in words", lambda: score(seed="a"), "seed='a': give a whole number"),
    ("no draw", lambda: score(draws=0), "draws=0: must be a whole number, 1 or more"),
    ("draws in words", lambda: score(draws="2"), "draws='2': must be a whole number"),
    ("draws of a function", lambda: score(None, IMAGES, the_same_noise, draws=2), "several draws need a perturbation"),
    ("another average", lambda: score(average="mean"), "average='mean': choose gradients or scores"),
    # what to leave out
    ("skip everything", lambda: score(skip=["0", "4"]), r"layer to score left after skip=\['0', '4'\]"),
    ("skip nothing there", lambda: score(skip=["zzz"]), r"skip=\['zzz'\]: the encoder has no module or parameter"),
    ("skip a word", lambda: score(skip="0"), r"skip='0': give a list of names, such as \['0'\]"),
    # how to compute
    ("inference mode", in_inference_mode, "call this outside of torch.inference_mode"),
    ("batch size 0", lambda: issl.Computing(batch_size=0), "batch_size=0: must be 1 or more"),
    ("another precision", lambda: issl.Computing(precision="fp8"), "precision='fp8': choose fp32 or bf16"),
    ("no such device", lambda: issl.Computing(device="tpu9"), "device='tpu9': torch knows no such device; try cpu or"),
    ("a store nowhere", lambda: score(computing=issl.Computing(store="/proc/none/x")), "cannot be written .*another"),
    ("no memory", lambda: issl.Computing(memory_gb=0.0), "memory_gb=0.0: must be > 0"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input_is_one_clear_error(case: Callable[[], Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # what a user without beartype gets
    with pytest.raises(issl.IsslError, match=message):
        case()


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
]  # fmt: skip


@pytest.mark.parametrize("case", [row[1] for row in UNUSUAL], ids=[row[0] for row in UNUSUAL])
def test_unusual_encoders_and_callers_get_the_same_scores(case: Callable[[], Any]) -> None:
    np.testing.assert_allclose(case()["influence"], score()["influence"], rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_rank_alike(dtype: torch.dtype) -> None:
    found = score(net().to(dtype))["influence"]
    assert found.notna().all() and found.corr(score()["influence"], method="spearman") > 0.8


def test_a_perturbation_that_works_in_place_changes_no_image() -> None:
    before = IMAGES.pixels.clone()
    here, there = (score(None, IMAGES, how)["influence"] for how in (noise_in_place, the_same_noise))
    assert (here > 0).all() and torch.equal(IMAGES.pixels, before)
    np.testing.assert_allclose(here, there, rtol=1e-6)


def test_scores_that_say_nothing_are_said() -> None:
    with pytest.warns(UserWarning, match="every influence is 0: the perturbation does not move the features"):
        score(None, IMAGES, issl.GaussianNoise(0.0, 0.0))
