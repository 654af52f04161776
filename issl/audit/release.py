"""Release tables: `python -m issl.audit.release --out DIR` copies into released/, under readable
names, the tables, and the numbers for pairs of images, that were made in DIR and that the default
profile or a reading of the paper draws from."""

from __future__ import annotations

import argparse
from pathlib import Path

from issl.audit import RELEASED
from issl.audit.cache import (
    MANIFEST,
    Artifacts,
    Stage,
    in_dependency_order,
    release,
    released_index,
)
from issl.audit.claims import readings
from issl.audit.config import as_plain
from issl.audit.profiles import ProfileOptions
from issl.audit.settings import Data
from issl.audit.stages import (
    CopiesTrainedOn,
    Influence,
    Pairs,
    Pretrain,
    State,
    Table,
    ThroughTraining,
    Without,
)
from issl.audit.table_stages import CopiesDiscount
from issl.data import datasets
from issl.errors import IsslError
from issl.files import provided
from issl.influence.perturbation import ClippedNoise, GaussianNoise
from issl.pretraining import recipes

USUAL = (GaussianNoise().std, 0.0)  # 0: cross-entropy is scored without noise


def files_of(stage: Table | Pairs) -> dict[str, str]:
    """The paths in the release of a stage's files."""
    if isinstance(stage, Pairs):
        files = ["pairs.safetensors", *(["through.json"] * isinstance(stage, ThroughTraining))]
    elif isinstance(stage, Without | CopiesTrainedOn):
        files = [stage.file]
    else:
        return {stage.file: path_of(stage)}
    first = next(s for s in in_dependency_order([stage]) if isinstance(s, Pretrain))
    name = "-".join([first.data.name, *_encoder(first), stage.key]).replace("_", "-")
    return {file: f"tables/{stage.name}/{name}{Path(file).suffix}" for file in files}


def path_of(stage: Table) -> str:
    """A table's path in the release: its kind, then its images and encoder."""
    encoders = [s for s in in_dependency_order([stage]) if isinstance(s, Pretrain)]
    data = _data(stage)
    if data.name in datasets.DRAWN or (encoders and encoders[-1].data.name in datasets.DRAWN):
        return f"tables/{stage.name}/{data.name}-{stage.key}.parquet"
    parts = [data.name, data.split] if not encoders else [data.name, *_encoder(encoders[-1])]
    if encoders and data.split == "test":
        parts.append("test")
    if data.first is not None:
        parts.append(f"first{data.first}")
    name = "-".join([*parts, *_settings(stage)]).replace("_", "-")
    return f"tables/{stage.name}/{name}.parquet"


def _data(stage: Stage) -> Data:
    """The images that a stage is about: its own, or those of the first stage that it reads."""
    own = getattr(stage, "data", None)
    return own if isinstance(own, Data) else _data(stage.needs()[0])


def _encoder(encoder: Pretrain) -> list[str]:
    method = encoder.method if encoder.epochs else "untrained"
    usual = {recipes.recipe(encoder.method, variant).view_a for variant in recipes.RECIPES}
    own = [] if encoder.recipe.view_a in usual else ["other-views"]
    return [method, *own, f"w{encoder.width}", str(encoder.seed)]


def _settings(stage: Table) -> list[str]:
    """What else tells tables of the same kind and encoder apart."""
    order = list(in_dependency_order([stage]))
    noises = [getattr(s, "perturbation", None) for s in order]
    reading = [f"after{s.after}" for s in order if isinstance(s, State)]
    if any(getattr(s, "output", None) == "projector" for s in order):
        reading.append("projector")
    if any(isinstance(noise, GaussianNoise) and noise.by_channel for noise in noises):
        reading.append("normalised")
    if any(isinstance(s, Influence) and s.loss == "cross_entropy" for s in order):
        reading.append("cross-entropy")
    if not isinstance(stage, Influence | CopiesDiscount):
        share = getattr(stage, "share", None)
        return reading + ([] if share is None else [f"{share:.0%}".replace("%", "percent")])
    weighing = as_plain(stage.curvature)
    kind = weighing.pop("type")
    reading += [] if kind == "LoGra" else [kind.lower()]
    reading += [v if isinstance(v, str) else f"{name}{v}" for name, v in weighing.items()]
    noise = stage.perturbation
    if isinstance(noise, GaussianNoise) and not noise.by_channel and noise.std not in USUAL:
        reading.append(f"std{noise.std}")
    reading += ["clipped"] if isinstance(noise, ClippedNoise) else []
    if isinstance(stage, CopiesDiscount):
        return reading
    reading += [] if stage.layers == "all" else [stage.layers.replace(" ", "-")]
    of, some = stage.others, stage.data.first is not None or stage.draws > 1
    others = [] if of is None else ["others", *([] if of.first is None else [f"first{of.first}"])]
    draws = [f"draws{stage.draws}"] if some else []
    return [*others, *reading, *draws, f"noise{stage.seed}"]


def main() -> None:
    """Copy the tables that are there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where a run wrote its artifacts")
    out = parser.parse_args().out
    folder, index = provided("released"), released_index(provided("released"))
    here = Artifacts(out / "artifacts", released=None)
    plans = [
        plan
        for profile in (RELEASED, *readings())
        for plan in ProfileOptions(profile, out=out, door=None).plans().values()
    ]
    for plan in plans:
        for stage in plan.stages():
            drawn = plan.dataset in datasets.DRAWN
            if not isinstance(stage, Table | Pairs) or drawn or stage.label in index:
                continue
            if (here.folder(stage) / MANIFEST).is_file():
                files = files_of(stage)
                taken = {f["path"] for entry in index.values() for f in entry["files"].values()}
                if both := taken.intersection(files.values()):
                    raise IsslError(f"{min(both)} is another table's; give this one its own name")
                release(here, stage, folder, files)
                index = released_index(folder)
                print(*files.values())


if __name__ == "__main__":
    main()
