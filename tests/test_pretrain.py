"""Views against torchvision's functional ops; the objective; the laws of the loop."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import forked
import numpy as np
import pandas as pd
import pytest
import torch
import torchvision.transforms.v2.functional as TF

import issl
from issl import views
from issl.encoder import BasicBlock, load_encoder, new_encoder, save_encoder
from issl.files import read_safetensors
from issl.pretrain import epoch_order, epoch_uniforms, learning_rate, pretrain, simclr
from issl.stages import Artifacts, Data, Influence, Pretrain

SMALL = {"width": 2, "epochs": 2, "batch_size": 16, "warmup_epochs": 1, "progress": False}


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return issl.load("scenes", n=24).pixels.float() / 255


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_jitters_equal_torchvisions(name: str, x: torch.Tensor) -> None:
    low, high = (-0.5, 0.5) if name == "hue" else (0.2, 1.8)
    factors = torch.linspace(low, high, len(x))
    got = getattr(views, name)(x, factors)
    want = torch.stack([getattr(TF, f"adjust_{name}")(i, float(f)) for i, f in zip(x, factors, strict=True)])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)  # grey: 0.299 here, 0.2989 there


def test_jitter_applies_each_order(x: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = torch.rand(len(x), 4, generator=generator) * 0.3 + torch.tensor([0.8, 0.8, 0.8, -0.1])
    order = torch.rand(len(x), 4, generator=generator).argsort(1)
    yes = torch.arange(len(x)) % 3 > 0
    got = views.jitter(x, factors, order, yes)
    for k in range(len(x)):
        want = x[k]
        for which in order[k].tolist() if yes[k] else []:
            want = getattr(TF, f"adjust_{views.JITTERS[which].__name__}")(want, float(factors[k, which]))
        torch.testing.assert_close(got[k], want, rtol=0, atol=5e-4)


def test_grayscale_and_flip(x: torch.Tensor) -> None:
    yes = torch.arange(len(x)) % 2 == 0
    torch.testing.assert_close(views.grayscale(x, yes)[::2], TF.rgb_to_grayscale(x[::2], 3), rtol=0, atol=1e-3)
    assert torch.equal(views.grayscale(x, yes)[1::2], x[1::2])
    assert torch.equal(views.flip(x, yes)[::2], TF.horizontal_flip(x[::2])) and torch.equal(
        views.flip(x, yes)[1::2], x[1::2]
    )


def test_crop_equals_torchvisions(x: torch.Tensor) -> None:
    boxes = [(0, 0, 32, 32), (4, 6, 16, 20), (10, 2, 8, 30)]  # top, left, height, width in px
    for top, left, h, w in boxes:
        box = torch.tensor([[(top + h / 2) / 32, (left + w / 2) / 32, h / 32, w / 32]]).expand(len(x), 4)
        got = views.crop(x, box)
        want = TF.resized_crop(x, top, left, h, w, [32, 32], antialias=False)
        # torchvision resizes the box alone, so it differs where bilinear weights reach over the box's edge
        torch.testing.assert_close(got[:, :, 4:-4, 4:-4], want[:, :, 4:-4, 4:-4], rtol=0, atol=1e-4)


def test_crop_boxes_lie_inside_and_have_their_area() -> None:
    u = torch.rand(4000, 4, generator=torch.Generator().manual_seed(0))
    cy, cx, h, w = views.crop_boxes(u, 0.2).unbind(1)
    for centre, size in ((cy, h), (cx, w)):
        assert float((centre - size / 2).min()) > -1e-6 and float((centre + size / 2).max()) < 1 + 1e-6
    assert float((h * w).min()) > 0.19 and float((h * w).max()) <= 1 and 0.55 < float((h * w).mean()) < 0.62


def test_a_view_depends_on_its_own_numbers_alone(x: torch.Tensor) -> None:
    u = torch.rand(len(x), views.VIEW_UNIFORMS, generator=torch.Generator().manual_seed(0))
    together, alone = (
        views.SimCLRView()(x, u),
        torch.cat([views.SimCLRView()(x[k : k + 1], u[k : k + 1]) for k in range(len(x))]),
    )
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert float(together.min()) >= 0 and float(together.max()) <= 1


def test_simclr_loss_is_the_formula() -> None:
    za, zb = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).unbind()
    z = torch.cat([za, zb])
    s = torch.nn.functional.cosine_similarity(z[:, None], z[None], dim=2)
    terms = []
    for i in range(10):
        j = (i + 5) % 10
        others = sum(torch.exp(s[i, k] / 0.5) for k in range(10) if k != i)
        terms.append(-torch.log(torch.exp(s[i, j] / 0.5) / others))
    torch.testing.assert_close(simclr(za, zb, 0.5), torch.stack(terms).mean())


def test_learning_rate() -> None:
    rates = [learning_rate(k, 100, 10, 2.0) for k in range(100)]
    assert (
        rates[9] == 2.0 and rates[0] == pytest.approx(0.2) and rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.01
    )


def test_leaving_an_image_out_changes_nothing_else() -> None:
    """Order and views of the others are drawn over the whole set, whatever is left out."""
    images = issl.load("scenes", n=64)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Spy(views.SimCLRView):
        def __call__(self, pixels, u):
            seen.append((pixels, u))
            return super().__call__(pixels, u)

    keep = torch.ones(64, dtype=torch.bool)
    keep[11] = False
    runs = []
    for mask in (None, keep):
        seen.clear()
        pretrain(images, **{**SMALL, "epochs": 1, "batch_size": 2}, keep=mask, view=Spy())
        runs.append((torch.cat([p for p, _ in seen[::2]]), torch.cat([u for _, u in seen[::2]])))
    whole, without = runs
    stays = epoch_order(64, 0, 0) != 11
    assert torch.equal(without[0], whole[0][stays][: len(without[0])]) and len(without[0]) == 62
    assert torch.equal(without[1], whole[1][stays][: len(without[1])])


def test_seeds_and_epochs_differ() -> None:
    assert not torch.equal(epoch_order(50, 0, 0), epoch_order(50, 0, 1))
    assert not torch.equal(epoch_uniforms(5, 0, 0), epoch_uniforms(5, 1, 0))
    state = torch.random.get_rng_state()
    a, b = new_encoder(2, 8, 0), new_encoder(2, 8, 1)
    assert torch.equal(state, torch.random.get_rng_state())  # the global generator is left alone
    assert not torch.equal(a.backbone[1].weight, b.backbone[1].weight)


def test_training_lowers_the_loss() -> None:
    _, history = pretrain(issl.load("scenes", n=256), **{**SMALL, "width": 4, "epochs": 6, "batch_size": 64})
    assert history["loss"].iloc[-1] < history["loss"].iloc[0] - 0.2
    assert len(history) == 6 and (history["feature_std"] > 0).all()


def test_encoder_files(tmp_path: Path) -> None:
    encoder, path = new_encoder(2, 8, 0).eval(), tmp_path / "e.safetensors"
    save_encoder(path, encoder, {"note": 1})
    x = torch.rand(3, 3, 32, 32)
    assert torch.equal(load_encoder(path)(x), encoder.backbone(x))
    assert torch.equal(load_encoder(path, output="projector")(x), encoder(x))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(issl.IsslError, match="damaged"):
        load_encoder(path)
    with pytest.raises(issl.IsslError, match="does not exist"):
        load_encoder(tmp_path / "none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "moco"}, "method 'moco': known are simclr"),
        ({"batch_size": 65}, "batch_size=65: need 2 to 64"),
        ({"width": 0}, "width=0"),
        ({"peak_lr": 1e12, "epochs": 3}, "diverged in epoch"),
    ],
)
def test_bad_settings(arguments: dict, message: str) -> None:
    with pytest.raises(issl.IsslError, match=message):
        pretrain(issl.load("scenes", n=64), **{**SMALL, **arguments})


STAGES = {
    "pretrain": Pretrain(data=Data(name="scenes", n=256), width=1, epochs=5, batch_size=32),
    "influence": Influence(  # three chunks of gradients
        pretrain=Pretrain(data=Data(name="scenes", n=64), width=1, epochs=1, batch_size=32),
        data=Data(name="scenes", n=1100),
    ),
}
HALF_WAY = {
    "pretrain": "pretrain/*.part/checkpoint.safetensors",
    "influence": "influence/*.part/rows/rows-*.safetensors",
}


@pytest.mark.parametrize("name", STAGES)
def test_killed_and_resumed_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    def make(root: str) -> Path:
        return Artifacts(tmp_path / root, checkpoint_seconds=0.0).get(STAGES[name])

    process = forked.context.Process(target=forked.make, args=(tmp_path / "killed", STAGES[name]))
    process.start()
    deadline = time.monotonic() + 900
    while not (found := list((tmp_path / "killed").glob(HALF_WAY[name]))):
        assert time.monotonic() < deadline and process.is_alive(), "ended before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and found[0].exists()
    assert not list((tmp_path / "killed").glob(f"{name}/*/manifest.json"))  # truly half way
    whole, resumed = make("whole"), make("killed")
    if name == "pretrain":
        a, b = (read_safetensors(f / "encoder.safetensors", "encoder")[1] for f in (whole, resumed))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    else:
        a, b = (pd.read_parquet(f / "influence.parquet") for f in (whole, resumed))
        np.testing.assert_array_equal(a.to_numpy(), b.to_numpy())


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path, images = tmp_path / "c.safetensors", issl.load("scenes", n=64)
    pretrain(images, **SMALL, checkpoint=path, checkpoint_seconds=0.0)
    with pytest.raises(issl.IsslError, match="belongs to another run: seed differ"):
        pretrain(images, **SMALL, checkpoint=path, seed=1)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(issl.IsslError, match="is damaged"):
        pretrain(images, **SMALL, checkpoint=path)


def test_basic_block_equals_torchvisions() -> None:
    from torchvision.models.resnet import BasicBlock as Theirs

    for inside, outside, stride in ((4, 4, 1), (4, 8, 2)):
        down = None
        if inside != outside:
            down = torch.nn.Sequential(
                torch.nn.Conv2d(inside, outside, 1, stride, bias=False), torch.nn.BatchNorm2d(outside)
            )
        theirs, ours = Theirs(inside, outside, stride, down), BasicBlock(inside, outside, stride)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(3, inside, 8, 8, generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            torch.testing.assert_close(ours(x.clone()), theirs(x.clone()), rtol=0, atol=0)
            ours.eval(), theirs.eval()
