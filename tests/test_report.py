"""The report: its parts from what a run left, and the pages themselves in a browser, opened from
files."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

import issl
from issl.audit import site as report
from issl.audit.cache import Artifacts
from issl.audit.claims import provenance, record
from issl.audit.profiles import PLANS
from issl.audit.stats.statistics import Estimate
from issl.audit.verdicts import read_records, summary

FORMULAS = "\n\nLet $x_i < 1$ and `cost: $5`:\n\n$$\\frac{a}{b}$$"
TABLE = {"text/html": "<table><th>overlap_top1</th><td>barlow_twins</td></table>"}


def printed(text: str) -> list[nbformat.NotebookNode]:
    return [new_output("stream", text=text)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report on two notebooks."""
    out = tmp_path_factory.mktemp("report")
    results, figures = out / "results/mini", out / "figures/mini"
    results.mkdir(parents=True)
    figures.mkdir(parents=True)
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
        nbformat.write(nbformat.v4.new_notebook(cells=cells), results / f"{name}.ipynb")
        plt.imsave(figures / f"{name}.png", np.zeros((20, 30)))
        (figures / f"{name}.csv").write_text("a\n1\n")
    plans = {name: plan_of(profile="mini", out=str(out)) for name, plan_of in PLANS.items()}
    report.build("mini", plans, Artifacts(out / "artifacts"), out)
    return results


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
    assert 'class="badge bad">BYOL ○ contradicted (0/1)' in index
    assert "SimCLR 0.97 [0.87, 0.99]" in index
    row = r'as the paper says\?</td>.*"holds in">–</td>.*<a href="#nb-01_seed_correlation">01</a>'
    assert re.search(row, index)


def test_the_bars_of_the_verdicts_are_their_intervals(site: Path) -> None:
    """On one scale, with the test's threshold: where the number is above it, so is the dot."""
    records = read_records(sorted(site.glob("claim_*.json")))
    row = next(r for r in summary(records) if r.notebook == "01_seed_correlation")
    simclr, byol = report.bars(row)
    assert simclr and byol and simclr["asked"] == byol["asked"]
    assert byol["low"] < byol["value"] < byol["high"] <= simclr["asked"]
    assert simclr["asked"] < simclr["value"] < simclr["high"]
    ratio = (simclr["value"] - byol["value"]) / (byol["value"] - byol["low"])
    assert ratio == pytest.approx(0.17 / 0.1, rel=0.02)
    assert (site / "index.html").read_text().count('<svg class="interval') == len(records)
    unknown = replace(row, estimates=[Estimate(np.nan, np.nan, np.nan, 9), *row.estimates[1:]])
    assert report.bars(unknown)[0] is None


def test_without_anything_run_there_is_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(issl.IsslError, match="holds no executed notebook"):
        report.build("mini", {}, Artifacts(tmp_path), tmp_path)


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
