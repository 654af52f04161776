"""README and docs/ as documentation that is run: every command that they show, and every block of
code.

Commands run as they stand, but smaller: fewer images and epochs, a narrower encoder, weights from a
file instead of the network. `./run_all.sh` and `./run_all.sh --test` are what `.ci/run` calls.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torchvision
import yaml
from disk import write_cifar10
from PIL import Image

import issl
from issl import cli
from issl.audit import profiles
from issl.errors import IsslError
from issl.influence import reference

REPOSITORY = Path(__file__).parent.parent
PAGES = {
    path: path.read_text()
    for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
}
EVERYTHING = "\n".join(PAGES.values())


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", EVERYTHING, re.DOTALL)


LINES = list(
    dict.fromkeys(
        line
        for raw in "\n".join(blocks("bash")).splitlines()
        if (line := raw.split("#")[0].strip())
    )
)
SMALL = {  # what follows the command as it stands; of an option that is given twice the last counts
    "run": ["--only", "01"],
    "compute": ["--only", "00"],
    "pretrain": [
        "--epochs",
        "1",
        "--width",
        "1",
        "--images",
        "12",
        "--batch-size",
        "4",
        "--recipe",
        "short",
    ],
    "influence": ["--images", "8", "--rank", "2"],
    "fit": ["--images", "8", "--rank", "2"],
    "merge": [],
    "explain": [],
}
LEAVES = {
    "run": "figures/{profile}/01_seed_correlation.png",
    "compute": "artifacts/pretrain",
    "explain": "explain.png",
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the reader has: data, photos, weights, an encoder of ours."""
    folder = tmp_path_factory.mktemp("desk")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_cifar10(folder / "DIR", 32, 20)
        rng = np.random.default_rng(0)
        for name in ("photos", "new"):
            Path(name).mkdir()
            for k in range(12):
                Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(
                    f"{name}/{k}.jpg"
                )
        Image.fromarray(rng.integers(0, 255, (60, 50, 3), dtype=np.uint8)).save("photo.png")
        model = torchvision.models.resnet18().train()
        with torch.no_grad():
            model(torch.rand(4, 3, 64, 64))  # BatchNorm has seen images
        for name in ("weights.pt", "simclr.ckpt", "byol.ckpt", "barlow.ckpt"):
            torch.save(model.state_dict(), name)
        Path("kept").mkdir()
        Path("released").symlink_to(REPOSITORY / "released")
        for data, out in (("cifar10", "byol.safetensors"), ("folder:photos", "mine.safetensors")):
            told = [
                "--data",
                data,
                "--data-root",
                "DIR",
                "--width",
                "1",
                "--epochs",
                "1",
                "--batch-size",
                "4",
            ]
            assert cli.main(["pretrain", *told, "--recipe", "short", "--out", f"kept/{out}"]) == 0
        for data, out in (("photos", "curvature"), ("new", "more")):
            told = [
                "--data",
                f"folder:{data}",
                "--encoder",
                "weights.pt",
                "--rank",
                "2",
                "--images",
                "4",
            ]
            assert cli.main(["fit", *told, "--out", f"kept/{out}.safetensors"]) == 0
    return folder


@pytest.fixture
def small(desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the desk, with profiles that take seconds."""
    monkeypatch.chdir(desk)
    for name in (
        "byol.safetensors",
        "mine.safetensors",
        "curvature.safetensors",
        "more.safetensors",
    ):
        shutil.copy(f"kept/{name}", name)  # a command may have left another
    monkeypatch.setenv("ISSL_DATA", str(desk / "DIR"))
    common = {
        "dataset": "cifar10",
        "n": 32,
        "n_test": 20,
        "width": 1,
        "epochs": 1,
        "batch_size": 16,
        "duplicates": 0,
        "atypical": 0,
    }
    seeds = {"methods": ["simclr"], "rank": 2}
    profile = tmp_path / "tiny.yaml"
    profile.write_text(
        yaml.safe_dump(
            {"common": common, "00_method": {"images": 16}, "01_seed_correlation": seeds}
        )
    )
    monkeypatch.setattr(
        profiles, "profiles", lambda: dict.fromkeys(("quick", "mini", "paper"), profile)
    )


def weights_for(encoder: str, folder: Path) -> list[str]:
    """--weights, for an encoder by name, whose own would come over the network."""
    if ":" not in encoder:
        return []
    source, name = encoder.split(":")
    torch.manual_seed(0)
    if source == "timm":
        model = timm.create_model(name, pretrained=False)
    else:
        model = getattr(torchvision.models, name)().train()
        with torch.no_grad():
            model(torch.rand(4, 3, 64, 64))
    torch.save(model.state_dict(), folder / f"{name}.pt")
    return ["--weights", str(folder / f"{name}.pt")]


@pytest.mark.parametrize("line", LINES)
def test_the_command_does_what_it_says(
    line: str, small: None, desk: Path, repository: Path, tmp_path: Path
) -> None:
    words = [w for w in shlex.split(line) if not re.fullmatch(r"ISSL_DATA=\S+", w)]
    if words[0] == "./run_all.sh" and words[1:] in ([], ["--test"]):
        assert re.search(
            rf"^{re.escape(line)}( |$)", (repository / ".ci/run").read_text(), re.MULTILINE
        )
        return
    if words[0] == "source":  # run_all.sh makes what is sourced
        assert (
            f"$here/{words[1].removesuffix('/bin/activate')}"
            in (repository / "run_all.sh").read_text()
        )
        return
    if words[:2] == ["jupyter", "lab"]:
        serves_lab(words[2:], repository)
        return
    several = words[0] == "torchrun"
    if several:
        words = words[words.index("-m") + 1 :]
    given = ["run", *words[1:]] if words[0] == "./run_all.sh" else words[1:]
    assert words[0].split("/")[-1] in ("issl", "run_all.sh"), f"who runs {line}?"
    if given[0] == "download":
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(IsslError, match="no route to host"),
        ):
            patch.setattr(torchvision.datasets.CIFAR10, "download", no_network)
            patch.setattr("huggingface_hub.snapshot_download", no_network)
            options = cli.parser("download").parse_args(given)
            issl.data.published.download(options.name, options.data_root)
        return
    options = cli.parser(given[0]).parse_args(given)  # an unknown option ends the test
    given += (
        SMALL[given[0]][:2] if "--curvature-from" in given else SMALL[given[0]]
    )  # which decides the rank
    left = Path(options.out or LEAVES[given[0]].format(profile=getattr(options, "profile", "")))
    if left.is_file():
        left.unlink()  # another command's
    if given[0] == "influence":
        given += weights_for(options.encoder, tmp_path)
    if several:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                "2",
                "-m",
                "issl",
                *given,
            ],
            check=False,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(repository)},
        )
        assert done.returncode == 0 and "on 2 processes" in done.stdout, done.stderr
    elif "slurm" in given:
        with pytest.MonkeyPatch.context() as patch:  # with a Slurm: tests/test_compute.py
            patch.setenv("PATH", str(tmp_path))
            assert cli.main([*given, "--out", str(desk)]) == 2
        return
    else:
        assert (
            cli.main([*given, *(["--out", str(desk)] if given[0] in ("run", "compute") else [])])
            == 0
        )
    assert left.exists(), left


def no_network(*_: object, **__: object) -> None:
    raise OSError("no route to host")


def serves_lab(arguments: list[str], repository: Path) -> None:
    """JupyterLab starts, and has the notebook and a kernel for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [
        sys.executable,
        "-m",
        "jupyterlab",
        *arguments,
        "--no-browser",
        "--port",
        str(port),
        "--allow-root",
    ]
    address = f"http://127.0.0.1:{port}/api"

    def asked(what: str, seconds: float = 60) -> dict:
        end = time.monotonic() + seconds
        while True:
            try:
                return json.load(urllib.request.urlopen(f"{address}/{what}?token=t"))
            except urllib.error.URLError:  # not yet there
                if time.monotonic() > end or server.poll() is not None:
                    raise
                time.sleep(0.2)

    program += ["--ServerApp.token=t"]
    with subprocess.Popen(program, cwd=repository, stderr=subprocess.DEVNULL) as server:
        try:
            assert "python3" in asked("kernelspecs")["kernelspecs"]
            for path in (a for a in arguments if a.endswith(".ipynb")):
                assert asked(f"contents/{Path(path).name}")["type"] == "notebook"
        finally:
            server.terminate()


# --- blocks of code ---


def test_no_block_is_forgotten() -> None:
    """What the tests below run is all there is, but for two that are no code: what a run prints,
    and the layout."""
    languages = re.findall(r"^```(\w*)\n", EVERYTHING, re.MULTILINE)
    opened = [language for language in languages if language]
    assert {k: opened.count(k) for k in ("python", "diff")} == {"python": 5, "diff": 3}
    assert set(opened) == {"bash", "python", "diff"} and EVERYTHING.count("```") == 2 * (
        len(opened) + 3
    )


def test_the_code_runs(small: None) -> None:
    """One's own code, and a perturbation of one's own."""
    shown = [text for text in blocks("python") if "self_influence" in text]
    assert len(shown) == 3
    own = 'encoder = issl.load_encoder("mine.safetensors")  #'
    for text in sorted(shown, key=lambda text: "def erase" in text):
        names: dict = {}
        ready = (
            text.replace("encoder = ...", own)
            .replace("/path/to/", "")
            .replace("size=64", "size=32")
        )
        exec(compile(ready, "documentation", "exec"), names)
        assert len(names["scores"]) in (12, 32) and (names["scores"]["influence"] >= 0).all()
    fitting = next(text for text in blocks("python") if "issl.fit(" in text)
    names["images"] = issl.load("folder:photos", size=32)
    exec(
        compile(
            fitting.replace("size=64", "size=32").replace("/path/to/", ""), "documentation", "exec"
        ),
        names,
    )
    assert len(names["scores"]) == 12 and names["crossed"].shape == (12, 12)
    index = torch.arange(32)
    pixels = issl.load("scenes", n=32).pixels.float() / 255
    changed = (names["erase"](pixels, index) != pixels).any(1).flatten(1).sum(1)
    assert int(changed.max()) <= 64 and int(changed.min()) > 32


@pytest.fixture
def checkout(repository: Path, tmp_path: Path) -> Path:
    """A copy of what the changes are made to."""
    folder = tmp_path / "checkout"
    for name in ("issl", "notebooks"):
        shutil.copytree(
            repository / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    return folder


def apply(diff: str, checkout: Path) -> None:
    assert sum(line.startswith("+") for line in diff.splitlines()) <= 20, (
        "more than a reader takes in at a glance"
    )
    options = ["--unidiff-zero", "--verbose"]  # a hunk may have context on one side alone
    done = subprocess.run(
        ["git", "apply", *options],
        input=diff,
        text=True,
        cwd=checkout,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def in_checkout(checkout: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, env=environment, cwd=checkout, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_adding_a_notebook(checkout: Path) -> None:
    (diff,) = (d for d in blocks("diff") if "plans_own.py" in d)
    (code,) = (c for c in blocks("python") if "Brightness(" in c)
    assert len(code.splitlines()) <= 20
    apply(diff, checkout)
    model = json.loads((checkout / "notebooks/13_explained.ipynb").read_text())
    texts = [c for c in model["cells"] if c["cell_type"] == "markdown"]
    (parameters,) = (c for c in model["cells"] if "parameters" in c["metadata"].get("tags", []))
    cell = {
        "cell_type": "code",
        "execution_count": None,
        "id": "one",
        "metadata": {},
        "outputs": [],
        "source": code,
    }
    model["cells"] = [texts[0], parameters, cell]
    (checkout / "notebooks/19_brightness.ipynb").write_text(json.dumps(model))
    (checkout / "notebooks/profiles/quick.yaml").write_text(
        "common: {n: 48, width: 1, epochs: 1, batch_size: 16}"
    )
    said = in_checkout(checkout, "-m", "issl", "run", "--only", "19", "--out", str(checkout))
    assert "1 of 1 notebooks ended well" in said
    record = json.loads((checkout / "results/quick/claim_bright_images.json").read_text())
    assert record["outcome"] in ("reproduced", "contradicted", "undecided")
    assert record["verdict"] == "not tested at this scale" and record["learned"]["encoders"] == 1
    assert (checkout / "figures/quick/19_brightness.png").is_file()
    assert (
        "Bright images have high influence" in (checkout / "results/quick/index.html").read_text()
    )


def test_adding_a_method(checkout: Path) -> None:
    (diff,) = (d for d in blocks("diff") if "objectives.py" in d)
    apply(diff, checkout)
    common = [
        "--data",
        "scenes",
        "--n",
        "32",
        "--width",
        "1",
        "--epochs",
        "2",
        "--batch-size",
        "16",
    ]
    encoder = str(checkout / "e.safetensors")
    in_checkout(
        checkout,
        "-m",
        "issl",
        "pretrain",
        *common,
        "--method",
        "vicreg",
        "--recipe",
        "short",
        "--out",
        encoder,
    )
    losses = pd.read_csv(checkout / "e.csv")["loss"]
    assert np.isfinite(losses).all()
    scored = [
        "--data",
        "scenes",
        "--n",
        "32",
        "--encoder",
        encoder,
        "--out",
        str(checkout / "s.csv"),
    ]
    in_checkout(checkout, "-m", "issl", "influence", *scored)
    assert len(pd.read_csv(checkout / "s.csv")) == 32
    # the objective is another implementation's
    from lightly.loss import VICRegLoss

    names: dict = {}
    source = (checkout / "issl/pretraining/objectives.py").read_text()
    exec(compile(source, "objectives.py", "exec"), names)
    za, zb = torch.randn(2, 24, 7, generator=torch.Generator().manual_seed(0)).unbind()
    torch.testing.assert_close(names["vicreg"](za, zb), VICRegLoss()(za, zb), rtol=1e-5, atol=0)


def test_adding_a_curvature(checkout: Path) -> None:
    (diff,) = (d for d in blocks("diff") if "curvature.py" in d)
    apply(diff, checkout)
    encoder = str(checkout / "e.safetensors")
    common = ["--data", "scenes", "--n", "24"]
    in_checkout(
        checkout,
        "-m",
        "issl",
        "pretrain",
        *common,
        "--width",
        "1",
        "--epochs",
        "1",
        "--batch-size",
        "8",
        "--recipe",
        "short",
        "--out",
        encoder,
    )
    scored = [*common, "--encoder", encoder, "--curvature", "scale", "--damping", "0.5"]
    in_checkout(checkout, "-m", "issl", "influence", *scored, "--out", str(checkout / "s.csv"))
    # by the formula: in each layer ‖g‖² over 1.5 times the mean of the curvature's diagonal
    images, model = issl.load("scenes", n=24), issl.load_encoder(encoder)
    _, found = reference.gradients(model.double(), images, issl.GaussianNoise().keyed(0))
    rows = [g.flatten(1).square() for g in found.values()]
    want = sum(squares.sum(1) / (1.5 * squares.mean()) for squares in rows)
    np.testing.assert_allclose(pd.read_csv(checkout / "s.csv")["influence"], want, rtol=1e-3)


def test_every_command_in_passing_is_known() -> None:
    """What the text names inline: `issl doctor`, say."""
    for inline in re.findall(r"`((?:\./run_all\.sh|(?:\.venv/bin/)?issl) [^`]+)`", EVERYTHING):
        words = shlex.split(inline.replace(" …", ""))
        given = ["run", *words[1:]] if words[0] == "./run_all.sh" else words[1:]
        if "--test" in given or "--help" in given:
            continue
        commands = cli.parser(given[0])._subparsers._group_actions[0].choices  # type: ignore[union-attr]
        known = commands[given[0]]._option_string_actions
        assert all(w.split("=")[0] in known for w in given if w.startswith("--")), inline


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE
    )
    return {
        re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_it_links_to_is_there(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[page]):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link
    for word in re.findall(r"--only (\d+)", PAGES[page]):
        assert word == "19" or profiles.select(word)  # 19 is the example of docs/extending.md


def test_the_readme_is_short_and_every_page_is_reached_from_it() -> None:
    """Directly: what is not linked there is not found."""
    readme = PAGES[REPOSITORY / "README.md"]
    assert len(readme.splitlines()) <= 150
    missing = {page.name for page in PAGES if f"(docs/{page.name}" not in readme} - {
        "README.md",
        "api.md",
    }
    assert not missing  # the API reference is of the site alone
    site = yaml.safe_load(re.sub(r"!!\S+", "", (REPOSITORY / "mkdocs.yml").read_text()))
    listed = re.findall(r"[\w-]+\.md", json.dumps(site["nav"]))
    linked = {
        (page.parent / link).resolve().relative_to(REPOSITORY)
        for page, text in PAGES.items()
        for link in re.findall(r"\]\((?!https?:)([^)#]+\.md)", text)
    }
    led = (
        REPOSITORY / "docs/site/hooks.py"
    ).read_text()  # which of them are pages of the site, too
    assert not [
        str(path) for path in linked if path.parent.name != "docs" and f'"{path}"' not in led
    ]
    assert {page.name for page in PAGES} - {"README.md"} <= set(listed) and len(listed) == len(
        set(listed)
    )
