"""Image operations against torchvision's functional ones; the laws of views and perturbations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torchvision.transforms.v2.functional as TF

import issl
from issl.data import image_operations
from issl.data.views import ON_CPU, VIEW_UNIFORMS, View, crop_boxes
from issl.influence.perturbation import Augmentation
from issl.pretraining.recipes import RECIPES

JITTERS = (
    "brightness",
    "contrast",
    "saturation",
    "hue",
)  # in the order of image_operations.BRIGHTNESS … HUE
CHAIN = replace(Augmentation("chain").view, solarize=0.3)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return issl.load("scenes", n=24).pixels.float() / 255


@pytest.mark.parametrize("name", JITTERS)
def test_jitters_equal_torchvisions(name: str, x: torch.Tensor) -> None:
    low, high = (-0.5, 0.5) if name == "hue" else (0.2, 1.8)
    factors = torch.linspace(low, high, len(x))
    got = getattr(image_operations, name)(x, factors)
    want = torch.stack(
        [getattr(TF, f"adjust_{name}")(i, float(f)) for i, f in zip(x, factors, strict=True)]
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)  # grey: 0.299 here, 0.2989 there


def test_jitter_applies_each_order(x: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = torch.rand(len(x), 4, generator=generator) * 0.3 + torch.tensor([0.8, 0.8, 0.8, -0.1])
    order = torch.stack(
        [torch.tensor(p) for p in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]]] * 6
    )
    yes = torch.arange(len(x)) % 3 > 0
    got = image_operations.jitter(x, factors, order, yes)
    for k in range(len(x)):
        want = x[k]
        for which in order[k].tolist() if yes[k] else []:
            want = getattr(TF, f"adjust_{JITTERS[which]}")(want, float(factors[k, which]))
        torch.testing.assert_close(got[k], want, rtol=0, atol=5e-4 if yes[k] else 0)


def test_grayscale_and_flip(x: torch.Tensor) -> None:
    yes = torch.arange(len(x)) % 2 == 0
    torch.testing.assert_close(
        image_operations.grayscale(x, yes)[::2], TF.rgb_to_grayscale(x[::2], 3), rtol=0, atol=1e-3
    )
    assert torch.equal(image_operations.grayscale(x, yes)[1::2], x[1::2])
    flipped = image_operations.flip(x, yes)
    assert torch.equal(flipped[::2], TF.horizontal_flip(x[::2])) and torch.equal(
        flipped[1::2], x[1::2]
    )


@pytest.mark.parametrize("radius", [1, 3])
def test_blur_equals_torchvisions(radius: int, x: torch.Tensor) -> None:
    sigma, yes = torch.linspace(0.1, 2.0, len(x)), torch.arange(len(x)) % 4 > 0
    got = image_operations.blur(x, sigma, yes, radius)
    for k in range(len(x)):
        want = (
            TF.gaussian_blur(x[k], [2 * radius + 1] * 2, [float(sigma[k])] * 2) if yes[k] else x[k]
        )
        torch.testing.assert_close(got[k], want, rtol=0, atol=1e-5)


def test_solarize_equals_torchvisions(x: torch.Tensor) -> None:
    yes = torch.arange(len(x)) % 2 == 0
    got = image_operations.solarize(x, yes, 0.4)
    torch.testing.assert_close(got[::2], TF.solarize(x[::2], 0.4))
    assert torch.equal(got[1::2], x[1::2])


@pytest.mark.parametrize("mirror", [False, True])
def test_crop_equals_torchvisions(mirror: bool, x: torch.Tensor) -> None:
    boxes = [(0, 0, 32, 32), (4, 6, 16, 20), (10, 2, 8, 30)]  # top, left, height, width in px
    for top, left, h, w in boxes:
        box = torch.tensor([[(top + h / 2) / 32, (left + w / 2) / 32, h / 32, w / 32]]).expand(
            len(x), 4
        )
        got = image_operations.crop(x, box, torch.full((len(x),), mirror))
        want = TF.resized_crop(x, top, left, h, w, [32, 32], antialias=False)
        want = TF.horizontal_flip(want) if mirror else want
        # torchvision resizes the box alone, so it differs where bilinear weights reach over the
        # box's edge
        torch.testing.assert_close(got[:, :, 4:-4, 4:-4], want[:, :, 4:-4, 4:-4], rtol=0, atol=1e-4)


def test_crop_boxes_lie_inside_and_have_their_area() -> None:
    u = torch.rand(4000, 4, generator=torch.Generator().manual_seed(0))
    cy, cx, h, w = crop_boxes(u, 0.2).unbind(1)
    for centre, size in ((cy, h), (cx, w)):
        assert (
            float((centre - size / 2).min()) > -1e-6 and float((centre + size / 2).max()) < 1 + 1e-6
        )
    assert (
        float((h * w).min()) > 0.19
        and float((h * w).max()) <= 1
        and 0.55 < float((h * w).mean()) < 0.62
    )


@pytest.mark.parametrize(
    "view", [CHAIN, *{r.view_b for v in RECIPES.values() for r in v.values()}], ids=hash
)
def test_a_view_depends_on_its_own_numbers_alone(view: View) -> None:
    x = issl.load("scenes", n=ON_CPU + 9).pixels.float() / 255
    u = torch.rand(len(x), VIEW_UNIFORMS, generator=torch.Generator().manual_seed(0))
    together = view(x, u)
    for k in (0, 5, ON_CPU, len(x) - 1):
        torch.testing.assert_close(
            together[k : k + 1], view(x[k : k + 1], u[k : k + 1]), rtol=0, atol=1e-6
        )
    assert float(together.min()) >= -1e-6 and float(together.max()) <= 1 + 1e-6
    assert not torch.equal(together, x)


def test_probabilities_and_ranges_are_kept() -> None:
    """Each operation happens as often as its setting says, and the off ones never."""
    x = issl.load("scenes", n=1).pixels.float().div(255).expand(400, 3, 32, 32).contiguous()
    u = torch.rand(400, VIEW_UNIFORMS, generator=torch.Generator().manual_seed(1))
    assert torch.equal(View()(x, u), x)
    for name in ("flip", "grayscale", "solarize"):
        changed = (View(**{name: 0.3})(x, u) != x).flatten(1).any(1).float().mean()
        assert 0.22 < float(changed) < 0.38, name
    colours = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
    changed = (View(jitter=0.6, **colours)(x, u) != x).flatten(1).any(1).float().mean()
    assert 0.52 < float(changed) < 0.68


@pytest.mark.parametrize(
    "kind", ["crop", "flip", "jitter", "grayscale", "blur", "solarize", "chain"]
)
def test_augmentations_as_perturbations(kind: str, x: torch.Tensor) -> None:
    index = torch.arange(100, 100 + len(x))
    strong, weak = (Augmentation(kind, s).keyed(7) for s in (1.0, 0.25))
    got = strong(x, index)
    assert (
        torch.equal(got, strong(x, index))
        and not torch.equal(got, Augmentation(kind).keyed(8)(x, index))
    ) or (
        kind in ("flip", "grayscale", "solarize")  # at full strength these leave nothing to chance
    )
    back = torch.arange(len(x)).flip(0)
    torch.testing.assert_close(strong(x[back], index[back])[back], got, rtol=0, atol=1e-6)
    size = [float((f(x, index) - x).square().mean()) for f in (weak, strong)]
    assert 0 < size[0] < size[1]


def test_influence_takes_an_augmentation() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, 2), torch.nn.ReLU(), torch.nn.Flatten()
    ).eval()
    images = issl.load("scenes", n=20)
    scores = issl.self_influence(net, images, Augmentation("jitter", 0.5), issl.LoGra(4))
    assert (scores["influence"] >= 0).all() and scores["influence"].std() > 0
    assert "jitter" in scores.attrs["perturbation"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Augmentation("rotate"), "'rotate'.*the kinds are crop"),
        (lambda: Augmentation("crop", 0.0), "strength=0.0.*must lie in"),
        (lambda: Augmentation("crop", 1.5), "strength=1.5"),
    ],
)
def test_bad_augmentations(make, message: str) -> None:
    with pytest.raises(issl.IsslError, match=message):
        make()


def test_a_smaller_view_is_the_same_crop_at_half_the_side(x: torch.Tensor) -> None:
    box, yes = (
        crop_boxes(torch.rand(len(x), 4, generator=torch.Generator().manual_seed(2)), 0.3),
        torch.arange(len(x)) > 9,
    )
    small = image_operations.crop(x, box, yes, (16, 16))
    assert small.shape == (len(x), 3, 16, 16)
    # exactly half the side of the whole image is the mean of its 2 × 2 blocks
    whole = torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(len(x), 4)
    torch.testing.assert_close(
        image_operations.crop(x, whole, None, (16, 16)), torch.nn.functional.avg_pool2d(x, 2)
    )
    u = torch.rand(len(x), VIEW_UNIFORMS, generator=torch.Generator().manual_seed(3))
    assert View(flip=0.5)(x, u, (16, 16)).shape == small.shape
    full = image_operations.crop(x, box, yes)
    assert float((torch.nn.functional.avg_pool2d(full, 2) - small).abs().mean()) < 0.03
