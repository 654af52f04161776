"""What comes with the repository: found by the keys of `overnight`, without any data, and whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from issl.audit import RELEASED
from issl.audit.again import differences
from issl.audit.cache import INDEX, Artifacts, Stage, release, released_index
from issl.audit.claims import readings
from issl.audit.profiles import ProfileOptions, all_stages
from issl.audit.settings import Data
from issl.audit.stages import Embed, Pretrain
from issl.audit.table_stages import Known, Pixels, Thumbnails, shown_images
from issl.errors import IsslError
from issl.files import REPOSITORY, provided
from issl.pretraining.encoder import read_encoder
from issl.pretraining.learner import load_learner


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without data."""
    monkeypatch.delenv("ISSL_DATA", raising=False)


@pytest.fixture
def stages() -> dict[str, Stage]:
    """Those of `overnight` in every reading of the paper, of its notebook about faces, and of what
    is drawn from tables."""
    options = [*map(ProfileOptions, readings()), ProfileOptions("overnight", only="05")]
    options.append(ProfileOptions(RELEASED, door="tables"))  # people's choices are not released
    return {stage.label: stage for o in options for stage in all_stages(o.plans().values())}


def test_every_released_artifact_is_one_of_overnight(
    stages: dict[str, Stage], tmp_path: Path
) -> None:
    """And every encoder is the whole learner, and says how it was trained."""
    folder = REPOSITORY / "released"
    index = released_index(folder)
    artifacts = Artifacts(tmp_path, released=folder)
    assert len(index) >= 60
    for label, entry in index.items():
        assert label in stages, f"{label} is released and no stage of overnight"
        assert {k: entry[k] for k in ("stage", "version", "settings")} == stages[label].content()
        assert artifacts.has(stages[label]) and artifacts.about(stages[label])["made_with"]
    listed = {file["path"] for entry in index.values() for file in entry["files"].values()}
    files = [p for p in folder.rglob("*") if p.is_file()]
    there = {str(p.relative_to(folder)) for p in files if "unfinished" not in p.parts}
    assert there == listed | {INDEX, "README.md"}
    for stage in (stages[label] for label in index if label.startswith("pretrain/")):
        assert isinstance(stage, Pretrain)
        path = artifacts.file(stage, "encoder.safetensors")
        config = read_encoder(path)[0]["config"]
        data = {k: config["data"][k] for k in Data.model_fields if k != "root"}
        settings = {k: v for k, v in config.items() if k in Pretrain.model_fields}
        assert Pretrain.model_validate(settings | {"data": data}).key == stage.key
        learner = load_learner(path)
        assert learner.recipe == stage.recipe
        assert all(v.isfinite().all() for v in learner.state_dict().values())
        assert len(stage.history(artifacts)) == stage.epochs


def test_what_is_released_is_read_alone_and_damage_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged table is computed again, a damaged encoder is an error."""
    data, released = Data(name="scenes", n=32), tmp_path / "released"
    train = Pretrain(data=data, width=1, epochs=2, batch_size=16, snapshots=(1,))
    table, depends = Pixels(data=data), Embed(pretrain=train, data=data)
    made = Artifacts(tmp_path / "made", released=None)
    for name in ("a", "b"):  # it can be released again
        release(made, train, released, {"encoder.safetensors": f"{name}.safetensors"})
    release(made, table, released, {"pixels.parquet": "pixels.parquet"})
    entries = json.loads((released / INDEX).read_text())
    assert set(entries) == {train.label, table.label}
    assert entries[train.label]["files"]["encoder.safetensors"]["path"] == "b.safetensors"
    there = {p: p.stat().st_mtime_ns for p in released.rglob("*")}
    found = Artifacts(tmp_path / "other", released=released)
    learner, state = train.learner(found), train.learner(made).state_dict()
    assert learner.recipe == train.recipe
    assert all(torch.equal(v, state[k]) for k, v in learner.state_dict().items())
    depends.read(found)  # what depends on it is computed into the cache
    assert found.computed == [depends.label] and not (tmp_path / "other" / train.name).exists()
    with pytest.raises(IsslError, match=r"encoder-0001.* is not among the released files"):
        train.encoder(found, after=1)
    assert {p: p.stat().st_mtime_ns for p in released.rglob("*")} == there
    for name in ("pixels.parquet", "b.safetensors"):
        damaged = released / name
        damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    again = Artifacts(tmp_path / "again", released=released)
    assert table.read(again).equals(table.read(made)) and again.computed == [table.label]
    assert "pixels.parquet is damaged" in capsys.readouterr().err
    with pytest.raises(IsslError, match=r"b\.safetensors is damaged"):
        again.get(train)


def test_every_released_table_opens_with_pandas_alone_and_names_its_stage() -> None:
    folder = REPOSITORY / "released"
    dictionary = (folder / "README.md").read_text()
    drawn = pd.read_parquet(next((folder / "tables/images").glob("scenes-*.parquet")))
    for label, entry in released_index(folder).items():
        for path in (Path(file["path"]) for file in entry["files"].values()):
            if path.suffix != ".parquet":
                continue
            table = pd.read_parquet(folder / path)
            assert table.attrs["stage"] == label and len(table)
            assert path.parent.name == entry["stage"]
            assert "float64" not in set(map(str, table.dtypes))
            assert all(f"`{column}`" in dictionary for column in set(table) - set(drawn)), path
            if "index" in table:
                asked = [c for c in ("perturbation", "draws", "seed") if c in table]
                assert not table.duplicated(["index", *asked]).any()


def test_the_first_door_draws_what_is_released_and_says_what_is_not() -> None:
    options = ProfileOptions(RELEASED, door="tables")
    plans, left_out = options.plans(), options.not_released()
    index = released_index(provided("released"))
    photos = {name: plan for name, plan in plans.items() if plan.dataset != "scenes"}
    assert {"01_seed_correlation", "03_background_bias", "13_explained"} <= set(photos)
    for plan in photos.values():
        assert all(stage.label in index for stage in plan.stages())
    everything = replace(options, door=None).plans()
    for name, plan in everything.items():
        drawn = getattr(plans.get(name), "methods", ())
        assert name in plans or left_out[name] == ()
        if name in plans:
            assert {*drawn, *left_out.get(name, ())} == set(getattr(plan, "methods", ())), name
    assert "06_pruning" not in plans


def test_the_second_door_trains_nothing_on_photos() -> None:
    plans = ProfileOptions(RELEASED, door="encoders").plans()
    index = released_index(provided("released"))
    artifacts = plans["01_seed_correlation"].artifacts()
    for stage in all_stages(plans.values()):
        if isinstance(stage, Pretrain) and stage.epochs and stage.data.name == "cifar10":
            assert stage.label in index and artifacts.has(stage)
        elif stage.name != "pretrain":
            assert artifacts._released(stage) is None


def test_tables_are_compared_by_numbers_then_ranks() -> None:
    rng = np.random.default_rng(0)
    kept = pd.DataFrame({"index": range(500), "influence": np.exp(rng.normal(size=500))})
    assert differences(kept, kept) == (0.0, 1.0)
    near = kept.assign(influence=kept["influence"] * (1 + 1e-5))
    assert 5e-6 < differences(near, kept)[0] <= 1.1e-5
    most, rank = differences(kept.assign(influence=kept["influence"] ** 3), kept)
    assert most > 0.1 and rank == 1
    most, rank = differences(kept.assign(influence=kept["influence"].to_numpy()[::-1]), kept)
    assert most > 0.1 and rank < 0.5
    assert differences(kept[:10], kept)[1] == -1
    for wrong in (np.nan, 0.0):
        most, rank = differences(kept.assign(influence=wrong), kept)
        assert most > 0.1 and rank == -1


def test_pixels_that_are_not_shown_are_an_error(tmp_path: Path) -> None:
    data, artifacts = Data(name="scenes", n=64), Artifacts(tmp_path, released=None)
    parts = Known(data=data).read(artifacts), Thumbnails(data=data).read(artifacts)
    images, whole = shown_images(parts[0], parts[1:]), data.load()
    assert images.index.equal(whole.index) and images.labels.equal(whole.labels)
    assert images.attributes.equals(whole.attributes.reset_index(drop=True))
    first = range(Thumbnails.first)
    assert torch.equal(images.subset(first).tensor(), whole.subset(first).tensor())
    shown = set(parts[1]["index"])
    other = next(k for k in range(64) if int(whole.index[k]) not in shown)
    with pytest.raises(IsslError, match=f"image {int(whole.index[other])} of scenes"):
        images.subset([other]).tensor()
