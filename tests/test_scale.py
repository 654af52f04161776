"""Several processes, encoders from elsewhere, and the command that scores one's own images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import submitit
import torch
from forked import on_processes
from nets import make, pictures
from PIL import Image
from test_influence import NOISE
from torch import Tensor, nn
from torchvision.models import resnet

import issl
from issl import (
    EKFAC,
    Computing,
    Exact,
    LoGra,
    cli,
    cross_influence,
    self_influence,
    top_influences,
)
from issl.pretraining.encoder import Head, new_encoder, save_encoder
from issl.pretraining.other_encoders import SOLO_CIFAR, Triple, open_encoder, resnet_from
from issl.shards import ONE, Shards

# --- several processes
# -------------------------------------------------------------------------------------


def several_scores(shards: Shards) -> tuple:
    net, images, query = make("batchnorm"), pictures(31), pictures(3, seed=4)
    how, pca = Computing(shards=shards), LoGra(3, projection="pca", fit=9)
    few = Computing(shards=shards, batch_size=7)
    return (
        self_influence(net, images, NOISE, LoGra(4), computing=few)["influence"].to_numpy(),
        self_influence(net, images, NOISE, EKFAC(), computing=how)["influence"].to_numpy(),
        self_influence(net, images, NOISE, pca, computing=how)["influence"].to_numpy(),
        self_influence(make("stride"), images, NOISE, Exact(), computing=how)
        .drop(columns="index")
        .to_numpy(),
        cross_influence(net, images, query, NOISE, LoGra(4), computing=how).numpy(),
        top_influences(net, images, query, 5, NOISE, LoGra(4), computing=how).to_numpy(),
    )


def dies_on_one(shards: Shards) -> str:
    if shards.rank == 1:
        os._exit(1)
    self_influence(make("stride"), pictures(12), NOISE, computing=Computing(shards=shards))
    return "went on"


def two_images(shards: Shards) -> None:
    self_influence(make("stride"), pictures(2), NOISE, computing=Computing(shards=shards))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_one_score(world: int) -> None:
    alone = several_scores(ONE)
    for several in on_processes(world, several_scores):
        for a, b in zip(alone, several, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-9)


def test_a_dead_process_is_an_error_and_no_hang() -> None:
    began = time.monotonic()
    (error,) = on_processes(2, dies_on_one, dying=1, timeout_s=20)
    assert (
        "process 0 of 2: another process died or did not answer" in error
        and time.monotonic() - began < 150
    )


def test_more_processes_than_images() -> None:
    assert all("2 images on 3 processes" in e for e in on_processes(3, two_images))


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
        assert picture.width > 1000
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
        (["--out", "scores.txt"], "ends in .parquet or .csv"),
        (["--out", "/proc/x/scores.csv"], "cannot be made"),
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
    """Kept while scoring, or fitted in parts and merged; then used for other images."""
    encoder, kept = ours(tmp_path / "e.safetensors"), tmp_path / "c.safetensors"
    common = ["--data", f"folder:{photos}", "--encoder", encoder]

    def scored(name: str, *more: str) -> pd.DataFrame:
        assert (
            cli.main(["influence", *common, "--out", str(tmp_path / f"{name}.parquet"), *more]) == 0
        )
        return pd.read_parquet(tmp_path / f"{name}.parquet")

    whole = scored("whole", "--rank", "2", "--save-curvature", str(kept))
    pd.testing.assert_frame_equal(scored("later", "--curvature-from", str(kept)), whole, rtol=1e-9)
    for part in "ab":
        common[1] = f"folder:{photos / part}"
        assert (
            cli.main(
                ["fit", *common, "--rank", "2", "--out", str(tmp_path / f"{part}.safetensors")]
            )
            == 0
        )
    assert "curvature of 5 images of folder:b, 20 layers" in capsys.readouterr().out
    parts = [str(tmp_path / f"{part}.safetensors") for part in "ab"]
    assert cli.main(["merge", *parts, "--out", str(tmp_path / "ab.safetensors")]) == 0
    assert "curvature of 10 images, in 2 parts" in capsys.readouterr().out
    few = scored("few", "--curvature-from", str(tmp_path / "ab.safetensors"))
    assert len(few) == 5 and (few["influence"] > 0).all()
    for more, message in [
        (["--curvature-from", str(kept), "--rank", "3"], "--rank 3: the file of --curvature-from"),
        (
            ["--curvature-from", str(kept), "--size", "64"],
            "the curvature is of images of (32, 32) px",
        ),
        (["--curvature-from", "nothing.safetensors"], "does not exist"),
        (
            ["--save-curvature", "c.pt"],
            "--save-curvature c.pt: give a file name that ends in .safetensors",
        ),
    ]:
        assert cli.main(["influence", *common, "--out", str(tmp_path / "x.csv"), *more]) == 2
        assert message in capsys.readouterr().err


def test_the_command_fills_a_folder(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder, out = ours(tmp_path / "e.safetensors"), tmp_path / "all"
    given = ["influence", "--data", f"folder:{photos}", "--encoder", encoder]
    assert cli.main([*given, "--rank", "2", "--out", str(out)]) == 0
    assert "1 parts fitted, 1 scored" in capsys.readouterr().out and (out / "scores.png").is_file()
    assert cli.main([*given, "--rank", "2", "--out", str(tmp_path / "one.parquet")]) == 0
    one, parts = pd.read_parquet(tmp_path / "one.parquet"), pd.read_parquet(out / "scores")
    pd.testing.assert_frame_equal(one, parts, rtol=1e-6)
    capsys.readouterr()
    assert cli.main([*given, "--rank", "2", "--out", str(out)]) == 0
    assert "0 parts fitted, 0 scored" in capsys.readouterr().out
    other = [
        *given,
        "--curvature-from",
        str(out / "curvature.safetensors"),
        "--out",
        str(tmp_path / "again"),
    ]
    assert cli.main(other) == 0 and "0 parts fitted, 1 scored" in capsys.readouterr().out
    for more, message in [
        (["--out", str(out), "--rank", "3"], "of another encoder, images or setting"),
        (["--out", str(out), "--store", "x"], "drop --store"),
        (["--out", "x.csv", "--cluster", "slurm"], "give a folder with --out"),
    ]:
        assert cli.main([*given, *more]) == 2
        assert message in capsys.readouterr().err


def test_three_steps_of_jobs(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """As on Slurm (tests/test_compute.py), by submitit's executor that runs them in this
    process."""
    asked: list[dict] = []

    def executor_for(cluster: str, folder: Path, jobs: int, slurm: dict) -> submitit.AutoExecutor:
        executor = submitit.AutoExecutor(folder, cluster="debug")
        monkeypatch.setattr(executor, "update_parameters", lambda **options: asked.append(options))
        return executor

    monkeypatch.setattr("issl.commands.in_parts.executor_for", executor_for)
    given = [
        "influence",
        "--data",
        f"folder:{photos}",
        "--encoder",
        ours(tmp_path / "e.safetensors"),
        "--rank",
        "2",
    ]
    assert (
        cli.main([*given, "--out", str(tmp_path / "all"), "--cluster", "slurm", "--jobs", "2"]) == 0
    )
    said = capsys.readouterr().out
    assert (
        "fit: 2 jobs" in said
        and "merge: 1 jobs" in said
        and "score: 2 jobs" in said
        and "1 parts scored" in said
    )
    assert [next(iter(a["slurm_additional_parameters"].values()))[:9] for a in asked] == [
        "afterany:"
    ] * 2
    assert len(pd.read_parquet(tmp_path / "all" / "scores")) == 10


@pytest.mark.slow
def test_under_torchrun(photos: Path, tmp_path: Path) -> None:
    encoder = ours(tmp_path / "e.safetensors")
    common = [
        "influence",
        "--data",
        f"folder:{photos}",
        "--encoder",
        encoder,
        "--rank",
        "2",
        "--images",
        "9",
        "--out",
    ]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "issl"]
    done = subprocess.run(
        [*run, *common, str(tmp_path / "two.parquet")], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0 and "on 2 processes" in done.stdout, done.stderr
    assert cli.main([*common, str(tmp_path / "one.parquet")]) == 0
    one, two = (pd.read_parquet(tmp_path / f"{k}.parquet") for k in ("one", "two"))
    pd.testing.assert_frame_equal(one, two, rtol=1e-5)
