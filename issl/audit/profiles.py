"""Profiles: which notebooks run with which settings, and whether that can work here."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from issl.audit.cache import Stage, in_dependency_order, missing, released_index
from issl.audit.plan import Door, Plan
from issl.audit.plans_own import OWN
from issl.audit.plans_paper import PAPER
from issl.audit.settings import Data
from issl.audit.stages import Pretrain
from issl.data import datasets, published
from issl.devices import pick_device
from issl.errors import IsslError
from issl.files import REPOSITORY, check_writable, installed, provided, remove_leftovers
from issl.pretraining.recipes import NAMES

PLANS: dict[str, type[Plan]] = {  # by the name of their notebook
    p.notebook: p for p in sorted(PAPER + OWN, key=lambda p: p.notebook)
}


@dataclass(frozen=True)
class ProfileOptions:
    """Which part of which profile, and where.

    only      notebooks by number or name, separated by commas; None: all that the profile is for
    out       where figures/, results/ and artifacts/ go; None: the checkout, or the current folder
              if issl is installed from a wheel
    checkpoints   (method, file): encoders that are scored instead of trained, in place of those
                  that the profile names; a method may have several. Notebooks that train encoders
                  themselves are then left out
    door      what the run starts from (`Plan.door`). With "tables", nothing is made that needs
              images; with "encoders", nothing is trained on them; what is not released is left
              out. None: what is released is used, and all else is made
    """

    profile: str = "quick"
    only: str | None = None
    data_root: Path | None = None
    device: str = "auto"
    out: Path | None = None
    checkpoints: Sequence[tuple[str, str]] = ()
    door: Door | None = None

    @property
    def folder(self) -> Path:
        """The output folder, as an absolute path."""
        usual = Path.cwd() if installed() else REPOSITORY
        return (usual if self.out is None else self.out).resolve()

    @property
    def root(self) -> str | None:
        """The folder of the data sets, as an absolute path."""
        root = published.data_root(self.data_root)
        return None if root is None else str(root.resolve())

    def plans(self) -> dict[str, Plan]:
        """The plans of the chosen notebooks."""
        names = covered(self.profile) if self.only is None else select(self.only)
        left_out = self.left_out()
        plans = read_profile(
            self.profile,
            [name for name in names if name not in left_out],
            self._given(),
            out=str(self.folder),
            data_root=self.root,
            device=self.device,
            door=self.door or "tables",
        )
        if self.door in (None, "images"):
            return plans
        parts = {name: released_part(plan) for name, plan in plans.items()}
        return {name: part for name, part in parts.items() if part is not None}

    def not_released(self) -> dict[str, tuple[str, ...]]:
        """By notebook, the methods that this door leaves out; () if it leaves out the notebook."""
        found: dict[str, tuple[str, ...]] = {}
        drawn = self.plans()
        for name, plan in replace(self, door=None).plans().items():
            asked, kept = (set(getattr(p, "methods", ())) for p in (plan, drawn.get(name)))
            if name not in drawn or asked != kept:
                left = sorted(asked - kept, key=list(NAMES).index)
                found[name] = tuple(left) if name in drawn else ()
        return found

    def left_out(self) -> list[str]:
        """The notebooks left out because they train encoders themselves, while some are given."""
        if self.only is not None:
            return []  # what was asked for by name is an error instead
        return [
            name
            for name in covered(self.profile)
            if not PLANS[name].takes_checkpoints
            and _fields(self.profile, name, self._given()).get("checkpoints")
        ]

    def _given(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for method, file in self.checkpoints:
            found.setdefault(method, []).append(file)
        return found


def notebooks_folder() -> Path:
    """The notebooks that come with the code."""
    folder = provided("notebooks")
    if not folder.is_dir():
        raise IsslError(
            f"no notebooks at {folder}: install issl from its wheel, or clone the repository"
        )
    return folder


def profiles() -> dict[str, Path]:
    """The file of each profile."""
    return {p.stem: p for p in sorted((notebooks_folder() / "profiles").glob("*.yaml"))}


def covered(profile: str) -> list[str]:
    """The notebooks that a profile is for: those that its file lists under `notebooks`, or all."""
    return select(only) if (only := _content(profile).get("notebooks")) else list(PLANS)


def described(profile: str) -> str:
    """What a profile is, in words."""
    return str(_file(profile).get("about", "")) if profile in profiles() else ""


def select(only: str) -> list[str]:
    """Notebook names from a list such as `03,00_method`."""
    chosen = []
    for want in (w.strip() for w in only.split(",") if w.strip()):
        found = [name for name in PLANS if name == want or name.split("_")[0] == want]
        if not found:
            raise IsslError(f"notebook {want!r}: there are {', '.join(PLANS)} (a number is enough)")
        chosen += found
    if not chosen:
        raise IsslError(f"--only {only!r} names no notebook; there are {', '.join(PLANS)}")
    return sorted(set(chosen))


def read_profile(
    profile: str,
    names: Sequence[str],
    checkpoints: Mapping[str, list[str]] | None = None,
    **common: str | bool | None,
) -> dict[str, Plan]:
    """The plans of the named notebooks under a profile; every field is checked.

    checkpoints   replace the profile's own
    A profile's file has `common` (for all notebooks) and one entry per notebook, both field: value.
    `notebooks` lists those that it runs, if not all; others with an entry can be asked for by name.
    `base` is another profile, whose settings hold where the file has none.
    """
    file, asked = f"{profile}.yaml", covered(profile)
    there = sorted({*asked, *(set(_file(profile)) & set(PLANS))})
    plans = {}
    for name in names:
        if name not in there:
            raise IsslError(
                f"profile {profile!r} is not for notebook {name}; it is for {', '.join(there)}"
            )
        fields = {**_fields(profile, name, checkpoints), "profile": profile, **common}
        try:
            plans[name] = PLANS[name](**fields)
        except IsslError as error:
            raise IsslError(f"{file}, notebook {name}: {error}") from error
    return plans


def _fields(profile: str, name: str, checkpoints: Mapping[str, list[str]] | None) -> dict[str, Any]:
    """The fields that a profile sets for a notebook."""
    content = _content(profile)
    given = {"checkpoints": checkpoints} if checkpoints else {}
    return {**(content.get("common") or {}), **(content.get(name) or {}), **given}


def _content(profile: str) -> dict[str, Any]:
    """What a profile's file says, on top of what its base says."""
    content = _file(profile)
    base = content.pop("base", None)
    if base is None:
        return content
    if base not in list(profiles()) or "base" in (changed := _file(base)):
        possible = [name for name in profiles() if "base" not in _file(name)]
        raise IsslError(f"{profile}.yaml: base {base!r}; it may be {', '.join(possible)}")
    for entry, value in content.items():
        if entry in ("about", "notebooks"):
            changed[entry] = value
        else:
            changed[entry] = {**(changed.get(entry) or {}), **(value or {})}
    return changed


def _file(profile: str) -> dict[str, Any]:
    """The content of a profile's file, with its entries checked."""
    paths = profiles()
    if profile not in paths:
        raise IsslError(f"profile {profile!r}: there are {', '.join(paths)}")
    content: dict[str, Any] = copy.deepcopy(_parsed(paths[profile].read_text()))
    allowed = ("about", "base", "common", "notebooks", *PLANS)
    unknown = set(content) - set(allowed)
    if unknown:
        raise IsslError(
            f"{paths[profile].name}: unknown entry {sorted(unknown)[0]!r}; allowed are "
            f"{', '.join(allowed)}"
        )
    return content


@lru_cache
def _parsed(text: str) -> dict[str, Any]:
    return yaml.safe_load(text) or {}


def released_part(plan: Plan) -> Plan | None:
    """The plan with only those methods for which all that it starts from is released; None if there
    are none. A plan on drawn images stays whole, because they are available anywhere."""
    if plan.dataset in datasets.DRAWN:
        return plan
    methods: tuple[str, ...] | None = getattr(plan, "methods", None)
    if methods is None:
        return plan if _starts_with_released(plan) else None
    kept: tuple[str, ...] = ()
    for method in methods:
        tried = plan.model_copy(update={"methods": (*kept, method)})
        if _starts_with_released(tried):
            kept = (*kept, method)
    return plan.model_copy(update={"methods": kept}) if kept else None


def _starts_with_released(plan: Plan) -> bool:
    index = released_index(provided("released"))
    if plan.door == "tables":
        return all(stage.label in index for stage in plan.stages())
    trained = (s for s in all_stages([plan]) if isinstance(s, Pretrain) and s.epochs)
    return all(s.label in index for s in trained if s.data.name not in datasets.DRAWN)


def in_words_left_out(left_out: Mapping[str, Sequence[str]]) -> list[str]:
    """What is not released yet, a line for each group of notebooks that lack the same methods."""
    by_methods: dict[tuple[str, ...], list[str]] = {}
    for name, methods in left_out.items():
        by_methods.setdefault(tuple(methods), []).append(name.split("_")[0])
    return [
        ", ".join(numbers) + (f" ({', '.join(str(NAMES[m]) for m in methods)})" if methods else "")
        for methods, numbers in by_methods.items()
    ]


def all_stages(plans: Iterable[Plan]) -> list[Stage]:
    """The stages of these plans and all that they depend on, each once, in dependency order."""
    return list(in_dependency_order(stage for plan in plans for stage in plan.stages()))


def check(plans: dict[str, Plan], out: Path) -> None:
    """Check all that can be checked before any long work: device, output folder, data present
    and large enough."""
    for folder in (out / "artifacts", out / "figures", out / "results"):
        check_writable(folder, f"output folder {folder} (--out)")
    for place in (*(out / "figures").glob("**/"), *(out / "results").glob("**/")):
        remove_leftovers(place)
    for plan in plans.values():
        pick_device(plan.device)
        for checkpoint in (file for files in plan.checkpoints.values() for file in files):
            checkpoint.open()
        to_make = missing(plan.stages(), plan.artifacts())
        for data in dict.fromkeys(v for stage in to_make for _, v in stage if isinstance(v, Data)):
            try:
                available = data.available()
                datasets.say(data.which)
            except IsslError as error:
                raise IsslError(f"notebook {plan.notebook}: {error}") from error
            if data.n is not None and available is not None and data.n > available:
                raise IsslError(
                    f"n={data.n} for {plan.notebook}: data set {data.name!r} ({data.split}) has "
                    f"{available} here; lower n in the profile"
                )
