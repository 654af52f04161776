"""Claims: what the paper says, the test that decides, and the record that a notebook leaves."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import Field, model_validator

from issl import __version__
from issl.audit.metrics import words
from issl.audit.stats.statistics import Estimate
from issl.config import Config
from issl.data.datasets import without_place
from issl.devices import device_name
from issl.errors import IsslError
from issl.files import PACKAGE, REPOSITORY, atomic, installed

State = Literal["holds", "contradicted", "undecided"]
Learned = dict[
    str, float
]  # knn and untrained: kNN accuracies, the least of the encoders; encoders: how many
UNTESTED = "not tested at this scale"
SUPERSEDED = "superseded"
PASSED, FAILED = "check passed", "check failed"  # of the code


class Condition(Config):
    """One condition: a bound of a metric's interval above or below a threshold.

    where_measured   the metric needs something that not every data set has (pairs judged by
                     people): where it was not measured, the condition is skipped
    needs            another condition, such as one of the ceiling: where it does not hold, this one
                     is never contradicted
    p_value          the metric is a p-value: one that is too large is no evidence against the claim
    """

    metric: str
    bound: Literal["value", "low", "high"]
    above: float | None = None
    below: float | None = None
    where_measured: bool = False
    p_value: bool = False
    needs: Condition | None = None

    @model_validator(mode="after")
    def _one_side(self) -> Condition:
        if (self.above is None) == (self.below is None):
            raise ValueError("give exactly one of `above` and `below`")
        return self

    def state(self, metrics: dict[str, Estimate]) -> State:
        """contradicted: the whole interval is on the wrong side of the threshold. undecided: it
        spans it, or what could be seen is too poor (`needs`)."""
        for metric in (self.metric, *([self.needs.metric] if self.needs else [])):
            if metric not in metrics:
                raise IsslError(
                    f"claim test: metric {metric!r} was not measured; there are {sorted(metrics)}"
                )
        found = metrics[self.metric]
        value = float(getattr(found, self.bound))
        if self.above is not None:
            holds, wrong = value > self.above, found.high < self.above
        else:
            assert self.below is not None
            holds, wrong = value < self.below, found.low > self.below
        exact = found.low == found.high == found.value  # no interval: it holds, or it does not
        if holds:
            return "holds"
        poor = self.needs is not None and self.needs.state(metrics) != "holds"
        against = wrong or (exact and value == value)
        return "contradicted" if against and not poor and not self.p_value else "undecided"


class Superseded(Config):
    """Why a claim's test no longer decides: since when, by which claim, the reason, and what it had
    found."""

    date: str
    by: str
    reason: str
    found: str


class Scale(Config):
    """What a claim's encoders must have learned before its verdict says anything about the method.

    knn               kNN accuracy on test images, by data set: the least of all encoders
    above_untrained   the same less that of the untrained network
    encoders          how many of each method, trained from different seeds
    """

    knn: dict[str, float] = Field(default_factory=dict)
    above_untrained: dict[str, float] = Field(default_factory=dict)
    encoders: int = Field(1, ge=1)

    def reached(self, dataset: str, learned: Learned) -> bool:
        """Raises IsslError for a data set without a rule."""
        if dataset not in {**self.knn, **self.above_untrained}:
            raise IsslError(
                f"data set {dataset!r}: claims.yaml has no rule for what its encoders must have learned"
            )
        gain = learned["knn"] - learned["untrained"]
        return (
            learned["encoders"] >= self.encoders
            and learned["knn"] >= self.knn.get(dataset, 0.0)
            and gain >= self.above_untrained.get(dataset, 0.0)
        )


class Claim(Config):
    """One entry of claims.yaml."""

    notebook: str
    claim: str
    paper: str | float | None
    ours: bool = Field(description="true for a claim of this project, not of the paper")
    use: str | None = Field(
        None, description="what the score would be good for, if the claim holds"
    )
    profiles: list[str]
    scale: Literal["trained", "learning", "none"] = Field(
        "trained", description="which of the file's scales applies"
    )
    check: bool = Field(
        False, description="of the code rather than of a claim: not counted as reproduced"
    )
    tests: list[Condition] = Field(min_length=1)
    superseded: Superseded | None = None


def threshold(name: str, metric: str) -> float:
    """What a claim's test asks of a metric, for figures; raises IsslError where it asks nothing of
    it."""
    for test in claims()[name].tests:
        bound = test.below if test.above is None else test.above
        if test.metric == metric and bound is not None:
            return bound
    raise IsslError(f"claim {name!r} has no test of {metric!r}")


@lru_cache
def _file() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((PACKAGE / "audit" / "claims.yaml").read_text())
    return content


@lru_cache
def claims() -> dict[str, Claim]:
    """All claims by name."""
    return {name: Claim(**entry) for name, entry in _file().items() if name != "scales"}


@lru_cache
def scales() -> dict[str, Scale]:
    """What encoders must have learned, by the name that a claim's `scale` gives."""
    return {name: Scale(**entry) for name, entry in _file()["scales"].items()}


def judge(
    name: str,
    metrics: dict[str, Estimate],
    profile: str,
    dataset: str,
    learned: Learned | None = None,
) -> dict[str, Any]:
    """Outcome of the claim's tests, and its verdict at this profile. `learned` as `issl.audit.plan`
    gives it."""
    if name not in claims():
        raise IsslError(f"claim {name!r}: claims.yaml has {', '.join(claims())}")
    claim = claims()[name]
    if learned is None and claim.scale != "none":
        raise IsslError(
            f"claim {name!r} is about encoders: say what they learned (learned=plan.learned(...))"
        )
    tests = [t for t in claim.tests if t.metric in metrics or not t.where_measured]
    states = [test.state(metrics) for test in tests]
    return {
        "tests": [
            t.model_dump(exclude_none=True, exclude_defaults=True)
            | {"holds": s == "holds", "state": s}
            for t, s in zip(tests, states, strict=True)
        ],
        "outcome": outcome(states),
        "verdict": verdict(name, outcome(states), profile, dataset, learned),
    }


def outcome(states: Sequence[State]) -> str:
    """Of a claim, from the states of its tests."""
    if all(state == "holds" for state in states):
        return "reproduced"
    if "holds" in states:
        return "partly"
    return "contradicted" if "contradicted" in states else "undecided"


def verdict(name: str, found: str, profile: str, dataset: str, learned: Learned | None) -> str:
    """The outcome, where the claim's test still decides, the profile is one for this claim, and its
    encoders have learned enough (`Scale`)."""
    claim = claims()[name]
    if claim.superseded:
        return SUPERSEDED
    if profile.split("-")[0] not in claim.profiles:  # paper-cifar100 is the paper's scale, too
        return UNTESTED
    if claim.check:
        return PASSED if found == "reproduced" else FAILED
    enough = claim.scale == "none" or (
        learned is not None and scales()[claim.scale].reached(dataset, learned)
    )
    return found if enough else UNTESTED


def provenance(
    profile: str, parameters: dict[str, Any], device: torch.device, artifacts: list[str]
) -> dict[str, Any]:
    """Where a number comes from: profile, parameters, artifacts, commit, versions, hardware,
    time."""
    # the machine's cores, not the threads of the notebook that writes this: what each stage used is
    # in its manifest
    cpu = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    hardware = device_name(device) if device.type == "cuda" else cpu
    return {
        "profile": profile,
        "parameters": parameters,
        "artifacts": artifacts,
        "commit": commit(),
        "hardware": hardware,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def record(
    name: str,
    metrics: dict[str, Estimate],
    source: dict[str, Any],
    folder: Path,
    variant: str = "",
    *,
    dataset: str,
    learned: Learned | None = None,
    **about: Any,
) -> dict[str, Any]:
    """Judge a claim and write FOLDER/claim_NAME.json (claim_NAME.VARIANT.json); returns what was
    written.

    variant  for a claim that a notebook tests more than once: the method, say; in the file's name,
             "_" for spaces
    source   as `provenance` gives it
    learned  what the encoders that were scored had learned, as `issl.audit.plan.Plan.learned` gives
             it
    about    method, n, seeds and whatever else qualifies it. Of an encoder that was given as a
             file, neither recipe nor seeds are known: the record names the file instead
    """
    dataset = without_place(dataset)
    judged = judge(name, metrics, source["profile"], dataset, learned)
    given = source.get("checkpoints", {}).get(about.get("method"))
    if given is not None:
        about = {k: v for k, v in about.items() if k != "recipe"} | {
            "seeds": [],
            "checkpoint": given,
        }
    claim = claims()[name]
    content = {
        "name": name,
        "variant": variant,
        "notebook": claim.notebook,
        "claim": claim.claim,
        "paper": claim.paper,
        "ours": claim.ours,
        "dataset": dataset,
        "learned": learned,
        **about,
        "metrics": {k: m.as_dict() for k, m in metrics.items()},
        **judged,
        "provenance": source,
    }
    file = ".".join(part for part in (f"claim_{name}", variant.replace(" ", "_"), "json") if part)
    with atomic(folder / file) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")
    return content


def format_record(written: dict[str, Any]) -> str:
    """What `record` wrote, for the reader of a notebook: each number, each test, the verdict."""
    variant = f" ({written['variant']})" if written["variant"] else ""
    lines = [f"{written['name']}{variant}: {written['claim']}"]
    for test in written["tests"]:
        m = written["metrics"][test["metric"]]
        low, high = (
            ["−∞", "∞"][k] if m[b] is None else f"{m[b]:.3g}" for k, b in enumerate(("low", "high"))
        )
        side, value = ("above", test["above"]) if "above" in test else ("below", test["below"])
        bound = "" if test["bound"] == "value" else f"{test['bound']} end "
        ours = "undefined" if m["value"] is None else f"{m['value']:.3g}"
        lines.append(
            f"  {words(test['metric'])} = {ours} [{low}, {high}]; {bound}{side} {value:g}: {test['state']}"
        )
    lines.append(f"  outcome {written['outcome']}; verdict at this profile: {written['verdict']}")
    return "\n".join(lines)


@lru_cache
def commit() -> str:
    """The code's commit, marked where files differ from it; of a wheel, its version; "unknown"
    elsewhere."""
    if installed():
        return f"version {__version__}"
    try:
        head = subprocess.run(
            ["git", "-C", REPOSITORY, "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        )
        status = subprocess.run(
            [
                "git",
                "-C",
                REPOSITORY,
                "status",
                "--porcelain",
                "--untracked-files=no",
                "--",
                "issl",
                "notebooks",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + (" with changes" if status.stdout.strip() else "")
