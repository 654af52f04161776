"""Encoders that others trained, in the place of trainings: keys, records, and bad input."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_scale import same_features, thin
from torch import nn

import issl
from issl.audit import claims
from issl.audit.cache import Artifacts
from issl.audit.given import CheckpointFile, Given
from issl.audit.plans_own import Bridges
from issl.audit.plans_paper import Duplicates, SeedCorrelation
from issl.audit.profiles import PLANS
from issl.audit.settings import Data
from issl.audit.stages import Embed, Influence, Pretrain
from issl.audit.stats.statistics import Estimate
from issl.cli import main
from issl.pretraining.other_encoders import open_encoder

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


def test_bad_checkpoints(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    torch.save({"state_dict": nn.Linear(2, 2).state_dict()}, tmp_path / "mlp.ckpt")
    for only, given, named in [
        ("03", f"simclr={tmp_path}/mlp.ckpt", "no ResNet among its keys"),
        ("03", f"moco={checkpoint}", "moco"),
        ("06", f"simclr={checkpoint}", "06_pruning trains encoders itself"),
    ]:
        assert main(["run", "--only", only, "--checkpoint", given, "--out", str(tmp_path)]) == 2
        assert named in capsys.readouterr().err
    with pytest.raises(issl.IsslError, match=r"checkpoints = 'weights\.ckpt'"):
        SeedCorrelation(checkpoints="weights.ckpt")
