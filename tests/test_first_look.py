"""The first look: where real photos are found, what is said where they are not, and the picture
itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml
from disk import png, write_batches, write_cifar10, write_parquet
from PIL import Image

from issl.audit import first_look as plans
from issl.audit import first_look_command as first_look
from issl.audit import profiles, run
from issl.audit.cache import Artifacts
from issl.audit.data.usual_places import find_cifar10
from issl.audit.plots import first_look as plots
from issl.audit.profiles import ProfileOptions
from issl.data import datasets
from issl.data.published import SOURCES
from issl.errors import IsslError

VARIABLES = (
    "ISSL_DATA",
    "TORCH_HOME",
    "KERAS_HOME",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_DATASETS_CACHE",
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and a current folder beside it."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for folder in ("home", "here"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)


def arrow(folder: Path, pixels: np.ndarray) -> None:
    """As the library `datasets` prepares it."""
    names = {
        "features": {
            "label": {"names": list(SOURCES["cifar10"].names["label"]), "_type": "ClassLabel"}
        }
    }
    table = pa.table(
        {
            "img": [{"bytes": png(p), "path": None} for p in pixels],
            "label": [k % 10 for k in range(12)],
        }
    )
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": names})})
    folder.mkdir(parents=True)
    with (
        pa.OSFile(str(folder / "cifar10-train.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as out,
    ):
        out.write_table(table)


def snapshot(hub: Path, pixels: np.ndarray) -> None:
    """As the hub's cache keeps it."""
    labels = {"label": [k % 10 for k in range(12)]}
    write_parquet(
        hub / "datasets--uoft-cs--cifar10/snapshots/0b27",
        "plain_text",
        "train",
        "img",
        labels,
        pixels,
    )


@pytest.mark.parametrize(
    ("where", "variable"),
    [
        ("here/data", ""),
        ("home/data", ""),
        ("home/.cache/torch", ""),
        ("elsewhere/data", "TORCH_HOME=elsewhere"),
        ("home/.keras/datasets", ""),
        ("home/.keras/datasets/cifar-10-batches-py-target", ""),
        ("keras/datasets", "KERAS_HOME=keras"),
        ("home/.cache/huggingface/hub", ""),
        ("hub", "HF_HUB_CACHE=hub"),
        ("hf/hub", "HF_HOME=hf"),
        ("home/.cache/huggingface/datasets/uoft-cs___cifar10/plain_text/0.0.0/0b27", ""),
        ("sets/cifar10/plain_text/1.0.0/447d", "HF_DATASETS_CACHE=sets"),
    ],
)
def test_it_is_found_where_other_programs_leave_it(
    home: Path,
    where: str,
    variable: str,
    pixels: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In each layout, and read to the same pixels."""
    if variable:
        monkeypatch.setenv(variable.split("=")[0], str(tmp_path / variable.split("=")[1]))
    assert find_cifar10(None, 5) == (None, [])
    folder = tmp_path / where
    if "plain_text" in where:
        arrow(folder, pixels)
    elif folder.name == "hub":
        snapshot(folder, pixels)
    else:
        write_batches(folder, pixels, monkeypatch)
    place, wrong = find_cifar10(None, 5)
    assert place is not None and wrong == [] and folder in (place.folder, *place.folder.parents)
    read = datasets.load(place.dataset, root=place.root).tensor().numpy()
    np.testing.assert_array_equal(read, pixels[: len(read)])
    assert len(read) >= 5


def test_the_data_root_comes_first_and_what_is_damaged_or_too_small_is_said(
    home: Path, tmp_path: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar10(tmp_path / "root", 20, 10)
    base = write_batches(tmp_path / "here/data", pixels, monkeypatch)
    arrow(home / ".cache/huggingface/datasets/cifar10/plain_text/1.0.0/447d", pixels)
    place, wrong = find_cifar10(tmp_path / "root", 10)
    assert place is not None and place.root == tmp_path / "root" and wrong == []
    (base / "data_batch_3").write_bytes(b"another version")
    place, wrong = find_cifar10(tmp_path / "root", 11 + 10)
    assert place is None and len(wrong) == 3
    assert (
        "it has 20 training images, and 21 are needed" in wrong[0]
        and str(tmp_path / "root") in wrong[0]
    )
    assert "Dataset not found or corrupted" in wrong[1] and "it has 12 training images" in wrong[2]
    place, wrong = find_cifar10(None, 12)
    assert place is not None and place.dataset.startswith("arrow:") and len(wrong) == 1
    (tmp_path / "root/cifar10/plain_text/train-00000-of-00001.parquet").write_bytes(b"PAR1")
    assert "is not a readable parquet file" in find_cifar10(tmp_path / "root", 5)[1][0]


# --- in a run
# ----------------------------------------------------------------------------------------------


@pytest.fixture
def go(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a profile of one notebook, which is not executed, with a first look at twenty photos;
    returns what was printed, the notebook's line being how many pictures it found."""
    profile = tmp_path / "tiny.yaml"
    profile.write_text(
        yaml.safe_dump({"notebooks": "09", "first_look": {"n": 20, "shown": 4, "rank": 2}})
    )
    monkeypatch.setattr(profiles, "profiles", lambda: {"tiny": profile})
    # the explorer would train encoders
    monkeypatch.setattr(
        ProfileOptions,
        "plans",
        lambda self: profiles.read_profile(
            self.profile, ["09_linear_theory"], out=str(self.folder), data_root=self.root
        ),
    )
    monkeypatch.setattr(run, "_report", lambda *_: "none")

    def notebook(*_: object) -> str:
        print(f"pictures: {len([*tmp_path.glob('out/figures/tiny/*.png')])}", flush=True)
        return "ok"

    monkeypatch.setattr(run, "_notebook", notebook)

    def ran(**options: object) -> str:
        assert run.run(ProfileOptions("tiny", out=tmp_path / "out", **options), jobs=1) == 0
        return capsys.readouterr().out

    return ran


def about(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("first look")]


def test_real_photos_come_first_and_only_once(
    go: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar10(tmp_path / "root", 24, 10)
    monkeypatch.setenv("ISSL_DATA", str(tmp_path / "root"))
    printed = go()
    assert (
        about(printed)[0]
        == f"first look: CIFAR-10 at {tmp_path / 'root'} (Hugging Face's parquet files)"
    )
    picture = tmp_path / "out/figures/tiny/first_look.png"
    with Image.open(picture) as image:
        assert image.width > 1200
    assert str(picture) in about(printed)[1] and "The 4 of highest influence: mostly" in printed
    assert "pictures: 1" in printed  # the notebook was not started before
    written = json.loads(picture.with_suffix(".json").read_text())
    ranked = pd.read_csv(picture.with_suffix(".csv"))
    assert len(ranked) == 20 and ranked["influence"].is_monotonic_decreasing
    assert written["seen"] == plots.seen(ranked, 4) and written["encoder"].startswith(
        "SimCLR encoder, width 16, 100"
    )
    assert str(tmp_path) not in picture.with_suffix(".json").read_text()
    again = go()
    assert "stages: 0 computed" in again and about(again)[1].endswith("first_look.png, current")


def test_without_photos_one_line_says_how_to_get_them(
    go: Callable[..., str], tmp_path: Path
) -> None:
    printed = go()
    assert "pictures: 0" in printed
    (line,) = about(printed)
    assert (
        "no CIFAR-10 in the usual places" in line
        and "issl download cifar10 --data-root DIR" in line
    )
    assert not (tmp_path / "out/figures/tiny/first_look.png").exists()
    (line,) = about(go(from_scratch=True))
    assert "--from-scratch" in line
    assert about(go(only="09")) == []


def test_damaged_photos_and_a_damaged_encoder_fail_nothing(
    go: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar10(tmp_path / "root", 24, 10)
    path = tmp_path / "root/cifar10/plain_text/train-00000-of-00001.parquet"
    table = pa.parquet.read_table(path)
    images = table.column("img").to_pylist()
    pa.parquet.write_table(
        table.set_column(0, "img", [[{**i, "bytes": b""} for i in images]]), path
    )
    told = about(go(data_root=tmp_path / "root"))
    assert (
        len(told) == 2 and "cannot be decoded" in told[0] and "left out, for real photos" in told[1]
    )
    write_cifar10(tmp_path / "root", 24, 10)
    monkeypatch.setattr(plans, "provided", lambda _: tmp_path / "nothing")
    told = about(go(data_root=tmp_path / "root"))
    assert len(told) == 1 and "cifar10-simclr-w16-0.safetensors' does not exist" in told[0]


def test_a_setting_that_is_wrong_is_an_error(go: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"first_look": {"photos": 3}}))
    with pytest.raises(IsslError, match="unknown field 'photos'"):
        first_look.find(ProfileOptions("tiny", out=tmp_path / "out"))


# --- what is said
# ------------------------------------------------------------------------------------------


def test_the_sentences_count_what_is_there() -> None:
    ranked = pd.DataFrame(
        {
            "position": range(10),
            "influence": np.arange(10.0)[::-1],
            "stability_loss": [9, 1, 2, 8, 3, 4, 5, 6, 7, 0],
            "label_name": ["ship", "ship", "cat", *["dog"] * 4, "frog", "frog", "frog"],
            "brightness": [0.5] * 10,
            "contrast": [0.3, 0.3, 0.3, *[0.2] * 4, 0.1, 0.1, 0.1],
            "border_std": [0.1] * 10,
        }
    )
    classes, pixels, loss = plots.seen(ranked, 3)
    assert (
        classes == "The 3 of highest influence: mostly ship (2) and cat (1); of lowest: frog (3)."
    )
    assert "differ most in contrast: on average 0.30 against 0.10 (0.20 in all" in pixels
    assert loss.startswith("Of those 3 highest, 1 are also among the 3 of highest stability loss")


@pytest.mark.data
def test_under_the_released_encoder_ships_and_cars_are_above_frogs(
    data_root: Path, tmp_path: Path
) -> None:
    """What the README's figure shows, on 400 photos: the encoder is read as it was trained."""
    plan = plans.FirstLook(data_root=str(data_root), out=str(tmp_path), n=400)
    ranked = plots.table(plan.scores().read(Artifacts(tmp_path / "artifacts")), plan.data().load())
    machines = ranked["label_name"].isin(["ship", "automobile", "airplane", "truck"])
    assert machines.head(100).mean() > machines.mean() + 0.15 > machines.tail(100).mean() + 0.3
