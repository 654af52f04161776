"""Encoders from elsewhere, and the command that scores one's own images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import resnet

import issl
from issl import LoGra, cli, self_influence
from issl.commands.pictures import SIDE
from issl.pretraining.encoder import Head, new_encoder, save_encoder
from issl.pretraining.other_encoders import SOLO_CIFAR, Triple, open_encoder, resnet_from

# --- encoders from elsewhere
# ---------------------------------------------------------------------------------


def trained(net: nn.Module, side: int = 32) -> nn.Module:
    """BatchNorm statistics as after training."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5), m.bias.normal_(0, 0.1)
                m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 2)
    return net.eval()


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std of the pixels


def same_features(
    ours: nn.Module, theirs: nn.Module, side: int, scale: tuple[Triple, Triple] = IMAGENET
) -> None:
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v)[:, None, None] for v in scale)
    with torch.no_grad():
        want = theirs((x - mean) / std).flatten(1)
        torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-5)


def small(net: nn.Module, padding: int = 1) -> nn.Module:
    """The usual change for small images; solo-learn's own pads the stem by 2."""
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, padding, bias=False), nn.Identity()
    return net


def thin(block=resnet.BasicBlock, layers=(1, 1, 1, 1), **options) -> nn.Module:
    return trained(resnet.ResNet(block, list(layers), **options))


@pytest.mark.parametrize(
    "layout", ["torchvision", "bottleneck", "wide", "small", "solo-learn", "children", "lightning"]
)
def test_resnets_in_others_layouts(layout: str, tmp_path: Path) -> None:
    block = resnet.Bottleneck if layout in ("bottleneck", "wide") else resnet.BasicBlock
    net = thin(block, width_per_group=128 if layout == "wide" else 64)
    if layout in ("small", "solo-learn", "children"):
        net = trained(small(net, 2 if layout == "solo-learn" else 1))
    body = nn.Sequential(*list(net.children())[:-1])
    content: dict = net.state_dict()
    if layout == "solo-learn":
        owner = nn.ModuleDict(
            {"backbone": net, "momentum_backbone": thin(), "projector": nn.Linear(512, 8)}
        )
        owner["backbone"].fc, owner["classifier"] = nn.Identity(), nn.Linear(512, 10)
        content = {"state_dict": owner.state_dict(), "epoch": 3}
    if layout in ("children", "lightning"):
        owner = nn.ModuleDict({"backbone": body, "projection_head": nn.Linear(512, 8)})
        content = {"state_dict": owner.state_dict(), "pytorch-lightning_version": "2.4.0"}
    torch.save(content, tmp_path / "weights.pt")
    opened = open_encoder(str(tmp_path / "weights.pt"))
    side = 32 if layout in ("small", "solo-learn", "children") else 64
    assert opened.size == (32 if side == 32 else 224)
    same_features(
        opened.encoder, body, side, SOLO_CIFAR[10] if layout == "solo-learn" else IMAGENET
    )


def test_lightlys_own_resnet(tmp_path: Path) -> None:
    from lightly import models

    net = trained(models.ResNetGenerator("resnet-18", width=0.25))
    body = nn.Sequential(*list(net.children())[:-1], nn.AdaptiveAvgPool2d(1))
    owner = nn.ModuleDict({"backbone": body, "head": nn.Linear(128, 8)})
    for content, name in ((owner.state_dict(), "a.pt"), (net.state_dict(), "b.pt")):
        torch.save({"state_dict": content}, tmp_path / name)

    class Reference(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(net.bn1(net.conv1(x)))
            return net.layer4(net.layer3(net.layer2(net.layer1(x)))).mean((2, 3))

    same_features(open_encoder(str(tmp_path / "b.pt")).encoder, Reference(), 32)
    same_features(open_encoder(str(tmp_path / "a.pt")).encoder, Reference(), 32)


def test_models_by_name(tmp_path: Path) -> None:
    from torchvision.models import get_model

    theirs = trained(get_model("resnet18", weights=None))
    torch.save(theirs.state_dict(), tmp_path / "r18.pth")
    opened = open_encoder("torchvision:resnet18", str(tmp_path / "r18.pth"))
    theirs.fc = nn.Identity()
    same_features(opened.encoder, theirs, 64)
    assert opened.size == 224 and "without fc" in opened.about


def test_bad_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(name: str, content: object) -> str:
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    (tmp_path / "text.pt").write_text("hello")
    net = thin().state_dict()
    two = {f"{p}.{k}": v for p in ("a", "b") for k, v in net.items()}
    cases = [
        ("nowhere.pt", None, "is not a file; give one, or torchvision:NAME"),
        (str(tmp_path / "text.pt"), None, "is no checkpoint; give"),
        (write("code.pt", {"state_dict": Path()}), None, "reading that could run code"),
        (write("list.pt", [1, 2]), None, "not a state dict"),
        (write("empty.pt", {"epoch": 3}), None, "holds no state dict; its entries are epoch"),
        (write("mlp.pt", nn.Linear(2, 2).state_dict()), None, "no ResNet among its keys"),
        (write("two.pt", two), None, "several ResNets"),
        (
            write("cut.pt", {k: v for k, v in net.items() if "bn2" not in k}),
            None,
            "do not fit .*bn2",
        ),
        ("torchvision:resnet7", None, "no model 'resnet7'"),
        ("torchvision:resnet18", "nowhere.pth", "'nowhere.pth' do not exist"),
        (str(tmp_path / "two.pt"), "w.pth", "go with torchvision:NAME"),
    ]
    for spec, weights, message in cases:
        with pytest.raises(issl.IsslError, match=message):
            open_encoder(spec, weights)
    monkeypatch.setattr(
        "torch.hub.load_state_dict_from_url",
        lambda *_, **__: (_ for _ in ()).throw(OSError("no route")),
    )
    with pytest.raises(issl.IsslError, match=r"could not be downloaded .*--weights FILE"):
        open_encoder("torchvision:resnet18")
    with pytest.raises(issl.IsslError, match="no ResNet"):
        resnet_from({}, "nothing")


# --- the command
# -------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten JPEGs of mixed size in two folders."""
    generator = np.random.default_rng(0)
    for k in range(10):
        path = tmp_path / "photos" / "ab"[k % 2] / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40 + 7 * k, 50, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def ours(path: Path) -> str:
    encoder = new_encoder(2, Head(hidden=8, out=8), 0).train()
    with torch.no_grad():
        encoder(torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    save_encoder(path, encoder, {})
    return str(path)


def test_scores_of_ones_own_images(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = ours(tmp_path / "e.safetensors")
    arguments = [
        "influence",
        "--data",
        f"folder:{photos}",
        "--encoder",
        encoder,
        "--rank",
        "2",
        "--out",
    ]
    out = tmp_path / "new" / "scores.parquet"
    assert cli.main([*arguments, str(out)]) == 0
    assert "10 images" in capsys.readouterr().out
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.width >= 10 * SIDE
    table = pd.read_parquet(out)
    want = self_influence(
        issl.load_encoder(encoder), issl.load(f"folder:{photos}"), curvature=LoGra(2)
    )
    np.testing.assert_allclose(table["influence"], want["influence"])
    assert table["path"][0] == "a/0.jpg" and table["label_name"].tolist() == list("aaaaabbbbb")
    assert table.attrs["curvature"] == repr(LoGra(2)) and len(table.attrs["damping"]) == 20
    assert (
        cli.main(
            [
                *arguments,
                str(tmp_path / "s.csv"),
                "--n",
                "4",
                "--draws",
                "2",
                "--curvature",
                "ekfac",
            ]
        )
        == 0
    )
    assert (
        len(pd.read_csv(tmp_path / "s.csv")["standard_error"]) == 4
        and (tmp_path / "s.png").is_file()
    )
    assert json.loads((tmp_path / "s.json").read_text())["draws"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "scores.txt"], "ends in .csv or .parquet"),
        (["--out", "/proc/x/scores.csv"], "cannot be written"),
        (["--encoder", "nowhere"], "encoder 'nowhere' is not a file"),
        (["--data", "folder:/nowhere"], "image folder '/nowhere' does not exist"),
        (["--damping", "0"], "damping"),
        (["--skip", "head"], "no module or parameter of that name"),
    ],
)
def test_bad_commands(
    arguments: list[str], message: str, photos: Path, tmp_path: Path, capsys
) -> None:
    given = {
        "--data": f"folder:{photos}",
        "--encoder": ours(tmp_path / "e.safetensors"),
        "--out": str(tmp_path / "s.csv"),
    }
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert cli.main(["influence", *(v for pair in given.items() for v in pair)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_kept_curvature(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fitted on images, and used for these and for others."""
    encoder = ours(tmp_path / "e.safetensors")
    common = ["--data", f"folder:{photos}", "--encoder", encoder]

    def scored(name: str, *more: str) -> pd.DataFrame:
        assert (
            cli.main(["influence", *common, "--out", str(tmp_path / f"{name}.parquet"), *more]) == 0
        )
        return pd.read_parquet(tmp_path / f"{name}.parquet")

    def fitted(name: str) -> str:
        path = str(tmp_path / f"{name}.safetensors")
        assert cli.main(["fit", *common, "--rank", "2", "--out", path]) == 0
        return path

    whole, kept = scored("whole", "--rank", "2"), fitted("all")
    pd.testing.assert_frame_equal(scored("later", "--curvature-from", kept), whole, rtol=1e-6)
    common[1] = f"folder:{photos / 'a'}"
    part = fitted("a")
    assert "curvature of 5 images of folder:a, 20 layers" in capsys.readouterr().out
    common[1] = f"folder:{photos / 'b'}"
    few = scored("few", "--curvature-from", part)
    assert len(few) == 5 and (few["influence"] > 0).all()
    for more, message in [
        (["--curvature-from", kept, "--rank", "3"], "--rank 3: the file of --curvature-from"),
        (["--curvature-from", kept, "--size", "64"], "the curvature is of images of (32, 32) px"),
        (["--curvature-from", "nothing.safetensors"], "does not exist"),
    ]:
        assert cli.main(["influence", *common, "--out", str(tmp_path / "x.csv"), *more]) == 2
        assert message in capsys.readouterr().err
