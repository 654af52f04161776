"""Execute notebooks and note what their outputs were made from, so that a run skips those that are
current."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

from issl.audit.plan import Plan
from issl.errors import IsslError
from issl.files import PACKAGE, REPOSITORY, atomic, file_digest, write_json


def fingerprint(source: Path, plan: Plan, device: str) -> str:
    """The hash of all that decides a notebook's outputs: its cells, its plan, the artifacts it
    reads, the device, this library's code and the versions of what it builds on."""
    content: dict[str, Any] = {
        "notebook": file_digest(source),
        "plan": plan.settings(),
        "device": device,
        "library": _library(),
        "stages": [stage.label for stage in plan.stages()],
        "records": [f"{p} {file_digest(p)}" for p in plan.reads()],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@lru_cache
def _library() -> list[str]:
    """This library's code and settings, and the versions of what it needs."""
    needed = [r for r in metadata.requires("issl") or [] if "extra ==" not in r]
    names = sorted({m[0] for r in needed if (m := re.match(r"[A-Za-z0-9._-]*[A-Za-z0-9]", r))})
    versions = [f"{name} {metadata.version(name)}" for name in names]
    files = [p for p in sorted(PACKAGE.rglob("*")) if p.suffix in (".py", ".yaml")]
    return [f"{p.relative_to(PACKAGE)} {file_digest(p)}" for p in files] + versions


def _outputs(plan: Plan) -> dict[str, str]:
    """The digests of the files that a notebook left, by their place under the output folder:
    figures, executed copy, claims."""
    name = plan.notebook
    found = [*plan.figures.glob(f"{name}.*"), *plan.figures.glob(f"{name}_*")]
    found.append(plan.results / f"{name}.ipynb")
    for path in plan.results.glob("claim_*.json"):
        if f'"notebook": "{name}"' in path.read_text(errors="replace"):
            found.append(path)
    return {str(p.relative_to(plan.out)): file_digest(p) for p in sorted(found) if p.is_file()}


def _record(plan: Plan) -> Path:
    return plan.results / f"{plan.notebook}.made.json"


def note_made(plan: Plan, key: str) -> None:
    """Record what the notebook's outputs were made from, with their checksums."""
    write_json(_record(plan), {"made_from": key, "files": _outputs(plan)}, indent=1)


def is_current(plan: Plan, key: str) -> bool:
    """Are all outputs of the notebook there, undamaged, and made from exactly this `key`?"""
    try:
        record = json.loads(_record(plan).read_text())
        return bool(record["made_from"] == key and record["files"] == _outputs(plan))
    except (FileNotFoundError, ValueError, KeyError):
        return False  # not there, or damaged


def make_notebook(source: Path, plan: Plan, key: str) -> None:
    """Execute a notebook under its plan, and note that its outputs were made from `key`."""
    plan.results.mkdir(parents=True, exist_ok=True)
    execute(source, plan.results / source.name, plan)
    note_made(plan, key)


def execute(source: Path, target: Path, plan: Plan) -> None:
    """Run a notebook with papermill; the executed copy stays at `target`, errors included.

    Raises:
        IsslError: naming the cell that failed, or why it could not be run.
    """
    import nbformat  # slow to import, like papermill
    import papermill
    from papermill.exceptions import PapermillExecutionError

    failed = None
    try:
        with atomic(target) as part:
            try:
                papermill.execute_notebook(
                    *(_unformatted(path) for path in (source, part)),
                    parameters=plan.model_dump(mode="json", exclude_unset=True),
                    progress_bar=False,
                    start_timeout=300,
                    # the kernel's folder; papermill's `cwd` would move this whole process
                    resources={"metadata": {"path": str(target.parent)}},
                    # the kernel's own messages are not for the reader; the cells' are kept
                    extra_arguments=["--IPKernelApp.log_level=50"],
                )
            except PapermillExecutionError as error:
                failed = f"cell {error.exec_count}: {error.ename}: {error.evalue}"
    except (nbformat.ValidationError, OSError, RuntimeError) as error:
        raise IsslError(f"{type(error).__name__}: {error}") from error
    if failed is not None:
        raise IsslError(f"{failed}\nthe executed copy shows where: {target}")


def _unformatted(path: Path) -> str:
    """The path with its braces doubled, because papermill formats paths."""
    return str(path).replace("{", "{{").replace("}", "}}")


def own_paths(plans: Iterable[Plan], out: Path) -> dict[str, str]:
    """Paths on this machine that notebooks of these plans may mention, each with the text that
    replaces it in the report."""
    found = {
        str(Path(sys.prefix)): "PYTHON",
        str(REPOSITORY): "REPOSITORY",
        str(out): "OUT",
        str(Path.home()): "~",
    }
    for plan in plans:
        if plan.data_root is not None:
            found[plan.data_root] = "DATA"
        if (place := plan.dataset.partition(":")[2]) != "":
            found[place] = Path(place).name
        files = [given.file for given in chain(*plan.checkpoints.values())]
        found |= {str(file): file.name for file in files}
    return {place: text for place, text in found.items() if len(place) > 1}  # / may be a home


def hidden(text: str, places: Mapping[str, str]) -> str:
    """The text with each of these paths replaced, the longest first."""
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(place, places[place])
    return text
