"""Places on the machine of whoever ran a profile, as others should read them: the report names no
such folder."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from issl.audit.plan import Plan
from issl.files import REPOSITORY


def own_paths(plans: Iterable[Plan], out: Path) -> dict[str, str]:
    """The places that notebooks of these plans may mention, each with what stands for it."""
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
        found |= {
            str(given.file): given.file.name
            for files in plan.checkpoints.values()
            for given in files
        }
    return {
        place: text for place, text in found.items() if len(place) > 1
    }  # not /, some containers' home


def hidden(text: str, places: Mapping[str, str]) -> str:
    """The text with each of these places replaced, the longest first."""
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(place, places[place])
    return text
