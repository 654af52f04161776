"""Winograd's convolution is the convolution: values, gradients, and the scores made with it."""

import copy

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn

import issl
from issl.influence import winograd
from issl.pretraining.encoder import resnet18


def a_conv(channels: tuple[int, int] = (128, 128), seed: int = 0, **options) -> nn.Conv2d:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Conv2d(*channels, 3, padding=1, **options).requires_grad_(False)


@settings(max_examples=15, deadline=None)
@given(
    b=st.integers(1, 9), h=st.integers(1, 5), w=st.integers(1, 5), c=st.integers(1, 7), o=st.integers(1, 7),
    rows=st.integers(1, 40), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_equals_the_convolution_in_double_precision(b, h, w, c, o, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, c, 2 * h, 2 * w, generator=generator, dtype=torch.float64)
    weight = torch.randn(o, c, 3, 3, generator=generator, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "ROWS", rows)  # any split into steps, with a remainder or without
        found = winograd.convolve(x, winograd._transformed(weight))
    torch.testing.assert_close(found, F.conv2d(x, weight, padding=1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradient_are_the_layers_own_to_single_precision(bias):
    plain, quick = a_conv((128, 192), bias=bias), nn.Sequential(a_conv((128, 192), bias=bias))
    assert winograd.quicken(quick) == ["0"]
    x = torch.randn(6, 128, 8, 4, generator=torch.Generator().manual_seed(1))
    results = []
    for layer in (plain.double(), quick):
        own = x.to(next(layer.parameters()).dtype).requires_grad_()
        y = layer(own)
        (gradient,) = torch.autograd.grad(y.sin().sum(), own)
        results.append((y.detach().double(), gradient.double()))
    for exact, found in zip(*results, strict=True):
        assert float((exact - found).abs().max() / exact.abs().max()) < 2e-6


def test_rounding_is_that_of_the_plain_convolution():
    conv = a_conv((256, 256))
    x = torch.randn(4, 256, 8, 8, generator=torch.Generator().manual_seed(2))
    exact = F.conv2d(x.double(), conv.weight.double(), padding=1)
    ours = winograd.convolve(x, winograd._transformed(conv.weight)).double()
    plain = F.conv2d(x, conv.weight, padding=1).double()
    assert float((ours - exact).abs().max()) < 4 * float((plain - exact).abs().max())


@pytest.mark.parametrize(
    "conv",
    [
        a_conv((64, 128)), a_conv(groups=2), a_conv(stride=2), a_conv(padding_mode="reflect"), a_conv().double(),
        a_conv().requires_grad_(), nn.Conv2d(128, 128, 3).requires_grad_(False),
        nn.Conv2d(128, 128, 3, padding=2, dilation=2).requires_grad_(False),
        nn.Conv2d(128, 128, 3, padding="same").requires_grad_(False),
        nn.Conv2d(128, 128, 1).requires_grad_(False),
    ],
)  # fmt: skip
def test_leaves_other_convolutions_alone(conv):
    model = nn.Sequential(conv)
    assert winograd.quicken(model) == []
    assert "forward" not in conv.__dict__


def test_several_threads_take_the_usual_way():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert winograd.quicken(nn.Sequential(a_conv())) == []
        torch.set_num_threads(1)
        assert winograd.quicken(nn.Sequential(a_conv())) == ["0"]
    finally:
        torch.set_num_threads(threads)


def test_odd_sizes_and_autocast_take_the_usual_way():
    plain, quick = a_conv(), nn.Sequential(a_conv())
    winograd.quicken(quick)
    odd = torch.randn(2, 128, 7, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(quick(odd), plain(odd))
    even = odd[:, :, :6]
    with torch.autocast("cpu", torch.bfloat16):
        assert quick(even).dtype == torch.bfloat16
        assert torch.equal(quick(even), plain(even))
    assert not torch.equal(quick(even), plain(even))  # else it would never be used
    torch.testing.assert_close(quick(even), plain(even), rtol=1e-4, atol=1e-5)


def test_scores_with_and_without_it_are_the_same(monkeypatch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = resnet18(32).train()
        images = issl.load("scenes", n=12)
        with torch.no_grad():
            encoder(images.pixels.float() / 255)
        encoder.eval()
    before = copy.deepcopy(encoder.state_dict())
    quick = issl.self_influence(encoder, images, batch_size=5)
    monkeypatch.setattr("issl.influence.self_influence.quicken", lambda model: [])
    plain = issl.self_influence(encoder, images, batch_size=5)
    assert not quick["influence"].equals(plain["influence"])  # it was used: 128 and 256 channels
    for column in ("influence", "stability_loss", "grad_norm"):
        assert quick[column].to_numpy() == pytest.approx(plain[column].to_numpy(), rel=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
