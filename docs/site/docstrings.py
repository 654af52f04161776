"""Arguments in docstrings, written in aligned columns (`name   what it is`), as lists on the
site."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROW = re.compile(r"(?P<name>\w[\w, ]{0,30}?) {2,}(?P<text>\S.*)")


class Arguments(griffe.Extension):
    """Rewrites every docstring before it is rendered."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_lists(obj.docstring.value)


def as_lists(text: str) -> str:
    """The text with each aligned row as an item; lines below it, indented, belong to it. Formulas
    stay in place."""
    lines: list[str] = []
    item = False  # is the line above part of an item?
    for line in text.splitlines():
        row = ROW.fullmatch(line)
        if row:
            lines += ([] if item else [""]) + [f"- `{row['name'].strip()}`: {row['text']}"]
        elif item and line.startswith("    "):
            lines[-1] += f" {line.strip()}"
        else:
            lines += ["", line] if item and line else [line]
        item = bool(row) or (item and line.startswith("    "))
    return "\n".join(lines)
