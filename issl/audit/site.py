"""The report: results/<profile>/index.html, a static site that opens from a file and needs no
network.

It has the verdicts, a card and a page per notebook (formulas as MathML, which browsers draw
themselves), and where the numbers come from. It shows what the run left and computes nothing
itself. The HTML is in templates/, styles and scripts are in static/.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import nbformat
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from issl.audit import RELEASED, verdicts
from issl.audit.claims import FAILED, PASSED, SUPERSEDED, UNTESTED, all_words, claims, readings
from issl.audit.notebooks import hidden, own_paths
from issl.audit.plan import Plan
from issl.audit.profiles import described, in_words_left_out
from issl.audit.verdicts import Record
from issl.errors import IsslError
from issl.files import PACKAGE, atomic, provided
from issl.pretraining.recipes import NAMES

KINDS = {  # a verdict's CSS class
    "reproduced": "good",
    "partly": "half",
    "contradicted": "bad",
    "undecided": "none",
    UNTESTED: "none",
    SUPERSEDED: "none",
    PASSED: "good",
    FAILED: "bad",
}
MATHS = re.compile(r"(`+)(?:.|\n)*?\1|\$\$(.+?)\$\$|\$(.+?)\$", re.DOTALL)


def build(
    profile: str,
    plans: dict[str, Plan],
    out: Path,
    left_out: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """Write the site of a profile from what is under out/results and out/figures; returns its
    index.

    plans     of all notebooks that may have been run
    left_out  by notebook, the methods that are not released yet
    Raises IsslError where no notebook was executed.
    """
    results, figures = out / "results" / profile, out / "figures" / profile
    site, index = results / "report", results / "index.html"
    site.mkdir(parents=True, exist_ok=True)
    places = own_paths(plans.values(), out)
    records = verdicts.read_records(sorted(results.glob("claim_*.json")))
    done = [name for name in plans if (results / f"{name}.ipynb").is_file()]
    if not done:
        raise IsslError(
            f"{results} holds no executed notebook; `issl run --profile {profile}` makes them"
        )
    kept = verdicts.kept_records(provided("figures"))
    told = [r | {"dataset": str(escape(r["dataset"])).replace("$", "&#36;")} for r in records]
    left_out = left_out or {}
    reached = [r["verdict"] for r in records]
    counts = ", ".join(f"{reached.count(v)} {v}" for v in KINDS if v in reached)
    cards = [
        _card(name, records, results / f"{name}.ipynb", figures, site, places) for name in done
    ]
    _write(
        index,
        "index.html",
        profile=profile,
        about=described(profile),
        verdicts=_staying(_html(verdicts.markdown(told, history=[*kept, *records]))),
        table=_table(records, profile, kept),
        missing=in_words_left_out(left_out),
        counts=f"{len(records)} tests of {len({r['name'] for r in records})} claims: {counts}",
        cards=cards,
        provenance=_provenance(records),
    )
    return index


def _table(
    records: Sequence[Record], profile: str, kept: Sequence[Record]
) -> list[tuple[str, ...]]:
    """The rows of the README's table that these records answer, with its head; without, none.

    A variant of a profile counts as that profile. Other readings are known of released encoders.
    """
    scale = {"profile": profile.split("-")[0]}
    own = [r | {"provenance": r["provenance"] | scale} for r in records]
    known = profile in (RELEASED, *readings())
    found = verdicts.answers(own, kept if known else [])
    return [tuple(found.columns), *found.itertuples(index=False, name=None)] if len(found) else []


def _title(notebook: Any, name: str) -> str:
    """The notebook's first heading, or its name if it has no text."""
    source: str = next((c.source for c in notebook.cells if c.cell_type == "markdown"), name)
    return source.splitlines()[0].lstrip("# ").strip()


def _card(
    name: str,
    records: Sequence[Record],
    executed: Path,
    figures: Path,
    site: Path,
    places: Mapping[str, str],
) -> dict[str, Any]:
    """Write a notebook's page; returns what the index shows of it.

    places   paths on this machine, which the page must not show
    """
    notebook = nbformat.read(executed, as_version=4)
    title, page, picture = _title(notebook, name), f"report/{name}.html", figures / f"{name}.png"
    cells, parts = notebook_cells(notebook, places)
    _write(site / f"{name}.html", "notebook.html", name=name, title=title, cells=cells, parts=parts)
    card: dict[str, Any] = {
        "name": name,
        "title": title,
        "page": page,
        "claims": _claims_of(name, records),
        "image": f"report/{picture.name}",
        "width": "",
        "height": "",
        "links": [("whole notebook", page)],
    }
    if picture.is_file():
        shutil.copyfile(picture, site / picture.name)
        with Image.open(picture) as image:
            card |= {"width": image.width, "height": image.height}
    for text, suffix in (("PDF", "pdf"), ("numbers (CSV)", "csv")):
        if (source := figures / f"{name}.{suffix}").is_file():
            shutil.copyfile(source, site / source.name)
            card["links"].append((text, f"report/{source.name}"))
    return card


def _claims_of(name: str, records: Sequence[Record]) -> list[tuple[str, list[tuple[str, str]]]]:
    """A notebook's claims, each with the verdict of every method: in words, and alone."""
    found: dict[str, list[tuple[str, str]]] = {}
    for r in (r for r in records if r["notebook"] == name):
        text = f"{verdicts.method(r)} {verdicts.MARKS[r['verdict']]} {r['verdict']}".strip()
        found.setdefault(claims()[r["name"]].claim, []).append((text, r["verdict"]))
    return list(found.items())


def notebook_cells(
    notebook: Any, places: Mapping[str, str]
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """The cells of an executed notebook, formulas as MathML, and its headings (id, text).

    A text cell has id and text. A code cell has code; folded, the summary that hides it; outputs
    (kind, content), where the kind is text, png or html; and solution, whether the outputs are
    hidden, too.
    """
    from pygments import highlight  # slow to import
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    folded = {
        "parameters": "Parameters: defaults",
        "injected-parameters": "Parameters: this run's",
        "solution": "Answers, checked",
    }
    cells: list[dict[str, Any]] = []
    headings = []
    for number, cell in enumerate(notebook.cells):
        source, place = cell.source, f"cell-{number}"
        if cell.cell_type == "markdown":
            if found := re.search(r"^## (.+)$", source, re.MULTILINE):
                headings.append((place, re.sub(r"[`$*]", "", found[1])))
            cells.append({"id": place, "text": Markup(_html(source))})
        elif cell.cell_type == "code":
            tags, lines = cell.metadata.get("tags", []), len(source.splitlines())
            summary = f"Code, {lines} line{'' if lines == 1 else 's'}"
            listing = highlight(hidden(source, places), PythonLexer(), HtmlFormatter(nowrap=True))
            cells.append(
                {
                    "code": Markup(listing),
                    "folded": next((folded[tag] for tag in folded if tag in tags), summary),
                    "outputs": [_output(output, places) for output in cell.outputs],
                    "solution": "solution" in tags,
                }
            )
    return cells, headings


def _output(output: Any, places: Mapping[str, str]) -> tuple[str, str]:
    """A cell's output: its kind (text, png or html) and content. HTML comes from the notebook's own
    cells, but names from foreign data may be in it. The page's policy keeps these from running
    scripts and from using the network."""
    from nbconvert.filters import strip_ansi

    if output.output_type == "stream":
        return "text", hidden(strip_ansi(output.text), places)
    if output.output_type == "error":
        return "text", hidden(strip_ansi("\n".join(output.traceback)), places)
    data = output.data
    if "image/png" in data:
        return "png", data["image/png"].strip()
    if "text/html" in data:
        return "html", _staying(_cells_in_words(hidden(data["text/html"], places)))
    if "text/markdown" in data:
        return "html", _staying(_html(hidden(data["text/markdown"], places)))
    return "text", hidden(data.get("text/plain", ""), places)


def _staying(html: str) -> Markup:
    """HTML without meta tags: these could send the reader elsewhere, which no policy forbids."""
    return Markup(re.sub(r"<(?=\s*meta)", "&lt;", html, flags=re.IGNORECASE))


def _cells_in_words(table: str) -> str:
    """The table with readable names for the metrics and methods in its cells."""
    known = all_words() | NAMES
    return re.sub(
        r"(?<=>)[^<>]+(?=<)",
        lambda cell: escape(known[cell[0]]) if cell[0] in known else cell[0],
        table,
    )


def _html(source: str) -> str:
    """Markdown as HTML, with $…$ and $$…$$ as MathML, except in code."""
    from latex2mathml.converter import convert
    from nbconvert.filters import markdown2html  # slow to import

    def replaced(found: re.Match[str]) -> str:
        block, line = found[2], found[3]
        if block is None and line is None:
            return found[0]
        return str(convert(block or line, display="inline" if block is None else "block"))

    return str(markdown2html(MATHS.sub(replaced, source)))


def _provenance(records: Sequence[Record]) -> list[tuple[str, str]]:
    """What the records say about the code, the machine and the time, as pairs of name and value."""
    if not records:
        return []
    sources = [r["provenance"] for r in records]
    found = [
        (key, ", ".join(sorted({str(s[key]) for s in sources})))
        for key in ("commit", "hardware", "torch", "python")
    ]
    times = sorted(s["time"] for s in sources)
    seeds = sorted({f"{s}" for r in records for s in r["seeds"]}, key=int)
    return [*found, ("measured", f"{times[0]} to {times[-1]}"), ("seeds", ", ".join(seeds))]


def _write(path: Path, template: str, **values: Any) -> None:
    """Write a page from a template. Only scripts with the page's nonce run, and nobody can know the
    nonce beforehand."""
    with atomic(path) as part:
        page = _templates().get_template(template)
        part.write_text(page.render(**values, nonce=secrets.token_urlsafe(16)))


@lru_cache
def _templates() -> Environment:
    found = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        loader=FileSystemLoader(PACKAGE / "audit" / "templates"),
    )
    found.globals |= {"css": _css, "static": _static, "kinds": KINDS}
    return found


def _static(name: str) -> Markup:
    return Markup((PACKAGE / "audit" / "static" / name).read_text())


@lru_cache
def _css() -> Markup:
    """The pages' style, with that of code, light and dark."""
    from pygments.formatters import HtmlFormatter

    light, dark = (
        HtmlFormatter(style=s).get_style_defs("code").splitlines()
        for s in ("default", "github-dark")
    )
    code = [line for line in light if line.startswith("code .")]
    dark = [line for line in dark if line.startswith("code .")]
    code += ["@media (prefers-color-scheme: dark) {", *dark, "}"]
    return Markup("\n".join([_static("style.css"), *code]))
