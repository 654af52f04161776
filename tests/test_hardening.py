"""What people hand to the library by mistake, and unusual things that are scored all the same.

One row a case: an IsslError in one line that names the thing, before any long work.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import disk
import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from disk import encoded
from hostile import GOOD, PICTURE, PIXELS, declaring, with_text_of
from hostile import folder as images_in
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import issl
from issl import Computing, cli
from issl.files import read_safetensors
from issl.pretraining.other_encoders import open_encoder

IMAGES = issl.load("scenes", n=6)
FLOATS = encoded(Image.fromarray(np.zeros((20, 28), np.float32)), "TIFF")
Case = Callable[[Path], Any]


def pooled(*parts: nn.Module) -> nn.Module:
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def net() -> nn.Module:
    torch.manual_seed(0)
    return pooled(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()).append(nn.Linear(4, 5)).eval()


class Gives(nn.Module):
    """An encoder whose features are changed by a function."""

    def __init__(self, change: Callable[[Tensor], Any], inner: nn.Module | None = None):
        super().__init__()
        self.inner, self.change = inner or net(), change
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.change(self.inner(x))


def with_unused_head() -> nn.Module:
    encoder = Gives(lambda f: f)
    encoder.head = nn.Linear(5, 2).eval()
    return encoder


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3072, 3072, bias=False), nn.Linear(3072, 3072, bias=False)
        self.b.weight = self.a.weight
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x.flatten(1))))


def with_nan() -> nn.Module:
    model = net()
    model[4].weight.data[0, 0] = float("nan")
    return model


def fresh_norm() -> nn.Module:
    return pooled(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def over_the_batch() -> nn.Module:
    return pooled(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))


def score(encoder: Any = None, images: Any = IMAGES, *arguments: Any, **more: Any) -> Any:
    return issl.self_influence(net() if encoder is None else encoder, images, *arguments, **more)


def the_same_noise(x: Tensor, index: Tensor) -> Tensor:
    return x + 0.1 * torch.sin(torch.arange(x[0].numel(), dtype=x.dtype)).view_as(x[0])


def with_last(change: Callable[[Any], nn.Module]) -> nn.Module:
    model = net()
    model[4] = change(model[4])
    return model.eval()


def load(name: str, size: Any = 16) -> Tensor:
    return issl.load(name, size=size).tensor()


def saved_encoder(folder: Path) -> str:
    return disk.encoder(folder / "e.safetensors")


def of_another_width(folder: Path) -> str:
    """An encoder whose header says another width than that of its weights."""
    path = saved_encoder(folder)
    header = json.loads(read_safetensors(Path(path), "encoder")[0]["issl"])
    save_file(load_file(path), path, {"issl": json.dumps({**header, "width": 1})})
    return path


def two(folder: Path, content: bytes) -> Any:
    return load(images_in(folder, a__png=GOOD, b__png=content))


BAD: dict[str, tuple[Case, str]] = {
    # the encoder
    "train mode": (lambda _: score(net().train()), "encoder is in train mode"),
    "NaN": (lambda _: score(with_nan()), "4.weight"),
    "never trained": (lambda _: score(fresh_norm()), "1 was never trained .*untrained=True"),
    "over the batch": (lambda _: score(over_the_batch()), "1 normalises by the batch"),
    "a shared weight": (lambda _: score(Tied()), "a and b share one weight"),
    "transposed": (
        lambda _: score(pooled(nn.ConvTranspose2d(3, 4, 3))),
        "0.weight .is a weight of ConvTranspose2d",
    ),
    "detached": (lambda _: score(Gives(lambda f: f.detach())), "encoder cuts its features"),
    "mixing": (lambda _: score(Gives(lambda f: f + f.mean(0))), "other features alone"),
    "traced": (lambda _: score(torch.jit.trace(net(), IMAGES.pixels[:1] / 255)), "torch.jit"),
    "quantised": (
        lambda _: score(with_last(lambda _: torch.ao.nn.quantized.dynamic.Linear(4, 5))),
        "4 is a Linear",
    ),
    "gives a tuple": (lambda _: score(Gives(lambda f: (f, f))), "encoder gives tuple"),
    "gives NaN": (lambda _: score(Gives(lambda f: f / 0)), "NaN or infinite features for image"),
    "gives zeros": (lambda _: score(Gives(lambda f: f * 0)), "all-zero, .* for image index 0, 1"),
    "a head that is not used": (
        lambda _: score(with_unused_head()),
        r"1 of 3 .* head \(is never used.*skip",
    ),
    # the images
    "no image": (lambda _: score(images=IMAGES.subset([])), "images 'scenes'"),
    "floats": (lambda _: score(images=torch.rand(4, 3, 32, 32)), "pixels are torch.float32"),
    # the perturbation and the loss
    "NaN pixels": (lambda _: score(None, IMAGES, lambda x, i: x / 0 * 0), "image index"),
    "no loss": (lambda _: score(loss=lambda a, b: torch.zeros(len(a))), "loss does not depend"),
    # numbers and names
    "a fractional seed": (lambda _: score(seed=1.5), "seed=1.5"),
    "no draws": (lambda _: score(draws=0), "draws=0"),
    "draws of a function": (lambda _: score(None, IMAGES, the_same_noise, draws=2), "draws=2"),
    "skip a word": (lambda _: score(skip="0"), "skip='0'"),
    # how to compute
    "batch 0": (lambda _: score(computing=Computing(batch_size=0)), "batch_size=0"),
    "an abacus": (lambda _: score(computing=Computing(device="abacus")), "device='abacus'"),
    # files
    "an image cut off": (lambda f: two(f, GOOD[:60]), "b.png .*truncated"),
    "an image of 3,600 million pixels": (lambda f: two(f, declaring(60_000, 60_000)), "b.png"),
    "pixels of floats": (lambda f: load(images_in(f, a__tiff=FLOATS)), "a.tiff .*mode F"),
    "an image with a text of 30 MB": (lambda f: two(f, with_text_of(30_000_000)), "b.png"),
    "another width in it": (lambda f: open_encoder(of_another_width(f)), "width 1"),
    "pixels of no spread": (lambda f: open_encoder(saved_encoder(f), std=(0.0, 1.0, 1.0)), "std="),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as without beartype
    case, named = BAD[name]
    with pytest.raises(issl.IsslError, match=named) as error:
        case(tmp_path)
    assert str(error.value).strip().count("\n") == 0 and " object at 0x" not in str(error.value)


PRETRAIN = "pretrain --data scenes --n 32 --batch-size 16 --width 1 --out OUT.safetensors "
INFLUENCE = "influence --data scenes --n 8 --encoder ENCODER --out OUT.csv "
COMMANDS = {  # what must be named
    "fly": "'fly'",
    PRETRAIN + "--n 0": "n=0",
    PRETRAIN + "--out /proc/x.safetensors": "--out /proc/x",
    INFLUENCE + "--encoder nowhere": "encoder 'nowhere' is not a file",
    INFLUENCE + "--noise-std nan": "std=nan",
    "download imagenet --data-root OUT": "cifar10, cifar100, fairface",
}


@pytest.mark.parametrize("words", COMMANDS)
def test_a_bad_command_fails_at_once_and_leaves_nothing(
    words: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    encoder = saved_encoder(tmp_path)
    given = words.replace("ENCODER", encoder).replace("OUT", str(tmp_path / "out")).split()
    for place in ("issl.pretraining.loop.epoch_batches", "issl.devices.Batches.__call__"):
        monkeypatch.setattr(place, lambda *_: pytest.fail("work was begun"))
    try:
        code = cli.main(given)
    except SystemExit as stop:  # argparse's
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("issl: error: ") and error.count("\n") == 1
    assert COMMANDS[words] in error and [str(p) for p in tmp_path.iterdir()] == [encoder]


UNUSUAL: dict[str, Callable[[], Any]] = {
    "frozen": lambda: score(net().requires_grad_(False)),
    "compiled": lambda: score(torch.compile(net(), backend="eager")),
    "DataParallel": lambda: score(nn.DataParallel(net()).eval()),
    "under no_grad": torch.no_grad()(score),
    "weight_norm": lambda: score(with_last(parametrizations.weight_norm)),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_encoders_and_callers_get_the_same_scores(name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    np.testing.assert_allclose(UNUSUAL[name]()["influence"], score()["influence"], rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_rank_alike(dtype: torch.dtype) -> None:
    found = score(net().to(dtype))["influence"]
    assert found.notna().all() and found.corr(score()["influence"], method="spearman") > 0.8


def test_a_perturbation_that_works_in_place_changes_no_image() -> None:
    before = IMAGES.pixels.clone()
    here = score(None, IMAGES, lambda x, index: x.copy_(the_same_noise(x, index)))["influence"]
    there = score(None, IMAGES, the_same_noise)["influence"]
    assert (here > 0).all() and torch.equal(IMAGES.pixels, before)
    np.testing.assert_allclose(here, there, rtol=1e-6)


def test_scores_that_say_nothing_are_said() -> None:
    with pytest.warns(UserWarning, match="no loss is above 0, .* hardly moves the features"):
        score(None, IMAGES, issl.GaussianNoise(0.0, 0.0))


def test_an_encoder_as_initialised_is_a_control_where_it_is_asked_for(tmp_path: Path) -> None:
    encoder = fresh_norm()
    found = score(encoder, untrained=True)
    assert found.attrs["untrained"] and (found["influence"] > 0).all()
    assert not score().attrs["untrained"]
    issl.fit(encoder, IMAGES, untrained=True).save(tmp_path / "c.safetensors")
    later = issl.load_fitted(tmp_path / "c.safetensors", encoder).score(IMAGES)
    pd.testing.assert_frame_equal(later, found, rtol=1e-6)
    assert later.attrs["untrained"]


GREY = PIXELS[0]
GREY16 = GREY.astype(np.uint16) * 257
SIDEWAYS = Image.Exif()
SIDEWAYS[274] = 6  # the orientation: the camera was held a quarter turn clockwise
PAIR: dict[str, Any] = {"save_all": True, "append_images": [PICTURE.rotate(90)]}
STRANGE_IMAGES: dict[str, tuple[bytes, np.ndarray]] = {
    "grey of 16 bits": (encoded(Image.fromarray(GREY16), "PNG"), np.stack([GREY] * 3)),
    "with transparency": (encoded(PICTURE.convert("RGBA"), "PNG"), PIXELS),
    "CMYK": (encoded(PICTURE.convert("CMYK"), "TIFF"), PIXELS),
    "animated: the first": (encoded(PICTURE, "WEBP", lossless=True, **PAIR), PIXELS),
    "sideways": (encoded(PICTURE, "PNG", exif=SIDEWAYS), np.rot90(PIXELS, -1, (1, 2))),
    "wide: the middle third": (encoded(np.tile(PIXELS, (1, 1, 3)), "PNG"), PIXELS),
    "long": (encoded(Image.new("RGB", (1, 900), (9, 9, 9)), "PNG"), np.full((3, 16, 16), 9)),
}


@pytest.mark.parametrize("name", STRANGE_IMAGES)
def test_strange_images_are_read_as_they_look(name: str, tmp_path: Path) -> None:
    content, want = STRANGE_IMAGES[name]
    np.testing.assert_array_equal(load(images_in(tmp_path, a__png=content))[0], want)
    given = issl.from_dataset([Image.open(io.BytesIO(content))], size=16)
    np.testing.assert_array_equal(given.tensor()[0], want)
