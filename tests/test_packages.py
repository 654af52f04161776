"""The package map: who imports whom. `python tests/test_packages.py` prints it."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import networkx
import pytest

ISSL = Path(__file__).parent.parent / "issl"
# from the ground up; a package imports from those before it, and packages of one floor do not know
# each other
FLOORS = (
    ("ground",),
    ("data",),
    ("pretraining", "influence"),
    ("analysis",),
    ("experiments",),
    ("reporting",),
    ("commands",),
)
GROUND = {"errors", "config", "files", "shards", "devices", "keyed_random"}
DOORS = {"__init__", "__main__"}  # the public names and `python -m issl`: they may import anything


def modules() -> dict[str, Path]:
    """Dotted name under issl → file; a package stands for its __init__."""
    return {
        ".".join(p.relative_to(ISSL).with_suffix("").parts).removesuffix(".__init__"): p
        for p in ISSL.rglob("*.py")
    }


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of issl that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        else:
            continue
        inside = [n.removeprefix("issl.") for n in names if n.startswith("issl.")]
        found |= {n for n in inside if n in known}
    return {n for n in found if not any(other.startswith(n + ".") for other in found)}


def floor_of(module: str) -> tuple[int, str]:
    package = module.split(".")[0] if "." in module or (ISSL / module).is_dir() else "ground"
    return next(k for k, floor in enumerate(FLOORS) if package in floor), package


def wrong(edges: dict[str, set[str]]) -> list[str]:
    """Every import that goes up, or sideways between the packages of one floor."""
    found = []
    for source, targets in edges.items():
        for target in targets:
            (a, here), (b, there) = floor_of(source), floor_of(target)
            if here != there and b >= a:
                found.append(f"{source} imports {target}")
    return found


def graph() -> dict[str, set[str]]:
    known = modules()
    return {
        name: imports(path, known) - {name} for name, path in known.items() if name not in DOORS
    }


def test_every_module_has_its_place() -> None:
    flat = {name for name in modules() if "." not in name and not (ISSL / name).is_dir()}
    assert flat - DOORS == GROUND
    assert {p.parent.name for p in ISSL.glob("*/__init__.py")} == {
        name for floor in FLOORS[1:] for name in floor
    }


def test_nothing_imports_upward_and_there_is_no_circle() -> None:
    edges = graph()
    assert sum(len(targets) for targets in edges.values()) > 150  # it does see the imports
    assert wrong(edges) == []
    circles = list(
        networkx.simple_cycles(
            networkx.DiGraph([(a, b) for a, targets in edges.items() for b in targets])
        )
    )
    assert circles == []


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("data.images", "commands.cli"),
        ("influence.cross", "pretraining.loop"),
        ("errors", "data.images"),
    ],
)
def test_an_import_that_goes_up_or_sideways_is_found(source: str, target: str) -> None:
    assert wrong({source: {target}}) == [f"{source} imports {target}"]
    assert wrong({target: {source}}) == (
        [] if source != "influence.cross" else [f"{target} imports {source}"]
    )


def test_the_fingerprint_of_the_code_goes_down_into_the_packages(repository: Path) -> None:
    """A notebook that was run by other code is not current."""
    from issl.audit.notebooks import library_files

    names = {str(p.relative_to(repository / "issl")) for p in library_files()}
    assert {"audit/claims.yaml", "influence/scores.py", "cli.py"} <= names


if __name__ == "__main__":
    every = graph()
    for floor in FLOORS:
        for package in floor:
            own = sorted(m for m in every if floor_of(m)[1] == package)
            used = Counter(
                floor_of(t)[1] for m in own for t in every[m] if floor_of(t)[1] != package
            )
            lines = sum(len(modules()[m].read_text().splitlines()) for m in own)
            below = ", ".join(f"{name} {count}" for name, count in used.most_common()) or "nothing"
            print(f"{package:12} {len(own):3} modules {lines:6} lines   imports {below}")
    print("upward or sideways:", wrong(every) or "none")
