"""The report: its parts from what a run left, and the pages themselves in a browser, opened from
files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch

import issl
from issl.audit import site as report
from issl.audit.cache import Artifacts
from issl.audit.claims import provenance, record
from issl.audit.plans import EXPLORER, PLANS
from issl.audit.stats.neighbour_graph import nearest
from issl.audit.stats.statistics import Estimate
from issl.audit.verdicts import read_records, summary
from issl.evaluate import embed

SETTINGS: dict[str, Any] = {
    "profile": "mini",
    "n": 40,
    "width": 1,
    "epochs": 1,
    "batch_size": 20,
    "rank": 2,
    "duplicates": 0.1,
    "atypical": 0.1,
    "methods": ["simclr", "byol"],
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report on two notebooks and forty drawn images."""
    out = tmp_path_factory.mktemp("report")
    results, figures = out / "results/mini", out / "figures/mini"
    results.mkdir(parents=True)
    figures.mkdir(parents=True)
    source = provenance("overnight", {}, torch.device("cpu"), [])
    about = {
        "dataset": "scenes",
        "n": 40,
        "seeds": [0],
        "learned": {"knn": 0.4, "untrained": 0.2, "encoders": 3},
    }
    for method, r in (("simclr", 0.97), ("byol", 0.8)):
        record(
            "noise_seed_correlation",
            {"pearson": Estimate(r, r - 0.1, r + 0.02, 40)},
            source,
            results,
            method,
            **about,
        )
    record(
        "method_exact",
        {"relative_difference": Estimate(1e-9, 1e-9, 1e-9, 40)},
        source,
        results,
        **about,
    )
    for name, title in (
        ("00_method", "# 00 · The method <fast>"),
        ("01_seed_correlation", "# 01 · Seeds"),
    ):
        cells = [
            nbformat.v4.new_markdown_cell(
                title + "\n\nLet $x_i < 1$ and `cost: $5`:\n\n$$\\frac{a}{b}$$"
            ),
            nbformat.v4.new_markdown_cell("## Part one"),
            nbformat.v4.new_code_cell("n = 3", metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell(
                "answer = 6",
                metadata={"tags": ["solution"]},
                outputs=[nbformat.v4.new_output("stream", text="the answer: 42")],
            ),
            nbformat.v4.new_code_cell(
                "t",
                outputs=[
                    nbformat.v4.new_output(
                        "display_data",
                        {"text/html": "<table><th>overlap_top1</th><td>barlow_twins</td></table>"},
                    )
                ],
            ),
            nbformat.v4.new_code_cell(
                "print('<b>')",
                outputs=[nbformat.v4.new_output("stream", text="<b> & \x1b[31mred\x1b[0m")],
            ),
        ]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), results / f"{name}.ipynb")
        plt.imsave(figures / f"{name}.png", np.zeros((20, 30)))
        (figures / f"{name}.csv").write_text("a\n1\n")
    plan = EXPLORER(**SETTINGS, out=str(out))
    artifacts = Artifacts(out / "artifacts")
    for stage in plan.stages():
        artifacts.get(stage)
    plans = {name: plan_of(profile="mini", out=str(out)) for name, plan_of in PLANS.items()}
    assert report.build("mini", plans, plan, artifacts, out) == results / "index.html"
    return results


class Links(HTMLParser):
    """All that a page refers to, and the places it has."""

    def __init__(self, text: str):
        super().__init__()
        self.to: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.to.append(value)
            if name == "id" and value:
                self.ids.append(value)


def test_every_link_leads_somewhere_and_nothing_is_fetched(site: Path) -> None:
    pages = [site / "index.html", *sorted((site / "report").glob("*.html"))]
    assert len(pages) == 3
    for page in pages:
        text = page.read_text()
        links = Links(text)
        assert len(links.ids) == len(set(links.ids)), page.name
        for link in links.to:
            if link.startswith("data:"):
                continue
            parts = urlsplit(link)
            if parts.scheme:
                assert link == "https://arxiv.org/abs/2412.17170", (
                    link
                )  # the one link outwards, followed by the reader
                continue
            target = page if not parts.path else (page.parent / unquote(parts.path)).resolve()
            assert target.is_file(), (page.name, link)
            if parts.fragment:
                assert parts.fragment in Links(target.read_text()).ids, (page.name, link)
        assert not re.search(r"url\(['\"]?https?:|@import|<script[^>]+src=['\"]https?:|<link", text)


def test_a_notebook_page_has_its_formulas_as_mathml_and_its_text_as_text(site: Path) -> None:
    text = (site / "report/00_method.html").read_text()
    assert text.count("<math") == 2 and "cost: $5" in text
    assert "&lt;b&gt; &amp; red" in text and "\x1b" not in text
    assert "<th>overlap of the top 1%</th><td>Barlow Twins</td>" in text


def test_verdicts_and_findings_are_the_records(site: Path) -> None:
    index = (site / "index.html").read_text()
    assert "3 tests of 2 claims: 1 reproduced, 1 contradicted, 1 check passed" in index
    assert 'class="badge bad">BYOL ○ contradicted (0/1)' in index
    assert "SimCLR 0.97 [0.87, 0.99]" in index


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
    assert "BYOL 0.80 [0.70, 0.82]" in byol["text"] and "0.924" in byol["text"]
    assert (site / "index.html").read_text().count('<svg class="interval') == len(records)
    unknown = replace(row, estimates=[Estimate(np.nan, np.nan, np.nan, 9), *row.estimates[1:]])
    assert report.bars(unknown)[0] is None


def test_the_explorers_lists_are_the_librarys(site: Path) -> None:
    data = json.loads((site / "report/images.js").read_text().removeprefix("window.EXPLORER="))
    plan = EXPLORER(**SETTINGS, out=str(site.parent.parent))
    artifacts, images = Artifacts(site.parent.parent / "artifacts"), plan.images().load()
    assert data["n"] == len(images) == 40 and data["index"] == images.index.tolist()
    encoder = plan.pretrain("simclr").encoder(artifacts)
    how = {"curvature": issl.LoGra(2), "computing": issl.Computing(batch_size=64)}
    scores = issl.cross_influence(encoder, images, images, **how)
    own = issl.self_influence(encoder, images, **how)["influence"]
    mine = data["methods"]["SimCLR"]
    np.testing.assert_allclose(mine["influence"], own, rtol=1e-3)
    near = nearest(embed(encoder, images), 6)
    for i in (0, 7, 39):
        others = scores[i].clone()
        others[i] = -torch.inf
        want = others.topk(6)
        np.testing.assert_allclose([v for _, v in mine["taught"][i]], want.values, rtol=2e-3)
        np.testing.assert_allclose([v for _, v in mine["nearest"][i]], 1 - near[1][i], atol=2e-3)
        assert i not in [p for p, _ in mine["taught"][i] + mine["nearest"][i]]
    assert "label_name" in data["attributes"] and "duplicate_of" not in data["attributes"]


def test_without_anything_run_there_is_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(issl.IsslError, match="holds no executed notebook"):
        report.build("mini", {}, None, Artifacts(tmp_path), tmp_path)


# --- in a browser
# ------------------------------------------------------------------------------------------


@pytest.fixture
def page(browser: Any, site: Path) -> Iterator[Any]:
    """The index, opened from its file; anything on the console or from the network fails the
    test."""
    bad: list[str] = []
    opened = browser.new_page(viewport={"width": 1100, "height": 800})
    opened.on("console", lambda m: bad.append(m.text) if m.type in ("error", "warning") else None)
    opened.on("pageerror", lambda e: bad.append(str(e)))
    opened.on(
        "request", lambda r: bad.append(r.url) if not r.url.startswith(("file:", "data:")) else None
    )
    opened.goto((site / "index.html").as_uri())
    yield opened
    opened.close()
    assert bad == []


def influences(page: Any) -> list[float]:
    places = page.eval_on_selector_all(
        "#grid .t", "tiles => tiles.map(t => Number(t.dataset.place))"
    )
    values = page.evaluate("EXPLORER.methods[document.getElementById('method').value].influence")
    return [values[p] for p in places]


def test_order_and_filters_do_what_they_say(page: Any) -> None:
    assert page.locator("#grid .t").count() == 40
    assert influences(page) == sorted(influences(page), reverse=True)
    page.select_option("#order", "influence, lowest first")
    assert influences(page) == sorted(influences(page))
    first = influences(page)
    page.select_option("#method", "BYOL")
    assert influences(page) == sorted(influences(page)) and influences(page) != first
    page.select_option("#attribute", "group")
    page.select_option("#value", "cool")
    wanted = page.evaluate("EXPLORER.attributes.group.filter(v => v === 'cool').length")
    assert page.locator("#grid .t").count() == wanted < 40
    assert page.inner_text("#count") == f"{wanted} of 40 images"
    page.select_option("#attribute", "none")
    assert page.locator("#grid .t").count() == 40 and page.locator("#value").is_disabled()


def test_an_image_opens_by_keyboard_and_leads_to_its_neighbours(page: Any) -> None:
    page.locator("#grid .t").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("#detail").is_visible() and "rank 1 of 40" in page.inner_text("#detail")
    assert page.locator("#detail .strip .t").count() == 12
    page.locator("#detail .strip .t").first.click()
    assert (
        "rank 1 of 40" not in page.inner_text("#detail")
        or page.locator("#detail .strip .t").count() == 12
    )
    page.keyboard.press("Escape")
    assert not page.locator("#detail").is_visible()


def places_of(page: Any, selector: str) -> list[int]:
    return page.eval_on_selector_all(
        f"{selector} .t", "tiles => tiles.map(t => Number(t.dataset.place))"
    )


def test_the_methods_side_by_side_mark_what_they_share(page: Any) -> None:
    """Counted here by themselves."""
    for order, sign in (("influence, highest first", -1), ("influence, lowest first", 1)):
        page.select_option("#order", order)
        tops = []
        for k, method in enumerate(("SimCLR", "BYOL")):
            scores = np.array(page.evaluate(f"EXPLORER.methods['{method}'].influence"))
            tops.append(places_of(page, f"#lists section >> nth={k} >> .grid"))
            np.testing.assert_array_equal(scores[tops[-1]], np.sort(sign * scores)[:12] * sign)
        shared = set(tops[0]) & set(tops[1])
        assert shared  # of forty images, twelve each: chance gives four
        assert set(places_of(page, "#lists")) == set(tops[0]) | set(tops[1])
        marked = page.eval_on_selector_all(
            "#lists .t.shared", "tiles => tiles.map(t => Number(t.dataset.place))"
        )
        assert sorted(marked) == sorted([*shared, *shared])
    tile = page.locator("#lists .t.shared").first
    influence = page.evaluate("EXPLORER.methods.BYOL.influence")
    rank = 1 + sum(v > influence[int(tile.get_attribute("data-place"))] for v in influence)
    assert f"(rank {rank} of 40)" in tile.get_attribute("title").split("BYOL:")[1]


def test_an_answer_is_hidden_until_it_is_asked_for_and_a_phone_needs_no_scrolling(
    page: Any,
) -> None:
    page.set_viewport_size({"width": 360, "height": 700})
    wide = "document.documentElement.scrollWidth"
    assert page.evaluate(wide) <= 360
    page.click("#notebooks h3 a >> nth=0")
    assert page.locator("math").count() == 2 and page.evaluate(wide) <= 360
    assert not page.get_by_text("the answer: 42").is_visible()
    page.click("#unfold")
    assert page.locator("code", has_text="print").is_visible()
