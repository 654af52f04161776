"""Claims: what the paper says, the test that decides, and the record that a notebook leaves."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Container, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import Field, model_validator

from issl import __version__
from issl.audit.config import Config
from issl.audit.stats.statistics import Estimate
from issl.data.datasets import without_place
from issl.devices import device_name
from issl.errors import IsslError
from issl.files import PACKAGE, REPOSITORY, installed, write_json

State = Literal["holds", "contradicted", "undecided"]
# knn: the encoders' lowest kNN accuracy; untrained: the untrained network's; encoders: how many
Learned = dict[str, float]
UNTESTED = "not tested at this scale"
# what outcomes are called when they are counted over readings
COUNTED = {
    "reproduced": "holds",
    "partly": "in part",
    "undecided": "undecided",
    "contradicted": "contradicted",
}
SUPERSEDED = "superseded"
PASSED, FAILED = "check passed", "check failed"  # of the code


class Condition(Config):
    """One condition: a bound of a metric's interval above or below a threshold. The head of
    claims.yaml says what the fields mean."""

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

    @property
    def threshold(self) -> float:
        return float(self.below if self.above is None else self.above)  # type: ignore[arg-type]

    def state(self, metrics: dict[str, Estimate]) -> State:
        """holds; contradicted: the whole interval is on the wrong side; undecided: anything else.

        A number without an interval holds or is contradicted, unless `p_value` or `needs` forbids.
        """
        if self.metric not in metrics:
            raise IsslError(
                f"claim test: metric {self.metric!r} was not measured; there are {sorted(metrics)}"
            )
        found = metrics[self.metric]
        poor = self.needs is not None and self.needs.state(metrics) != "holds"
        value = float(getattr(found, self.bound))
        if self.above is not None:
            holds, wrong = value > self.threshold, found.high < self.threshold
        else:
            holds, wrong = value < self.threshold, found.low > self.threshold
        if holds:
            return "holds"
        exact = found.low == found.high == found.value
        return "contradicted" if (wrong or exact) and not (poor or self.p_value) else "undecided"


class Superseded(Config):
    """Why a claim's test no longer decides: since when, by which claim, and what it had found."""

    date: str
    by: str
    reason: str
    found: str


class Scale(Config):
    """What a claim's encoders must have learned before its verdict says anything about the method;
    claims.yaml, `scales`, says what the fields mean."""

    knn: dict[str, float] = Field({})
    above_untrained: dict[str, float] = Field({})
    encoders: int = Field(1, ge=1)

    def reached(self, dataset: str, learned: Learned) -> bool:
        """Raises IsslError for a data set without a rule."""
        if dataset not in {**self.knn, **self.above_untrained}:
            raise IsslError(
                f"data set {dataset!r}: claims.yaml has no rule for what its encoders must have "
                "learned"
            )
        gain = learned["knn"] - learned["untrained"]
        return (
            learned["encoders"] >= self.encoders
            and learned["knn"] >= self.knn.get(dataset, 0.0)
            and gain >= self.above_untrained.get(dataset, 0.0)
        )


class Claim(Config):
    """One entry of claims.yaml; the head of that file says what the fields mean."""

    notebook: str
    claim: str
    question: str | None = None
    numbers: dict[str, str] = Field({})
    paper: str | float | None
    ours: bool
    use: str | None = None
    profiles: list[str]
    scale: Literal["trained", "learning", "none"] = "trained"
    check: bool = False
    stated: str | None = None
    tests: list[Condition] = Field(min_length=1)
    superseded: Superseded | None = None


@lru_cache
def _file(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((PACKAGE / "audit" / name).read_text())
    return content


@lru_cache
def claims() -> dict[str, Claim]:
    """All claims by name."""
    others = ("scales", "readings")
    return {name: Claim(**e) for name, e in _file("claims.yaml").items() if name not in others}


@lru_cache
def readings() -> dict[str, dict[str, str]]:
    """The primary readings of the paper, by profile: what each profile sets."""
    found: dict[str, dict[str, str]] = _file("claims.yaml")["readings"]["primary"]
    return found


@lru_cache
def scales() -> dict[str, Scale]:
    """What encoders must have learned, by the name that a claim's `scale` gives."""
    return {name: Scale(**entry) for name, entry in _file("claims.yaml")["scales"].items()}


def all_words() -> dict[str, str]:
    """The readable names of metrics (metrics.yaml)."""
    return _file("metrics.yaml")


def words(metric: str) -> str:
    """The readable name of a metric. Raises IsslError if it has none."""
    if metric not in all_words():
        raise IsslError(f"metric {metric!r} has no words: name it in issl/audit/metrics.yaml")
    return all_words()[metric]


def threshold(name: str, metric: str) -> float:
    """The threshold in a claim's test of a metric, for figures; IsslError if there is none."""
    for test in claims()[name].tests:
        if test.metric == metric:
            return test.threshold
    raise IsslError(f"claim {name!r} has no test of {metric!r}")


def stated(name: str, metrics: Container[str]) -> list[dict[str, Any]]:
    """A claim's tests of these metrics, as records keep them."""
    asked = [t for t in claims()[name].tests if t.metric in metrics or not t.where_measured]
    return [test.model_dump(exclude_none=True, exclude_defaults=True) for test in asked]


def judge(
    name: str,
    metrics: dict[str, Estimate],
    profile: str,
    dataset: str,
    learned: Learned | None = None,
    tests: Sequence[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The tests with their states, the outcome, and the verdict at this profile. The arguments are
    those of `record`; `tests` are those of an older record, by default the claim's own. Raises
    IsslError for an unknown claim, and where it is not said what the encoders learned."""
    if tests is None:
        if name not in claims():
            raise IsslError(f"claim {name!r}: claims.yaml has {', '.join(claims())}")
        if learned is None and claims()[name].scale != "none":
            raise IsslError(
                f"claim {name!r} is about encoders: say what they learned "
                "(learned=plan.scale(method))"
            )
        tests = stated(name, metrics)
    states = [Condition(**test).state(metrics) for test in tests]
    found = outcome(states)
    return {
        "tests": [
            test | {"holds": state == "holds", "state": state}
            for test, state in zip(tests, states, strict=True)
        ],
        "outcome": found,
        "verdict": verdict(name, found, profile, dataset, learned),
    }


def outcome(states: Sequence[State]) -> str:
    """The outcome of a claim, from the states of its tests."""
    if all(state == "holds" for state in states):
        return "reproduced"
    if "holds" in states:
        return "partly"
    return "contradicted" if "contradicted" in states else "undecided"


def over_readings(outcomes: Sequence[str]) -> str:
    """The verdict over readings of the paper (claims.yaml, `readings`), from the outcome of each
    reading that was run."""
    counted = Counter(outcomes)
    each = (f"{said} in {counted[word]}" for word, said in COUNTED.items() if counted[word])
    counts = ", ".join(each)
    run = len(outcomes)
    of = str(run) if run == len(readings()) else f"the {run} that were run"
    if counted["reproduced"] == run:
        return f"holds in each of {of}"
    if counted["reproduced"] and counted["contradicted"]:
        return f"depends on the reading: {counts}"
    return counts if counted["reproduced"] else f"holds in none of {of}: {counts}"


def verdict(name: str, found: str, profile: str, dataset: str, learned: Learned | None) -> str:
    """The outcome `found`, if the claim's test still decides and the scale allows a verdict.

    The profile must be one of the claim's, and its encoders must have learned enough (`Scale`).
    """
    claim = claims()[name]
    if claim.superseded:
        return SUPERSEDED
    if profile.split("-")[0] not in claim.profiles:  # paper-cifar100 is the paper's scale, too
        return UNTESTED
    if claim.check:
        return PASSED if found == "reproduced" else FAILED
    if claim.scale == "none":
        return found
    enough = learned is not None and scales()[claim.scale].reached(dataset, learned)
    return found if enough else UNTESTED


def provenance(
    profile: str, parameters: dict[str, Any], device: torch.device, artifacts: list[str]
) -> dict[str, Any]:
    """Where a number comes from: profile, parameters, artifacts, commit, versions, hardware, time.

    The cores are the machine's, not the threads of the notebook that writes this: each stage's
    manifest says what it used.
    """
    cpu = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return {
        "profile": profile,
        "parameters": parameters,
        "artifacts": artifacts,
        "commit": commit(),
        "hardware": device_name(device) if device.type == "cuda" else cpu,
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
    """Judge a claim and write FOLDER/claim_NAME.json (or claim_NAME.VARIANT.json).

    Args:
        metrics: what the claim's tests ask for, and whatever else was measured.
        source: as `provenance` gives it.
        variant: tells several records of one claim apart: the method, say.
        dataset: the images that were scored.
        learned: what the encoders learned (`Plan.scale`); a claim about encoders needs it.
        **about: method, n, seeds and whatever else qualifies it. For an encoder given as a file,
            recipe and seeds are unknown: the record names the file instead.

    Returns:
        What was written.
    """
    dataset = without_place(dataset)
    judged = judge(name, metrics, source["profile"], dataset, learned)
    given = source.get("checkpoints", {}).get(about.get("method"))
    if given is not None:
        about.pop("recipe", None)
        about |= {"seeds": [], "checkpoint": given}
    content = {
        "name": name,
        "variant": variant,
        **claims()[name].model_dump(include={"notebook", "claim", "paper", "ours"}),
        "dataset": dataset,
        "learned": learned,
        **about,
        "metrics": {k: m.as_dict() for k, m in metrics.items()},
        **judged,
        "provenance": source,
    }
    file = ".".join(part for part in (f"claim_{name}", variant.replace(" ", "_"), "json") if part)
    write_json(folder / file, content, indent=1)
    return content


def format_record(written: dict[str, Any]) -> str:
    """What `record` wrote, for the reader of a notebook: each number, each test, the verdict."""
    variant = f" ({written['variant']})" if written["variant"] else ""
    lines = [f"{written['name']}{variant}: {written['claim']}"]
    for test in written["tests"]:
        e = Estimate.of(written["metrics"][test["metric"]])
        ours = f"{e.value:.3g} [{e.low:.3g}, {e.high:.3g}]".replace("inf", "∞").replace("-", "−")
        side = "above" if "above" in test else "below"
        asked = f"{side} {test[side]:g}"
        bound = "" if test["bound"] == "value" else f"{test['bound']} end "
        lines.append(f"  {words(test['metric'])} = {ours}; {bound}{asked}: {test['state']}")
    lines.append(f"  outcome {written['outcome']}; verdict at this profile: {written['verdict']}")
    return "\n".join(lines)


@lru_cache
def commit() -> str:
    """The code's commit, marked if files differ from it; for a wheel, its version."""
    if installed():
        return f"version {__version__}"

    def git(command: str) -> str:
        told = ["git", "-C", str(REPOSITORY), *command.split()]
        return subprocess.run(told, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status --porcelain --untracked-files=no -- issl notebooks")
        return git("rev-parse HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"  # a copy of the files without their history
