"""Image operations against torchvision's functional ones; the laws of views and perturbations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torchvision.transforms.v2.functional as TF

import issl
from issl.data import views
from issl.data.views import ON_CPU, VIEW_UNIFORMS, View, crop_boxes
from issl.influence.perturbation import Augmentation
from issl.pretraining.recipes import RECIPES

CHAIN = replace(Augmentation("chain").view, solarize=0.3)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return issl.load("scenes", n=24).pixels.float() / 255


def uniforms(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, VIEW_UNIFORMS, generator=torch.Generator().manual_seed(seed))


def test_jitter_applies_each_order(x: torch.Tensor) -> None:
    factors = uniforms(len(x))[:, :4] * torch.tensor([1.6, 1.6, 1.6, 0.9])
    factors += torch.tensor([0.2, 0.2, 0.2, -0.45])
    jitters = ("brightness", "contrast", "saturation", "hue")  # as `order` numbers them
    orders = [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]]
    order, yes = torch.tensor(orders * 6), torch.arange(len(x)) % 3 > 0
    got = views.jitter(x, factors, order, yes)
    for k in range(len(x)):
        want = x[k]
        for which in order[k].tolist() if yes[k] else []:
            want = getattr(TF, f"adjust_{jitters[which]}")(want, float(factors[k, which]))
        # grey: 0.299 here, 0.2989 there
        torch.testing.assert_close(got[k], want, rtol=0, atol=2e-3 if yes[k] else 0)


def test_certain_operations_equal_torchvisions(x: torch.Tensor) -> None:
    for view, want in (
        (View(flip=1.0), TF.horizontal_flip(x)),
        (View(grayscale=1.0), TF.rgb_to_grayscale(x, 3)),
        (View(solarize=1.0), TF.solarize(x, 0.5)),
    ):
        torch.testing.assert_close(view(x, uniforms(len(x))), want, rtol=0, atol=1e-3)


def test_each_image_is_blurred_by_its_own_sigma(x: torch.Tensor) -> None:
    sigma, yes = torch.linspace(0.1, 2.0, len(x)), torch.arange(len(x)) % 4 > 0
    got = views.blur(x, sigma, yes)
    for k in range(len(x)):
        want = TF.gaussian_blur(x[k], [5, 5], [float(sigma[k])] * 2) if yes[k] else x[k]
        torch.testing.assert_close(got[k], want, rtol=0, atol=1e-5)


def test_crop_equals_torchvisions(x: torch.Tensor) -> None:
    mirror = torch.arange(len(x)) % 2 > 0
    for top, left, h, w in [(0, 0, 32, 32), (4, 6, 16, 20), (10, 2, 8, 30)]:
        box = torch.tensor([[(top + h / 2) / 32, (left + w / 2) / 32, h / 32, w / 32]])
        got = views.crop(x, box.expand(len(x), 4), mirror)[:, :, 4:-4, 4:-4]
        want = TF.resized_crop(x, top, left, h, w, [32, 32], antialias=False)
        want[mirror] = TF.horizontal_flip(want[mirror])
        # torchvision resizes the box alone, so it differs where weights reach over its edge
        torch.testing.assert_close(got, want[:, :, 4:-4, 4:-4], rtol=0, atol=1e-4)


def test_crop_boxes_lie_inside_and_have_their_area() -> None:
    cy, cx, h, w = crop_boxes(uniforms(4000)[:, :4], 0.2).unbind(1)
    for centre, size in ((cy, h), (cx, w)):
        assert float((centre - size / 2).min()) > -1e-6
        assert float((centre + size / 2).max()) < 1 + 1e-6
    area = h * w
    assert float(area.min()) > 0.19 and float(area.max()) <= 1 and 0.55 < float(area.mean()) < 0.62


@pytest.mark.parametrize(
    "view", [CHAIN, *{r.view_b for v in RECIPES.values() for r in v.values()}], ids=hash
)
def test_a_view_depends_on_its_own_numbers_alone(view: View) -> None:
    x = issl.load("scenes", n=ON_CPU + 9).pixels.float() / 255
    u = uniforms(len(x))
    together = view(x, u)
    for k in (0, 5, ON_CPU, len(x) - 1):
        alone = view(x[k : k + 1], u[k : k + 1])
        torch.testing.assert_close(together[k : k + 1], alone, rtol=0, atol=1e-6)
    assert float(together.min()) >= -1e-6 and float(together.max()) <= 1 + 1e-6
    assert not torch.equal(together, x)


def test_probabilities_are_kept() -> None:
    """Each operation happens as often as its setting says, and the off ones never."""
    x = issl.load("scenes", n=1).pixels.float().div(255).expand(400, 3, 32, 32).contiguous()
    u = uniforms(400, 1)
    assert torch.equal(View()(x, u), x)
    colours = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
    for name, more in {"flip": {}, "grayscale": {}, "solarize": {}, "jitter": colours}.items():
        changed = (View(**{name: 0.3}, **more)(x, u) != x).flatten(1).any(1).float().mean()
        assert 0.22 < float(changed) < 0.38, name


@pytest.mark.parametrize("kind", "crop flip jitter grayscale blur solarize chain".split())
def test_augmentations_as_perturbations(kind: str, x: torch.Tensor) -> None:
    index = torch.arange(100, 100 + len(x))
    strong, weak = (Augmentation(kind, s).keyed(7) for s in (1.0, 0.25))
    got = strong(x, index)
    assert torch.equal(got, strong(x, index))
    if kind not in ("flip", "grayscale", "solarize"):  # these leave nothing to chance
        assert not torch.equal(got, Augmentation(kind).keyed(8)(x, index))
    back = torch.arange(len(x)).flip(0)
    torch.testing.assert_close(strong(x[back], index[back])[back], got, rtol=0, atol=1e-6)
    size = [float((f(x, index) - x).square().mean()) for f in (weak, strong)]
    assert 0 < size[0] < size[1]


def test_a_smaller_view_is_the_same_crop_at_half_the_side(x: torch.Tensor) -> None:
    u, half = uniforms(len(x), 2), torch.nn.functional.avg_pool2d(x, 2)
    box, yes = crop_boxes(u[:, :4], 0.3), torch.arange(len(x)) > 9
    small = views.crop(x, box, yes, (16, 16))
    assert small.shape == View(flip=0.5)(x, u, (16, 16)).shape == (len(x), 3, 16, 16)
    # exactly half the side of the whole image is the mean of its 2 × 2 blocks
    whole, no = torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(len(x), 4), torch.zeros_like(yes)
    torch.testing.assert_close(views.crop(x, whole, no, (16, 16)), half)
    full = views.crop(x, box, yes)
    assert float((torch.nn.functional.avg_pool2d(full, 2) - small).abs().mean()) < 0.03
