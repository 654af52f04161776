"""Encoders that people have, made small and with random weights: scored as autograd says, or named
for skip."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from nets import pictures
from test_scale import IMAGENET, same_features, trained
from timm.data.config import resolve_model_data_config
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models import get_model

import issl
from issl import Exact, GaussianNoise, Identity
from issl.influence import reference
from issl.influence.layers import scored_layers
from issl.pretraining.other_encoders import open_encoder

VIT = dict(img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=2, num_classes=0)  # noqa: C408
SWIN = dict(img_size=16, patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(2, 2), num_classes=0)  # noqa: C408
# LayerScale, register tokens, SwiGLU, fused attention
DINO = dict(init_values=0.1, reg_tokens=2, mlp_layer=timm.layers.SwiGLUPacked, no_embed_class=True)  # noqa: C408
TABLE = "layers.{}.blocks.{}.attn.relative_position_bias_table"
TABLES = [TABLE.format(layer, block) for layer in (0, 1) for block in (0, 1)]
SMALL = {  # how it is made, and what cannot be scored
    "DINOv2": (lambda: VisionTransformer(**VIT, **DINO), ["cls_token", "reg_token", "pos_embed"]),
    "ConvNeXt": (lambda: ConvNeXt(depths=(1, 1, 1, 1), dims=(4, 6, 6, 8), num_classes=0), []),
    "Swin": (lambda: SwinTransformer(**SWIN, window_size=4), TABLES),  # of relative positions
}


@pytest.mark.parametrize("name", SMALL)
def test_scored_as_autograd_says_or_named(name: str) -> None:
    make, skip = SMALL[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make().double().eval()
    if skip:
        with pytest.raises(issl.IsslError) as error:
            scored_layers(net)
        (listed,) = re.findall(r"--skip ([\w.,]+)", str(error.value))
        assert sorted(listed.split(",")) == sorted(skip)
    images = pictures(6, side=32 if name == "ConvNeXt" else 16)
    losses, gradients = reference.gradients(net, images, GaussianNoise().keyed(0))
    gradients = {layer: gradients[layer] for layer in scored_layers(net, skip)}
    assert len(gradients) >= 8
    norm = torch.stack([g.square().sum((1, 2)) for g in gradients.values()]).sum(0).sqrt()
    plain = issl.self_influence(net, images, curvature=Identity(), skip=skip)
    np.testing.assert_allclose(plain["stability_loss"], losses, rtol=1e-7)
    np.testing.assert_allclose(plain["grad_norm"], norm, rtol=1e-7)
    exact = issl.self_influence(net, images, curvature=Exact(), skip=skip)
    want = reference.self_influence(gradients, 0.1)
    np.testing.assert_allclose(exact["influence"], want, rtol=1e-6)


# --- weights of these models in files, wherever they lie

HALF = (0.5, 0.5, 0.5)


def theirs(spec: str, seed: int = 0) -> nn.Module:
    """The whole model, with random weights and statistics."""
    kind, _, name = spec.partition(":")
    quick = {"init_weights": False} if name == "googlenet" else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = timm.create_model(name) if kind == "timm" else get_model(name, weights=None, **quick)
    return trained(net)


def without_head(net: nn.Module) -> nn.Module:
    if hasattr(net, "reset_classifier"):  # timm's
        net.reset_classifier(0)
    else:
        linear = [name for name, m in net.named_modules() if isinstance(m, nn.Linear)]
        net.set_submodule(linear[-1], nn.Identity())
    return net.eval()


def pre(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


def mae(net: nn.Module) -> dict:
    parts = ("decoder_embed", "decoder_blocks.0.norm1", "decoder_norm", "mask_token")
    return {"model": net.state_dict() | {f"{part}.weight": torch.ones(3) for part in parts}}


WAYS = [  # model, what is in the file, what is said
    (
        "torchvision:mobilenet_v3_small",
        lambda net: {"model": pre("_orig_mod.net.encoder.", net.state_dict())},
        "without classifier.3, keys model.net.encoder.…",
    ),
    ("timm:levit_128s", nn.Module.state_dict, "without head, left out: head, head_dist"),
    ("timm:vit_tiny_patch16_224", mae, "decoder_embed, decoder_norm, head, mask_token"),
]


@pytest.mark.parametrize(("spec", "content", "said"), WAYS)
def test_weights_of_named_models_in_files(
    spec: str, content: Callable[[nn.Module], dict], said: str, tmp_path: Path
) -> None:
    net = theirs(spec)
    torch.save(content(net), tmp_path / "w.pth")
    opened = open_encoder(spec, str(tmp_path / "w.pth"))
    assert said in opened.about
    config = resolve_model_data_config(net) if spec.startswith("timm") else {}
    scale = config.get("mean", IMAGENET[0]), config.get("std", IMAGENET[1])
    same_features(opened.encoder, without_head(net), 224, scale)


def test_which_of_two_named_models(tmp_path: Path) -> None:
    spec, file = "timm:vit_tiny_patch16_224", str(tmp_path / "w.pth")
    nets = theirs(spec), theirs(spec, 1)
    one, other = (pre("backbone.", net.state_dict()) for net in nets)
    student, teacher = map(without_head, nets)
    torch.save({"student": one, "teacher": other | {"dino_head.mlp.0.weight": torch.ones(3)}}, file)
    opened = open_encoder(spec, file)
    same_features(opened.encoder, teacher, 224, (HALF, HALF))
    assert "keys teacher.backbone.… (not student.backbone; part= takes another)" in opened.about
    same_features(open_encoder(spec, file, part="student").encoder, student, 224, (HALF, HALF))
    large = theirs("timm:vit_small_patch32_224").state_dict()
    torch.save({"student": one, "teacher": large}, file)  # distilled
    same_features(open_encoder(spec, file).encoder, student, 224, (HALF, HALF))
    torch.save({"teacher": large}, file)
    with pytest.raises(issl.IsslError, match=r"fewer than half .*cls_token"):
        open_encoder(spec, file)


def test_pixels_are_normalised_again_unless_the_user_says_how(tmp_path: Path) -> None:
    spec, file = "torchvision:googlenet", str(tmp_path / "w.pth")
    net = theirs(spec)
    torch.save(net.state_dict(), file)
    net = without_head(net)
    opened = open_encoder(spec, file)
    assert opened.encoder[1].transform_input and "again by transform_input" in opened.about
    same_features(opened.encoder, net, 96, (HALF, HALF))  # what the two normalisations come to
    for scale in (IMAGENET, (HALF, HALF)):
        opened = open_encoder(spec, file, *scale)
        assert "no transform_input" in opened.about
        same_features(opened.encoder, net, 96, scale)


def test_pixels_as_the_pretrained_weights_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    monkeypatch.setattr("torchvision.models.get_model", lambda *_, **__: model)
    normalized = open_encoder("torchvision:efficientnet_v2_l").encoder[0]
    pixels = torch.full((1, 3, 1, 1), 0.75)
    torch.testing.assert_close(normalized(pixels), torch.full_like(pixels, 0.5))
