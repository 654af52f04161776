"""All verdicts together: the records that notebooks leave, as rows and Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from issl.audit.claims import (
    FAILED,
    PASSED,
    SUPERSEDED,
    UNTESTED,
    Claim,
    all_words,
    claims,
    judge,
    over_readings,
    readings,
    stated,
    words,
)
from issl.audit.stats.statistics import Estimate
from issl.data.datasets import DRAWN
from issl.errors import IsslError
from issl.files import write_json
from issl.pretraining.recipes import NAMES

Record = dict[str, Any]  # as issl.audit.claims.record writes it, with `copied` (`read_records`)
Test = dict[str, Any]  # of a record
KEPT = "claims.json"  # a profile's records, beside its figures
OUTCOMES = ("reproduced", "partly", "contradicted", "undecided")
ANSWERS = {"reproduced": "yes", "partly": "in part", "contradicted": "no", "undecided": "open"}
ANSWERS[UNTESTED] = "untested"
MARKS = dict(zip((*OUTCOMES, UNTESTED, SUPERSEDED, PASSED, FAILED), "●◐○◇◌⊘✓✗", strict=True))
STATES = {"holds": "●", "contradicted": "○", "undecided": "◇"}  # of a test
BEGIN = "<!-- verdicts: written by `issl verdicts --readme`, do not edit -->"
END = "<!-- /verdicts -->"
# until 2026-11-28 "cifar10" was a copy that had been re-encoded as JPEG, and the faces were a
# different copy from today's: records from then are kept in folders whose names end like this
COPIED, COPY = "-jpeg", "the JPEG copy"
BY_READING = [
    *("name", "claim", "method", "reading", "output", "unit"),
    *("metric", "value", "low", "high", "asked", "outcome", "over_readings"),
]
SCALES = ("mini", "overnight", "paper")  # profiles whose records are kept, the largest last


def read_records(paths: Iterable[Path]) -> list[Record]:
    """The records in these files, one or a list in each, judged by the rules that hold now.

    Returns:
        By notebook, in the order of claims.yaml, then of the methods. Each says whether it is
        `copied`: measured on images that nobody else has.

    Raises:
        IsslError: for a file that cannot be read, or a record of a claim that is not stated.
    """
    found: list[Record] = []
    for path in paths:
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise IsslError(
                f"claim record {path} cannot be read ({error}); delete it and run its notebook"
            ) from error
        for record in content if isinstance(content, list) else [content]:
            if record["name"] not in claims():
                raise IsslError(
                    f"{path} records the claim {record['name']!r}, which claims.yaml does not "
                    "state; delete it"
                )
            copied = path.parent.name.endswith(COPIED) and record["dataset"] not in DRAWN
            found.append(_by_todays_rules(record) | {"copied": copied})
    order, methods = list(claims()), ["", *NAMES]

    def place(r: Record) -> tuple[str, int, int, str]:
        method = methods.index(r["variant"]) if r["variant"] in methods else len(methods)
        notebook = claims()[r["name"]].notebook
        return notebook, order.index(r["name"]), method, r["provenance"]["profile"]

    return sorted(found, key=place)


def _by_todays_rules(record: Record) -> Record:
    """A record with the outcome of its own tests, and its verdict, by the rules that hold now."""
    metrics = {name: Estimate.of(m) for name, m in record["metrics"].items()}
    tests, profile = _plain_tests(record), record["provenance"]["profile"]
    learned = record.get("learned")  # older ones lack it
    return record | judge(record["name"], metrics, profile, record["dataset"], learned, tests)


def _plain_tests(record: Record) -> list[Test]:
    """A record's tests, as they were stated."""
    return [{k: v for k, v in t.items() if k not in ("holds", "state")} for t in record["tests"]]


def keep(records: Sequence[Record], folder: Path) -> Path:
    """Write FOLDER/claims.json, without `copied`, which the folder's name says."""
    kept = [{k: v for k, v in r.items() if k != "copied"} for r in records]
    write_json(folder / KEPT, kept, indent=1, ensure_ascii=False)
    return folder / KEPT


def kept_records(figures: Path) -> list[Record]:
    """The records kept in the repository: figures/*/claims.json."""
    kept = sorted(figures.glob(f"*/{KEPT}"))
    return read_records(p for p in kept if p.parent.name.split("-")[0] in SCALES)


def newest(records: Sequence[Record]) -> list[Record]:
    """Without those that were measured again later (of drawn images, which are no copies)."""

    def about(r: Record) -> Hashable:
        return r["name"], r["variant"], r["provenance"]["profile"], r["copied"]

    by_time = sorted(records, key=lambda r: str(r["provenance"]["time"]))
    latest = {about(r): id(r) for r in by_time}
    return [r for r in records if latest[about(r)] == id(r)]


def table(records: Sequence[Record]) -> pd.DataFrame:
    """One row per record: the claim, the method, our number of the first test, the verdict."""
    rows = []
    for r in records:
        plain = {k: r[k] for k in ("name", "claim", "ours", "paper", "n", "dataset", "copied")}
        about = {"method": r["variant"] or r.get("method", ""), "metric": r["tests"][0]["metric"]}
        numbers = r["metrics"][about["metric"]]
        held = {"tests_held": sum(t["holds"] for t in r["tests"]), "tests": len(r["tests"])}
        found = {k: r[k] for k in ("outcome", "verdict", "notebook")}
        made = {k: r["provenance"][k] for k in ("profile", "commit", "hardware")}
        rows.append(plain | about | numbers | held | found | made)
    return pd.DataFrame(rows)


def by_reading(records: Sequence[Record]) -> pd.DataFrame:
    """The multiverse: a row for each claim that still stands, method and primary reading that was
    measured. Columns BY_READING: the reading is its profile, the metric that of the deciding test,
    asked its threshold."""
    rows = []
    for r in records:
        profile, test = r["provenance"]["profile"], deciding(r)
        if r["verdict"] in OUTCOMES and not r["copied"] and profile in readings():
            asked = test["above"] if "above" in test else test["below"]
            about = {"method": r["variant"], "reading": profile, **readings()[profile]}
            rows.append({**r, **r["metrics"][test["metric"]], **about, **test, "asked": asked})
    found = pd.DataFrame(rows, columns=BY_READING)
    found = found.drop_duplicates(["name", "method", "reading"], keep="last", ignore_index=True)
    each = found.groupby(["name", "method"])["outcome"]
    together = each.transform(lambda o: over_readings(list(o)) if len(o) > 1 else "")
    return found.assign(over_readings=together)


def deciding(record: Record) -> Test:
    """The test that decides a record's outcome: the first that is contradicted, else the first that
    is undecided, else the first of all."""
    order = ("contradicted", "undecided", "holds")
    found: Test = min(record["tests"], key=lambda test: order.index(test["state"]))
    return found


def _asked(test: Test) -> str:
    """What a test asks of its number."""
    return f"> {test['above']:g}" if "above" in test else f"< {test['below']:g}"


def _grouped(
    records: Sequence[Record], key: Callable[[Record], Hashable]
) -> Iterable[list[Record]]:
    """Records that share a key, in the order of the first of each."""
    found: dict[Hashable, list[Record]] = {}
    for r in records:
        found.setdefault(key(r), []).append(r)
    return found.values()


def _number(record: Record, metric: str) -> str:
    """A number, with its interval if it has one."""
    return with_interval(Estimate.of(record["metrics"][metric]))


def with_interval(e: Estimate) -> str:
    return f"{e.value:.2g}" if e.low == e.high == e.value else str(e)


def method(record: Record) -> str:
    """The record's variant as people write it."""
    return str(NAMES.get(record["variant"], record["variant"]))


def _why(claim: Claim) -> str:
    """Why the claim's test no longer decides; "" if it still does."""
    if (past := claim.superseded) is None:
        return ""
    return f"Superseded on {past.date} by `{past.by}`: {past.reason} It had found: {past.found}"


def _verdict(r: Record) -> str:
    """A verdict with its mark and how many tests hold; if untested, the outcome beside it."""
    states = [t["state"] for t in r["tests"]]
    held = f"{states.count('holds')}/{len(states)}"
    if r["outcome"] == "partly" and "contradicted" in states:
        held += f", {states.count('contradicted')} contradicted"
    if r["verdict"] == UNTESTED:
        held = f"here {MARKS[r['outcome']]} {r['outcome']}, {held}"
    return f"{MARKS[r['verdict']]} {r['verdict']} ({held})"


def good_for(records: Sequence[Record]) -> dict[str, list[str]]:
    """What the score is good for, by the outcome of each use's claim.

    Methods are named where their outcomes differ. These are outcomes, not verdicts: a profile too
    small for the claim speaks for itself alone.
    """
    found: dict[str, list[str]] = {outcome: [] for outcome in OUTCOMES}
    for name, claim in claims().items():
        own = [r for r in records if r["name"] == name]
        if claim.use is None or claim.superseded or not own:
            continue
        for reached, uses in found.items():
            if which := [method(r) for r in own if r["outcome"] == reached]:
                named = "" if len(which) == len(own) else f" [{', '.join(which)}]"
                uses.append(claim.use + named)
    return found


def markdown(
    records: Sequence[Record],
    repository: Path | None = None,
    history: Sequence[Record] | None = None,
) -> str:
    """Every claim with what was found: those that stand, a section each; then the code's checks,
    and the tests that no longer decide.

    Args:
        records: Of any profiles.
        repository: Whose figures are linked, as from docs/; None: no links.
        history: All records that are kept, to say when a test was first run; None: `records`.
    """
    kept = records if history is None else history
    parts: dict[str, list[str]] = {"standing": [], "checks": [], "superseded": []}
    for own in _grouped(records, lambda r: r["name"]):
        about = claims()[own[0]["name"]]
        kind = "superseded" if about.superseded else "checks" if about.check else "standing"
        earlier = [r for r in kept if r["name"] == own[0]["name"]]
        parts[kind].append(_section(own, repository, earlier))
    found = "".join(parts["standing"])
    for title, kind in (("Checks of the code", "checks"), ("Superseded tests", "superseded")):
        if parts[kind]:
            inside = "\n".join(parts[kind])
            found += f"<details markdown><summary>{title}</summary>\n\n{inside}\n</details>\n\n"
    return found


def _section(own: Sequence[Record], repository: Path | None, kept: Sequence[Record]) -> str:
    """What the records of one claim say, the largest scale first; all that are `kept` of it."""
    name = own[0]["name"]
    about = claims()[name]
    paper = "our question" if about.paper is None else f"the paper: {about.paper}"
    since = "" if about.stated is None else f"tests stated {about.stated}, "
    kind = " (superseded)" if about.superseded else " (ours)" if about.ours else ""
    lines = [f"### {about.claim.rstrip('.')}{kind}", ""]
    asked = f"{paper[0].upper()}{paper[1:]}. Notebook `{about.notebook}`"
    lines.append(f"{asked}; {since}{_first_made(kept)}.")
    tested = {test["metric"] for r in own for test in r["tests"]}
    if more := dict.fromkeys(m for r in own for m in r["metrics"] if m not in tested):
        named = [all_words()[m] for m in more if m in all_words()]
        left = len(more) - len(named)
        what = "more" if named else "number" if left == 1 else "numbers"
        rest = f"{left} {what} in `{KEPT}`"
        told = ", ".join([*named, *([rest] if len(named) < len(more) else [])])
        lines.append(f"Also measured, without a test: {told}.")
    for past in claims().values():
        if past.superseded and past.superseded.by == name:
            lines.append(f"It replaced the test of *{past.claim.rstrip('.')}*.")
    if about.superseded:
        lines.append(_why(about))
    over = by_reading(own)[["method", "over_readings"]].drop_duplicates()
    each = [f"{NAMES.get(who) or 'Over readings'}: {o}" for who, o in over.to_numpy() if o]
    lines += ["", *(f"- {told}." for told in each)] if each else []
    return "\n".join([*lines, "", _table_of_tests(own, repository)]) + "\n"


def _table_of_tests(own: Sequence[Record], repository: Path | None) -> str:
    """The records of one claim: a row for each and a column for each test. If there are several
    readings, a row is named by its own, else by its profile."""
    several = len({r["provenance"]["profile"] for r in own} & readings().keys()) > 1
    asked = dict.fromkeys(_asked_in_full(t) for r in own for t in r["tests"])
    rows = []
    for r in sorted(own, key=lambda r: (-_scale(r), r["copied"])):
        profile = r["provenance"]["profile"]
        where = _reading(profile) if several and profile in readings() else profile
        folder = profile + (COPIED if r["copied"] else "")
        figure = f"figures/{folder}/{claims()[r['name']].notebook}.png"
        if repository is not None and (repository / figure).is_file():
            where = f"[{where}](../{figure})"
        data = f"{r['dataset']}, n = {r['n']:,}{f' ({COPY})' if r['copied'] else ''}"
        found = {
            _asked_in_full(t): f"{STATES[t['state']]} {_number(r, t['metric'])}" for t in r["tests"]
        }
        cells = [found.get(test, "–") for test in asked]
        rows.append((method(r), f"{where}, {data}", *cells, _verdict(r)))
    return _markdown(["", "measured at", *asked, "verdict (tests held)"], rows)


def _reading(profile: str) -> str:
    """A reading as people write it."""
    read = readings()[profile]
    unit = ", noise on normalised pixels" if read["unit"] == "normalised" else ""
    return read["output"] + unit


def _first_made(kept: Sequence[Record]) -> str:
    """When and by which code a claim's tests, as they read now, were first run: the earliest record
    that is kept of it."""
    same = [r for r in kept if _plain_tests(r) == stated(r["name"], r["metrics"])]
    first = min((r["provenance"] for r in same or kept), key=lambda made: made["time"])
    made = f"first kept record at {first['profile']} {first['time'][:10]}"
    code, _, changed = first["commit"].partition(" ")
    run = f"{made} in {code[:7]}{f' ({changed})' if changed else ''}"
    return run if same else f"{run}, with an earlier test"


def _scale(record: Record) -> int:
    profile = record["provenance"]["profile"].split("-")[0]
    return SCALES.index(profile) if profile in SCALES else -1


def answers(records: Sequence[Record], kept: Sequence[Record]) -> pd.DataFrame:
    """The README's table: a row for each question of claims.yaml and a column for each method,
    answered at the largest scale of its measurements.

    What was measured on the JPEG copy counts, with a star, until it is measured again. `kept`: the
    records of all readings; the column "holds in" counts those, by reading and method, in which all
    tests hold.
    """
    read = by_reading(kept)
    held = read["outcome"].eq("reproduced").groupby(read["name"]).agg(["sum", "size"])
    several = read.groupby("name")["reading"].nunique().gt(1)
    asked = [r for r in records if claims()[r["name"]].question and _scale(r) >= 0]
    if not asked:
        return pd.DataFrame()
    methods = [m for m in NAMES if m in {r["variant"] for r in asked}]
    rows = []
    for of_claim in _grouped(asked, lambda r: r["name"]):
        at = max(_scale(r) for r in of_claim)
        own = [r for r in of_claim if r["provenance"]["profile"] == SCALES[at]]
        own.sort(key=lambda r: not r["copied"])
        latest = {r["variant"]: r for r in own}  # of the copy only if there is no other
        about, first = claims()[own[0]["name"]], next(m for m in methods if m in latest)
        told = [_answer(latest[m]) if m in latest else "" for m in methods]
        whose = "" if first == methods[0] else f"{NAMES[first]}: "
        number, name = whose + _deciding_number(latest[first]), own[0]["name"]
        some = "{} of {}".format(*held.loc[name]) if several.get(name, False) else "–"
        rows.append((str(about.question), *told, number, some, about.notebook[:2]))
    names = [str(NAMES[m]) for m in methods]
    head = ["question", *names, f"{names[0]}'s number (asked)", "holds in", "notebook"]
    return pd.DataFrame(rows, columns=head)


def _answer(record: Record) -> str:
    """A verdict as an answer to its claim's question."""
    told, star = ANSWERS[record["verdict"]], "\\*" if record["copied"] else ""
    if record["verdict"] == "partly" and "contradicted" in {t["state"] for t in record["tests"]}:
        told = "mixed"
    return told + star


def _deciding_number(record: Record) -> str:
    """The number of the test that decides a record, and in brackets what this test asks of it. If
    all tests hold, it is the last one, which asks the most."""
    test = deciding(record)
    if test["holds"]:
        test = record["tests"][-1]
    name = claims()[record["name"]].numbers[test["metric"]]
    return f"{name} = {_number(record, test['metric'])} ({_asked(test)})"


def _asked_in_full(test: Test) -> str:
    """A test's number in words, and what the test asks of it."""
    what = "" if test["bound"] == "value" else "interval "
    return f"{words(test['metric'])} ({what}{_asked(test)})"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [f"| {' | '.join(head)} |", f"{'|---' * len(head)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in escaped)]) + "\n"


def _contents(sections: str) -> str:
    """A list of links to the sections, by the rule that gives a heading its address."""
    titles = re.findall("^### (.*)$", sections, re.MULTILINE)
    slugs = [re.sub(r"[^\w\s-]", "", title.lower()).replace(" ", "-") for title in titles]
    return "".join(f"- [{t}](#{slug})\n" for t, slug in zip(titles, slugs, strict=True))


def pages(repository: Path) -> dict[Path, str]:
    """The pages that show verdicts, as they must read given the records that are kept.

    README.md has the answers; docs/verdicts.md has each claim at the largest scale of its records.
    """
    records = kept_records(repository / "figures")
    standing = newest(records)
    of_each = _grouped(standing, lambda r: r["name"])
    shown = [r for own in of_each for r in own if _scale(r) == max(map(_scale, own))]
    blocks = markdown(shown, repository, records)
    blocks = f"{_contents(blocks.partition('<details')[0])}\n{blocks}"
    answered = answers(standing, standing)
    rows = answered.itertuples(index=False, name=None)
    tables = {"README.md": _markdown(answered.columns.tolist(), rows), "docs/verdicts.md": blocks}
    found = {}
    for name, text in tables.items():
        before, begin, rest = (repository / name).read_text().partition(BEGIN)
        _, end, after = rest.partition(END)
        if not (begin and end):
            raise IsslError(f"{name} lacks the markers of the table of verdicts: {BEGIN} … {END}")
        found[repository / name] = f"{before}{BEGIN}\n{text}{END}{after}"
    return found
