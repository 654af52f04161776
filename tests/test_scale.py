"""Encoders from elsewhere, and the command that scores one's own images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from disk import encoder
from PIL import Image
from torch import nn
from torchvision.models import resnet

import issl
from issl import LoGra, cli, self_influence
from issl.commands.pictures import SIDE
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
    """Other projects' files: test_given.py."""
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
    offline = Mock(side_effect=OSError("no route"))
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    for spec, message in (
        (str(tmp_path / "text.pt"), "no checkpoint"),
        (str(tmp_path / "empty.pt"), "no state dict"),
        ("torchvision:resnet7", "no model 'resnet7'"),
        ("torchvision:resnet18", "--weights FILE"),
    ):
        with pytest.raises(issl.IsslError, match=message):
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
