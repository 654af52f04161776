"""Are the released tables what the released encoders give? Each is made again, and compared.

    ISSL_DATA=DIR python benchmarks/again.py --jobs 2      # about 19 hours of a core

What has been compared stays noted in measured/again.json, and a later call goes on from there.
`./run_all.sh --from encoders` makes the same tables in one run.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from report import keep, machine

from issl.audit import RELEASED
from issl.audit.again import differences_from_released, released_table
from issl.audit.cache import MANIFEST, Artifacts, Stage, in_dependency_order
from issl.audit.profiles import ProfileOptions, all_stages
from issl.audit.stages import Table

NOTED = Path(__file__).with_name("measured") / "again.json"


def again(stage: Stage, artifacts: Artifacts) -> dict[str, Any] | None:
    """Make the stage; for a table that is released, how far the two are apart."""
    torch.set_num_threads(1)
    folder = artifacts.get(stage)
    if not isinstance(stage, Table) or (name := released_table(stage)) is None:
        return None
    most, rank = differences_from_released(stage, artifacts)
    seconds = json.loads((folder / MANIFEST).read_text())["made_with"]["seconds"]
    about = {"stage": stage.label, "table": name, "kind": stage.name, "seconds": seconds}
    return about | {"most": most, "rank": rank}


def note(each: list[dict[str, Any]], of: int) -> None:
    """A row for each kind of table."""
    kinds = pd.DataFrame(each).groupby("kind", as_index=False)
    rows = kinds.agg({"table": "size", "seconds": "sum", "most": "max", "rank": "min"})
    rows["minutes"] = rows["seconds"] / 60
    hours = rows["seconds"].sum() / 3600
    part = {"rows": rows.to_dict("records"), "of": of, "done": len(each), "hours": hours}
    keep("again", part | {"each": each} | machine(""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", help="notebooks, by number")
    parser.add_argument("--out", type=Path, default=Path(), help="where artifacts/ goes")
    given = parser.parse_args()
    data_root = Path(os.environ["ISSL_DATA"])
    everything = ProfileOptions(RELEASED, None, data_root, "cpu", given.out, door="encoders")
    wanted = {s.label for s in all_stages(everything.plans().values()) if released_table(s)}
    before = json.loads(NOTED.read_text())["each"] if NOTED.is_file() else []
    each = [row for row in before if row["stage"] in wanted]  # others were released anew since
    noted = {row["stage"] for row in each}
    plans = list(replace(everything, only=given.only).plans().values())
    stages = (stage for plan in plans for stage in plan.stages())
    todo = list(in_dependency_order(stages, lambda stage: stage.label in noted))
    with ProcessPoolExecutor(given.jobs) as pool:
        artifacts = plans[0].artifacts()
        for done in as_completed([pool.submit(again, s, artifacts) for s in todo]):
            if (row := done.result()) is not None:
                each.append(row)
                note(each, len(wanted))
                print(f"{len(each)} of {len(wanted)}  {row}", flush=True)


if __name__ == "__main__":
    main()
