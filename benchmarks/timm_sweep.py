"""Do the scores of timm's encoders match autograd? One small random model of each family.

Eight scenes, LoGra(16) and squared gradient norms. `error` is the largest relative error; `skip`
lists the layers that error messages said to leave out.
"""

from __future__ import annotations

import argparse
import ast
import re
import time
from dataclasses import replace

import pandas as pd
import timm
import torch

import issl
from issl.influence.layers import scored_layers
from issl.influence.reference import cosine_loss

# name and side; a star where position embeddings are made for that side
MODELS = """resnet10t 32, resnetv2_18 32, resnetv2_50x1_bit 64, eca_nfnet_l0 64, regnety_002 32, efficientnet_b0 32,
tf_efficientnet_b0 32, mobilenetv3_small_050 32, convnext_atto 32, vit_tiny_patch16_224 64*, vit_small_patch14_dinov2
56*, deit_tiny_distilled_patch16_224 64*, swin_tiny_patch4_window7_224 64*, swinv2_cr_tiny_224 64*,
beit_base_patch16_224 32*, eva02_tiny_patch14_224 56*, mixer_s32_224 64*, resmlp_12_224 64*, gmlp_ti16_224 64*,
poolformer_s12 32, caformer_s18 32, coatnet_nano_rw_224 64*, maxvit_pico_rw_256 64*, edgenext_xx_small 64,
mobilevit_xxs 64, levit_128s 224, pvt_v2_b0 64, xcit_nano_12_p16_224 64*, cait_xxs24_224 64*, twins_svt_small 64,
hrnet_w18_small 64, dla46_c 32, densenet121 32, vgg11_bn 64, inception_v3 96, res2net50_14w_8s 32, resnest14d 64,
ghostnet_050 32, hardcorenas_a 32, fastvit_t8 64, repvgg_a0 32, focalnet_tiny_srf 64, davit_tiny 64, volo_d1_224 64*,
tiny_vit_5m_224 64, efficientformer_l1 224, crossvit_9_240 240, convmixer_768_32 32, visformer_tiny 64*"""


def build(name: str, side: int, **options: int) -> torch.nn.Module:
    """Weights as initialised, but no scale or bias at 0, which would hide a layer. BatchNorm has
    seen noise. Double precision, because some features hardly differ before training."""
    torch.manual_seed(0)
    net = timm.create_model(name, pretrained=False, num_classes=0, **options).train()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p) if p.ndim == 1 or not p.any() else 0)
        net(torch.rand(8, 3, side, side))
    return net.double().eval()


def reference(encoder: torch.nn.Module, images: issl.Images, layers: dict) -> torch.Tensor:
    """LoGra's scores and the squared gradient norms by plain autograd, one image at a time, in
    double precision."""
    sketches = [issl.LoGra(16).sketch(layer, k) for k, layer in enumerate(layers.values())]
    weights = [layer.weight.requires_grad_() for layer in layers.values()]
    rows = [[] for _ in layers]
    scores, norms = torch.zeros(2, len(images), dtype=torch.float64)

    def straighten(_module: torch.nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
        output.register_hook(torch.Tensor.contiguous)

    # torch 2.15, BatchNorm in eval mode, one image: a transposed gradient gives wrong results
    for m in encoder.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.register_forward_hook(straighten)
    for i in range(len(images)):
        x = images.pixels[i : i + 1].float() / 255
        shaken = issl.GaussianNoise().keyed(0)(x, images.index[i : i + 1]).double()
        loss = cosine_loss(encoder(x.double()), encoder(shaken)).squeeze()
        gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
        for row, s, g in zip(rows, sketches, gradients, strict=True):
            norms[i] += g.square().sum()
            row.append((s.p_out.double() @ g.flatten(1) @ s.p_in.double().T).flatten())
    for p in map(torch.stack, rows):
        ridge = issl.LoGra(16).damping * p.square().mean() * torch.eye(len(p))
        scores += torch.linalg.solve(p @ p.T / len(p) + ridge, p @ p.T).diagonal() if p.any() else 0
    return torch.stack([scores, norms])


def measured(encoder: torch.nn.Module, images: issl.Images, skip: list[str]) -> dict:
    """The outcome for a model, after leaving out the layers that errors name."""
    began, hows = time.perf_counter(), (issl.LoGra(16), issl.Identity())
    try:
        found = [
            issl.self_influence(encoder, images, curvature=h, skip=skip, untrained=True).influence
            for h in hows
        ]
    except Exception as error:  # noqa: BLE001 (a crash is what we look for; the others continue)
        ours = isinstance(error, issl.IsslError)
        named = re.findall(r"skip=(\[.*?\])", str(error)) if ours else []
        asked = ast.literal_eval(named[-1]) if named else []
        if more := [name for name in asked if name not in skip]:
            return measured(encoder, images, skip + more)
        outcome = f"refused, {type(error).__name__}: {str(error)[:100]}"
        return {"outcome": outcome, "skip": " ".join(skip)}
    seconds, layers = time.perf_counter() - began, scored_layers(encoder, skip, untrained=True)
    ratios = torch.tensor([list(f) for f in found]) / reference(encoder, images, layers)
    about = {"outcome": "scored", "skip": " ".join(skip), "layers": len(layers)}
    return about | {"error": (ratios - 1).abs().max().item(), "seconds": seconds}


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--only", default="", help="only models whose names contain this")
    options.add_argument("--out", default="timm_sweep.csv")
    given, rows, scenes = options.parse_args(), [], issl.load("scenes", n=8)
    for name, side in map(str.split, MODELS.split(",")):
        if given.only not in name:
            continue
        size = int(side.rstrip("*"))
        net = build(name, size, **({"img_size": size} if "*" in side else {}))
        pixels = torch.nn.functional.interpolate(scenes.pixels, size)
        family = {"family": type(net).__module__.split(".")[-1], "name": name}
        rows.append(family | measured(net, replace(scenes, pixels=pixels, masks=None), []))
        told = (f"{v:.2g}" if isinstance(v, float) else v for v in rows[-1].values())
        print(*told, sep=" | ", flush=True)
        pd.DataFrame(rows).to_csv(given.out, index=False)
