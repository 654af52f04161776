"""The site from the same files as the repository: pages that lie outside docs/, pictures, links and
formulas.

mkdocs calls the functions named on_…. Links are written as they work in the repository; here each
is led to the page that the file has become. Formulas become MathML, which browsers draw themselves.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).parents[2]
PAGES = {  # files outside docs/ that are pages of the site
    "README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md",
    "benchmarks/RESULTS.md": "benchmarks.md", "released/README.md": "released.md",
    "issl/audit/data/labels/README.md": "labels.md",
}  # fmt: skip
COPIED = (
    "LICENSE",
    "CITATION.cff",
    "figures/*/*.png",
    "notebooks/*.ipynb",
    "issl/influence/reference.py",
)  # and what they link to
# the report of a run, with its executed notebooks, is a part of the site where it is there
REPORT = Path(os.environ.get("ISSL_REPORT", REPOSITORY / "results" / "overnight-released"))
FETCHED = re.compile(r"https://[^\s\"]+/iframe-worker/shim")
LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?(\))")
CODE_OR_MATHS = re.compile(
    r"(?P<code>(`+)(?:.|\n)*?\2)|\$\$(?P<block>.+?)\$\$|\$(?P<line>[^$\n]+?)\$", re.DOTALL
)


def on_config(config: Any) -> Any:
    """Lead to the executed notebooks."""
    if (REPORT / "index.html").is_file():
        config.nav.append({"Executed notebooks": "executed/index.html"})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add what lies outside docs/."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, abs_src_path=str(REPOSITORY / source)))
    for pattern in COPIED:
        for path in sorted(REPOSITORY.glob(pattern)):
            place = path.relative_to(REPOSITORY).as_posix()
            files.append(File.generated(config, place, abs_src_path=str(path)))
    for path in (REPORT / "index.html", *sorted((REPORT / "report").glob("*"))):
        if path.is_file():
            place = f"executed/{path.relative_to(REPORT).as_posix()}"
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links to where their files are on the site, and write formulas as MathML."""
    here = page.file.src_uri
    source = next((s for s, target in PAGES.items() if target == here), f"docs/{here}")

    def led(found: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[2]))
        target = PAGES.get(place, place.removeprefix("docs/"))
        return f"{found[1]}{posixpath.relpath(target, posixpath.dirname(here) or '.')}{found[3] or ''}{found[4]}"

    return CODE_OR_MATHS.sub(_mathml, LINK.sub(led, markdown))


def on_post_page(output: str, page: Any, config: Any) -> str:
    """The theme would fetch what its search needs in pages from files: use ours."""
    return FETCHED.sub(
        posixpath.relpath("site/worker.js", posixpath.dirname(page.file.dest_uri) or "."), output
    )


def on_post_template(output: str, template_name: str, config: Any) -> str:
    """The page for a wrong address, too."""
    return FETCHED.sub("site/worker.js", output)


def _mathml(found: re.Match[str]) -> str:
    if found["code"]:
        return found[0]
    formula = found["block"] or found["line"]
    return str(convert(formula, display="block" if found["block"] else "inline"))
