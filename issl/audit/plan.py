"""The plan: what a notebook needs, declared once (the plans themselves are in `plans_paper` and
`plans_own`).

A plan's fields are the notebook's parameters. Its methods name the stages that the notebook reads,
and `stages` lists them all, so `issl run` can compute everything before any notebook starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import pandas as pd
from pydantic import BeforeValidator, Field, model_validator

from issl.audit.cache import Artifacts, Stage
from issl.audit.claims import Learned, format_record, provenance, record
from issl.audit.config import Config
from issl.audit.given import CheckpointFile, Given
from issl.audit.settings import Data, Injection
from issl.audit.stages import (
    AnyEncoder,
    Betweenness,
    Embed,
    Evaluate,
    Influence,
    Neighbours,
    Pretrain,
)
from issl.audit.stats.statistics import Estimate, proportion
from issl.audit.table_stages import Geometry, Known, Pixels, Thumbnails, shown_images
from issl.data import datasets
from issl.data.images import Images
from issl.devices import pick_device
from issl.errors import IsslError
from issl.files import atomic, write_json
from issl.influence.curvature import LoGra
from issl.influence.perturbation import GaussianNoise
from issl.pretraining import recipes
from issl.pretraining.encoder import PIXEL_STD, Output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Unit = Literal["range", "normalised"]  # the pixels that a noise's mean and std apply to
TESTED_ON = {"cifair10": "cifar10"}  # sets without a test set of their own
Epochs = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Snapshots = Annotated[int, Field(ge=1)] | tuple[Share, ...]
Files = Annotated[
    tuple[CheckpointFile, ...],
    Field(min_length=1),
    BeforeValidator(lambda v: v if isinstance(v, list | tuple) else [v]),
]


def noise_in(
    unit: Unit, mean: float, std: float, kind: type[GaussianNoise] = GaussianNoise
) -> GaussianNoise:
    """Noise whose mean and std are in this unit; every encoder here normalises by PIXEL_STD."""
    if unit == "normalised":
        return kind.of_normalised(PIXEL_STD, mean, std)
    return kind(mean, std)


P = TypeVar("P", bound="Plan")
Door = Literal["tables", "encoders", "images"]
Labels = tuple[str | int | float, ...]
BY = "method encoder"  # the labels of most stages; the network before training is "untrained 0"
UNTRAINED = "untrained"


@dataclass(frozen=True)
class Cells:
    """Stages of one kind, told apart by labels.

    Args:
        columns: what the labels are called, such as "method encoder noise".
        stages: by their labels, in the order of `columns`.
    """

    columns: str
    stages: Mapping[Labels, Stage]


def under(
    encoders: Mapping[Labels, AnyEncoder], stage: Callable[[AnyEncoder], Stage], columns: str = BY
) -> Cells:
    """A stage under each encoder."""
    return Cells(columns, {labels: stage(encoder) for labels, encoder in encoders.items()})


class Plan(Config):
    """What all notebooks share: where to read and write, the images, and the encoder that is
    trained.

    door                   what a run starts from: everything that comes with the repository
                           ("tables"), only its "encoders", or nothing of it ("images")
    pdf                    write figures as PDF, too, which takes as long as all else about them
    duplicates, atypical   shares of the images that are replaced, see `issl.audit.data.injection`;
                           0 nearly everywhere
    methods                for notebooks about several; `method` for those about one
    epochs                 one number, or one for each method
    snapshots              shares of a training after which its state is kept, or the number of such
                           states, evenly spaced; an empty list keeps only the whole learner at the
                           end (see `Pretrain.snapshots`)
    checkpoints            by method, the file of an encoder that is scored instead of training one
                           (or several files, of different seeds); methods without a file are left
                           out
    """

    notebook: ClassVar[str]
    last: ClassVar[bool] = False  # does it read what the other notebooks left?
    takes_checkpoints: ClassVar[bool] = False  # can it do without any training?

    profile: str = "quick"
    out: str = "."
    data_root: str | None = None
    device: str = "auto"
    door: Door = "tables"
    pdf: bool = True
    dataset: str = "scenes"
    n: int = Field(512, ge=16)
    n_test: int = Field(300, ge=16)
    size: int | None = None
    duplicates: float = Field(0.03, ge=0, le=0.3)
    atypical: float = Field(0.03, ge=0, le=0.3)
    method: recipes.Method = "simclr"
    recipe: recipes.Variant = "short"
    width: int = Field(8, ge=1)
    epochs: Epochs | dict[recipes.Method, Epochs] = 4
    batch_size: int = Field(64, ge=2)
    seed: int = Field(0, ge=0)
    snapshots: Snapshots | None = None
    checkpoints: dict[recipes.Method, Files] = Field({}, exclude_if=lambda given: not given)

    @model_validator(mode="before")
    @classmethod
    def _what_is_given(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """With `checkpoints`, keep only the `methods` that have a file, and set `encoders` to the
        smallest number of files of any method that is asked about."""
        given = fields.get("checkpoints")
        if not isinstance(given, dict) or not given:
            return fields
        found = dict(fields)
        if "methods" in cls.model_fields:
            methods = fields.get("methods", cls.model_fields["methods"].default)
            found["methods"] = [m for m in methods if m in given]
            if not found["methods"]:
                raise ValueError(
                    f"there are checkpoints for {', '.join(given)}; {cls.notebook} asks about "
                    f"{', '.join(methods)}"
                )
            files = [given[m] for m in found["methods"]]
            found["encoders"] = min(len(f) if isinstance(f, list | tuple) else 1 for f in files)
        return found

    @model_validator(mode="after")
    def _can_take_checkpoints(self) -> Plan:
        if not self.checkpoints:
            return self
        if not self.takes_checkpoints:
            raise ValueError(
                f"{self.notebook} trains encoders itself; leave it out of --only, or give no "
                "checkpoints"
            )
        if "supervised" in self.checkpoints:
            raise ValueError(
                f"checkpoints: the methods are {', '.join(recipes.SSL)}; a supervised encoder is "
                "not accepted"
            )
        return self

    def data(self, split: str = "train", n: int | None = None, **changes: Any) -> Data:
        """The images of this notebook; nothing is injected into a test set. `changes` are fields of
        the data."""
        train = split == "train"
        found: dict[str, Any] = {
            "name": self.dataset if train else TESTED_ON.get(self.dataset, self.dataset),
            "split": split,
            "n": (self.n if train else self.n_test) if n is None else n,
            "root": self.data_root,
            "size": self.size,
        }
        if train and (self.duplicates > 0 or self.atypical > 0):
            found["inject"] = Injection(duplicates=self.duplicates, atypical=self.atypical)
        return Data(**found | changes)

    def epochs_of(self, method: recipes.Method) -> int:
        """How many epochs this method trains."""
        if isinstance(self.epochs, int):
            return self.epochs
        if method not in self.epochs:
            raise IsslError(
                f"{self.notebook}: epochs has no entry for {method}; it has "
                f"{', '.join(self.epochs)}"
            )
        return self.epochs[method]

    def training(
        self, method: recipes.Method | None = None, number: int = 0, **changes: Any
    ) -> Pretrain:
        """A training of `method` (by default the notebook's) on the notebook's images, with the
        seed `seed` + `number`; `changes` are fields of the stage."""
        method = method or self.method
        epochs, shares = self.epochs_of(method), self.snapshots
        if isinstance(shares, int):
            shares = tuple(k / (shares + 1) for k in range(1, shares + 1))
        found: dict[str, Any] = {
            "data": self.data(),
            "recipe": recipes.recipe(method, self.recipe),
            "width": self.width,
            "epochs": epochs,
            "batch_size": self.batch_size,
            "seed": self.seed + number,
        }
        if shares is not None:
            found["snapshots"] = sorted({int(share * epochs + 1e-9) for share in shares} - {0})
        return Pretrain(**found | changes)

    def pretrain(self, method: recipes.Method | None = None, number: int = 0) -> Pretrain | Given:
        """An encoder of a method: a training, or a given one."""
        if not self.checkpoints:
            return self.training(method, number)
        method = method or self.method
        return Given(method=method, checkpoint=self.checkpoints[method][number])

    @classmethod
    def of(cls: type[P], cell: Mapping[str, Any]) -> P:
        """The plan that a notebook's parameters define: `Plan.of(globals())` after their cell."""
        return cls(**{name: cell[name] for name in cls.model_fields if name in cell})

    def tables(self) -> dict[str, Cells]:
        """Every stage that the notebook reads, in tables by name, with its labels."""
        return {}

    def stages(self) -> list[Stage]:
        return [stage for cells in self.cells.values() for stage in cells.stages.values()]

    @cached_property
    def cells(self) -> dict[str, Cells]:
        """`tables`, made once: a notebook reads from them many times."""
        return self.tables()

    @cached_property
    def store(self) -> Artifacts:
        """Where the stages' results are read from."""
        return self.artifacts()

    @cached_property
    def training_set(self) -> Images:
        """This notebook's training images."""
        return self.data().load()

    @cached_property
    def known_images(self) -> Images:
        """The images that a notebook is about, from the stages of its table "images": what is known
        about all of them, and the pixels of those that it shows."""
        known, *pictures = self.each("images").values()
        return shown_images(known, pictures)

    def image_tables(self, data: Data | None = None, *pictures: Thumbnails) -> Cells:
        """The table "images" of `data` (by default the training images), with these pictures."""
        data = data or self.data()
        found = [Known(data=data), Thumbnails(data=data), *pictures]
        return Cells("part", {(k,): stage for k, stage in enumerate(found)})

    def each(self, name: str) -> dict[Any, Any]:
        """What each stage of a table holds, by its labels, or by its label if it has only one."""
        stages = self.cells[name].stages
        return {k[0] if len(k) == 1 else k: s.read(self.store) for k, s in stages.items()}

    def read(self, name: str) -> pd.DataFrame:
        """The stages of a table as one tidy table: the labels' columns, then the stages' own."""
        cells = self.cells[name]
        labels = cells.columns.split()
        found = [
            stage.read(self.store).assign(**dict(zip(labels, key, strict=True)))
            for key, stage in cells.stages.items()
        ]
        table = pd.concat(found, ignore_index=True)
        return table[[*labels, *(c for c in table if c not in labels)]]

    def scale(self, method: str, name: str = "accuracy") -> Learned:
        """What the encoders of a method had learned, from a table of evaluations whose first label
        is the method; claims require this (`issl.audit.claims.Scale`)."""
        knn = self.read(name).groupby(self.cells[name].columns.split())["knn"].mean()
        of_method, fresh = knn[method], float(knn[UNTRAINED].iloc[0])
        return {"knn": float(of_method.min()), "untrained": fresh, "encoders": len(of_method)}

    def record(
        self, name: str, metrics: dict[str, Estimate], method: str = "", **about: Any
    ) -> dict[str, Any]:
        """Write the record of a claim (`claims.record`) and print it. Data set, recipe, seeds,
        number of images and what the encoders learned are taken from the plan, unless `about` says
        otherwise. `method` is that of the encoders that were measured (for a claim about no method,
        what else was), and by default the variant."""
        known: dict[str, Any] = {"dataset": self.dataset, "n": self.n}
        trained = method in recipes.NAMES
        known |= self.about_encoders(method) if trained else {"method": method}
        known |= {"variant": method if trained else "", **about}
        written = record(name, metrics, self.source(), self.results, **known)
        print(format_record(written))
        return written

    def about_encoders(self, method: str) -> dict[str, Any]:
        """What a record says about a method's encoders."""
        known: dict[str, Any] = {"method": method, "recipe": self.recipe, "seeds": [self.seed]}
        return known | ({"learned": self.scale(method)} if "accuracy" in self.cells else {})

    def save(self, figure: Figure, table: pd.DataFrame, name: str = "") -> None:
        """Write a figure as NOTEBOOK or NOTEBOOK_name (PNG, PDF where the plan asks for it, its
        numbers as CSV, and where they come from as JSON), and show it."""
        import matplotlib.pyplot as plt  # slow to import

        path = self.figures / (f"{self.notebook}_{name}" if name else self.notebook)
        with atomic(path.with_suffix(".png")) as part:
            figure.savefig(part, format="png")
        if self.pdf:
            with atomic(path.with_suffix(".pdf")) as part:
                figure.savefig(part, format="pdf", metadata={"CreationDate": None})
        else:
            path.with_suffix(".pdf").unlink(missing_ok=True)  # an earlier run's
        with atomic(path.with_suffix(".csv")) as part:
            table.to_csv(part, index=False)
        write_json(path.with_suffix(".json"), self.source(), indent=1)
        plt.show()

    @property
    def scope(self) -> str:
        """Data set, number of images and profile, for figures."""
        return f"{self.set_name}, n = {self.n:,}, {self.profile} profile"

    @property
    def caption(self) -> str:
        """The scope, for a figure with intervals."""
        return f"{self.scope}; bars: 95% intervals"

    def reads(self) -> list[Path]:
        """What else the notebook reads: files that other notebooks left."""
        return []

    def artifacts(self, progress: bool = False) -> Artifacts:
        found = Artifacts(Path(self.out) / "artifacts", pick_device(self.device), progress)
        if self.door == "images":
            return replace(found, released=None)
        return replace(found, only=Pretrain.name if self.door == "encoders" else None)

    def settings(self) -> dict[str, Any]:
        """The fields that decide the results: not where files are, nor the device."""
        settings = self.model_dump(
            mode="json", exclude={"out", "data_root", "device", "door", "checkpoints"}
        )
        settings["dataset"] = self.set_name
        return settings | ({"checkpoints": self.given_files()} if self.checkpoints else {})

    @property
    def set_name(self) -> str:
        """The data set as figures and records name it: without a folder's place on this machine."""
        return datasets.without_place(self.dataset)

    def given_files(self) -> dict[str, list[dict[str, str]]]:
        """By method, the name and the digest of each checkpoint."""
        return {
            method: [file.described() for file in files]
            for method, files in self.checkpoints.items()
        }

    def source(self) -> dict[str, Any]:
        """Where this notebook's numbers come from, for its figures and records."""
        read = self.store.cached + self.store.computed
        found = provenance(self.profile, self.settings(), self.store.device, read)
        given = {"checkpoints": self.given_files()} if self.checkpoints else {}
        return found | {"images": self.identities()} | given

    def identities(self) -> dict[str, dict[str, str]]:
        """Which training and test images these are: name, digest, and how they differ from the
        published ones."""
        # a folder has no test set
        splits = ("train",) if ":" in self.dataset else ("train", "test")
        found = {split: self.data(split).which for split in splits}
        return {
            split: {"name": w.name, "digest": w.digest, "about": w.about}
            for split, w in found.items()
        }

    @property
    def figures(self) -> Path:
        return Path(self.out) / "figures" / self.profile

    @property
    def results(self) -> Path:
        return Path(self.out) / "results" / self.profile


class Scored(Plan):
    """A plan with the settings of the influence; `encoders`: how many of each method are scored."""

    mean: float = 0.05
    std: float = Field(0.2, ge=0)
    rank: int = Field(16, ge=1)
    damping: float = Field(0.1, gt=0)
    noise_seed: int = Field(0, ge=0)
    encoders: int = Field(1, ge=1)

    def encoders_of(self, methods: Iterable[recipes.Method]) -> dict[Labels, Pretrain | Given]:
        """The encoders that are scored, by method and number, and the untrained network."""
        found: dict[Labels, Pretrain | Given] = {
            (method, k): self.pretrain(method, k)
            for method in methods
            for k in range(self.encoders)
        }
        return {**found, (UNTRAINED, 0): self.untrained(next(iter(found.values())))}

    def scored_and_evaluated(self, encoders: Mapping[Labels, AnyEncoder]) -> dict[str, Cells]:
        """The tables of most notebooks: scores and accuracy under each encoder."""
        return {
            "scores": under(encoders, self.influence),
            "accuracy": under(encoders, self.evaluation),
        }

    def learned_table(self) -> pd.DataFrame:
        """Have the encoders learned enough? For the reader, the accuracy of each by kNN and by a
        linear probe."""
        hits = self.read("accuracy").groupby(BY.split(), sort=False)
        return pd.DataFrame(
            {
                name: {labels: str(proportion(part[column].to_numpy())) for labels, part in hits}
                for name, column in (("kNN", "knn"), ("linear probe", "probe"))
            }
        ).rename_axis(BY.split())

    def about_encoders(self, method: str) -> dict[str, Any]:
        seeds = [self.seed + k for k in range(self.encoders)]
        noises = [self.noise_seed]
        return super().about_encoders(method) | {"seeds": seeds, "noise_seeds": noises}

    @property
    def scope(self) -> str:
        of_each = f"{self.encoders} encoder{'s' * (self.encoders > 1)} a method"
        return f"{super().scope}, {of_each}"

    @property
    def noise(self) -> GaussianNoise:
        return self.gaussian(self.mean, self.std)

    def gaussian(self, mean: float, std: float) -> GaussianNoise:
        return GaussianNoise(mean, std)

    @property
    def curvature(self) -> LoGra:
        return LoGra(self.rank, self.damping)

    def influence(self, encoder: AnyEncoder, noise: int = 0, **changes: Any) -> Influence:
        """The scores of this notebook's images under an encoder, with noise of the seed
        `noise_seed` + `noise`; `changes` are fields of the stage."""
        settings: dict[str, Any] = {
            "data": self.data(),
            "perturbation": self.noise,
            "curvature": self.curvature,
            "seed": self.noise_seed + noise,
        }
        return Influence(pretrain=encoder, **settings | changes)

    def features(self, encoder: AnyEncoder, data: Data | None = None) -> Embed:
        """Features of this notebook's images, or of `data`, under an encoder."""
        return Embed(pretrain=encoder, data=data or self.data())

    def nearest(self, encoder: AnyEncoder, k: int) -> Neighbours:
        """The k nearest others of each of this notebook's images, under an encoder."""
        return Neighbours(features=self.features(encoder), k=k)

    def geometry(self, encoder: AnyEncoder, k: int) -> Geometry:
        """Where each image lies among its k nearest, under an encoder."""
        return Geometry(neighbours=self.nearest(encoder, k))

    def pixels(self) -> Pixels:
        """What the pixels of this notebook's images tell without an encoder."""
        return Pixels(data=self.data())

    def heads(self, methods: Iterable[recipes.Method], **settings: Any) -> list[Thumbnails]:
        """The images of highest and lowest influence under the first encoder of each method."""
        scores = [self.influence(self.pretrain(method)) for method in methods]
        return [Thumbnails(data=self.data(), scores=(s,), **settings) for s in scores]

    def betweenness(self, encoder: AnyEncoder, k: int) -> Betweenness:
        """Each image's betweenness in the graph of k nearest neighbours, under an encoder."""
        return Betweenness(neighbours=self.nearest(encoder, k), seed=self.seed)

    def evaluation(
        self, encoder: AnyEncoder, train: Data | None = None, test: Data | None = None
    ) -> Evaluate:
        """kNN and linear probe of an encoder, on all training images (or `train`) whether or not it
        was trained on them."""
        a, b = self.features(encoder, train), self.features(encoder, test or self.data("test"))
        return Evaluate(train=a, test=b, k=max(1, min(200, self.n // 20)))

    def untrained(self, encoder: Pretrain | Given) -> Pretrain:
        """The network of an encoder before any training: what it shows is not due to training.

        It is the same for every method and whatever is left out, so it is made with one recipe on
        all images. For a given encoder it is a ResNet-18 of the same width.
        """
        run = self.training() if isinstance(encoder, Given) else encoder
        changes = {
            "recipe": recipes.recipe("simclr", self.recipe),
            "width": encoder.width,
            "epochs": 0,
            "without": None,
            "snapshots": None,
            "calibrated": True,
        }
        return run.model_copy(update=changes)


class Readable(Scored):
    """A plan whose score can be read in the ways that the paper leaves open.

    output   the encoder's output whose stability is scored
    unit     of the noise's mean and std: the range of the pixels, or normalised pixels
    """

    takes_checkpoints: ClassVar[bool] = True

    output: Output = "features"
    unit: Unit = "range"
    methods: tuple[recipes.Method, ...] = recipes.SSL

    def gaussian(self, mean: float, std: float) -> GaussianNoise:
        return noise_in(self.unit, mean, std)

    def influence(self, encoder: AnyEncoder, noise: int = 0, **changes: Any) -> Influence:
        return super().influence(encoder, noise, **{"output": self.output, **changes})
