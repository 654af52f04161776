"""Encoders that people have: read from other projects' files, scored as autograd says, and in the
place of trainings."""

import argparse
import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from disk import encoder
from nets import pictures
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models import get_model, resnet

import issl
from issl import Exact, GaussianNoise, Identity, LoGra, cli, self_influence
from issl.audit import claims
from issl.audit.cache import Artifacts
from issl.audit.given import CheckpointFile, Given
from issl.audit.plans_own import Bridges
from issl.audit.plans_paper import Duplicates, SeedCorrelation
from issl.audit.profiles import PLANS
from issl.audit.settings import Data
from issl.audit.stages import Embed, Influence, Pretrain
from issl.audit.stats.statistics import Estimate
from issl.commands.pictures import SIDE
from issl.influence import reference
from issl.influence.layers import scored_layers
from issl.pretraining.other_encoders import Scale, open_encoder


def trained(net: nn.Module) -> nn.Module:
    """BatchNorm statistics as after training."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5), m.bias.normal_(0, 0.1)
                m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 2)
    return net.eval()


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std of the pixels


def same_features(ours: nn.Module, theirs: nn.Module, side: int, scale: Scale = IMAGENET) -> None:
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v)[:, None, None] for v in scale)
    with torch.no_grad():
        want = theirs((x - mean) / std).flatten(1)
        torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-5)


def thin(block=resnet.BasicBlock, **options) -> nn.Module:
    return trained(resnet.ResNet(block, [1, 1, 1, 1], **options))


def test_a_wide_resnet(tmp_path: Path) -> None:
    net = thin(resnet.Bottleneck, width_per_group=128)
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    opened = open_encoder(str(tmp_path / "weights.pt"))
    assert opened.size == 224
    same_features(opened.encoder, nn.Sequential(*list(net.children())[:-1]), 64)


def test_lightlys_own_resnet(tmp_path: Path) -> None:
    from lightly import models

    net = trained(models.ResNetGenerator("resnet-18", width=0.25))
    body = nn.Sequential(*list(net.children())[:-1], nn.AdaptiveAvgPool2d(1))
    owner = nn.ModuleDict({"backbone": body, "head": nn.Linear(128, 8)})
    layers = net.layer1, net.layer2, net.layer3, net.layer4
    want = nn.Sequential(net.conv1, net.bn1, nn.ReLU(), *layers, nn.AdaptiveAvgPool2d(1))
    for content in (owner.state_dict(), net.state_dict()):
        torch.save({"state_dict": content}, tmp_path / "weights.pt")
        opened = open_encoder(str(tmp_path / "weights.pt"))
        assert opened.size == 32
        same_features(opened.encoder, want, 32)


def test_bad_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.pt").write_text("hello")
    offline = Mock(side_effect=OSError("no route"))
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    for spec, named in ((f"{tmp_path}/text.pt", "text.pt"), ("torchvision:resnet18", "--weights")):
        with pytest.raises(issl.IsslError, match=named):
            open_encoder(spec)


def test_scores_of_ones_own_images(photos: Path, tmp_path: Path) -> None:
    file = encoder(tmp_path / "e.safetensors")
    given = f"influence --data folder:{photos} --encoder {file} --rank 2 --out"
    out = tmp_path / "new" / "scores.parquet"
    assert cli.main([*given.split(), str(out)]) == 0
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.width >= 10 * SIDE
    table, images = pd.read_parquet(out), issl.load(f"folder:{photos}")
    want = self_influence(issl.load_encoder(file), images, curvature=LoGra(2))
    np.testing.assert_allclose(table["influence"], want["influence"])
    assert table["path"][0] == "a/00.jpg"
    assert table["label_name"].tolist() == list("aaaaabbbbcccc")
    assert table.attrs["curvature"] == repr(LoGra(2))
    more = f"{tmp_path}/s.csv --n 4 --draws 2 --curvature ekfac"
    assert cli.main([*given.split(), *more.split()]) == 0
    assert len(pd.read_csv(tmp_path / "s.csv")["standard_error"]) == 4
    assert json.loads((tmp_path / "s.json").read_text())["draws"] == 2


def test_a_kept_curvature(photos: Path, tmp_path: Path, capsys: Any) -> None:
    """Fitted on some images and used for others."""
    file = encoder(tmp_path / "e.safetensors")
    a, b = (f"folder:{photos / name}" for name in "ab")
    kept, out = str(tmp_path / "kept.safetensors"), str(tmp_path / "scores.csv")
    assert cli.main(["fit", "--data", a, "--encoder", file, "--rank", "2", "--out", kept]) == 0
    score = ["influence", "--data", b, "--encoder", file, "--curvature-from", kept, "--out", out]
    assert cli.main(score) == 0
    want = issl.fit(issl.load_encoder(file), issl.load(a), curvature=LoGra(2)).score(issl.load(b))
    np.testing.assert_allclose(pd.read_csv(out)["influence"], want["influence"], rtol=1e-6)
    assert cli.main([*score, "--rank", "3"]) == 2
    assert "--rank 3" in capsys.readouterr().err


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


def theirs(spec: str) -> nn.Module:
    """The whole model, with random weights and statistics."""
    kind, _, name = spec.partition(":")
    quick = {"init_weights": False} if name == "googlenet" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
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
def test_weights_of_named_models_in_files(spec, content, said, tmp_path) -> None:
    net = theirs(spec)
    torch.save(content(net), tmp_path / "w.pth")
    opened = open_encoder(spec, str(tmp_path / "w.pth"))
    assert said in opened.about
    config = resolve_model_data_config(net) if spec.startswith("timm") else {}
    scale = config.get("mean", IMAGENET[0]), config.get("std", IMAGENET[1])
    same_features(opened.encoder, without_head(net), 224, scale)


def test_a_larger_model_in_the_file_is_not_the_named_one(tmp_path: Path) -> None:
    """A distilled student beside its teacher."""
    spec, file = "timm:vit_tiny_patch16_224", str(tmp_path / "w.pth")
    student, large = theirs(spec), theirs("timm:vit_small_patch32_224").state_dict()
    torch.save({"student": pre("backbone.", student.state_dict()), "teacher": large}, file)
    same_features(open_encoder(spec, file).encoder, without_head(student), 224, (HALF, HALF))
    torch.save({"teacher": large}, file)
    with pytest.raises(issl.IsslError, match="fewer than half"):
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


DATA = Data(name="scenes", n=24)


def solo(path: Path, classes: int = 10) -> Path:
    """A thin encoder for small images as solo-learn saves it, beside the online classifier."""
    net = thin()
    net.conv1 = nn.Conv2d(3, 64, 3, bias=False)
    keys = {f"backbone.{k}": v for k, v in net.state_dict().items()}
    torch.save({"state_dict": keys | {"classifier.weight": torch.ones(classes, 512)}}, path)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return solo(tmp_path / "simclr-ep=999.ckpt")


def test_a_given_encoder_takes_the_place_of_a_training(checkpoint: Path, tmp_path: Path) -> None:
    given = Given(method="simclr", checkpoint=checkpoint)
    artifacts, few = Artifacts(tmp_path / "artifacts"), DATA.model_copy(update={"first": 6})
    scores = Influence(pretrain=given, data=few, curvature=issl.LoGra(4)).read(artifacts)
    encoder = open_encoder(str(checkpoint)).encoder
    want = issl.self_influence(encoder, few.load(), curvature=issl.LoGra(4))
    np.testing.assert_allclose(scores["influence"], want["influence"], rtol=1e-4)
    assert Embed(pretrain=given, data=few).read(artifacts).shape == (6, 512)
    about = json.loads((artifacts.get(given) / "about.json").read_text())
    assert about["file"] == checkpoint.name
    assert about["sha256"] == issl.files.file_digest(checkpoint)
    written = "".join(p.read_text() for p in (tmp_path / "artifacts").rglob("*.json"))
    assert str(tmp_path) not in written


def test_solo_learns_pixels_are_those_of_its_cifar(tmp_path: Path) -> None:
    own = (0.1, 0.2, 0.3)
    for classes, mean, given in ((10, 0.4914, None), (100, 0.5071, None), (10, 0.1, own)):
        file = solo(tmp_path / "a.ckpt", classes)
        normalize, net = open_encoder(str(file), mean=given).encoder
        assert float(normalize.mean.flatten()[0]) == pytest.approx(mean)
        assert net.conv1.padding == (2, 2)  # unlike others'


# --- other projects' files: what is in them, and which of two encoders is taken

# where the encoder lies that is taken, where another one does, and what else is there
FILES: dict[str, tuple[str, str | None, list[str]]] = {
    "MoCo": ("state_dict/module.encoder_q.", "state_dict/module.encoder_k.", []),
    "BYOL": ("online_network_state_dict/encoder.", "target_network_state_dict/encoder.", []),
    "DINO": ("teacher/backbone.", "student/module.backbone.", ["teacher/head.last_layer"]),
    "solo-learn": ("state_dict/backbone.", "state_dict/momentum_backbone.", []),
    "timm": ("state_dict/", "state_dict_ema/", ["state_dict/fc", "state_dict_ema/fc"]),
    "SwAV": ("module.", None, ["module.projection_head.0", "module.prototypes", "module.fc"]),
}


def place(content: dict, where: str, state: dict) -> None:
    """Put tensors under a prefix; a part that ends in / is the name of a dictionary."""
    *parts, prefix = where.split("/")
    for part in parts:
        content = content.setdefault(part, {})
    content |= {prefix + name: value for name, value in state.items()}


@pytest.fixture(scope="module")
def two() -> tuple[nn.Module, nn.Module]:
    """ResNets of random weights, the second unlike the first, without heads."""
    nets = thin(), thin()
    with torch.no_grad():
        nets[1].conv1.weight.mul_(-1)
    for net in nets:
        net.fc = nn.Identity()
    return nets


@pytest.mark.parametrize("layout", FILES)
def test_files_of_other_projects(layout: str, two, tmp_path: Path) -> None:
    taken, other, heads = FILES[layout]
    optimizer = {"state": {0: {"m": torch.ones(3)}}}
    content: dict = {"epoch": 9, "args": argparse.Namespace(lr=0.03), "optimizer": optimizer}
    for where, net in ((taken, two[0]), (other, two[1])):
        if where is not None:
            place(content, where, net.state_dict())
    for name in heads:
        place(content, name + ".", {"weight": torch.ones(4, 4)})
    file = str(tmp_path / "theirs.pth")
    torch.save(content, file)
    own, beside = (None if where is None else where.replace("/", ".") for where in (taken, other))
    for opened in (open_encoder(file), open_encoder(file, part=own or None)):
        same_features(opened.encoder, two[0], 64)
        assert own in opened.about
    if beside is not None:
        assert f"not {beside.strip('.')}" in opened.about
        same_features(open_encoder(file, part=beside).encoder, two[1], 64)


def test_an_encoder_is_read_whole_and_never_chosen_in_silence(two, tmp_path: Path) -> None:
    state, file = two[0].state_dict(), str(tmp_path / "w.pth")
    less = {k: v for k, v in state.items() if ".bn1." not in k}
    for content, named in [
        (state | {"layer1.0.se.weight": torch.ones(4)}, "do not fit .*layer1.0.se.weight"),
        ({"net": nn.Linear(2, 2).state_dict()}, "net.weight.* the known layouts"),
        ({"net": less}, "do not fit .*layer1.0.bn1.weight"),
        ({"left": state, "right": two[1].state_dict()}, r"\(left, right\); .* part='left'"),
    ]:
        torch.save(content, file)
        with pytest.raises(issl.IsslError, match=named):
            open_encoder(file)
    for part, net in zip(("left", "right"), two, strict=True):
        same_features(open_encoder(file, part=part).encoder, net, 64)


def test_the_key_follows_the_bytes_not_the_name(checkpoint: Path, tmp_path: Path) -> None:
    def given(file: Path, **more: object) -> Given:
        return Given(method="simclr", checkpoint={"file": file, **more})

    key, other = given(checkpoint).key, tmp_path / "other.ckpt"
    other.write_bytes(checkpoint.read_bytes())
    assert given(other).key == key
    assert given(checkpoint, mean=(0.1, 0.2, 0.3)).key != key
    checkpoint.write_bytes(checkpoint.read_bytes() + b" ")
    assert given(checkpoint).key != key


def test_plans_take_given_encoders_for_trainings(checkpoint: Path) -> None:
    taking = [plan for plan in PLANS.values() if plan.takes_checkpoints]
    assert len(taking) == 10
    for plan in taking:
        stages = plan(checkpoints={"simclr": checkpoint}).stages()
        needed = [need for stage in stages for need in (stage, *stage.needs())]
        # the control is untrained
        assert not any(isinstance(s, Pretrain) and s.epochs for s in needed), plan
    plan = SeedCorrelation(checkpoints={"simclr": str(checkpoint)})
    assert plan.methods == ("simclr",) and plan.encoders == 1
    two = SeedCorrelation(checkpoints={"simclr": [str(checkpoint), str(checkpoint)]})
    assert two.encoders == 2 and len(two.encoders_of(two.methods)) == 3  # and the untrained one
    others = {"simclr": [checkpoint, checkpoint], "byol": [checkpoint]}  # byol is not asked about
    assert SeedCorrelation(methods=["simclr"], checkpoints=others).encoders == 2
    assert Bridges(checkpoints={"simclr": checkpoint}).trained_doses == ()
    told = json.dumps(plan.model_dump(mode="json", exclude_unset=True))
    assert SeedCorrelation(**json.loads(told)) == plan  # as a kernel is told it


def test_records_name_the_file_and_its_digest(checkpoint: Path, tmp_path: Path) -> None:
    plan = Duplicates(checkpoints={"simclr": checkpoint}, out=str(tmp_path))
    source = plan.source()
    metrics = {m: Estimate(0.5, 0.4, 0.6, 9) for m in ("auc_injected", "precision")}
    about = {"dataset": "scenes", "recipe": "published", "n": 9, "seeds": [0]}
    about["learned"] = {"knn": 0.7, "untrained": 0.2, "encoders": 1}
    written, other = (
        claims.record("low_influence_duplicates", metrics, source, tmp_path, m, method=m, **about)
        for m in ("simclr", "byol")
    )
    named = [{"file": checkpoint.name, "sha256": CheckpointFile(file=checkpoint).sha256}]
    assert written["checkpoint"] == named and "recipe" not in written and written["seeds"] == []
    assert written["provenance"]["checkpoints"] == {"simclr": named}
    assert str(tmp_path) not in json.dumps(written)
    assert other["recipe"] == "published" and "checkpoint" not in other
