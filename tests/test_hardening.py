"""What people hand to the library by mistake, and unusual things that are scored all the same.

One row a case: an IsslError in one line that names the thing, before any long work.
"""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import disk
import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from disk import encoded, png
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.ao.nn.quantized.dynamic import Linear as Quantised
from torch.nn.utils import parametrizations

import issl
from issl import Computing, GaussianNoise, cli
from issl.pretraining.other_encoders import open_encoder

IMAGES = issl.load("scenes", n=6)
PIXELS = (np.arange(3 * 16 * 16) % 251).astype(np.uint8).reshape(3, 16, 16)
PICTURE = Image.fromarray(PIXELS.transpose(1, 2, 0))


def pooled(*parts: nn.Module) -> nn.Module:
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def net() -> nn.Module:
    torch.manual_seed(0)
    return pooled(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()).append(nn.Linear(4, 5)).eval()


def gives(change: Callable[[Tensor], Any]) -> nn.Module:
    """An encoder whose features are changed by a function."""
    model = net()
    model.register_forward_hook(lambda _, given, features: change(features))
    return model


def tied() -> nn.Module:
    model = pooled(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    model[1].weight = model[0].weight
    return model


def with_nan() -> nn.Module:
    model = net()
    model[4].weight.data[0, 0] = float("nan")
    return model


def fresh_norm(**how: Any) -> nn.Module:
    return pooled(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **how))


def score(encoder: Any = None, images: Any = IMAGES, **more: Any) -> Any:
    return issl.self_influence(net() if encoder is None else encoder, images, **more)


def the_same_noise(x: Tensor, index: Tensor) -> Tensor:
    return x + 0.1 * torch.sin(torch.arange(x[0].numel(), dtype=x.dtype)).view_as(x[0])


def with_last(change: Callable[[Any], nn.Module]) -> nn.Module:
    model = net()
    model[4] = change(model[4])
    return model.eval()


def of_another_width(folder: Path) -> str:
    path = disk.encoder(folder / "e.safetensors")
    save_file(load_file(path), path, {"issl": json.dumps({"width": 1, "head": {}})})
    return path


def load(folder: Path, *contents: bytes) -> Tensor:
    """A folder of these files: 0.png, 1.png, …"""
    for k, content in enumerate(contents):
        (folder / f"{k}.png").write_bytes(content)
    return issl.load(f"folder:{folder}", size=16).tensor()


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    # the encoder
    "train mode": (lambda _: score(net().train()), "encoder is in train mode"),
    "NaN": (lambda _: score(with_nan()), "4.weight"),
    "never trained": (lambda _: score(fresh_norm()), "1 was never trained .*untrained=True"),
    "over the batch": (lambda _: score(fresh_norm(track_running_stats=False)), "1 normalises by"),
    "a shared weight": (lambda _: score(tied()), "0 and 1 share one weight"),
    "detached": (lambda _: score(gives(lambda f: f.detach())), "encoder cuts its features"),
    "mixing": (lambda _: score(gives(lambda f: f + f.mean(0))), "other features alone"),
    "traced": (lambda _: score(torch.jit.trace(net(), IMAGES.pixels[:1] / 255)), "torch.jit"),
    "gives a tuple": (lambda _: score(gives(lambda f: (f, f))), "encoder gives tuple"),
    "quantised": (lambda _: score(with_last(lambda _: Quantised(4, 5))), "4 is a Linear"),
    "gives NaN": (lambda _: score(gives(lambda f: f / 0)), "NaN or infinite features for image"),
    "gives zeros": (lambda _: score(gives(lambda f: f * 0)), "all-zero, .* for image index 0, 1"),
    # the images
    "floats": (lambda _: score(images=torch.rand(4, 3, 32, 32)), "pixels are torch.float32"),
    # the perturbation and the loss
    "NaN pixels": (lambda _: score(perturbation=lambda x, i: x / 0 * 0), "image index"),
    "no loss": (lambda _: score(loss=lambda a, b: torch.zeros(len(a))), "loss does not depend"),
    # numbers and names
    "draws of a function": (lambda _: score(perturbation=the_same_noise, draws=2), "draws=2"),
    "skip a word": (lambda _: score(skip="0"), "skip='0'"),
    "no damping": (lambda _: issl.Exact(math.nan), "damping=nan"),
    # how to compute
    "an abacus": (lambda _: score(computing=Computing(device="abacus")), "device='abacus'"),
    # files
    "pixels of floats": (lambda f: load(f, encoded(Image.new("F", (9, 9)), "TIFF")), "mode F"),
    "a huge image": (lambda f: load(f, b"P6 60000 60000 255\n"), "0.png .*3600000000 pixels"),
    "another width in it": (lambda f: open_encoder(of_another_width(f)), "width 1"),
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
    "explain nowhere.png --data scenes --n 8 --encoder ENCODER --out OUT.png": "nowhere.png",
    "explain train:8 --data scenes --n 8 --encoder ENCODER --out OUT.png": "train:8",
    "run --profile huge --out OUT": "profile 'huge'",
    "run --profile mini --data-root /nowhere": "there is no /nowhere/",
    "run --out /proc/nothing": "cannot be written",
    "run --only 06 --checkpoint simclr=ENCODER --out OUT": "06_pruning",
}


@pytest.mark.parametrize("words", COMMANDS)
def test_a_bad_command_fails_at_once_and_leaves_nothing(
    words: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    encoder = disk.encoder(tmp_path / "e.safetensors")
    given = words.replace("ENCODER", encoder).replace("OUT", str(tmp_path / "out")).split()
    work = "pretraining.loop.epoch_batches devices.Batches.__call__ engine.Engine.run"
    for place in work.split():
        monkeypatch.setattr(f"issl.{place}", lambda *_: pytest.fail("work was begun"))
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
    here, there = (
        score(perturbation=noise)["influence"]
        for noise in (lambda x, index: x.copy_(the_same_noise(x, index)), the_same_noise)
    )
    assert (here > 0).all() and torch.equal(IMAGES.pixels, before)
    np.testing.assert_allclose(here, there, rtol=1e-6)


def test_scores_that_say_nothing_are_said() -> None:
    with pytest.warns(UserWarning, match="no loss is above 0, .* hardly moves the features"):
        score(perturbation=GaussianNoise(0.0, 0.0))


def test_an_encoder_as_initialised_is_a_control_where_it_is_asked_for(tmp_path: Path) -> None:
    encoder = fresh_norm()
    found = score(encoder, untrained=True)
    assert found.attrs["untrained"] and (found["influence"] > 0).all()
    assert not score().attrs["untrained"]
    issl.fit(encoder, IMAGES, untrained=True).save(tmp_path / "c.safetensors")
    later = issl.load_fitted(tmp_path / "c.safetensors", encoder).score(IMAGES)
    pd.testing.assert_frame_equal(later, found, rtol=1e-6)
    assert later.attrs["untrained"]


def test_strange_images_are_read_as_they_look(tmp_path: Path) -> None:
    grey, sideways = PIXELS[0].astype(np.uint16), Image.Exif()
    sideways[274] = 6  # the orientation: the camera was held a quarter turn clockwise
    contents = [
        encoded(Image.fromarray(257 * grey), "PNG"),  # of 16 bits
        encoded(PICTURE.convert("CMYK"), "TIFF"),
        png(PICTURE, exif=sideways),
        png(np.tile(PIXELS, (1, 1, 3))),  # wide: the middle third
    ]
    wanted = np.stack([grey] * 3), PIXELS, np.rot90(PIXELS, -1, (1, 2)), PIXELS
    np.testing.assert_array_equal(load(tmp_path, *contents), np.stack(wanted))
    opened = [Image.open(io.BytesIO(content)) for content in contents]
    np.testing.assert_array_equal(issl.from_dataset(opened, size=16).tensor(), np.stack(wanted))
