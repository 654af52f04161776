"""Encoders that people have, made small and with random weights: scored as autograd says, or named for skip."""

from __future__ import annotations

import re

import numpy as np
import pytest
import timm
import torch
from nets import pictures
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models import get_model
from torchvision.models.resnet import Bottleneck, ResNet

import issl
from issl import Exact, GaussianNoise, Identity, LoGra
from issl.influence import reference
from issl.influence.layers import scored_layers
from issl.pretraining.other_encoders import open_encoder

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 0}
SMALL = {  # how it is made, and what cannot be scored
    "ViT": (lambda: VisionTransformer(**VIT), ["cls_token", "pos_embed"]),
    "DINOv2": (  # LayerScale, register tokens, SwiGLU, fused attention
        lambda: VisionTransformer(
            **VIT, init_values=1e-1, reg_tokens=2, mlp_layer=timm.layers.SwiGLUPacked, no_embed_class=True
        ),
        ["cls_token", "reg_token", "pos_embed"],
    ),
    "ViT of averages": (lambda: VisionTransformer(**VIT, global_pool="avg", class_token=False), ["pos_embed"]),
    "ConvNeXt": (lambda: ConvNeXt(depths=(1, 1, 1, 1), dims=(4, 6, 6, 8), num_classes=0), []),
    "Swin": (  # tables of relative positions
        lambda: SwinTransformer(
            img_size=16, patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(2, 2), window_size=4, num_classes=0
        ),
        [f"layers.{k}.blocks.{b}.attn.relative_position_bias_table" for k in (0, 1) for b in (0, 1)],
    ),
    "ResNet-50": (lambda: headless(ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=4)), []),
}  # fmt: skip


def headless(net: ResNet) -> ResNet:
    net.fc = nn.Identity()
    return net


def build(name: str) -> nn.Module:
    """In double precision; BatchNorm has seen images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = SMALL[name][0]().double().train()
        with torch.no_grad():
            net(torch.rand(8, 3, 16, 16, dtype=torch.float64) if name not in ("ConvNeXt", "ResNet-50") else WIDE)
    return net.eval()


WIDE = torch.rand(8, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SMALL)
def test_scored_as_autograd_says_or_named(name: str) -> None:
    net, skip = build(name), SMALL[name][1]
    if skip:
        with pytest.raises(issl.IsslError) as error:
            scored_layers(net)
        (listed,) = re.findall(r"--skip ([\w.,]+)", str(error.value))
        assert sorted(listed.split(",")) == sorted(skip)
    images = pictures(6, side=32 if name in ("ConvNeXt", "ResNet-50") else 16)
    losses, gradients = reference.gradients(net, images, GaussianNoise().keyed(0))
    if name == "Swin":  # windows, not images, are the rows of its attention: named when it is called, and left out
        with pytest.raises(issl.IsslError, match=r"layers.0.blocks.0.attn.qkv sees .* rows .* skip="):
            issl.self_influence(net, images, skip=skip)
        skip = [table.removesuffix(".relative_position_bias_table") for table in skip]
    gradients = {layer: gradients[layer] for layer in scored_layers(net, skip)}
    assert len(gradients) >= 8
    norm = torch.stack([g.square().sum((1, 2)) for g in gradients.values()]).sum(0).sqrt()
    plain = issl.self_influence(net, images, curvature=Identity(), skip=skip)
    np.testing.assert_allclose(plain["stability_loss"], losses, rtol=1e-7)
    np.testing.assert_allclose(plain["grad_norm"], norm, rtol=1e-7)
    if name != "ResNet-50":  # its widest layer has two million weights: no dense reference
        exact = issl.self_influence(net, images, curvature=Exact(), skip=skip)
        np.testing.assert_allclose(exact["influence"], reference.self_influence(gradients, 0.1), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "skip"),
    [
        ("timm:vit_small_patch16_224", "cls_token,pos_embed"), ("timm:convnext_atto", ""),
        ("timm:vit_small_patch14_dinov2", "cls_token,pos_embed"), ("torchvision:resnet50", ""),
    ],
)  # fmt: skip
def test_at_full_size_by_name(name: str, skip: str, tmp_path) -> None:
    kind, _, model = name.partition(":")
    torch.manual_seed(0)
    if kind == "timm":
        net = timm.create_model(model, pretrained=False)
    else:
        net = get_model(model, weights=None).train()
        with torch.no_grad():
            net(torch.rand(4, 3, 64, 64))
    torch.save(net.state_dict(), tmp_path / "w.pt")
    opened = open_encoder(name, str(tmp_path / "w.pt"))
    skipped = opened.own_names(skip.split(","))
    scores = issl.fit(opened.encoder, pictures(4, side=opened.size), curvature=LoGra(4), skip=skipped).score(
        pictures(2, seed=1, side=opened.size)
    )
    assert np.isfinite(scores["influence"]).all() and (scores["influence"] > 0).all()
