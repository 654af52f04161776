"""The report: its parts from what a run left, the pages in a browser, opened from files; and files
and names of strangers: nothing in them runs, fills the memory, leaves its folder or asks the
network."""

import json
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bs4 import BeautifulSoup
from disk import png
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

import issl
from issl import cli
from issl.audit import site as report
from issl.audit.claims import provenance, record
from issl.audit.data import human_choices
from issl.audit.profiles import PLANS
from issl.audit.stats.statistics import Estimate
from issl.files import REPOSITORY
from issl.pretraining.other_encoders import open_encoder

FORMULAS = "\n\nLet $x_i < 1$ and `cost: $5`:\n\n$$\\frac{a}{b}$$"
TABLE = {"text/html": "<table><th>overlap_top1</th><td>barlow_twins</td></table>"}


def printed(text: str) -> list[nbformat.NotebookNode]:
    return [new_output("stream", text=text)]


def write(out: Path, profile: str, books: dict[str, nbformat.NotebookNode], plans: dict) -> Path:
    """The folder of a report on these executed notebooks; records may lie there already."""
    results, figures = out / "results" / profile, out / "figures" / profile
    figures.mkdir(parents=True)
    for name, book in books.items():
        nbformat.write(book, results / f"{name}.ipynb")
        plt.imsave(figures / f"{name}.png", np.zeros((20, 30)))
        (figures / f"{name}.csv").write_text("a\n1\n")
    report.build(profile, plans, out)
    return results


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report on two notebooks."""
    out = tmp_path_factory.mktemp("report")
    results, books = out / "results/mini", {}
    results.mkdir(parents=True)
    source = provenance("overnight", {}, torch.device("cpu"), [])
    learned = {"knn": 0.4, "untrained": 0.2, "encoders": 3}
    about: dict[str, Any] = {"dataset": "scenes", "n": 40, "seeds": [0], "learned": learned}
    for method, r in (("simclr", 0.97), ("byol", 0.8)):
        found = {"pearson": Estimate(r, r - 0.1, r + 0.02, 40)}
        record("noise_seed_correlation", found, source, results, method, **about)
    exact = Estimate(1e-9, 1e-9, 1e-9, 40)
    record("method_exact", {"relative_difference": exact}, source, results, **about)
    solution = {"tags": ["solution"]}
    for name in ("00_method", "01_seed_correlation"):
        cells = [
            new_markdown_cell(f"# {name} <fast>{FORMULAS}"),
            new_code_cell("n = 3", metadata={"tags": ["parameters"]}),
            new_code_cell("answer = 6", metadata=solution, outputs=printed("the answer: 42")),
            new_code_cell("t", outputs=[new_output("display_data", TABLE)]),
            new_code_cell("print('<b>')", outputs=printed("<b> & \x1b[31mred\x1b[0m")),
        ]
        books[name] = nbformat.v4.new_notebook(cells=cells)
    plans = {name: plan_of(profile="mini", out=str(out)) for name, plan_of in PLANS.items()}
    return write(out, "mini", books, plans)


def test_every_link_leads_somewhere_and_nothing_is_fetched(site: Path) -> None:
    pages = [site / "index.html", *(site / "report").glob("*.html")]
    assert len(pages) == 3
    read = {page: BeautifulSoup(page.read_text(), "html.parser") for page in pages}
    ids = {page: [tag["id"] for tag in html.find_all(id=True)] for page, html in read.items()}
    for page, html in read.items():
        assert len(ids[page]) == len(set(ids[page])), page.name
        for link in (tag[k] for k in ("href", "src") for tag in html.find_all(**{k: True})):
            parts = urlsplit(link)
            if parts.scheme:  # in the page itself, or the one outwards, which the reader follows
                assert parts.scheme == "data" or link == "https://arxiv.org/abs/2412.17170"
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.is_file(), (page.name, link)
            assert not parts.fragment or parts.fragment in ids[target], (page.name, link)
        fetched = r"url\(['\"]?https?:|@import|<script[^>]+src=['\"]https?:|<link"
        assert not re.search(fetched, page.read_text())


def test_pages_show_formulas_as_mathml_text_as_text_and_the_records(site: Path) -> None:
    text = (site / "report/00_method.html").read_text()
    assert text.count("<math") == 2 and "cost: $5" in text
    assert "&lt;b&gt; &amp; red" in text and "\x1b" not in text
    assert "<th>overlap of the top 1%</th><td>Barlow Twins</td>" in text
    index = (site / "index.html").read_text()
    assert "3 tests of 2 claims: 1 reproduced, 1 contradicted, 1 check passed" in index
    numbers = r"<td>BYOL</td>\s*<td>[^<]*</td>\s*<td>○ [^<]*</td>\s*<td>○ contradicted \(0/1\)"
    assert re.search(numbers, index)
    assert re.search(r"\(&gt; 0\.924\)</th>", index) and "● 0.97 [0.87, 0.99]" in index
    row = r'as the paper says\?</td>.*"holds in">–</td>.*<a href="#nb-01_seed_correlation">01</a>'
    assert re.search(row, index)


@pytest.mark.parametrize("width", [360, 1280])
def test_an_answer_is_hidden_until_asked_for_and_no_screen_needs_scrolling_sideways(
    width: int, browser: Any, site: Path
) -> None:
    """And nothing is on the console, or asked of the network."""
    bad: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 700})
    page.on("console", lambda m: bad.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: bad.append(str(e)))
    page.on("request", lambda r: bad.append(r.url))
    page.goto((site / "index.html").as_uri())
    wide = "document.documentElement.scrollWidth"
    assert page.evaluate(wide) <= width
    page.click("#notebooks h3 a >> nth=0")
    assert page.locator("math").count() == 2 and page.evaluate(wide) <= width
    assert not page.get_by_text("the answer: 42").is_visible()
    page.click("#unfold")
    assert page.locator("code", has_text="print").is_visible()
    page.close()
    assert [said for said in bad if not said.startswith(("file:", "data:"))] == []


class Evil:
    """Unpickled with the usual reader, it creates a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_would_run_a_command_does_not(zipped: bool, tmp_path: Path) -> None:
    mark, path = tmp_path / "was_here", tmp_path / "weights.pt"
    content = {"state_dict": Evil(mark)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    said = r"holds more than tensors( \(it asks for \S*system\))?, and reading"
    with pytest.raises(issl.IsslError, match=said):
        open_encoder(str(path))
    given = ["run", "--only", "03", "--checkpoint", f"simclr={path}", "--out", str(tmp_path)]
    assert cli.main(given) == 2 and not mark.exists()


def test_data_sets_in_pickles_do_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "was_here"
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta"]:
        (batches / name).write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(issl.IsslError, match=r"differs or a file is missing.; download it again"):
        issl.load("cifar10", root=tmp_path)
    (tmp_path / "cifar10h").mkdir()
    np.save(tmp_path / human_choices.FILE, np.array([Evil(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(issl.IsslError, match=r"is not a readable .npy file"):
        human_choices.read(tmp_path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(mark)))  # with the usual reader it runs
    assert mark.exists()


def test_a_zip_bomb_is_refused_by_its_declared_size(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(30_000_000))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(issl.IsslError, match=r"declares 30\.0 MB of content in a file of 0\.0 MB"):
        open_encoder(str(path))


SCRIPT = "</script></pre><script>window.pwned=1</script><img src=x onerror=window.pwned=1>"
FORMULA = r"$\frac{1}{$_$"
THERE, NAME = "http://elsewhere.example", "a$b$<img src=x>.parquet"


def attack() -> Any:
    """A notebook whose outputs hold what a name could bring into them, escaped or not."""
    new = nbformat.v4
    frame = pd.DataFrame({SCRIPT: [SCRIPT]}).to_html()
    raw = (
        f"{SCRIPT}<iframe src='{THERE}/a'></iframe><img src='{THERE}/a.png'>"
        f"<link rel=stylesheet href='{THERE}/a.css'><style>p {{background: url({THERE}/)}}"
        f"</style><p>x</p><object data='{THERE}/o'></object><base href='{THERE}/'>"
        f"<meta http-equiv=refresh content='0; url={THERE}/'><svg onload=window.pwned=1></svg>"
        "<a id=bad href='javascript:window.pwned=1'>here</a>"
    )
    places = f"{SCRIPT} of {Path.home()}/photos and {REPOSITORY}/issl/x.py"
    trace = [f"File {sys.prefix}/lib/x.py", SCRIPT]
    markdown = f"| a |\n|---|\n| {SCRIPT} ${SCRIPT}$ |"
    shown = [("html", frame), ("html", raw), ("markdown", markdown), ("plain", SCRIPT)]
    outputs = [
        new.new_output("stream", text=places),
        new.new_output("error", ename="E", evalue=SCRIPT, traceback=trace),
        *(new.new_output("display_data", data={f"text/{kind}": text}) for kind, text in shown),
    ]
    title = new.new_markdown_cell(f"# {SCRIPT}\n\n## {SCRIPT}")
    return new.new_notebook(cells=[title, new.new_code_cell(f"'{SCRIPT}'", outputs=outputs)])


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on classes and columns with hostile names, in a folder of a person's machine."""
    out, rng = tmp_path_factory.mktemp("private"), np.random.default_rng(0)
    images = [png(rng.integers(0, 256, (3, 32, 32), dtype=np.uint8)) for _ in range(24)]
    names = [(SCRIPT, FORMULA)[k % 2] for k in range(24)]
    table = pa.table({"image": images, "label": names, SCRIPT: names})
    pq.write_table(table, out / NAME)
    data = f"hf:{out}/{NAME}"
    results = out / "results/mine"
    results.mkdir(parents=True)
    place = {"out": str(out), "data_root": str(out)}
    plan = PLANS["00_method"](profile="mine", dataset=data, n=24, images=12, **place)
    source = plan.source()
    metrics = {"relative_difference": Estimate(0.0, 0.0, 0.0, 4)}
    record("method_exact", metrics, source, results, dataset=data, n=4, seeds=[0])
    return write(out, "mine", {"00_method": attack()}, {"00_method": plan})


def test_no_place_of_the_machine_is_in_the_report_or_a_record(hostile: Path) -> None:
    texts = [hostile / "index.html", *(hostile / "report").rglob("*.*"), *hostile.glob("*.json")]
    assert {p.suffix for p in texts} >= {".html", ".json", ".png"}
    private = [str(hostile.parents[1]), str(Path.home()), str(REPOSITORY), sys.prefix]
    for path in texts:
        content = path.read_bytes().decode("utf-8", "replace")
        assert [p for p in private if len(p) > 1 and p in content] == [], path.name
    page = (hostile / "report/00_method.html").read_text()
    assert "~/photos and REPOSITORY/issl/x.py" in page and "PYTHON/lib/x.py" in page
    written = json.loads((hostile / "claim_method_exact.json").read_text())
    assert written["dataset"] == written["provenance"]["parameters"]["dataset"] == f"hf:{NAME}"
    index = (hostile / "index.html").read_text()
    assert "hf:a$b$&lt;img src=x&gt;" in index and "<math" not in index


def test_nothing_in_a_name_runs_or_asks_the_network(browser: Any, hostile: Path) -> None:
    page, file, asked = browser.new_page(), hostile / "report/00_method.html", []

    def offline(route: Any) -> None:
        asked.append(route.request.url)
        route.abort()

    page.route(re.compile("^http"), offline)
    page.goto((hostile / "index.html").as_uri())
    assert page.evaluate("window.pwned") is None
    page.goto(file.as_uri())
    page.wait_for_timeout(300)
    page.click("#bad")
    assert page.evaluate("window.pwned") is None and page.url.endswith(file.name)
    assert asked == []
    # without its policy the attack succeeds: the assertions above could fail
    policy = re.compile('<meta http-equiv="Content-Security-Policy"[^>]*>')
    bare, removed = policy.subn("", file.read_text())
    file.with_name("bare.html").write_text(bare)
    page.goto(file.with_name("bare.html").as_uri())
    page.wait_for_timeout(300)
    assert removed == 1 and page.evaluate("window.pwned") == 1 and len(asked) >= 3
    page.close()
