"""The plan: what a notebook needs, declared once (the plans themselves are in `issl.experiments.plans_paper`).

A plan's fields are the notebook's parameters (the same names and defaults stand in its `parameters` cell; a
test compares them), and `stages` names every artifact that it reads. So `issl run` can compute them all
before any notebook starts, and a notebook then only reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import Field, ValidationError

from issl.config import Config, explain
from issl.devices import pick_device
from issl.errors import IsslError
from issl.experiments.cache import Artifacts, Stage
from issl.experiments.settings import Curvature, Data, Injection, Noise
from issl.experiments.stages import Choice, Embed, Evaluate, Influence, Pretrain
from issl.pretraining import recipes

P = TypeVar("P", bound="Plan")  # not typing.Self: a checker of shapes at run time cannot resolve it in a method


class Plan(Config):
    """What all notebooks share: where to read and write, the images, and the encoder that is trained.

    duplicates, atypical   shares of the images that are replaced, see `issl.data.injection`; 0 nearly everywhere
    methods                for notebooks about several; `method` for those about one
    """

    notebook: ClassVar[str]
    last: ClassVar[bool] = False  # does it read what the other notebooks left?

    profile: str = "quick"
    out: str = "."
    data_root: str | None = None
    device: str = "auto"
    dataset: str = "scenes"
    n: int = Field(512, ge=16)
    n_test: int = Field(300, ge=16)
    size: int | None = None
    duplicates: float = Field(0.03, ge=0, le=0.3)
    atypical: float = Field(0.03, ge=0, le=0.3)
    method: recipes.Method = "simclr"
    recipe: recipes.Variant = "short"
    width: int = Field(8, ge=1)
    epochs: int = Field(4, ge=1)
    batch_size: int = Field(64, ge=2)
    seed: int = Field(0, ge=0)

    @classmethod
    def of(cls: type[P], cell: Mapping[str, Any]) -> P:
        """The plan of a notebook's parameters: `plan = SeedCorrelation.of(globals())`."""
        missing = [name for name in cls.model_fields if name not in cell]
        if missing:
            raise IsslError(f"{cls.notebook}: the parameters cell lacks {', '.join(missing)}")
        try:
            return cls(**{name: cell[name] for name in cls.model_fields})
        except ValidationError as error:
            raise explain(error, cls.notebook) from error

    def data(self, split: str = "train", n: int | None = None) -> Data:
        """The images of this notebook; nothing is injected into a test set."""
        root = None if self.data_root is None else Path(self.data_root)
        inject = Injection(duplicates=self.duplicates, atypical=self.atypical)
        mixed = split == "train" and (self.duplicates > 0 or self.atypical > 0)
        n = (self.n if split == "train" else self.n_test) if n is None else n
        return Data(name=self.dataset, split=split, n=n, root=root, size=self.size, inject=inject if mixed else None)

    def pretrain(
        self, method: recipes.Method | None = None, seed: int | None = None, without: Choice | None = None,
        gaps: bool = False,
    ) -> Pretrain:  # fmt: skip
        return Pretrain(
            data=self.data(), recipe=recipes.recipe(method or self.method, self.recipe), width=self.width,
            epochs=self.epochs, batch_size=self.batch_size, seed=self.seed if seed is None else seed, without=without,
            gaps=gaps,
        )  # fmt: skip

    def stages(self) -> dict[str, Stage]:
        """Every artifact that the notebook reads, by the name it has there."""
        return {"encoder": self.pretrain()}

    def reads(self) -> list[Path]:
        """What else it reads: files that other notebooks left."""
        return []

    def artifacts(self, progress: bool = False) -> Artifacts:
        return Artifacts(Path(self.out) / "artifacts", pick_device(self.device), progress)

    def settings(self) -> dict[str, Any]:
        """What decides the results; where files lie does not."""
        return self.model_dump(mode="json", exclude={"out", "data_root", "device"})

    @property
    def figures(self) -> Path:
        return Path(self.out) / "figures" / self.profile

    @property
    def results(self) -> Path:
        return Path(self.out) / "results" / self.profile


class Scored(Plan):
    """With the settings of the influence."""

    mean: float = 0.05
    std: float = Field(0.2, ge=0)
    rank: int = Field(16, ge=1)
    damping: float = Field(0.1, gt=0)
    noise_seed: int = Field(0, ge=0)

    @property
    def noise(self) -> Noise:
        return Noise(mean=self.mean, std=self.std)

    @property
    def curvature(self) -> Curvature:
        return Curvature(rank=self.rank, damping=self.damping)

    def influence(self, encoder: Pretrain, seed: int | None = None, **changes: Any) -> Influence:
        """The scores of this notebook's images under an encoder; `changes` are fields of the stage."""
        settings = {
            "data": self.data(), "perturbation": self.noise,
            "curvature": self.curvature,
            "seed": self.noise_seed if seed is None else seed, **changes,
        }  # fmt: skip
        return Influence(pretrain=encoder, **settings)

    def evaluate(self, encoder: Pretrain, train: Data | None = None, test: Data | None = None) -> Evaluate:
        """kNN and linear probe of an encoder, on all training images (or `train`) whether it saw them or not."""
        a, b = (Embed(pretrain=encoder, data=d) for d in (train or self.data(), test or self.data("test")))
        return Evaluate(train=a, test=b, k=max(1, min(200, self.n // 20)))

    def per_method(self, methods: tuple[recipes.Method, ...]) -> dict[str, Stage]:
        """METHOD/encoder, METHOD/influence, METHOD/features for each method."""
        found: dict[str, Stage] = {}
        for method in methods:
            encoder = self.pretrain(method)
            found |= {
                f"{method}/encoder": encoder, f"{method}/influence": self.influence(encoder),
                f"{method}/features": Embed(pretrain=encoder, data=self.data()),
            }  # fmt: skip
        return found
