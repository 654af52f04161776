"""The README as documentation that is run: its code, and every command that it shows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import issl
from issl import cli
from issl.run import select

README = (Path(__file__).parent.parent / "README.md").read_text()
BASH = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
LINES = [line for raw in BASH.splitlines() if (line := raw.split("#")[0].strip())]
COMMANDS = [shlex.split(line) for line in LINES]


def arguments(command: list[str]) -> list[str] | None:
    """What follows `issl` in a command line; None for another program's."""
    words = [w for w in command if not re.fullmatch(r"[A-Z_]+=\S+", w)]
    if words[0].endswith("issl"):
        return words[1:]
    if words[:1] == ["torchrun"]:
        return words[words.index("issl") + 1 :]
    if words[0] == "./run_all.sh" and "--test" not in words:
        return ["run", *words[1:]]
    return None


def test_every_command_is_known() -> None:
    """Its options exist and its values are of the right kind; what else is shown is our own script."""
    seen = set()
    for command in COMMANDS:
        given = arguments(command)
        if given is None:
            assert command[:2] == ["./run_all.sh", "--test"], command
            continue
        options = cli.parser(given[0]).parse_args(given)  # an unknown option ends the test
        seen.add(options.command)
    assert seen >= {"run", "compute", "pretrain", "influence", "explain", "download"}
    for word in re.findall(r"--only (\d+)", README):
        assert select(word)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the README's reader has: photos, weights, an encoder of ours."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Path("photos").mkdir()
    for k in range(12):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(f"photos/{k}.jpg")
    Image.fromarray(rng.integers(0, 255, (60, 50, 3), dtype=np.uint8)).save("photo.png")
    from torchvision.models import resnet18

    model = resnet18(width_per_group=64).train()
    with torch.no_grad():
        model(torch.rand(4, 3, 64, 64))  # BatchNorm has seen images
    torch.save(model.state_dict(), "weights.pt")
    told = ["pretrain", "--data", "scenes", "--n", "32", "--width", "1", "--epochs", "1", "--batch-size", "16"]
    assert cli.main([*told, "--recipe", "short", "--out", "mine.safetensors"]) == 0
    return tmp_path


def shown(program: str, *words: str) -> list[str]:
    """The arguments of the one command of the README that has all these words."""
    alone = [c for c in COMMANDS if c[0] != "torchrun"]
    found = [a for c in alone if (a := arguments(c)) is not None and a[0] == program and set(words) <= set(c)]
    assert len(found) == 1, (program, words, found)
    return found[0]


def test_scores_of_ones_own_photos(desk: Path) -> None:
    given = shown("influence", "folder:photos", "weights.pt")
    assert cli.main([*given, "--size", "32"]) == 0
    scores = pd.read_parquet("scores.parquet")
    assert len(scores) == 12 and "path" in scores and (scores["influence"] > 0).all()


def test_an_encoder_of_ones_own_photos(desk: Path) -> None:
    given = shown("pretrain", "folder:photos")
    given[given.index("--epochs") + 1] = "1"
    given[given.index("--batch-size") + 1] = "4"
    assert cli.main(given) == 0 and Path("mine.csv").is_file() and Path("mine.png").is_file()


def test_where_did_it_learn_that(desk: Path) -> None:
    given = shown("explain", "test:17")
    given[given.index("cifar10")] = "scenes"
    assert cli.main(given) == 0 and Path("why.png").is_file() and Path("why.csv").is_file()
    given = shown("explain", "photo.png", "--fit")
    given[given.index("cifar10")] = "scenes"
    given[given.index("--encoder") + 1] = "mine.safetensors"
    assert cli.main(given) == 0 and Path("explain.png").is_file()


def test_the_code_runs(desk: Path) -> None:
    assert len(PYTHON) == 2
    own, perturbed = PYTHON
    own = own.replace("encoder = ...", 'encoder = issl.load_encoder("mine.safetensors")  #').replace("/path/to/", "")
    for text in (own.replace("size=64", "size=32"), perturbed):
        names: dict = {}
        exec(compile(text, "README.md", "exec"), names)
        assert len(names["scores"]) in (12, 32) and (names["scores"]["influence"] >= 0).all()
    index = torch.arange(32)
    pixels = issl.load("scenes", n=32).pixels.float() / 255
    changed = (names["erase"](pixels, index) != pixels).any(1).flatten(1).sum(1)
    assert int(changed.max()) <= 64 and int(changed.min()) > 32


def test_what_it_links_to_is_there(repository: Path) -> None:
    for link in re.findall(r"\]\((?!https?:|#)([^)]+)\)", README):
        assert (repository / link).exists(), link
