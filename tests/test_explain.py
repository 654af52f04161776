"""`issl explain`: its lists against the library's scores, and input that does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import issl
from issl import cli
from issl.audit.cache import Artifacts
from issl.audit.settings import Data
from issl.audit.stages import Pretrain
from issl.data import datasets
from issl.data.identity import SetIdentity
from issl.influence.scores import as_queries
from issl.pretraining.encoder import load_encoder, read_encoder
from issl.pretraining.other_encoders import open_encoder

HOW = {"curvature": issl.LoGra(4), "draws": 4, "computing": issl.Computing(batch_size=64)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder trained on 64 scenes by the command line."""
    path = tmp_path_factory.mktemp("encoder") / "mine.safetensors"
    told = "pretrain --data scenes --n 64 --width 2 --epochs 1 --batch-size 32 --recipe short"
    assert cli.main([*told.split(), "--out", str(path)]) == 0
    return path


def run(encoder: Path, out: Path, image: str = "test:3", *more: str, data: str = "scenes") -> int:
    shared = ["--encoder", str(encoder), "--data", data, "--out", str(out / "why.png")]
    shared += ["--rank", "4", "--k", "5"]
    return cli.main(["explain", image, *shared, *more])


def test_the_lists_are_those_of_the_scores(trained: Path, tmp_path: Path, capsys) -> None:
    assert run(trained, tmp_path) == 0
    assert "test image 3 among 64 images of scenes" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "why.csv")
    encoder, images = load_encoder(trained), issl.load("scenes", n=64)
    query = issl.load("scenes", "test").subset([3])
    scores = issl.cross_influence(encoder, images, as_queries(query), **HOW)[0]
    with torch.no_grad():
        features = encoder(torch.cat([images.pixels, query.pixels]).float() / 255)
    features = torch.nn.functional.normalize(features, dim=1)
    near = (features[:-1] @ features[-1]).numpy()
    of = {name: part.set_index("rank") for name, part in table.groupby("list")}
    assert of["taught"]["index"].tolist() == scores.argsort(descending=True)[:5].tolist()
    assert of["opposed"]["index"].tolist() == scores.argsort()[:5].tolist()
    assert of["nearest"]["index"].tolist() == np.argsort(-near, kind="stable")[:5].tolist()
    np.testing.assert_allclose(of["taught"]["influence"], scores.topk(5)[0], rtol=1e-4)
    assert of["nearest"]["similarity_rank"].tolist() == [1, 2, 3, 4, 5]
    assert (tmp_path / "why.png").stat().st_size > 10_000


def test_a_file_says_which_part_it_saw_and_at_which_size(tmp_path: Path) -> None:
    path = tmp_path / "tested.safetensors"
    told = "pretrain --data scenes --split test --n 48 --width 1 --epochs 1 --batch-size 16"
    assert cli.main([*told.split(), "--recipe", "short", "--out", str(path)]) == 0
    assert run(path, tmp_path, "train:7") == 0
    own = pd.read_csv(tmp_path / "why.csv").query("list == 'itself'")["index"]
    assert own.tolist() == [int(issl.load("scenes", "test", n=48).index[7])]
    header, tensors = read_encoder(path)
    save_file(tensors, path, {"issl": json.dumps(header | {"size": 64})})
    assert open_encoder(str(path)).size == 64


def test_a_training_image_stands_by_itself(trained: Path, tmp_path: Path) -> None:
    assert run(trained, tmp_path, "train:7") == 0
    table = pd.read_csv(tmp_path / "why.csv")
    others, row = table[table["list"] != "itself"], table[table["list"] == "itself"].iloc[0]
    assert row["index"] == 7 and 7 not in others["index"].tolist()
    assert others["similarity_rank"].min() == 1 and others["influence_rank"].max() == 63
    assert row["similarity"] == pytest.approx(1)
    own = issl.self_influence(load_encoder(trained), issl.load("scenes", n=64), **HOW)
    assert row["influence"] == pytest.approx(own["influence"][7], rel=1e-3)


def test_a_photo_is_fitted_only_where_asked_for(trained: Path, tmp_path: Path, capsys) -> None:
    photo = tmp_path / "photo.jpg"
    drawn = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(drawn).save(photo)
    assert run(trained, tmp_path, str(photo)) == 2
    said = capsys.readouterr().err
    assert "photo.jpg is 90 × 60 px" in said and "--fit" in said
    assert run(trained, tmp_path, str(photo), "--fit") == 0


@pytest.mark.parametrize(
    ("image", "more", "data", "named"),
    [
        ("nowhere.png", [], "scenes", "nowhere.png"),
        ("train:64", [], "scenes", "train:64"),
        ("test:3", [], "scenes-swapped", "scenes, not on scenes-swapped"),
        ("test:3", ["--images", "32"], "scenes", "64 images of scenes, not on 32"),
    ],
)
def test_input_that_does_not_fit(image, more, data, named, trained, tmp_path, capsys) -> None:
    assert run(trained, tmp_path, image, *more, data=data) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "why.csv").exists()


def test_a_stages_encoder_and_images_that_changed(tmp_path: Path, capsys, monkeypatch) -> None:
    stage = Pretrain(data=Data(name="scenes", n=40), width=1, epochs=1, batch_size=20)
    encoder = Artifacts(tmp_path).get(stage) / "encoder.safetensors"
    assert run(encoder, tmp_path) == 0
    assert "among 40 images of scenes" in capsys.readouterr().out
    monkeypatch.setattr(datasets, "identity", lambda *_: SetIdentity("another", "scenes"))
    assert run(encoder, tmp_path) == 2
    assert "other images of scenes" in capsys.readouterr().err
