"""All verdicts together: the records that notebooks leave, as one table, in Markdown, LaTeX and the
README."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from issl.audit.claims import (
    FAILED,
    PASSED,
    SUPERSEDED,
    UNTESTED,
    Condition,
    claims,
    outcome,
    verdict,
)
from issl.audit.metrics import words
from issl.audit.stats.statistics import Estimate
from issl.data.datasets import DRAWN
from issl.errors import IsslError
from issl.files import atomic
from issl.pretraining.recipes import NAMES

Record = dict[str, Any]  # as issl.audit.claims.record writes it, and `copied`, see `read_records`
KEPT = "claims.json"  # a profile's records, beside its figures
MARKS = {
    "reproduced": "●",
    "partly": "◐",
    "contradicted": "○",
    "undecided": "◇",
    UNTESTED: "◌",
    SUPERSEDED: "⊘",
    PASSED: "✓",
    FAILED: "✗",
}
BEGIN, END = (
    "<!-- verdicts: written by `issl verdicts --readme`, do not edit -->",
    "<!-- /verdicts -->",
)
# until 2026-11-28 "cifar10" was a copy that had been re-encoded as JPEG, and the faces were another
# copy than today's: # records of then are kept in folders of this ending
COPIED, COPY = "-jpeg", "the JPEG copy"
COMPARED, COMPARED_END = "<!-- compared: idem -->", "<!-- /compared -->"
SCALES = (
    "mini",
    "overnight",
    "paper",
)  # the profiles whose records are kept in the repository, the largest last
PHRASES = {
    "reproduced": "holds",
    "partly": "holds in part",
    "contradicted": "does not hold",
    "undecided": "is undecided",
}


def read_records(paths: Iterable[Path]) -> list[Record]:
    """The records in these files, one or a list in each, by notebook, in the order of claims.yaml,
    then of the methods.

    Each says whether it is `copied`: made of images that nobody else has.
    Raises IsslError for a file that cannot be read, and for a record of a claim that is no longer
    stated.
    """
    found: list[Record] = []
    for path in paths:
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise IsslError(
                f"claim record {path} cannot be read ({error}); delete it and run its notebook"
            ) from error
        records = content if isinstance(content, list) else [content]
        unknown = [r["name"] for r in records if r["name"] not in claims()]
        if unknown:
            raise IsslError(
                f"{path} records the claim {unknown[0]!r}, which claims.yaml does not state; delete it"
            )
        copied = path.parent.name.endswith(COPIED)
        found += [
            _by_todays_rules(r) | {"copied": copied and r["dataset"] not in DRAWN} for r in records
        ]
    order = {name: k for k, name in enumerate(claims())}
    methods = ["", *NAMES]

    def place(r: Record) -> tuple[str, int, int, str]:
        known = methods.index(r["variant"]) if r["variant"] in methods else len(methods)
        return claims()[r["name"]].notebook, order[r["name"]], known, r["provenance"]["profile"]

    return sorted(found, key=place)


def _by_todays_rules(record: Record) -> Record:
    """A record with the outcome of its own tests, and its verdict, by the rules that hold now."""
    metrics = {name: Estimate.of(m) for name, m in record["metrics"].items()}
    conditions = [
        Condition(**{k: v for k, v in t.items() if k not in ("holds", "state")})
        for t in record["tests"]
    ]
    states = [condition.state(metrics) for condition in conditions]
    tests = [
        t | {"holds": s == "holds", "state": s}
        for t, s in zip(record["tests"], states, strict=True)
    ]
    found = outcome(states)
    about = (
        record["provenance"]["profile"],
        record["dataset"],
        record.get("learned"),
    )  # older records lack the last
    reached = verdict(record["name"], found, *about)
    return record | {"tests": tests, "outcome": found, "verdict": reached}


def keep(records: Sequence[Record], folder: Path) -> Path:
    """Write FOLDER/claims.json."""
    with atomic(folder / KEPT) as part:
        kept = [
            {k: v for k, v in r.items() if k != "copied"} for r in records
        ]  # their folder says it
        part.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    return folder / KEPT


def table(records: Sequence[Record]) -> pd.DataFrame:
    """One row per record: claim, method, the paper's number, ours of the first test with its
    interval, n, verdict, …"""
    rows = []
    for r in records:
        first = r["tests"][0]["metric"]
        e = Estimate.of(r["metrics"][first])
        rows.append(
            {
                "name": r["name"],
                "claim": r["claim"],
                "whose": "ours" if r["ours"] else "the paper's",
                "method": r["variant"] or r.get("method", ""),
                "paper": r["paper"],
                "metric": first,
                "value": e.value,
                "low": e.low,
                "high": e.high,
                "n": r["n"],
                "seeds": len(r["seeds"]),
                "dataset": r["dataset"],
                "profile": r["provenance"]["profile"],
                "copied": r["copied"],
                "tests_held": sum(t["holds"] for t in r["tests"]),
                "tests": len(r["tests"]),
                "contradicted": sum(t["state"] == "contradicted" for t in r["tests"]),
                "outcome": r["outcome"],
                "verdict": r["verdict"],
                "notebook": r["notebook"],
                "commit": r["provenance"]["commit"],
                "hardware": r["provenance"]["hardware"],
            }
        )
    return pd.DataFrame(rows)


def summary(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One entry for each claim and profile, its methods together, as text: claim, notebook, paper,
    measured (the first test's metric, in words), ours (its numbers, a list), found (both, as
    lines), intervals (the numbers themselves: method, value, low, high, a list), asked (that test's
    threshold), n, profile, data, verdict (a list; one where all agree), reached (the same without
    method and counts), failed (the tests that do not hold, in words)."""
    rows: list[dict[str, Any]] = []
    for (_, profile, copied), part in table(records).groupby(
        ["name", "profile", "copied"], sort=False
    ):
        one = part.iloc[0]
        failed = [failures(records[i]) for i in part.index]
        methods = _shown([records[i]["variant"] for i in part.index])
        numbers = [
            f"{m} {_number(r)}".strip() for m, r in zip(methods, part.itertuples(), strict=True)
        ]
        plain = [_verdict(r) for r in part.itertuples()]
        verdicts = [f"{m} {v}".strip() for m, v in zip(methods, plain, strict=True)]
        rows.append(
            {
                "claim": _in_words(one["name"]),
                "notebook": one["notebook"],
                "paper": "–" if one["paper"] is None else str(one["paper"]),
                "measured": words(one["metric"]),
                "ours": numbers,
                "found": _found(words(one["metric"]), numbers),
                "n": f"{one['n']:,}",
                "intervals": list(
                    zip(methods, part["value"], part["low"], part["high"], strict=True)
                ),
                "asked": next(
                    v
                    for k, v in records[part.index[0]]["tests"][0].items()
                    if k in ("above", "below")
                ),
                "profile": profile,
                "data": one["dataset"] + (f" ({COPY})" if copied else ""),
                "verdict": verdicts if len(set(plain)) > 1 else plain[:1],
                "reached": list(part["verdict"]),
                "failed": [
                    f"{m}: {f}" if m else f for m, f in zip(methods, failed, strict=True) if f
                ],
            }
        )
    return rows


def _found(measured: str, numbers: Sequence[str]) -> list[str]:
    return [f"{measured} = {numbers[0]}"] if len(numbers) == 1 else [f"{measured}:", *numbers]


def sentence(records: Sequence[Record]) -> str:
    """What one claim's records say, in a sentence: with which methods it holds, by which numbers,
    and whether that decides anything."""
    measured = words(records[0]["tests"][0]["metric"])
    numbers = dict(
        zip((r["variant"] for r in records), map(_number, table(records).itertuples()), strict=True)
    )
    reached = {r["verdict"] for r in records}
    parts = []
    for found, phrase in PHRASES.items():
        own = [r["variant"] for r in records if r["outcome"] == found]
        if own and all(variant in NAMES for variant in own):
            parts.append(f"{phrase} with {_listed([f'{_name(v)} ({numbers[v]})' for v in own])}")
        elif own:
            parts.append(
                phrase
                + (
                    f" ({'; '.join(f'{_name(v)}: {numbers[v]}' for v in own)})"
                    if own != [""]
                    else ""
                )
            )
    if len(records) == 1:
        r = records[0]
        where = (
            f"with {_name(r['variant'])}"
            if r["variant"] in NAMES
            else f"here {r['variant']}".strip()
        )
        head = (
            f"The {r['verdict']}"
            if reached <= {PASSED, FAILED}
            else f"The claim {PHRASES[r['outcome']]} {where}"
        )
        text = f"{head}: {measured} = {next(iter(numbers.values()))}"
    else:
        text = f"Measured as {measured}, the claim {_listed(parts)}"
    if reached == {SUPERSEDED}:
        return text + "; another test has taken this one's place."
    return text + ("; at this scale that decides nothing." if reached == {UNTESTED} else ".")


def _listed(parts: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(part for part in (", ".join(parts[:-1]), *parts[-1:]) if part)


def _verdict(r: Any) -> str:
    """A verdict with its mark and the tests that hold; where the scale allows none, the outcome is
    said beside it."""
    held = f"{r.tests_held}/{r.tests}" + (
        f", {r.contradicted} contradicted" if r.outcome == "partly" and r.contradicted else ""
    )
    here = f"here {MARKS[r.outcome]} {r.outcome}, {held}" if r.verdict == UNTESTED else held
    return f"{MARKS[r.verdict]} {r.verdict} ({here})"


def _in_words(name: str) -> str:
    """The claim; whose it is, if not the paper's; why its test was replaced, if it was."""
    claim = claims()[name]
    text = claim.claim + (" (ours)" if claim.ours else "")
    if claim.superseded is None:
        return text
    why = claim.superseded
    return f"{text} Superseded on {why.date} by `{why.by}`: {why.reason} It had found: {why.found}"


def failures(record: Record) -> str:
    """The tests of a record that do not hold, in words: what was required, and what was found."""
    found = []
    for test in record["tests"]:
        if not test["holds"]:
            e, side = (
                Estimate.of(record["metrics"][test["metric"]]),
                "above" if "above" in test else "below",
            )
            bound = "" if test["bound"] == "value" else f"{test['bound']} end of "
            value = f"{getattr(e, test['bound']):.3g}".replace("-", "−").replace("inf", "∞")
            found.append(f"{bound}{words(test['metric'])} {side} {test[side]:g}: it is {value}")
    return "; ".join(found)


def decided(records: Sequence[Record]) -> list[Record]:
    """The records at a scale that allows a verdict on the claim, by a test that still stands; no
    checks of the code."""
    return [r for r in records if r["verdict"] not in (UNTESTED, SUPERSEDED, PASSED, FAILED)]


def good_for(records: Sequence[Record]) -> dict[str, list[str]]:
    """What the score is good for, by the outcome of each use's claim.

    Methods are named where their outcomes differ. These are outcomes, not verdicts: a profile too
    small for the claim speaks for itself alone.
    """
    found: dict[str, list[str]] = {
        "reproduced": [],
        "partly": [],
        "contradicted": [],
        "undecided": [],
    }
    for name, claim in claims().items():
        ours = [r for r in records if r["name"] == name]
        if claim.use is None or claim.superseded or not ours:
            continue
        for reached, uses in found.items():
            which = [
                str(NAMES.get(r["variant"], r["variant"])) for r in ours if r["outcome"] == reached
            ]
            if which:
                uses.append(
                    claim.use + ("" if len(which) == len(ours) else f" [{', '.join(which)}]")
                )
    return found


def _number(r: Any) -> str:
    if r.low == r.high == r.value:
        return f"{r.value:.2g}"
    return str(Estimate(r.value, r.low, r.high, r.n))


def markdown(records: Sequence[Record]) -> str:
    """The summary as a Markdown table."""
    lines = [
        "| claim | paper | ours (95% interval) | n | profile, data | verdict (tests held) |",
        "|---|---|---|---:|---|---|",
    ]
    for r in summary(records):
        cells = (
            r["claim"],
            r["paper"],
            "<br>".join(r["found"]),
            r["n"],
            f"{r['profile']}, {r['data']}",
            "<br>".join(r["verdict"]),
        )
        lines.append("| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines) + "\n"


def short_markdown(records: Sequence[Record]) -> str:
    """A line for each claim whose test still decides, at the largest scale that it was measured at,
    as a table; checks of the code are left out."""
    lines = ["| claim | paper | ours (95% interval) | verdict |", "|---|---|---|---|"]
    for name in dict.fromkeys(
        r["name"] for r in records if r["verdict"] not in (SUPERSEDED, PASSED, FAILED)
    ):
        own = [r for r in records if r["name"] == name]
        at = max((r["provenance"]["profile"] for r in own), key=_scale)
        own = [r for r in own if r["provenance"]["profile"] == at]
        again = [r["variant"] for r in own if not r["copied"]]
        old = [r for r in own if r["copied"] and r["variant"] not in again]
        row, numbers, reached = summary(own)[0], [], []
        for part, note in (([r for r in own if not r["copied"]], ""), (old, f"on {COPY}: ")):
            if part:
                each = zip(map(_number, table(part).itertuples()), _methods(part), strict=True)
                mixed = note if len(old) < len(own) else ""
                numbers.append(mixed + ", ".join(f"{n} {m}".strip() for n, m in each))
                reached.append(note + _short_verdict(part))
        where = "" if at == SCALES[0] else f"{at}: "
        cells = (
            row["claim"],
            row["paper"],
            f"{row['measured']} = {'; '.join(numbers)}",
            where + "; ".join(reached),
        )
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines) + "\n"


def compared_markdown(records: Sequence[Record]) -> str:
    """A line for each claim that was measured on the JPEG copy and again on the published images,
    as a table."""
    lines = [
        "| claim | profile | on the JPEG copy | on the published images |",
        "|---|---|---|---|",
    ]
    for (name, profile), part in table(records).groupby(["name", "profile"], sort=False):
        own = [records[i] for i in part.index]
        before, now = (
            {r["variant"] for r in own if r["copied"] == copied} for copied in (True, False)
        )
        again = before & now
        claim = claims()[str(name)]
        if not again or claim.superseded:
            continue
        cells = [claim.claim, str(profile)]
        for copied in (True, False):
            which = [r for r in own if r["copied"] == copied and r["variant"] in again]
            numbers = zip(_methods(which), map(_number, table(which).itertuples()), strict=True)
            cells.append(
                "<br>".join([*(f"{m} {n}".strip() for m, n in numbers), _short_verdict(which)])
            )
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return (
        "\n".join(lines) + "\n" if len(lines) > 2 else "No claim has been measured again so far.\n"
    )


def _scale(profile: str) -> int:
    return SCALES.index(profile.split("-")[0])


def _methods(records: Sequence[Record]) -> list[str]:
    return _shown([r["variant"] for r in records])


def _shown(variants: Sequence[str]) -> list[str]:
    """Each record's variant as people write it; of a single record only where it is a method, and
    others may follow."""
    return [_name(v) if len(variants) > 1 or v in NAMES else "" for v in variants]


def _name(variant: str) -> str:
    """A method as people write it; any other variant as it is."""
    return NAMES.get(variant, variant)


def _short_verdict(records: Sequence[Record]) -> str:
    """The verdicts by their marks, with the methods; in words where all agree. Where the scale
    allows no verdict, the outcomes so far."""
    parts = []
    for early in (False, True):
        by: dict[str, list[str]] = {}
        for r, method in zip(records, _methods(records), strict=True):
            if (r["verdict"] == UNTESTED) == early:
                found = r["outcome"] if early else r["verdict"]
                opposed = found == "partly" and any(
                    t["state"] == "contradicted" for t in r["tests"]
                )
                by.setdefault(found + (", in part contradicted" if opposed else ""), []).append(
                    method
                )
        if by:
            alone = len(by) == 1 and len(next(iter(by.values()))) == len(records)
            marked = [
                f"{MARKS[v.split(',')[0]]} {v if alone else _also(v, methods)}"
                for v, methods in by.items()
            ]
            parts.append(("◌ so far " if early else "") + "; ".join(marked))
    return "; ".join(parts)


def _also(found: str, methods: Sequence[str]) -> str:
    """The methods, and what their verdict says beside its mark."""
    _, comma, more = found.partition(", ")
    return ", ".join(methods) + (f" ({more})" if comma else "")


def latex(records: Sequence[Record]) -> str:
    """The summary as a LaTeX tabular (booktabs, makecell)."""
    head = ("claim", "paper", "measured", "ours", "n", "profile", "data", "verdict")
    rows = []
    for r in summary(records):
        cells = [
            _escaped(r[c])
            if isinstance(r[c], str)
            else r"\makecell[l]{" + r" \\ ".join(_escaped(v) for v in r[c]) + "}"
            for c in head
        ]
        rows.append(" & ".join(cells) + r" \\")
    top = [r"\begin{tabular}{p{5cm}lllrlll}", r"\toprule", " & ".join(head) + r" \\", r"\midrule"]
    return "\n".join([*top, *rows, r"\bottomrule", r"\end{tabular}", ""])


def _escaped(text: str) -> str:
    marks = {
        "_": r"\_",
        "%": r"\%",
        "&": r"\&",
        "−": "$-$",
        "∞": r"$\infty$",
        "⁻¹": "$^{-1}$",
        "ᵀ": r"$^\top$",
        "⊘": r"$\oslash$",
        "●": r"$\bullet$",
        "◐": r"$\circledast$",
        "○": r"$\circ$",
        "◇": r"$\diamond$",
        "◌": r"$\cdot$",
        "–": "--",
        "✓": r"$\checkmark$",
        "✗": r"$\times$",
    }
    for plain, escaped in marks.items():
        text = text.replace(plain, escaped)
    return text


def kept_records(figures: Path) -> list[Record]:
    """The records kept in the repository: figures/*/claims.json."""
    return read_records(
        p for p in sorted(figures.glob(f"*/{KEPT}")) if p.parent.name.split("-")[0] in SCALES
    )


def in_page(text: str, table: str, begin: str = BEGIN, end: str = END) -> str:
    """A page with a new table of verdicts between its markers. Raises IsslError where they are
    missing."""
    if begin not in text or end not in text:
        raise IsslError(
            f"the markers of the table of verdicts are missing from the page: {begin} … {end}"
        )
    before, rest = text.split(begin, 1)
    return f"{before}{begin}\n{table}{end}{rest.split(end, 1)[1]}"


def pages(repository: Path) -> dict[Path, str]:
    """The pages that show verdicts, as they must read by the records that are kept: a line a claim
    in the README, all of it in docs/verdicts.md."""
    records = kept_records(repository / "figures")
    readme, full = repository / "README.md", repository / "docs" / "verdicts.md"
    both = in_page(
        in_page(full.read_text(), markdown(records)),
        compared_markdown(records),
        COMPARED,
        COMPARED_END,
    )
    return {readme: in_page(readme.read_text(), short_markdown(records)), full: both}
