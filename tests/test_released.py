"""What comes with the repository: found by the keys of `overnight`, without any data, and whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from issl.audit.cache import INDEX, Artifacts, Stage, release, released_index
from issl.audit.profiles import ProfileOptions, all_stages
from issl.audit.settings import Data
from issl.audit.stages import Pretrain
from issl.pretraining.encoder import read_encoder
from issl.pretraining.learner import load_learner


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Stage]:
    """Those of `overnight`, and of its notebook about faces, on a machine without data."""
    monkeypatch.delenv("ISSL_DATA", raising=False)
    options = [ProfileOptions("overnight"), ProfileOptions("overnight", only="05")]
    return {stage.label: stage for o in options for stage in all_stages(o.plans().values())}


def test_every_released_artifact_is_one_of_overnight(
    stages: dict[str, Stage], repository: Path, tmp_path: Path
) -> None:
    folder = repository / "released"
    index = released_index(folder)
    artifacts = Artifacts(tmp_path, released=folder)
    assert len(index) >= 28
    for label, entry in index.items():
        assert label in stages, f"{label} is released and no stage of overnight"
        assert {k: entry[k] for k in ("stage", "version", "settings")} == stages[label].content()
        assert artifacts.has(stages[label]) and artifacts.about(stages[label])["made_with"]
    listed = {file["path"] for entry in index.values() for file in entry["files"].values()}
    there = {
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.is_file() and "unfinished" not in p.parts
    }
    assert there == listed | {INDEX, "README.md"}


def test_a_released_encoder_is_the_whole_learner_and_says_how_it_was_trained(
    stages: dict[str, Stage], repository: Path
) -> None:
    encoders = [
        stages[label]
        for label in released_index(repository / "released")
        if label.startswith("pretrain/")
    ]
    artifacts = Artifacts(repository / "nowhere", released=repository / "released")
    for stage in encoders:
        assert isinstance(stage, Pretrain)
        path = artifacts.file(stage, "encoder.safetensors")
        config = read_encoder(path)[0]["config"]
        data = {k: config["data"][k] for k in Data.model_fields if k != "root"}
        settings = {k: v for k, v in config.items() if k in Pretrain.model_fields}
        assert Pretrain.model_validate(settings | {"data": data}).key == stage.key
        learner = load_learner(path)
        assert learner.recipe == stage.recipe and all(
            v.isfinite().all() for v in learner.state_dict().values()
        )
        assert len(stage.history(artifacts)) == stage.epochs
        named = f"{stage.data.which.name}-{stage.method}-w{stage.width}-{stage.seed}.safetensors"
        assert path.name == named.replace("_", "-")


def test_what_is_released_can_be_released_again(tmp_path: Path) -> None:
    stage = Pretrain(data=Data(name="scenes", n=32), width=1, epochs=1, batch_size=16, snapshots=())
    made = Artifacts(tmp_path / "made", released=None)
    for name in ("a", "b"):
        release(made, stage, tmp_path / "released", {"encoder.safetensors": f"{name}.safetensors"})
    entries = json.loads((tmp_path / "released" / INDEX).read_text())
    assert list(entries) == [stage.label]
    assert entries[stage.label]["files"]["encoder.safetensors"]["path"] == "b.safetensors"
    found = Artifacts(tmp_path / "other", released=tmp_path / "released")
    learner = stage.learner(found)
    assert found.computed == [] and learner.recipe == stage.recipe
    state = stage.learner(made).state_dict()
    assert all(torch.equal(v, state[k]) for k, v in learner.state_dict().items())
