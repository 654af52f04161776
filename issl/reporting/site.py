"""The report: results/<profile>/index.html, a static site that opens from a file, without any network.

Verdicts, a card and a page per notebook (formulas as MathML, which browsers draw themselves), an explorer of the images
by their scores, and where the numbers come from. It shows what the run left and computes nothing of its own.
"""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
from jinja2 import Environment
from PIL import Image

from issl.data.images import Images
from issl.errors import IsslError
from issl.experiments.cache import MANIFEST, Artifacts, in_dependency_order
from issl.experiments.claims import UNTESTED
from issl.experiments.explorer import Explorer
from issl.experiments.plan import Plan
from issl.files import PACKAGE, atomic
from issl.pretraining.recipes import NAMES
from issl.reporting import verdicts
from issl.reporting.verdicts import Record

KINDS = {"reproduced": "good", "partly": "half", "not reproduced": "bad", UNTESTED: "none"}
COLUMNS = 50  # of the sheet that holds all images
MATHS = re.compile(r"(`+)(?:.|\n)*?\1|\$\$(.+?)\$\$|\$(.+?)\$", re.DOTALL)
SCALE = {
    "quick": "a demonstration on drawn images, in minutes", "mini": "small encoders on subsets of real images",
    "paper": "ResNet-18 at full width, the paper's scale",
}  # fmt: skip


def build(profile: str, plans: dict[str, Plan], explorer: Explorer | None, artifacts: Artifacts, out: Path) -> Path:
    """Write the site of a profile from what lies under out/results and out/figures; returns its index.

    plans     of all notebooks that may have been run
    explorer  whose stages are there; None leaves the image explorer out
    """
    results, figures = out / "results" / profile, out / "figures" / profile
    site = results / "report"
    site.mkdir(parents=True, exist_ok=True)
    records = verdicts.read_records(sorted(results.glob("claim_*.json")))
    done = [name for name in plans if (results / f"{name}.ipynb").is_file()]
    if not done:
        raise IsslError(f"{results} holds no executed notebook; `issl run --profile {profile}` makes them")
    cards = [_card(name, records, results / f"{name}.ipynb", figures, site) for name in done]
    script, about = "", ""
    if explorer is not None:
        images = explorer.images().load()
        _sheet(images, site / "images.png")
        data = json.dumps(explorer_data(explorer, images, artifacts), separators=(",", ":"), allow_nan=False)
        # a page that was opened from a file may load a script, but no JSON
        with atomic(site / "images.js") as part:
            part.write_text(f"window.EXPLORER={data}")
        script = f'<script src="report/images.js"></script><script>{_file("explorer.js")}</script>'
        about = f"{len(images):,} training images of {images.name}, scored under {len(explorer.methods)} encoders."
    summary = verdicts.summary(records) if records else []
    by_claim = {r["claim"] + (" (ours)" if r["ours"] else ""): r["notebook"] for r in records}
    told = [
        {**row, "notebook": by_claim[row["claim"]], "verdict": [_badge(v) for v in row["verdict"]]} for row in summary
    ]
    reached = [r["verdict"] for r in records]
    counts = ", ".join(f"{reached.count(v)} {v}" for v in KINDS if v in reached)
    names = {"reproduced": "Supported", "partly": "In part", "not reproduced": "Not supported"}
    uses = verdicts.good_for(verdicts.decided(records))
    good_for = [(names[outcome], "; ".join(found)) for outcome, found in uses.items() if found]
    body = _render(
        _file("index.html"), profile=profile, scale=SCALE.get(profile, "a profile of its own"), claims=told,
        untested=UNTESTED in reached, counts=f"{len(records)} tests of {len(summary)} claims: {counts}",
        cards=cards, explorer=about, good_for=good_for, provenance=_provenance(records),
        stages=_stages(plans, artifacts),
    )  # fmt: skip
    parts = [("verdicts", "Verdicts"), ("notebooks", "Notebooks")]
    parts += [("images", "Images")] * bool(about) + [("provenance", "Provenance")]
    index = results / "index.html"
    with atomic(index) as part:
        part.write_text(_page(f"Influence-SSL: {profile}", body, parts, "#main", script))
    return index


# --- notebooks ---------------------------------------------------------------------------------------------


def _card(name: str, records: Sequence[Record], executed: Path, figures: Path, site: Path) -> dict[str, Any]:
    """A notebook's page, and what stands of it in the index."""
    notebook = nbformat.read(executed, as_version=4)
    first = next((c.source for c in notebook.cells if c.cell_type == "markdown"), name)
    title = first.splitlines()[0].lstrip("# ").strip()
    body, headings = notebook_body(notebook)
    with atomic(site / f"{name}.html") as part:
        part.write_text(_page(title, body, headings, "../index.html#nb-" + name))
    picture = figures / f"{name}.png"
    card: dict[str, Any] = {
        "name": name,
        "title": title,
        "page": f"report/{name}.html",
        "finding": finding(name, records),
    }
    if picture.is_file():
        shutil.copyfile(picture, site / picture.name)
        with Image.open(picture) as image:
            card |= {"width": image.width, "height": image.height}
    card["image"] = f"report/{picture.name}"
    kept = [("PDF", "pdf"), ("numbers (CSV)", "csv")]
    card["links"] = [("whole notebook", card["page"])]
    for text, suffix in kept:
        if (source := figures / f"{name}.{suffix}").is_file():
            shutil.copyfile(source, site / source.name)
            card["links"].append((text, f"report/{source.name}"))
    return card


def finding(name: str, records: Sequence[Record]) -> dict[str, Any]:
    """What the notebook's first claim came to: claim, measured, lines (text and kind, one a method), more (claims)."""
    own = [r for r in records if r["notebook"] == name]
    if not own:
        return {"claim": "All verdicts together." if name == "11_claims_audit" else "No claim was recorded."}
    first = [r for r in own if r["name"] == own[0]["name"]]
    row = verdicts.summary(first)[0]
    numbers = zip(row["ours"], first, strict=True)
    lines = [
        {"text": f"{verdicts.MARKS[r['verdict']]} {text}: {r['verdict']}", "kind": KINDS[r["verdict"]]}
        for text, r in numbers
    ]
    return {
        "claim": row["claim"],
        "measured": row["measured"],
        "lines": lines,
        "more": len({r["name"] for r in own}) - 1,
    }


def notebook_body(notebook: Any) -> tuple[str, list[tuple[str, str]]]:
    """An executed notebook's cells as HTML, formulas as MathML, and its headings (id, text)."""
    from nbconvert.filters import markdown2html, strip_ansi  # slow to import
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    parts, headings = [], []
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            found = re.search(r"^## (.+)$", cell.source, re.MULTILINE)
            if found:
                headings.append((f"cell-{number}", re.sub(r"[`$*]", "", found[1])))
            parts.append(f'<div class="cell" id="cell-{number}">{markdown2html(_with_mathml(cell.source))}</div>')
        elif cell.cell_type == "code":
            code = highlight(cell.source, PythonLexer(), HtmlFormatter(nowrap=True, noclasses=False))
            shown = "".join(_output(o, strip_ansi) for o in cell.outputs)
            listing = f'<pre class="listing" tabindex="0"><code>{code}</code></pre>'
            tags = set(cell.metadata.get("tags", []))
            if tags & {"parameters", "injected-parameters"}:
                what = "Parameters: defaults" if "parameters" in tags else "Parameters: this run's"
                listing = f"<details><summary>{what}</summary>{listing}</details>"
            outputs = f'<div class="outputs" tabindex="0">{shown}</div>' if shown else ""
            parts.append(f'<div class="cell code">{listing}{outputs}</div>')
    return "\n".join(parts), headings


def _output(output: Any, strip_ansi: Any) -> str:
    if output.output_type == "stream":
        return f"<pre>{html.escape(strip_ansi(output.text))}</pre>"
    if output.output_type == "error":
        return f"<pre>{html.escape(strip_ansi(chr(10).join(output.traceback)))}</pre>"
    from nbconvert.filters import markdown2html

    data = output.data
    if "image/png" in data:
        return (
            f'<img alt="Figure; its title says what it shows" src="data:image/png;base64,{data["image/png"].strip()}">'
        )
    if "text/html" in data:
        return str(data["text/html"])
    if "text/markdown" in data:
        return str(markdown2html(_with_mathml(data["text/markdown"])))
    return f"<pre>{html.escape(data.get('text/plain', ''))}</pre>"


def _with_mathml(source: str) -> str:
    """$…$ and $$…$$ outside of code as MathML."""
    from latex2mathml.converter import convert

    def replaced(found: re.Match[str]) -> str:
        block, line = found[2], found[3]
        if block is None and line is None:
            return found[0]
        return str(convert(block or line, display="inline" if block is None else "block"))

    return MATHS.sub(replaced, source)


# --- the explorer ------------------------------------------------------------------------------------------


def _sheet(images: Images, path: Path) -> None:
    """All images on one sheet, COLUMNS a row."""
    n, _, h, w = images.pixels.shape
    rows = -(-n // COLUMNS)
    sheet = np.zeros((rows * COLUMNS, h, w, 3), np.uint8)
    sheet[:n] = images.pixels.permute(0, 2, 3, 1).numpy()
    joined = sheet.reshape(rows, COLUMNS, h, w, 3).transpose(0, 2, 1, 3, 4).reshape(rows * h, COLUMNS * w, 3)
    with atomic(path) as part:
        Image.fromarray(joined).save(part, "PNG")


def explorer_data(plan: Explorer, images: Images, artifacts: Artifacts) -> dict[str, Any]:
    """What explorer.js reads: scores and lists by method, and the attributes that have few values."""
    columns = images.attributes.drop(columns=["index", "duplicate_of"], errors="ignore")
    few: dict[str, list[str]] = {}
    for column in columns:
        values = columns[column].astype(str).tolist()
        # the same under another name, or a number for each image, is no filter
        if columns[column].nunique() <= 20 and values not in few.values():
            few[str(column)] = values
    methods = {}
    for method in plan.methods:
        scores, lists = plan.scores(method).read(artifacts), plan.lists(method).read(artifacts)
        methods[str(NAMES.get(method, method))] = {
            **{c: [float(f"{v:.4g}") for v in scores[c]] for c in ("influence", "stability_loss", "grad_norm")},
            **{kind: _rows(lists[lists["kind"] == kind]) for kind in ("nearest", "taught")},
        }
    return {
        "columns": COLUMNS, "sprite": "report/images.png", "n": len(images), "index": images.index.tolist(),
        "attributes": few, "methods": methods,
    }  # fmt: skip


def _rows(part: pd.DataFrame) -> list[list[tuple[int, float]]]:
    ordered = part.sort_values(["position", "rank"])
    pairs = [(int(o), float(f"{v:.4g}")) for o, v in zip(ordered["other"], ordered["value"], strict=True)]
    k = int(ordered["rank"].max())
    return [pairs[i : i + k] for i in range(0, len(pairs), k)]


# --- pages -------------------------------------------------------------------------------------------------


def _badge(text: str) -> dict[str, str]:
    plain = re.sub(r" \(\d+/\d+\)$", "", text)
    kind = next(kind for verdict, kind in KINDS.items() if plain.endswith(f"{verdicts.MARKS[verdict]} {verdict}"))
    return {"text": text, "kind": kind}


def _provenance(records: Sequence[Record]) -> list[tuple[str, str]]:
    if not records:
        return []
    sources = [r["provenance"] for r in records]
    fields = {"commit": "commit", "hardware": "hardware", "torch": "torch", "python": "python"}
    found = [(text, ", ".join(sorted({str(s[key]) for s in sources}))) for key, text in fields.items()]
    times = sorted(s["time"] for s in sources)
    seeds = sorted({f"{s}" for r in records for s in r["seeds"]}, key=int)
    return [*found, ("measured", f"{times[0]} to {times[-1]}"), ("seeds", ", ".join(seeds))]


def _stages(plans: dict[str, Plan], artifacts: Artifacts) -> list[dict[str, Any]]:
    """How many stages of each kind there are, those that others read among them, and what they took."""
    rows: dict[str, dict[str, Any]] = {}
    for stage in in_dependency_order(stage for plan in plans.values() for stage in plan.stages()):
        manifest = artifacts.folder(stage) / MANIFEST
        if manifest.is_file():
            row = rows.setdefault(stage.name, {"name": stage.name, "count": 0, "seconds": 0.0})
            row["count"] += 1
            row["seconds"] += json.loads(manifest.read_text())["made_with"]["seconds"]
    return [{**row, "seconds": f"{row['seconds']:,.0f}"} for row in rows.values()]


def _file(name: str) -> str:
    return (PACKAGE / "reporting" / name).read_text()


def _render(template: str, **values: Any) -> str:
    return Environment(autoescape=True).from_string(template).render(**values)


@lru_cache
def _css() -> str:
    """The pages' style, with that of code, light and dark."""
    from pygments.formatters import HtmlFormatter

    light, dark = (HtmlFormatter(style=s).get_style_defs("code") for s in ("default", "github-dark"))
    nested = "\n".join(f':root[data-theme="dark"] {line}' for line in dark.splitlines() if line.startswith("code ."))
    return "\n".join([_file("style.css"), *(line for line in light.splitlines() if line.startswith("code .")), nested])


def _page(title: str, body: str, parts: Sequence[tuple[str, str]], home: str, scripts: str = "") -> str:
    from markupsafe import Markup

    return _render(
        _file("page.html"), title=title, body=Markup(body), parts=parts, home=home, css=Markup(_css()),
        name="Influence-SSL" if home == "#main" else "← report",
        theme_js=Markup(_file("theme.js")), scripts=Markup(scripts),
    )  # fmt: skip
