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
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from issl.audit import RELEASED, verdicts
from issl.audit.cache import Artifacts
from issl.audit.claims import FAILED, PASSED, SUPERSEDED, UNTESTED, all_words, claims, readings
from issl.audit.notebooks import hidden, own_paths
from issl.audit.plan import Plan
from issl.audit.profiles import all_stages, in_words_left_out
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
SCALE = {
    "quick": "a demonstration on drawn images, in minutes",
    "mini": "small encoders on subsets of real images",
    "overnight": "trained encoders of width 16, all of CIFAR-10",
    "overnight-released": "trained encoders of width 16, all of CIFAR-10, from the tables "
    "that come with the repository",
    "overnight-projector": "trained encoders of width 16, all of CIFAR-10; another reading of the "
    "paper: the projector's output is scored",
    "overnight-normalised": "trained encoders of width 16, all of CIFAR-10; another reading of the "
    "paper: noise in normalised pixels",
    "overnight-projector-normalised": "trained encoders of width 16, all of CIFAR-10; another "
    "reading of the paper: the projector's output, noise in normalised pixels",
    "overnight-cifar100": "trained encoders of width 16, all of CIFAR-100",
    "overnight-injected": "trained encoders of width 16, CIFAR-10 with duplicates put in",
    "paper": "ResNet-18 at full width, the paper's scale",
    "paper-cifar100": "the paper's scale, on CIFAR-100",
    "paper-byol": "the paper's scale, for BYOL",
    "paper-barlow_twins": "the paper's scale, for Barlow Twins",
}


def build(
    profile: str,
    plans: dict[str, Plan],
    artifacts: Artifacts,
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
    rows = [(row, bars(row)) for row in verdicts.summary(records)]
    left_out = left_out or {}
    reached = [r["verdict"] for r in records]
    counts = ", ".join(f"{reached.count(v)} {v}" for v in KINDS if v in reached)
    uses = verdicts.good_for(verdicts.decided(records))
    cards = [
        _card(name, records, results / f"{name}.ipynb", figures, site, places) for name in done
    ]
    scale = profile.split("-")[0]
    kept = [_card_of_kept(name, scale) for name in left_out if name not in plans]
    _write(
        index,
        "index.html",
        profile=profile,
        scale=SCALE.get(profile, "a profile of its own"),
        claims=rows,
        answers=_answers(records),
        table=_table(records, profile),
        missing=in_words_left_out(left_out),
        counts=f"{len(records)} tests of {len(rows)} claims: {counts}",
        good_for={outcome: found for outcome, found in uses.items() if found},
        cards=sorted([*cards, *kept], key=lambda card: str(card["name"])),
        provenance=_provenance(records),
        stages=_stages(plans, artifacts),
    )
    return index


def _answers(records: Sequence[Record]) -> list[dict[str, Any]]:
    """What was found, a sentence for each claim: first the paper's, then ours, then the checks."""
    told = [r for r in records if r["verdict"] not in (UNTESTED, SUPERSEDED)]
    names = list(dict.fromkeys(r["name"] for r in told))
    names.sort(key=lambda name: (claims()[name].check, claims()[name].ours))
    return [finding(told, name) for name in names]


def _table(records: Sequence[Record], profile: str) -> list[tuple[str, ...]]:
    """The rows of the README's table that these records answer, with its head; without, none.

    A variant of a profile counts as that profile. Other readings are known of released encoders.
    """
    scale = {"profile": profile.split("-")[0]}
    own = [r | {"provenance": r["provenance"] | scale} for r in records]
    known = profile in (RELEASED, *readings())
    found = verdicts.answers(own, verdicts.kept_records(provided("figures")) if known else [])
    return [tuple(found.columns), *found.itertuples(index=False, name=None)] if len(found) else []


def _card_of_kept(name: str, scale: str) -> dict[str, Any]:
    """What the index shows of a notebook that is not drawn: what the kept records of this scale
    say. Those of the JPEG copy of CIFAR-10 count only if there are no others."""
    kept = verdicts.kept_records(provided("figures"))
    own = [r for r in kept if r["notebook"] == name and r["provenance"]["profile"] == scale]
    own = [r for r in own if not r["copied"]] or own
    found, said = _first_finding(name, own), "Not drawn, for not all of it is released yet."
    if own:
        where = f" On {verdicts.COPY}" if own[0]["copied"] else f" By the record of {scale}"
        said += f"{where}: {found['sentence']}"
    title = _title(nbformat.read(provided("notebooks") / f"{name}.ipynb", as_version=4), name)
    about = {"page": "", "image": "", "width": "", "height": "", "links": []}
    return {"name": name, "title": title, "finding": found | {"sentence": said}, **about}


def _title(notebook: Any, name: str) -> str:
    """The notebook's first heading, or its name if it has no text."""
    source: str = next((c.source for c in notebook.cells if c.cell_type == "markdown"), name)
    return source.splitlines()[0].lstrip("# ").strip()


def bars(row: verdicts.Row) -> list[dict[str, Any] | None]:
    """Where each interval of a row is drawn, in percent of the width, all on one scale.

    Returns:
        low, value, high, the threshold asked, a text and the verdict's kind; None for a number
        that is not finite.
    """
    numbers = [v for e in row.estimates for v in (e.low, e.value, e.high)]
    ends = [row.asked, *(v for v in numbers if np.isfinite(v))]
    lowest, span = min(ends), (max(ends) - min(ends)) or 1.0

    def place(v: float) -> float:
        return round(float(np.clip(4 + 92 * (v - lowest) / span, 0, 100)), 1)

    found: list[dict[str, Any] | None] = []
    for e, number, reached in zip(row.estimates, row.numbers, row.reached, strict=True):
        if not np.isfinite(e.value):
            found.append(None)
            continue
        asked = f"dashed: the test's threshold, {row.asked:g}"
        text = f"{row.measured}: {number}; {asked}; n = {row.n:,}; {reached}"
        places = {"low": e.low, "value": e.value, "high": e.high, "asked": row.asked}
        drawn = {name: place(v) for name, v in places.items()}
        found.append(drawn | {"text": text, "kind": KINDS[reached]})
    return found


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
        "finding": _first_finding(name, records),
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


def _first_finding(name: str, records: Sequence[Record]) -> dict[str, Any]:
    """The result of the notebook's first claim."""
    if own := [r for r in records if r["notebook"] == name]:
        return finding(own, own[0]["name"])
    claim = "All verdicts together." if name == "11_claims_audit" else "No claim was recorded."
    return {"claim": claim, "sentence": "", "reached": [], "more": 0, "notebook": name}


def finding(records: Sequence[Record], name: str) -> dict[str, Any]:
    """The result of a claim: claim, sentence, reached (its verdicts, with their marks), notebook,
    and how many more claims the records are about."""
    own = [r for r in records if r["name"] == name]
    reached = [(f"{verdicts.MARKS[v]} {v}", v) for v in dict.fromkeys(r["verdict"] for r in own)]
    return {
        "claim": verdicts.summary(own)[0].claim,
        "sentence": verdicts.sentence(own),
        "reached": reached,
        "more": len({r["name"] for r in records}) - 1,
        "notebook": own[0]["notebook"],
    }


def notebook_cells(
    notebook: Any, places: Mapping[str, str]
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """The cells of an executed notebook, formulas as MathML, and its headings (id, text).

    A text cell has id and text. A code cell has code; folded, the summary that hides it; outputs
    (kind, content), where the kind is text, png or html; and solution, whether the outputs are
    hidden, too.
    """
    from nbconvert.filters import markdown2html  # slow to import
    from pygments import highlight
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
            cells.append({"id": place, "text": Markup(markdown2html(_with_mathml(source)))})
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
    from nbconvert.filters import markdown2html, strip_ansi

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
        return "html", _staying(markdown2html(_with_mathml(hidden(data["text/markdown"], places))))
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


def _with_mathml(source: str) -> str:
    """The source with $…$ and $$…$$ as MathML, except in code."""
    from latex2mathml.converter import convert

    def replaced(found: re.Match[str]) -> str:
        block, line = found[2], found[3]
        if block is None and line is None:
            return found[0]
        return str(convert(block or line, display="inline" if block is None else "block"))

    return MATHS.sub(replaced, source)


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


def _stages(plans: dict[str, Plan], artifacts: Artifacts) -> list[tuple[str, int, float]]:
    """For each kind of stage, dependencies included: its name, how many artifacts are there, the
    seconds they took."""
    took: dict[str, list[float]] = {}
    for stage in all_stages(plans.values()):
        if (about := artifacts.about(stage)) is not None:
            took.setdefault(stage.name, []).append(about["made_with"]["seconds"])
    return [(name, len(seconds), sum(seconds)) for name, seconds in took.items()]


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
    code += [f':root[data-theme="dark"] {line}' for line in dark if line.startswith("code .")]
    return Markup("\n".join([_static("style.css"), *code]))
