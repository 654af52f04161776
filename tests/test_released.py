"""What comes with the repository: found by the keys of `overnight`, without any data, and whole; a
stranger's scores beside it."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import issl
from issl import cli
from issl.audit import RELEASED, cache
from issl.audit.again import differences
from issl.audit.cache import INDEX, Artifacts, release, released_index
from issl.audit.claims import readings
from issl.audit.profiles import ProfileOptions, all_stages
from issl.audit.settings import Data
from issl.audit.stages import Embed, Pretrain
from issl.audit.table_stages import Known, Pixels, Thumbnails, shown_images
from issl.commands.reference import open_reference
from issl.errors import IsslError
from issl.files import REPOSITORY, file_digest, provided
from issl.influence.scorer import Measurement
from issl.pretraining.encoder import Encoder, read_encoder
from issl.pretraining.learner import load_learner


def test_every_released_artifact_is_one_of_overnight(tmp_path: Path) -> None:
    """Of any reading, of 05 or 16. Encoders are whole learners and say how they were trained."""
    options = [*map(ProfileOptions, readings()), ProfileOptions("overnight", only="05,16")]
    options.append(ProfileOptions(RELEASED, door="tables"))  # people's choices are not released
    stages = {stage.label: stage for o in options for stage in all_stages(o.plans().values())}
    folder = REPOSITORY / "released"
    index = released_index(folder)
    artifacts = Artifacts(tmp_path, released=folder)
    assert len(index) >= 60
    listed = {INDEX, "README.md"}
    for label, entry in index.items():
        assert label in stages, f"{label} is released and no stage of overnight"
        stage = stages[label]
        assert {k: entry[k] for k in ("stage", "version", "settings")} == stage.content()
        assert artifacts.has(stage) and artifacts.about(stage)["made_with"]
        listed |= {file["path"] for file in entry["files"].values()}
        if isinstance(stage, Pretrain):
            path = artifacts.file(stage, "encoder.safetensors")
            config = read_encoder(path)[0]["config"]
            data = {k: config["data"][k] for k in Data.model_fields if k != "root"}
            settings = {k: v for k, v in config.items() if k in Pretrain.model_fields}
            assert Pretrain.model_validate(settings | {"data": data}).key == stage.key
            learner = load_learner(path)
            assert learner.recipe == stage.recipe
            assert all(v.isfinite().all() for v in learner.state_dict().values())
            assert len(stage.history(artifacts)) == stage.epochs
    files = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert {str(p) for p in files if "unfinished" not in p.parts} == listed


def test_what_is_released_is_read_alone_and_damage_is_named(tmp_path: Path, capsys) -> None:
    """A damaged table is computed again, a damaged encoder is an error."""
    data, released = Data(name="scenes", n=32), tmp_path / "released"
    train = Pretrain(data=data, width=1, epochs=2, batch_size=16, snapshots=(1,))
    table, depends = Pixels(data=data), Embed(pretrain=train, data=data)
    made = Artifacts(tmp_path / "made", released=None)
    release(made, train, released, {"encoder.safetensors": "e.safetensors"})
    release(made, table, released, {"pixels.parquet": "pixels.parquet"})
    there = {p: p.stat().st_mtime_ns for p in released.rglob("*")}
    found = Artifacts(tmp_path / "other", released=released)
    same, state = train.learner(found).state_dict(), train.learner(made).state_dict()
    assert all(torch.equal(v, state[k]) for k, v in same.items())
    depends.read(found)  # what depends on it is computed into the cache
    assert found.computed == [depends.label] and not (tmp_path / "other" / train.name).exists()
    with pytest.raises(IsslError, match=r"encoder-0001.* is not among the released files"):
        train.encoder(found, after=1)
    assert {p: p.stat().st_mtime_ns for p in released.rglob("*")} == there
    for damaged in (released / "pixels.parquet", released / "e.safetensors"):
        damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    again = Artifacts(tmp_path / "again", released=released)
    assert table.read(again).equals(table.read(made)) and again.computed == [table.label]
    assert "pixels.parquet is damaged" in capsys.readouterr().err
    with pytest.raises(IsslError, match=r"e\.safetensors is damaged"):
        again.get(train)


def test_a_damaged_table_ends_a_run_before_any_figure(tmp_path: Path, monkeypatch, capsys) -> None:
    name = "influence/cifar10-simclr-w16-0-noise0.parquet"
    monkeypatch.setattr(
        cache, "digest_once", lambda path: "" if str(path).endswith(name) else file_digest(path)
    )
    assert cli.main(["run", "--only", "01", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"{name} is damaged" in said and "--data-root" in said
    assert not list(tmp_path.rglob("*.png"))


def test_every_released_table_opens_with_pandas_alone_and_names_its_stage() -> None:
    folder = REPOSITORY / "released"
    dictionary = (folder / "README.md").read_text()
    drawn = pd.read_parquet(next((folder / "tables/images").glob("scenes-*.parquet")))
    for label, entry in released_index(folder).items():
        paths = (folder / file["path"] for file in entry["files"].values())
        for path in (path for path in paths if path.suffix == ".parquet"):
            table = pd.read_parquet(path)
            assert table.attrs["stage"] == label and len(table)
            assert path.parent.name == entry["stage"] and f"`{entry['stage']}`" in dictionary
            assert "float64" not in set(map(str, table.dtypes))
            assert all(f"`{column}`" in dictionary for column in set(table) - set(drawn)), path
            each = [c for c in ("index", "perturbation", "draws", "seed", "copies") if c in table]
            assert "index" not in table or not table.duplicated(each).any()


def test_the_accuracies_of_encoders_are_those_of_their_tables() -> None:
    """In released/README.md, and the range of the SSL ones in the README."""
    lines = (REPOSITORY / "released/README.md").read_text().splitlines()
    rows = [line.split("|") for line in lines if line.startswith("| `cifar10-")]
    assert len(rows) == len(list((REPOSITORY / "released/encoders").glob("*.safetensors")))
    reached = {}
    for _, name, _, _, knn, probe, *_ in rows:
        file = name.strip(" `").replace("_", "-")
        table = pd.read_parquet(REPOSITORY / f"released/tables/evaluate/{file}.parquet")
        told = [f"{table[column].mean():.1%}" for column in ("knn", "probe")]
        assert [knn.strip(), probe.strip()] == told, file
        reached[file] = 100 * table["knn"].mean()
    ssl = [v for file, v in reached.items() if not re.search("supervised|untrained", file)]
    readme = (REPOSITORY / "README.md").read_text()
    assert f"kNN {min(ssl):.0f} to {max(ssl):.0f}%" in readme


def test_the_first_door_draws_what_is_released_and_says_what_is_not() -> None:
    options = ProfileOptions(RELEASED, door="tables")
    plans, left_out = options.plans(), options.not_released()
    index = released_index(provided("released"))
    photos = {name: plan for name, plan in plans.items() if plan.dataset != "scenes"}
    assert {"01_seed_correlation", "03_background_bias", "13_explained"} <= set(photos)
    assert "06_pruning" not in plans
    for plan in photos.values():
        assert all(stage.label in index for stage in plan.stages())
    for name, plan in replace(options, door=None).plans().items():
        if name in plans:
            drawn, asked = (set(getattr(p, "methods", ())) for p in (plans[name], plan))
            assert drawn | set(left_out.get(name, ())) == asked, name
        else:
            assert left_out[name] == ()


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
    scores = np.exp(np.random.default_rng(0).normal(size=500))
    kept = pd.DataFrame({"index": range(500), "influence": scores})
    assert differences(kept, kept) == (0.0, 1.0)
    near = kept.assign(influence=scores * (1 + 1e-5))
    assert 5e-6 < differences(near, kept)[0] <= 1.1e-5
    assert differences(kept[:10], kept)[1] == -1
    ranks = []
    for other in (scores**3, scores[::-1], np.nan, 0.0):
        most, rank = differences(kept.assign(influence=other), kept)
        assert most > 0.1
        ranks.append(rank)
    assert ranks[0] == 1 and ranks[1] < 0.5 and ranks[2:] == [-1, -1]


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


NAME = "cifar10-simclr-w16"
WEIGHTS = REPOSITORY / f"released/encoders/{NAME}-1.safetensors"
USUAL = Measurement(issl.GaussianNoise(0.05, 0.2), issl.LoGra(16, 0.1))


def test_other_settings_or_another_architecture_are_one_error() -> None:
    encoder = issl.load_encoder(WEIGHTS)
    others = {"curvature": issl.LoGra(8), "perturbation": issl.GaussianNoise(0.05, 0.1), "draws": 2}
    for name, value in others.items():
        with pytest.raises(IsslError, match=f"--reference {NAME}.*{name}"):
            open_reference(NAME, encoder, replace(USUAL, **{name: value}))
    with pytest.raises(IsslError, match="another architecture"):
        open_reference(NAME, Encoder(width=8).backbone, USUAL)


def test_a_percentile_is_the_share_of_the_reference_below(tmp_path: Path) -> None:
    reference = open_reference(NAME, issl.load_encoder(WEIGHTS), USUAL)
    assert len(reference) == 50_000
    out = str(tmp_path / "scores.csv")
    command = f"influence --data scenes --n 24 --reference {NAME} --encoder".split()
    assert cli.main([*command, str(WEIGHTS), "--out", out]) == 0
    table = pd.read_csv(out)
    want = [100 * (reference < score).mean() for score in table["influence"]]
    np.testing.assert_allclose(table["reference_percentile"], want, atol=0.01)
    assert min(want) < max(want)
