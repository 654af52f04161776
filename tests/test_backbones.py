"""Encoders that people have, made small and with random weights: scored as autograd says, or named
for skip."""

from __future__ import annotations

import re
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
from torchvision.models.resnet import Bottleneck, ResNet

import issl
from issl import Exact, GaussianNoise, Identity, LoGra
from issl.influence import reference
from issl.influence.layers import scored_layers
from issl.pretraining.other_encoders import open_encoder

VIT = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 12,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 0,
}
SMALL = {  # how it is made, and what cannot be scored
    "ViT": (lambda: VisionTransformer(**VIT), ["cls_token", "pos_embed"]),
    "DINOv2": (  # LayerScale, register tokens, SwiGLU, fused attention
        lambda: VisionTransformer(
            **VIT,
            init_values=1e-1,
            reg_tokens=2,
            mlp_layer=timm.layers.SwiGLUPacked,
            no_embed_class=True,
        ),
        ["cls_token", "reg_token", "pos_embed"],
    ),
    "ViT of averages": (
        lambda: VisionTransformer(**VIT, global_pool="avg", class_token=False),
        ["pos_embed"],
    ),
    "ConvNeXt": (lambda: ConvNeXt(depths=(1, 1, 1, 1), dims=(4, 6, 6, 8), num_classes=0), []),
    "Swin": (  # tables of relative positions
        lambda: SwinTransformer(
            img_size=16,
            patch_size=2,
            embed_dim=8,
            depths=(2, 2),
            num_heads=(2, 2),
            window_size=4,
            num_classes=0,
        ),
        [
            f"layers.{k}.blocks.{b}.attn.relative_position_bias_table"
            for k in (0, 1)
            for b in (0, 1)
        ],
    ),
    "ResNet-50": (lambda: headless(ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=4)), []),
}


def headless(net: ResNet) -> ResNet:
    net.fc = nn.Identity()
    return net


def build(name: str) -> nn.Module:
    """In double precision; BatchNorm has seen images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = SMALL[name][0]().double().train()
        with torch.no_grad():
            net(
                torch.rand(8, 3, 16, 16, dtype=torch.float64)
                if name not in ("ConvNeXt", "ResNet-50")
                else WIDE
            )
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
    gradients = {layer: gradients[layer] for layer in scored_layers(net, skip)}
    assert len(gradients) >= 8
    norm = torch.stack([g.square().sum((1, 2)) for g in gradients.values()]).sum(0).sqrt()
    plain = issl.self_influence(net, images, curvature=Identity(), skip=skip)
    np.testing.assert_allclose(plain["stability_loss"], losses, rtol=1e-7)
    np.testing.assert_allclose(plain["grad_norm"], norm, rtol=1e-7)
    if name != "ResNet-50":  # its widest layer has two million weights: no dense reference
        exact = issl.self_influence(net, images, curvature=Exact(), skip=skip)
        np.testing.assert_allclose(
            exact["influence"], reference.self_influence(gradients, 0.1), rtol=1e-6
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "skip"),
    [
        ("timm:vit_small_patch16_224", "cls_token,pos_embed"),
        ("timm:convnext_atto", ""),
        ("timm:vit_small_patch14_dinov2", "cls_token,pos_embed"),
        ("torchvision:resnet50", ""),
    ],
)
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
    scores = issl.fit(
        opened.encoder, pictures(4, side=opened.size), curvature=LoGra(4), skip=skipped
    ).score(pictures(2, seed=1, side=opened.size))
    assert np.isfinite(scores["influence"]).all() and (scores["influence"] > 0).all()


# --- weights of these models in files, wherever they lie
# ---------------------------------------------------


def theirs(spec: str, seed: int = 0, **options: object) -> nn.Module:
    """The whole model, with random weights and statistics."""
    kind, _, name = spec.partition(":")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = (
            timm.create_model(name) if kind == "timm" else get_model(name, weights=None, **options)
        )
    return trained(net)


def without_head(net: nn.Module) -> nn.Module:
    if hasattr(net, "reset_classifier"):  # timm's
        net.reset_classifier(0)
        return net.eval()
    head = [name for name, m in net.named_modules() if isinstance(m, nn.Linear)][-1]
    parent, _, last = head.rpartition(".")
    setattr(net.get_submodule(parent), last, nn.Identity())
    return net


def by_place(net: nn.Module) -> dict:
    """As `nn.Sequential(*list(net.children())[:-1])`, the usual backbone in lightly, names them."""
    return nn.ModuleDict({"backbone": nn.Sequential(*list(net.children())[:-1])}).state_dict()


def old_dense(state: dict) -> dict:
    """The names in torchvision's own files of DenseNets."""
    return {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", k): v for k, v in state.items()
    }


def old_vit(state: dict) -> dict:
    """The names in torchvision's own files of ViTs."""
    return {
        k.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v
        for k, v in state.items()
    }


WAYS = {  # model, what is in the file, what is said
    "DataParallel": (
        "torchvision:resnet18",
        lambda n: pre("module.", n.state_dict()),
        "without fc, keys module.…",
    ),
    "by place": ("torchvision:resnet18", by_place, "without fc, keys backbone.…"),
    "an attribute of the compiled": (
        "torchvision:mobilenet_v3_small",
        lambda n: {"model": pre("_orig_mod.net.encoder.", n.state_dict())},
        "without classifier.3, keys model.net.encoder.…",
    ),
    "old DenseNet": (
        "torchvision:densenet121",
        lambda n: old_dense(n.state_dict()),
        "without classifier",
    ),
    "old ViT": ("torchvision:vit_b_32", lambda n: old_vit(n.state_dict()), "without heads.head"),
    "a version asked for": (
        "torchvision:mnasnet0_5",
        lambda n: n.state_dict(),
        "without classifier.1",
    ),
    "auxiliary heads": (
        "torchvision:googlenet",
        lambda n: n.state_dict(),
        "without fc, left out: aux1, aux2; pixels",
    ),
    "timm's own": (
        "timm:mobilenetv3_small_050",
        lambda n: n.state_dict(),
        "without head, left out: classifier",
    ),
    "head in a head": (
        "timm:convnext_atto",
        lambda n: n.state_dict(),
        "without head, left out: head",
    ),
    "two heads": (
        "timm:levit_128s",
        lambda n: {"model": n.state_dict()},
        "keys model.…, left out: head, head_dist",
    ),
    "MAE": (
        "timm:vit_tiny_patch16_224",
        lambda n: {
            "model": n.state_dict()
            | {
                f"{k}.weight": torch.ones(3)
                for k in ("decoder_embed", "decoder_blocks.0.norm1", "decoder_norm")
            }
            | {"mask_token": torch.ones(1, 1, 3)}
        },
        "keys model.…, left out: decoder_blocks, decoder_embed, decoder_norm, head, mask_token",
    ),
    "buffers of old versions": (
        "timm:swin_tiny_patch4_window7_224",
        lambda n: (
            n.state_dict() | {k: v for k, v in n.named_buffers() if "relative_position_index" in k}
        ),
        "without head, left out: head",
    ),
}


def pre(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("way", WAYS)
def test_weights_of_named_models_in_files(way: str, tmp_path: Path) -> None:
    spec, content, said = WAYS[way]
    net = theirs(spec, **({"init_weights": False} if "googlenet" in spec else {}))
    torch.save(content(net), tmp_path / "w.pth")
    opened = open_encoder(spec, str(tmp_path / "w.pth"))
    assert said in opened.about
    if "googlenet" in spec:
        net.transform_input = True
    config = (
        resolve_model_data_config(net)
        if spec.startswith("timm")
        else {"mean": IMAGENET[0], "std": IMAGENET[1]}
    )
    same_features(opened.encoder, without_head(net), 224, (config["mean"], config["std"]))


def test_which_of_two_named_models(tmp_path: Path) -> None:
    spec, file = "timm:vit_tiny_patch16_224", str(tmp_path / "w.pth")
    student, teacher = theirs(spec), theirs(spec, 1)
    half = (0.5, 0.5, 0.5)
    states = [pre("module.backbone.", student.state_dict()), pre("backbone.", teacher.state_dict())]
    torch.save(
        {"student": states[0], "teacher": states[1] | {"dino_head.mlp.0.weight": torch.ones(3)}},
        file,
    )
    student, teacher = without_head(student), without_head(teacher)
    opened = open_encoder(spec, file)
    same_features(opened.encoder, teacher, 224, (half, half))
    assert (
        "keys teacher.backbone.… (not student.module.backbone; part= takes another)" in opened.about
    )
    same_features(open_encoder(spec, file, part="student").encoder, student, 224, (half, half))
    torch.save(
        {"student": states[0], "teacher": theirs("timm:vit_small_patch32_224").state_dict()}, file
    )  # distilled
    opened = open_encoder(spec, file)
    same_features(opened.encoder, student, 224, (half, half))
    torch.save({"one": states[0], "two": states[1]}, file)
    with pytest.raises(
        issl.IsslError,
        match=r"several copies of vit_tiny.*choose one with part='one.module.backbone'",
    ):
        open_encoder(spec, file)


def test_named_models_that_do_not_fit(tmp_path: Path) -> None:
    state, file = theirs("timm:vit_tiny_patch16_224").state_dict(), str(tmp_path / "w.pth")
    registers = state | {"reg_token": torch.ones(1, 4, 192)}
    for content, message in [
        (registers, r"do not fit \(left over: reg_token\)"),
        (
            {k: v for k, v in state.items() if "blocks.3.attn" not in k},
            "missing: blocks.3.attn.qkv.weight, .*",
        ),
        (
            theirs("timm:vit_small_patch32_224").state_dict(),
            r"shape: cls_token \(1, 1, 384\) for \(1, 1, 192\)",
        ),
        (state | {"blocks.12.norm1.bias": torch.ones(192)}, "left over: blocks.12.norm1.bias"),
        (
            theirs("torchvision:resnet18").state_dict(),
            "fewer than half of the model's weights are among its keys",
        ),
    ]:
        torch.save({"teacher": pre("backbone.", content)}, file)
        with pytest.raises(issl.IsslError, match=message):
            open_encoder("timm:vit_tiny_patch16_224", file)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_pixels_are_normalised_again_unless_the_user_says_how(name: str, tmp_path: Path) -> None:
    net = theirs(f"torchvision:{name}", init_weights=False)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    spec, side, half = f"torchvision:{name}", 96, (0.5, 0.5, 0.5)
    net = without_head(net)
    opened = open_encoder(spec, str(tmp_path / "w.pth"))
    assert opened.encoder[1].transform_input and "transform_input" in opened.about
    same_features(opened.encoder, net, side, (half, half))  # what the two normalisations come to
    for scale in (IMAGENET, (half, half)):
        opened = open_encoder(spec, str(tmp_path / "w.pth"), *scale)
        assert "no transform_input" in opened.about
        same_features(opened.encoder, net, side, scale)


def test_pixels_as_the_pretrained_weights_take_them(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.models.get_model", lambda *_, **__: model)
        encoder = open_encoder("torchvision:efficientnet_v2_l").encoder
    torch.testing.assert_close(
        encoder[0](torch.full((1, 3, 1, 1), 0.75)), torch.full((1, 3, 1, 1), 0.5)
    )
