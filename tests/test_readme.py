"""README and docs/ as documentation that is run: every command and every block of code.

Commands run as they stand, but smaller: fewer images and epochs, a narrower encoder, weights from a
file instead of the network. `./run_all.sh` and `./run_all.sh --test` are what `.ci/run` calls.
"""

import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import nbformat
import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torchvision
from disk import write_cifar10
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

import issl
from issl import cli
from issl.audit import RELEASED, profiles, verdicts
from issl.audit.cache import Stage, released_index
from issl.audit.stages import Pretrain
from issl.audit.stats import statistics
from issl.files import REPOSITORY
from issl.influence import reference
from issl.pretraining.recipes import NAMES

PAGES = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
EVERYTHING = "\n".join(page.read_text() for page in PAGES)
IN_ONE_LINE = " ".join(EVERYTHING.split())


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", EVERYTHING, re.DOTALL)


JOINED = re.sub(r"\\\n\s*", "", "\n".join(blocks("bash")))  # a command may go on in the next line
LINES = dict.fromkeys(line.split("#")[0].strip() for line in JOINED.splitlines())
OURS = [line for line in LINES if line and not line.startswith(("source", "jupyter"))]
RUNS = re.compile(r"issl run|run_all.sh --profile")  # each starts the kernels of notebooks
SMALL = {  # what follows the command as it stands; of an option that is given twice the last counts
    "run": "--only 00",
    "pretrain": "--epochs 1 --width 1 --images 12 --batch-size 4 --recipe short",
    "influence": "--images 8 --rank 2 --draws 2",
    "fit": "--images 8 --rank 2",
    "attribute": "--batch-size 4 --check 2",
}
LEAVES = {
    "run": "figures/{profile}/{notebook}.png",
    "explain": "explain.png",
    "attribute": "attribute.csv",
}


def issl_(command: str) -> None:
    assert cli.main(command.split()) == 0, command


def resnet(name: str) -> torch.nn.Module:
    """Torchvision's, with random weights; BatchNorm has seen images."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name)
    model.train()(torch.rand(4, 3, 64, 64))
    return model


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the reader has: data, photos, weights, an encoder of ours."""
    folder = tmp_path_factory.mktemp("desk")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_cifar10(folder / "DIR", 32, 20)
        rng = np.random.default_rng(0)
        photos = [f"{folder}/{k}.jpg" for folder in ("photos", "new") for k in range(12)]
        for name in (*photos, "photo.png"):
            Path(name).parent.mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(name)
        weights = resnet("resnet18").state_dict()
        for name in ("weights.pt", "simclr.ckpt", "byol.ckpt", "barlow.ckpt"):
            torch.save(weights, name)
        Path("kept").mkdir()
        Path("released").symlink_to(REPOSITORY / "released")
        tiny = "--data-root DIR --width 1 --epochs 1 --batch-size 4 --recipe short"
        for data, out in (("cifar10", "byol"), ("folder:photos", "mine")):
            issl_(f"pretrain --data {data} {tiny} --out kept/{out}.safetensors")
        for data, out in (("photos", "curvature"), ("new", "more")):
            told = f"--data folder:{data} --encoder weights.pt --rank 2 --images 4"
            issl_(f"fit {told} --out kept/{out}.safetensors")
    return folder


@pytest.fixture
def small(desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the desk, with profiles that take seconds."""
    monkeypatch.chdir(desk)
    for path in Path("kept").iterdir():
        shutil.copy(path, path.name)  # a command may have left another
    monkeypatch.setenv("ISSL_DATA", str(desk / "DIR"))
    profile = tmp_path / "tiny.yaml"
    profile.write_text("""
common: {dataset: cifar10, n: 32, n_test: 20, width: 1, epochs: 1, batch_size: 16, duplicates: 0, atypical: 0}
00_method: {images: 16}
01_seed_correlation: {methods: [simclr], rank: 2}
""")
    known = dict.fromkeys(("quick", "mini", "paper"), profile)
    monkeypatch.setattr(profiles, "profiles", lambda: known)


@pytest.mark.parametrize(
    "line",
    [pytest.param(line, marks=pytest.mark.slow if RUNS.search(line) else ()) for line in OURS],
)
def test_the_command_does_what_it_says(line, small, desk, tmp_path, monkeypatch) -> None:
    words = [w for w in shlex.split(line) if not re.fullmatch(r"ISSL_DATA=\S+", w)]
    if line in ("./run_all.sh", "./run_all.sh --test"):
        called = (REPOSITORY / ".ci/run").read_text()
        assert re.search(rf"^{re.escape(line)}( |$)", called, re.MULTILINE)
        return
    given = ["run", *words[1:]] if words[0] == "./run_all.sh" else words[1:]
    command = given[0]
    assert words[0].split("/")[-1] in ("issl", "run_all.sh"), f"who runs {line}?"
    options = cli.parser(command).parse_args(given)  # an unknown option ends the test
    if command == "download":
        for place in ("torchvision.datasets.CIFAR10.download", "huggingface_hub.snapshot_download"):
            monkeypatch.setattr(place, Mock(side_effect=OSError("no route to host")))
        with pytest.raises(issl.IsslError, match="no route to host"):
            issl.data.published.download(options.name, options.data_root)
        return
    if "slurm" in given or "--scheduler" in given:  # which are not here
        monkeypatch.setenv("PATH", str(tmp_path))
        assert cli.main([*given, "--out", str(desk)]) == 2
        return
    less = SMALL.get(command, "").split()
    scored = getattr(options, "checkpoint", None)  # 00 asks about no encoder
    less += ["--only", "01"] if scored else []
    given += less[:2] if "--curvature-from" in given else less  # which decides the rank
    profile = getattr(options, "profile", None) or RELEASED
    names = {"profile": profile, "notebook": "01_seed_correlation" if scored else "00_method"}
    left = Path(options.out or LEAVES[command].format(**names))
    if left.is_file():
        left.unlink()  # another command's
    if command == "influence" and ":" in options.encoder:  # its own would come over the network
        source, name = options.encoder.split(":")
        make = {"timm": timm.create_model, "torchvision": resnet}[source]
        torch.save(make(name).state_dict(), tmp_path / "weights.pt")
        given += ["--weights", str(tmp_path / "weights.pt")]
    if command == "run":
        given += ["--out", str(desk)]
    assert cli.main(given) == 0
    assert left.exists(), left


def run_block(text: str, **names: Any) -> dict[str, Any]:
    """A block of Python as it stands, but with small images and an encoder that is there."""
    own = 'encoder = issl.load_encoder("mine.safetensors")  #'
    changes = (("encoder = ...", own), ("/path/to/", ""), ("size=64", "size=32"))
    for old, new in changes:
        text = text.replace(old, new)
    exec(compile(text, "documentation", "exec"), names)
    return names


def test_the_code_runs(small: None) -> None:
    """One's own code, a perturbation of one's own, and a curvature that is kept."""
    shown = [text for text in blocks("python") if "self_influence" in text]
    assert len(shown) == 3
    names: dict[str, Any] = {}
    for text in sorted(shown, key=lambda text: "def erase" in text):
        names = run_block(text)
        assert len(names["scores"]) in (12, 32) and (names["scores"]["influence"] >= 0).all()
    (attributing,) = (text for text in blocks("python") if "influence_through_training(" in text)
    effects = run_block(attributing.replace("batch_size=64", "batch_size=3"))["effects"]
    assert effects.derivatives.shape == (1, 12)
    (fitting,) = (text for text in blocks("python") if "issl.fit(" in text)
    images = issl.load("folder:photos", size=32)
    names = run_block(fitting, **names | {"images": images})
    assert len(names["scores"]) == 12 and names["crossed"].shape == (12, 12)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the changes are made to."""
    unlike = shutil.ignore_patterns("__pycache__")
    for name in ("issl", "notebooks"):
        shutil.copytree(REPOSITORY / name, tmp_path / "checkout" / name, ignore=unlike)
    return tmp_path / "checkout"


def changed(checkout: Path, file: str) -> None:
    """Apply the change to this file that the documentation shows."""
    (diff,) = (d for d in blocks("diff") if file in d)
    apply = ["git", "apply", "--unidiff-zero"]  # context may be on one side alone
    subprocess.run(apply, cwd=checkout, input=diff, text=True, check=True)


def in_checkout(checkout: Path, command: str) -> str:
    told = [sys.executable, "-m", "issl", *command.split()]
    how = {"env": os.environ | {"PYTHONPATH": str(checkout)}, "capture_output": True, "text": True}
    done = subprocess.run(told, cwd=checkout, check=False, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_adding_a_notebook(checkout: Path) -> None:
    changed(checkout, "plans_own.py")
    (code,) = (c for c in blocks("python") if "Brightness.of(" in c)
    notebook = nbformat.read(checkout / "notebooks/13_explained.ipynb", as_version=4)
    assert notebook.cells[1].metadata["tags"] == ["parameters"]
    notebook.cells[2:] = [nbformat.v4.new_code_cell(code)]
    nbformat.write(notebook, checkout / "notebooks/21_brightness.ipynb")
    profile = checkout / "notebooks/profiles/quick.yaml"
    profile.write_text("common: {n: 48, width: 1, epochs: 1, batch_size: 16}")
    said = in_checkout(checkout, f"run --profile quick --only 21 --out {checkout}")
    assert "1 of 1 notebooks ended well" in said
    written = checkout / "results/quick/claim_bright_images.simclr.json"
    record = json.loads(written.read_text())
    assert record["verdict"] == "not tested at this scale" and record["learned"]["encoders"] == 1
    assert (checkout / "figures/quick/21_brightness.png").is_file()
    report = (checkout / "results/quick/index.html").read_text()
    assert "Bright images have high influence" in report


TINY = "--data scenes --n 24 --width 1 --epochs 2 --batch-size 8 --recipe short --out e.safetensors"


def test_a_method_is_one_file(checkout: Path) -> None:
    """And a row of the recipes."""
    source = checkout / "issl/pretraining/methods/vicreg.py"
    text = source.read_text().replace('"vicreg", "VICReg"', '"mine", "Mine"')
    (source.parent / "mine.py").write_text(text.replace("class VICReg", "class Mine"))
    recipes = checkout / "issl/pretraining/recipes.py"
    row = re.search(r'    Recipe\("vicreg", "sgd".*\n', recipes.read_text())[0]
    recipes.write_text(recipes.read_text().replace(row, row + row.replace("vicreg", "mine")))
    in_checkout(checkout, f"pretrain --method mine {TINY}")
    assert np.isfinite(pd.read_csv(checkout / "e.csv")["loss"]).all()


def test_adding_a_curvature(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed(checkout, "curvature.py")
    monkeypatch.chdir(checkout)
    issl_(f"pretrain {TINY}")
    how = "--encoder e.safetensors --curvature scale --damping 0.5 --out s.csv"
    in_checkout(checkout, f"influence --data scenes --n 24 {how}")
    # by the formula: in each layer ‖g‖² over 1.5 times the mean of the curvature's diagonal
    images, model = issl.load("scenes", n=24), issl.load_encoder(checkout / "e.safetensors")
    _, found = reference.gradients(model.double(), images, issl.GaussianNoise().keyed(0))
    rows = [g.flatten(1).square() for g in found.values()]
    want = sum(squares.sum(1) / (1.5 * squares.mean()) for squares in rows)
    np.testing.assert_allclose(pd.read_csv(checkout / "s.csv")["influence"], want, rtol=1e-3)


def values(file: str, *columns: str) -> pd.Series:
    """What a table under figures/ holds, by the labels in these columns."""
    table = pd.read_csv(REPOSITORY / "figures" / file)
    return table.set_index([*columns])["value"].sort_index()


def row(head: str, numbers: Iterable[float | None]) -> str:
    """A row of a page's table."""
    cells = ["–" if n is None else f"{n:.2f}".replace("-", "−") for n in numbers]
    return f"| {' | '.join([head, *cells])} |"


def test_what_a_training_did_is_the_figures_tables() -> None:
    """A row each, a column a method; the LDS with its slope the other way round."""
    file = "mini/16_training_aware"
    lds = values(f"{file}.csv", "metric", "predictor", "method")["lds"]
    slope = values(f"{file}.csv", "metric", "share", "method")["slope"]
    exact = values(f"{file}.csv", "metric", "effect", "method")
    limit = values(f"{file}_limits.csv", "metric", "variant", "method")["lds"]
    rows = [(variant, limit[variant]) for variant in limit.index.unique("variant")]
    rows.append(("mean derivative of two other runs", lds["other order and views"]))
    rows.append(("ceiling: how well two runs agree", lds["two measurements agree"]))
    rows.append(("the paper's cross-influence", lds["cross-influence"]))
    rows.append(("cosine similarity of features", lds["similarity"]))
    for said, effect in {
        "single queries' stability: the paper's cross-influence": "single queries (cross-influence)",
        "the size of that effect, ignoring its sign: the paper's score": "unseen stability (size)",
    }.items():
        rows.append((said, exact["spearman", effect]))
        rows.append((f"{said.split(':')[0]}: ceiling", exact["ceiling", effect]))
    for of, images in itertools.product(("stability", "margin"), ("", ", all images")):
        said = f"unseen images' {'kNN ' * (of == 'margin')}{of}"
        rows.append((f"{said}: the paper's score", exact["spearman", f"unseen {of}{images}"]))
        rows.append((f"{said}: ceiling", exact["ceiling", f"unseen {of}{images}"]))
    for said, numbers in rows:
        assert row(said, numbers[SSL]) in IN_ONE_LINE, said
    shares = {"0.2%": 0.002, "1%": 0.01, "5%": 0.05, "10%": 0.1, "50%": 0.5}
    for m in SSL:
        cells = [f"{lds[f'without {k}', m]:.2f} ({slope[v, m]:.1f})" for k, v in shares.items()]
        assert f"| {NAMES[m]} | {' | '.join(cells)} |" in IN_ONE_LINE


def test_what_is_known_of_the_papers_claims_is_in_the_records() -> None:
    """The sentences of docs/verdicts.md about readings."""
    records = verdicts.kept_records(REPOSITORY / "figures")
    table = verdicts.by_reading(records)
    outcomes = table.set_index(["name", "method", "reading"])["outcome"]
    held = outcomes[outcomes == "reproduced"]
    assert held["semantic_bridges_of_degree"].index.tolist() == [("byol", "overnight-projector")]
    assert len(outcomes["semantic_bridges_of_degree"]) == 12
    assert set(outcomes["low_influence_duplicates"]) == {"contradicted"}
    plain = outcomes["plain_backgrounds_lead"]
    assert set(plain[:, "overnight-normalised"]) == {"reproduced"}
    assert set(plain[:, "overnight-projector"]) == {"contradicted"}
    leads = [r for r in records if r["name"] == "plain_backgrounds_lead"]
    against_460 = [r for r in leads if r["metrics"]["plain_top_less_460"]["low"] > 0.1]
    assert [r["provenance"]["profile"] for r in against_460] == ["overnight-normalised"] * 3
    assert "reproduced" not in set(outcomes["training_seed_correlation"])
    repeats, more = outcomes["noise_seed_correlation"], outcomes["more_than_statistics"]
    assert set(repeats["byol"]) == set(repeats[:, "overnight-normalised"]) == {"reproduced"}
    weak_projector = ("barlow_twins", "overnight-projector-normalised")
    assert repeats[weak_projector] == "contradicted"
    assert set(more[:, "overnight"]) == set(more[:, "overnight-projector"]) == {"reproduced"}
    weak = more[more.index.get_level_values(1).str.endswith("-normalised")]
    assert weak[weak == "reproduced"].index.tolist() == [weak_projector]
    assert set(outcomes["gaussian_most_stable"]) == {"reproduced"}
    white = {
        (r["variant"], r["provenance"]["profile"])
        for r in records
        if r["name"] == "uniform_backgrounds_by_eye" and not r["copied"]
        for test in r["tests"]
        if test["metric"] == "auc_labels_white_black" and test["holds"]
    }
    normalised = ("overnight-normalised", "overnight-projector-normalised")
    assert white == {("byol", reading) for reading in normalised}


COMPARED = """
agreement of two noise seeds, r | noise_seed_correlation pearson
the same, sixteen draws averaged (first 5,000 images) | noise_seed_correlation_averaged pearson_of_16_draws
agreement of two trainings, r | training_seed_correlation pearson
the same, sixteen draws averaged | training_seed_correlation_averaged pearson_of_16_draws
uniform backgrounds rank high, labelled, AUC | uniform_backgrounds_by_eye auc_labels
bridges: neighbours in other classes minus controls' | semantic_bridges_of_degree cross_class_difference_of_degree
low influence finds judged duplicates, AUC | low_influence_duplicates auc_judged
of the five lowest automobiles, those that show one car (at least 1) | lowest_automobiles_are_one_car lowest_of_one_car
people's disagreement, ρ | high_influence_ambiguous spearman_ambiguity
strange images without static, AUC | high_influence_ambiguous auc_without_static
Gaussian noise's r minus the best augmentation's (first 1,000 images) | gaussian_most_stable margin_usual
two trainings' agreement minus that with a supervised model, ρ | supervised_differs_more_than_seeds seeds_less_supervised
another SSL method's minus that with a supervised model | supervised_differs_more_than_seeds other_ssl_less_supervised
edges of the top 5% removed: gain of modularity over matched images | influence_holds_classes_together_matched modularity_gain_matched
R² by pixel statistics, of the repeatable part | more_than_statistics pixels_of_repeatable
variance that repeats and statistics do not explain | more_than_statistics repeatable_beyond_statistics
"""


def test_the_copy_and_the_original_are_the_records() -> None:
    rows, changed = {}, {}
    for line in COMPARED.strip().splitlines():
        row, _, asked = line.partition(" | ")
        name, metric = asked.split()
        each = [records()["overnight", name, m, copied] for m in SSL for copied in (True, False)]
        numbers = [statistics.Estimate.of(r["metrics"][metric]) for r in each]
        rows[row] = [
            f"{verdicts.with_interval(number)} {verdicts.MARKS[r['outcome']]}"
            for number, r in zip(numbers, each, strict=True)
        ]
        for m, old, new in zip(SSL, each[::2], each[1::2], strict=True):
            if new["outcome"] != old["outcome"]:
                changed[name, m] = new["outcome"]
    assert table_of("docs/verdicts.md", "claim, number") == rows
    # the four undecided: Barlow Twins' supervised models and the five automobiles of each method
    counts = Counter(changed.values())
    assert counts == {"contradicted": 2, "undecided": 4, "partly": 1, "reproduced": 1}


@cache
def records() -> dict[tuple[str, str, str, bool], dict[str, Any]]:
    """Those that are kept, by profile, claim, variant and whether of the JPEG copy."""
    kept = verdicts.kept_records(REPOSITORY / "figures")
    return {(r["provenance"]["profile"], r["name"], r["variant"], r["copied"]): r for r in kept}


LABELS = REPOSITORY / "issl/audit/data/labels"
PAIRS = pd.read_csv(LABELS / "cifar10_duplicates.csv").query("same == 'yes'")
COPIES = [*PAIRS["a"], *PAIRS["b"]]
SSL = ["simclr", "byol", "barlow_twins"]
WHO = [*SSL, "untrained"]
HEADS = {  # of the method's tables about the paper's galleries
    "overnight": "CIFAR-10, features",
    "overnight-projector": "CIFAR-10, projector's output",
    "overnight-normalised": "CIFAR-10, features, noise on normalised pixels",
    "overnight-projector-normalised": "CIFAR-10, projector's output, noise on normalised pixels",
}


def table_of(page: str, head: str) -> dict[str, list[str]]:
    """The rows of a page's table with this first head cell, by their first cell."""
    lines = (REPOSITORY / page).read_text().splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith(f"| {head} |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]
    return {first: others for first, *others in cells}


method_table = partial(table_of, "docs/method.md")


@cache
def scored(reading: str, encoder: str) -> list[pd.DataFrame]:
    """The released scores under each encoder of a method."""
    output = reading.removeprefix("overnight")
    name = f"cifar10-{encoder.replace('_', '-')}-w16-?{output}-noise0.parquet"
    files = sorted((REPOSITORY / "released/tables/influence").glob(name))
    assert len(files) == (1 if encoder == "untrained" else 3)
    return [pd.read_parquet(f).set_index("index") for f in files]


def ends(reading: str, encoder: str, by: str = "influence") -> tuple[pd.Index, pd.Index]:
    """The 100 lowest and the 100 highest images by the mean rank over encoders."""
    ranks = sum(one[by].rank() for one in scored(reading, encoder))
    return ranks.nsmallest(100).index, ranks.nlargest(100).index


def test_the_papers_galleries_are_the_released_tables() -> None:
    """The method's tables, one a reading, a column a method."""
    background = pd.read_csv(LABELS / "cifar10_listed_backgrounds.csv", index_col="index")
    background = background["background"]

    def copies(images: pd.Index) -> str:
        return str(int(images.isin(COPIES).sum()))

    def share(images: pd.Index, *kinds: str) -> str:
        assert images.isin(background.index).all()
        return str(int(background[images].isin(kinds).sum()))

    numbers = {key[:3]: r["metrics"] for key, r in records().items() if not key[3]}
    for reading, head in HEADS.items():
        low, high = zip(*(ends(reading, m) for m in WHO), strict=True)
        of_pairs = values(f"{reading}/04_duplicates.csv", "detector", "metric", "method")
        car = {m: numbers[reading, "lowest_automobiles_are_one_car", m] for m in SSL}
        alike = [f"{car[m]['lowest_of_one_car']['value']:.1f}" for m in SSL]
        alike.append(f"{car['simclr']['by_untrained']['value']:.1f}")
        auc = of_pairs["low influence", "auc_judged"][WHO]
        smooth = [share(i, "plain", "smooth") for i in high]
        assert method_table(head) == {
            "of the five lowest automobiles, those from one photograph (mean; 1: none)": alike,
            "duplicates among the 100 lowest images": [copies(i) for i in low],
            "duplicates among the 100 highest images": [copies(i) for i in high],
            "AUC of low influence for labelled duplicates": [f"{v:.2f}" for v in auc],
            "plain backgrounds among the 100 highest": [share(i, "plain") for i in high],
            "plain backgrounds among the 100 lowest": [share(i, "plain") for i in low[:3]] + ["–"],
            "plain or smooth backgrounds among the 100 highest": smooth,
        }
    nearest = {
        f"{word}{noise}": [f"{numbers[reading, name, m][metric]['value']:.2f}" for m in SSL]
        for word, name, metric in (
            ("r of two draws of the noise", "noise_seed_correlation", "pearson"),
            ("r of two trainings, one draw each", "training_seed_correlation", "pearson"),
            ("share left unexplained", "more_than_statistics", "repeatable_beyond_statistics"),
        )
        for reading, noise in (
            ("overnight", ""),
            ("overnight-normalised", ", on normalised pixels"),
        )
    }
    assert method_table("features, three encoders a method") == nearest
    by_loss, weak = {}, ", noise on normalised pixels"
    for reading, noise in (("overnight", ""), ("overnight-normalised", weak)):
        for word, by in (("stability loss", "stability_loss"), ("influence", "influence")):
            high = [ends(reading, m, by)[1] for m in WHO]
            by_loss[f"by {word}{noise}"] = [share(i, "plain") for i in high]
    weakest = method_table("features: plain backgrounds among the 100 highest")
    assert {head: weakest[head] for head in by_loss} == by_loss
    flat = "cross_flat_difference_of_degree"
    bridges = {
        head.removeprefix("CIFAR-10, "): [
            f"{values(f'{r}/03_background_bias_bridges.csv', 'score', 'method', 'metric')[who]:.2f}"
            for who in (("influence", m, flat) for m in WHO)
        ]
        for r, head in HEADS.items()
    }
    told = method_table("top 5%: share of edges to flat frames, less that of others")
    assert {k: [v.replace("−", "-") for v in cells] for k, cells in told.items()} == bridges
    swapped, file = {}, "03_background_bias_causal.csv"
    for word, by in (("stability loss", "log_ratio_stability_loss"), ("influence", "log_ratio")):
        for who, named in (("simclr", ""), ("untrained", ", untrained")):
            of = [np.exp(values(f"{r}/{file}", "metric", "method")[by, who]) for r in HEADS]
            swapped[f"{word}{named}"] = [f"{ratio:.2f}" for ratio in of]
    assert method_table("score on a flat background ÷ on a texture") == swapped


def test_sentences_about_the_galleries_are_the_released_tables() -> None:
    """In the README and in the method."""
    weak, file = "overnight-normalised", "03_background_bias_ends.csv"
    plain = {r: 100 * values(f"{r}/{file}", "list", "method") for r in ("overnight", weak)}
    top = {r: share["plain: highest"].round().astype(int) for r, share in plain.items()}
    of_plain = method_table("features: plain backgrounds among the 100 highest")
    by_loss = of_plain["by stability loss"]
    shared = [len(ends(weak, m)[1].intersection(ends(weak, m, "stability_loss")[1])) for m in SSL]
    each = [one for m in SSL for one in scored(weak, m)]
    follows = [one["influence"].corr(one["stability_loss"], method="spearman") for one in each]
    auc, strong = (
        values(f"{r}/03_background_bias.csv", "metric", "score", "method")["auc_labels"]
        for r in (weak, "overnight")
    )
    loss = [*auc["stability loss ℓ"][SSL], *strong["stability loss ℓ"][SSL]]
    hits = {m: np.arange(100) < top[weak][m] for m in WHO}
    margins = [statistics.proportion_difference(hits[m], hits["untrained"]) for m in SSL]
    margin = [f"{100 * e.value:.0f} [{100 * e.low:.0f}, {100 * e.high:.0f}]" for e in margins]
    assert of_plain["the same, less untrained"] == [m.replace("-", "−") for m in margin] + ["–"]
    assert of_plain["images in both of the last lists"] == [*map(str, shared), "–"]
    colour = values("overnight/03_background_bias_colours.csv", "score", "method", "metric")
    colour = colour["influence", "untrained"]
    ranks = pd.read_csv(REPOSITORY / "figures/overnight-projector/04_duplicates_series.csv")
    of_each = 100 * ranks.groupby(["method", "encoder"])["rank"].median()
    least, most = (of_each.groupby("method").agg(f) for f in ("min", "max"))
    r = values("overnight/01_seed_correlation_draws.csv", "draws", "seed", "method")[16]
    repeats = values(f"{weak}/01_seed_correlation.csv", "metric", "seed", "method")["pearson"]
    once = values("overnight/01_seed_correlation.csv", "metric", "seed", "method")["pearson"]
    pairs = pd.read_csv(REPOSITORY / "figures/overnight/04_duplicates.csv")
    found = pairs.query("detector == 'low influence' and method == 'simclr'").set_index("metric")
    copies = found["n"]["precision"]
    chance = copies / found["n"]["auc_judged"]
    of_pairs = values("overnight-projector/04_duplicates.csv", "detector", "metric", "method")
    norm, by_loss_low = (
        ends("overnight-projector", "barlow_twins", by)[0].isin(COPIES).sum()
        for by in ("grad_norm", "stability_loss")
    )
    alike = method_table("CIFAR-10, projector's output")["duplicates among the 100 lowest images"]
    lowest = alike[WHO.index("barlow_twins")]
    for said in (
        f"top 100: {top['overnight']['simclr']} by influence (untrained "
        f"{top['overnight']['untrained']}, random "
        f"{plain['overnight']['plain: random', 'no encoder']:.0f} to 16), {by_loss[0]} by the loss "
        f"(untrained {by_loss[3]})",
        f"two draws agree (r = {repeats['noise', 'simclr']:.2f}), {top[weak]['simclr']} of the "
        f"top 100 are plain (untrained {top[weak]['untrained']})",
        f"(rank correlation {min(follows):.2f} to {max(follows):.2f})",
        f"its AUC for plain backgrounds is {min(loss):.2f} to {max(loss):.2f}",
        f"(AUC {colour['auc_labels_white']:.2f}), the others slightly high "
        f"({colour['auc_labels_other']:.2f}). All together have {colour['auc_labels']:.2f}",
        f"at percentile {of_each['untrained', 0]:.0f}.",
        f"percentiles {least['simclr']:.0f} to {most['simclr']:.0f} (SimCLR), "
        f"{least['byol']:.0f} to {most['byol']:.0f} (BYOL) and {most['barlow_twins']:.0f} (Barlow",
        f"{norm} of the 100 lowest images are duplicates; ranked by the stability loss, "
        f"{by_loss_low} are",
        f'The paper: r = 0.97 "across seeds". Two draws of noise: {once["noise", "simclr"]:.2f} '
        f"(means of sixteen: {r['noise', 'simclr']:.2f}); two trainings: "
        f"{once['training', 'simclr']:.2f} ({r['training', 'simclr']:.2f})",
        f"Of the {copies} lowest, {found['value']['precision']:.0%} are labelled duplicates "
        f"(chance: {chance:.0%}). But: {lowest} of the lowest 100 on Barlow Twins' projector",
        f"with {of_pairs['low influence', 'precision', 'barlow_twins']:.0%} of the {copies}.",
    ):
        assert said in IN_ONE_LINE, said


def test_what_is_counted_of_labels_and_encoders() -> None:
    """In the method and in the verdicts."""
    same = coo_matrix((np.ones(len(PAIRS)), (PAIRS["a"], PAIRS["b"])), shape=(50_000, 50_000))
    photograph = connected_components(same, directed=False)[1]
    listed = pd.read_csv(LABELS / "cifar10_listed_backgrounds.csv", index_col="index")
    is_plain = listed["background"] == "plain"
    high = ends("overnight-normalised", "barlow_twins")[1]
    shown = len({*photograph[high]}), len({*photograph[high[is_plain[high]]]})
    random = listed[listed["random"] == 1]
    plain, smooth = (random["background"].eq(kind).sum() for kind in ("plain", "smooth"))
    assert not random.index.isin(COPIES).any()
    earlier = pd.read_csv(LABELS / "cifar10_backgrounds.csv")["uniform"].eq("yes")
    both = (plain + earlier.sum()) / (100 + len(earlier))
    learned = {key: r.get("learned") for key, r in records().items()}
    accuracy = {
        head: [f"{learned['overnight', 'noise_seed_correlation', m, k]['knn']:.1%}" for m in SSL]
        for head, k in (("the JPEG copy", True), ("CIFAR-10 as published", False))
    }
    assert table_of("docs/verdicts.md", "lowest kNN accuracy of the three") == accuracy
    small, little, also_little = (learned["mini", "influence_is_the_effect", m, False] for m in SSL)
    swapped = learned["overnight", "causal_background", "", False]
    pruning = records()["overnight", "pruning_helps", "simclr", True]
    most = [100 * pruning["metrics"][k]["high"] for k in ("top_less_random", "top_less_none")]
    faces = learned["overnight", "group_differences", "simclr", True]
    assert faces["knn"] - faces["untrained"] < 0.05
    assert f"{little['knn']:.2f}" == f"{also_little['knn']:.2f}"
    fooled = records()["mini", "predicts_subsets", "continued", True]["metrics"]
    lds = [f"{fooled['lds'][k]:.2f}".replace("-", "−") for k in ("value", "low", "high")]
    of_five = {
        (m, profile): r["metrics"]["lowest_of_one_car"]["value"]
        for (profile, name, m, copied), r in records().items()
        if name == "lowest_automobiles_are_one_car" and not copied
    }
    assert len(of_five) == 12
    assert {n for (m, _), n in of_five.items() if m == "byol"} == {1.0}
    for said in (
        f"hundred highest show only {shown[0]} photographs, {shown[1]} of them plain",
        f"Of 100 random ones, {plain} have plain backgrounds and {plain + smooth} plain or smooth",
        f"Of another {len(earlier)}, labelled earlier, {earlier.sum()} are plain "
        f"({earlier.mean():.0%})",
        f"{len(earlier) + 100} random images, of which {both:.0%} are plain",
        f"contains one photograph of that car {np.bincount(photograph).max()} times",
        f"SimCLR's kNN {small['knn']:.0%} (untrained: {small['untrained']:.0%})",
        f"(lowest kNN of three {swapped['knn']:.0%}, untrained {swapped['untrained']:.0%})",
        f"The BYOL and Barlow Twins encoders have learned little (kNN {little['knn']:.0%}, "
        f"untrained {little['untrained']:.0%})",
        f"| {lds[0]}, 95% interval from {lds[1]} to {lds[2]} |",
        f"| what a perfect score could have reached | {fooled['ceiling']['value']:.2f} |",
        f"SimCLR has {of_five['simclr', 'overnight-projector']:.1f} and "
        f"Barlow Twins {of_five['barlow_twins', 'overnight-projector']:.1f}",
        f"(60 epochs, lowest kNN {pruning['learned']['knn']:.0%})",
        f"rule out that it gains more than {most[0]:.1f} points of probe accuracy over random removal",
        f"a gain of more than {most[1]:.2f} points over removing nothing, and of more than "
        f"{most[0]:.1f} over random removal",
    ):
        assert said in IN_ONE_LINE, said
    before = set(random.index)
    for reading in ("overnight", "overnight-projector"):
        before.update(ends(reading, "untrained")[1])
        before.update(*(images for m in SSL for images in ends(reading, m)))

    def again(reading: str) -> list[str]:
        seen = [ends(reading, m)[1].intersection([*before]) for m in SSL]
        return [f"{len(images)} ({is_plain[images].sum()})" for images in seen]

    head = "of the hundred highest on normalised pixels, labelled before (plain)"
    assert table_of("docs/verdicts.md", head) == {
        "features": again("overnight-normalised"),
        "projector's output": again("overnight-projector-normalised"),
    }


def test_what_other_choices_change_is_the_figures_table() -> None:
    table = pd.read_csv(REPOSITORY / "figures/overnight/19_multiverse_simclr.csv")
    of = table[table["metric"] == "auc"].set_index(["unit", "output"])["value"]
    stated = table.loc[table["metric"] == "auc", "varied"].to_numpy() == "as stated"
    each = [of[stated], *(of[~stated].groupby(level=[0, 1]).agg(end) for end in ("min", "max"))]
    told = method_table("influence's AUC for plain backgrounds").values()
    order = list(itertools.product(("range", "normalised"), ("features", "projector")))
    assert list(told) == [[f"{row[k]:.2f}" for k in order] for row in each]


def test_what_copies_leave_of_a_score_is_the_released_tables() -> None:
    def left(column: str, output: str, rank: str, among: str, copies: int = 64) -> str:
        name = f"cifar10-simclr-w16-0{among}{output}{rank}.parquet"
        table = pd.read_parquet(REPOSITORY / "released/tables/copies" / name)
        of = table.pivot_table(index="index", columns="copies", values=column)
        return f"{(of[copies] / of[0]).mean():.2f}"

    sets = ("-first1000", "-first10000", "")
    assert list(method_table("share of the score left beside 64 copies, among").values()) == [
        [left(column, "", rank, among) for among in sets]
        for rank in ("-rank4", "", "-rank64")
        for column in ("influence", "predicted")
    ]
    on_projector = left("influence", "-projector", "", "")
    assert f"among 50,000 images, {on_projector} is left" in IN_ONE_LINE
    (few,) = {left("influence", output, "", "", 16) for output in ("", "-projector")}
    assert f"Beside 16 copies it is {few} on both outputs" in IN_ONE_LINE
    few, one = (left("influence", "", "-rank64", "", k) for k in (16, 1))
    said = f"among 50,000 images, {few} is left beside 16 copies, but {one} beside one"
    assert said in IN_ONE_LINE


def test_what_benchmarks_measured_is_what_the_pages_say(tmp_path: Path) -> None:
    folder = REPOSITORY / "benchmarks"
    report = runpy.run_path(str(folder / "report.py"))
    report["write_report"](folder / "measured", tmp_path / "RESULTS.md")
    assert (tmp_path / "RESULTS.md").read_text() == (folder / "RESULTS.md").read_text()
    part = json.loads((folder / "measured/duplicates.json").read_text())
    auc = {row["by"]: float(row["auc"].split()[0]) for row in part["rows"]}
    for row in part["rows"]:
        assert "| {by} | {precision} | {auc} |".format(**row) in IN_ONE_LINE
    both = auc["cleanlab, near duplicates, on the encoder's features"], auc["low influence"]
    assert "an AUC of {:.2f}, low influence with {:.2f}".format(*both) in IN_ONE_LINE
    assert f"{part['images']:,} images, {part['in_pairs']} of them" in IN_ONE_LINE
    wide = json.loads((folder / "measured/wide.json").read_text())["rows"]
    cost = {r["method"]: f"{r['ratio']:.2f}" for r in wide}
    said = f"LogIX costs {cost['LogIX rank 16']} of a plain pass, `issl` {cost['LoGra rank 16']})"
    assert said in IN_ONE_LINE
    once = json.loads((folder / "measured/once.json").read_text())["rows"]
    tried = {row["what"]: [row["measured"]] for row in once}
    assert table_of("docs/reliability.md", "what was tried").items() <= tried.items()
    for row in once:
        for said in row.get("on_pages", ()):
            assert said in IN_ONE_LINE, said
            of_row = re.findall(r"[\d.]*\d", row["what"] + row["measured"])
            assert set(re.findall(r"[\d.]*\d", said)) <= set(of_row), said


def test_hours_are_those_of_the_released_stages() -> None:
    """Hours of 05's and 06's trainings, to come, are arithmetic from SimCLR's released ones."""
    index = released_index(REPOSITORY / "released")

    def hours(stages: Iterable[Stage]) -> float:
        known = [index[s.label] for s in stages if s.label in index]
        return sum(entry["made_with"]["seconds"] for entry in known) / 3600

    table = table_of("docs/verdicts.md", "of the paper").values()
    said = {name.strip("`"): h for name, _, *h in table}
    assert said.pop("09_linear_theory") == ["no encoder", "no data"]
    plans = profiles.read_profile("overnight", list(said))
    encoders = plans["01_seed_correlation"].encoders_of(["simclr"]).values()
    an_image = hours(encoders) / sum(e.epochs * 50_000 for e in encoders)
    for name, plan in plans.items():
        stages = set(profiles.all_stages([plan]))
        trained = {s for s in stages if isinstance(s, Pretrain)}
        want = [f"{hours(stages - trained):.1f}", f"{hours(trained):.0f}"]
        if name in ("05_fairness", "06_pruning"):
            to_come = sum(s.epochs for s in trained if s.label not in index)
            want = ["–", f"{to_come * plan.n * an_image:.0f}"]
        assert said[name] == want, name


def test_which_score_finds_what_is_the_figures_tables() -> None:
    own = "overnight"
    rows = {
        "influence": (own, "influence", "simclr"),
        "influence, projector's output": ("overnight-projector", "influence", "simclr"),
        "influence, noise on normalised pixels": ("overnight-normalised", "influence", "simclr"),
        "stability loss": (own, "stability loss ℓ", "simclr"),
        "gradient norm": (own, "gradient norm ‖g‖", "simclr"),
        "distance to the nearest in features": (own, "kNN distance", "simclr"),
        "entropy of the kNN vote, with labels": (own, "entropy of the kNN vote", "simclr"),
        "distance to a class's prototype, with labels": (own, "distance to a prototype", "simclr"),
        "perceptual hash": (own, "perceptual hash", "no encoder"),
        "influence under an untrained network": (own, "influence", "untrained"),
    }
    columns = {
        "04_duplicates": ("detector", "auc_judged"),
        "03_background_bias": ("score", "auc_labels"),
        "07_outliers": ("detector", "auc_without_static", "auc_foreign", "spearman_ambiguity"),
    }
    told = table_of("docs/compare.md", "by")
    assert set(told) == set(rows)
    for said, (reading, *who) in rows.items():
        numbers: list[float | None] = []
        for notebook, (name, *metrics) in columns.items():
            path = f"{reading}/{notebook}.csv"
            if not (REPOSITORY / "figures" / path).exists():
                numbers += [None] * len(metrics)
                continue
            table = values(path, name, "method", "metric")
            table = table.rename(lambda by: by.removeprefix("low "), level=name)
            table = table.rename({"nearest in features": "kNN distance"}, level=name)
            numbers += [table.get((*who, metric)) for metric in metrics]
        assert row(said, numbers) == f"| {' | '.join([said, *told[said]])} |"
    outliers = values("overnight/07_outliers.csv", "detector", "method", "metric")
    foreign = outliers.xs(("simclr", "auc_foreign"), level=["method", "metric"])
    assert foreign.idxmax() == "influence"  # the column that it leads
    small = pd.read_csv(REPOSITORY / "figures/mini/12_continual.csv")
    of = small.query("task == 'classes' and channel == 'BatchNorm held' and table == 'predicted'")
    nearest, score = of.set_index("metric")["value"][["spearman kNN distance", "spearman"]]
    assert f"rank correlation of {nearest:.2f}, and influence has {score:.2f}" in IN_ONE_LINE
