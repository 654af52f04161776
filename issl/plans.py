"""Plans: what each notebook needs, declared once.

A plan's fields are the notebook's parameters (the same names and defaults stand in its `parameters` cell; a
test compares them), and `stages` names every artifact that it reads. So `issl run` can compute them all
before any notebook starts, and a notebook then only reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, ValidationError

from issl import recipes
from issl.artifacts import Artifacts, Stage
from issl.config import Config, explain
from issl.errors import IsslError
from issl.stages import (
    Augmentation,
    Curvature,
    Data,
    Embed,
    Evaluate,
    Influence,
    Injection,
    Noise,
    Pretrain,
    Prune,
    Thin,
)  # fmt: skip

SSL: tuple[recipes.Method, ...] = ("simclr", "byol", "barlow_twins")


class Plan(Config):
    """What all notebooks share: where to read and write, the images, and the encoder that is trained.

    duplicates, atypical   shares of the images that are replaced, see `issl.injection`; 0 nearly everywhere
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
    def of(cls, cell: Mapping[str, Any]) -> Self:
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
        self, method: recipes.Method | None = None, seed: int | None = None, without: Prune | Thin | None = None
    ) -> Pretrain:
        return Pretrain(
            data=self.data(), recipe=recipes.recipe(method or self.method, self.recipe), width=self.width,
            epochs=self.epochs, batch_size=self.batch_size, seed=self.seed if seed is None else seed, without=without,
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

    def influence(self, encoder: Pretrain, seed: int | None = None, **changes: Any) -> Influence:
        """The scores of this notebook's images under an encoder; `changes` are fields of the stage."""
        settings = {
            "data": self.data(), "perturbation": Noise(mean=self.mean, std=self.std),
            "curvature": Curvature(rank=self.rank, damping=self.damping),
            "seed": self.noise_seed if seed is None else seed, **changes,
        }  # fmt: skip
        return Influence(pretrain=encoder, **settings)

    def evaluate(self, encoder: Pretrain) -> Evaluate:
        """kNN and linear probe of an encoder, on all training images whether it saw them or not."""
        train, test = Embed(pretrain=encoder, data=self.data()), Embed(pretrain=encoder, data=self.data("test"))
        return Evaluate(train=train, test=test, k=max(1, min(200, self.n // 20)))


class Method(Plan):
    """00_method: the score step by step on a few images."""

    notebook: ClassVar[str] = "00_method"

    images: int = Field(48, ge=8)
    rank: int = Field(16, ge=1)
    damping: float = Field(0.1, gt=0)


class SeedCorrelation(Scored):
    """01_seed_correlation: do the scores of two seeds agree, of the noise, and of the training?"""

    notebook: ClassVar[str] = "01_seed_correlation"

    methods: tuple[recipes.Method, ...] = SSL
    noise_seeds: int = Field(2, ge=2)
    train_seeds: int = Field(2, ge=2)

    def stages(self) -> dict[str, Stage]:
        found: dict[str, Stage] = {}
        for method in self.methods:
            for seed in range(self.train_seeds):
                encoder = self.pretrain(method, self.seed + seed)
                found[f"{method}/encoder {seed}"] = encoder
                for noise in range(self.noise_seeds if seed == 0 else 1):
                    found[f"{method}/influence {seed} {noise}"] = self.influence(encoder, self.noise_seed + noise)
        return found


class AugmentationAblation(Scored):
    """02_augmentation_ablation: is Gaussian noise the most stable perturbation?"""

    notebook: ClassVar[str] = "02_augmentation_ablation"

    methods: tuple[recipes.Method, ...] = ("simclr",)
    scored: int = Field(128, ge=16)
    sigmas: tuple[float, ...] = (0.05, 0.2, 0.4)
    strengths: tuple[float, ...] = (1.0,)
    draws: tuple[int, ...] = (1, 4)

    def perturbations(self) -> dict[str, Noise | Augmentation]:
        """Every perturbation by its name; of flip and grayscale the strength is the share of images changed."""
        found: dict[str, Noise | Augmentation] = {f"noise {s:g}": Noise(mean=self.mean, std=s) for s in self.sigmas}
        for kind in ("crop", "flip", "jitter", "blur", "grayscale", "chain"):
            for strength in self.strengths:
                usual = {"flip": 0.5, "grayscale": 0.2}.get(kind, 1.0)
                found[f"{kind} {strength:g}"] = Augmentation(kind=kind, strength=usual * strength)
        return found

    def stages(self) -> dict[str, Stage]:
        """`METHOD/PERTURBATION/draws K/seed S`; seeds 0 and 1."""
        found: dict[str, Stage] = {}
        data = self.data().model_copy(update={"first": self.scored})
        for method in self.methods:
            encoder = self.pretrain(method)
            found[f"{method}/encoder"] = encoder
            for name, perturbation in self.perturbations().items():
                # several draws of what the paper uses and of what SSL uses; of the others one
                many = self.draws if name in (f"noise {self.std:g}", "crop 1", "chain 1") else self.draws[:1]
                for draws in many:
                    for seed in range(2):
                        found[f"{method}/{name}/draws {draws}/seed {seed}"] = self.influence(
                            encoder, self.noise_seed + seed, data=data, perturbation=perturbation, draws=draws
                        )
        return found


class BackgroundBias(Scored):
    """03_background_bias: do images of high influence have uniform backgrounds?"""

    notebook: ClassVar[str] = "03_background_bias"

    methods: tuple[recipes.Method, ...] = SSL
    gallery: int = Field(24, ge=1)
    neighbours: int = Field(10, ge=1)
    drawn: int = Field(512, ge=16)
    drawn_epochs: int = Field(4, ge=1)
    swapped: int = Field(96, ge=16)

    def stages(self) -> dict[str, Stage]:
        """METHOD/encoder, influence, features, evaluation; `swapped`: scores of the same scenes on each background,
        under an encoder of the first method trained on scenes, `drawn encoder`."""
        found: dict[str, Stage] = {}
        for method in self.methods:
            encoder = self.pretrain(method)
            found |= {
                f"{method}/encoder": encoder, f"{method}/influence": self.influence(encoder),
                f"{method}/features": Embed(pretrain=encoder, data=self.data()),
                f"{method}/evaluation": self.evaluate(encoder),
            }  # fmt: skip
        # on scenes, the encoder is the one of the other questions
        world = {"dataset": "scenes", "n": self.drawn, "size": None, "epochs": self.drawn_epochs}
        drawn = self.model_copy(update=world) if self.dataset != "scenes" else self
        encoder = drawn.pretrain(self.methods[0])
        twins = Data(name="scenes-swapped", n=self.swapped)
        return found | {"drawn encoder": encoder, "swapped": self.influence(encoder, data=twins)}


class Duplicates(Scored):
    """04_duplicates: does low influence find duplicates?"""

    notebook: ClassVar[str] = "04_duplicates"

    methods: tuple[recipes.Method, ...] = SSL

    def stages(self) -> dict[str, Stage]:
        return _per_method(self, self.methods)


class Fairness(Scored):
    """05_fairness: does influence differ between groups of people, and rise in a group that is thinned?"""

    notebook: ClassVar[str] = "05_fairness"

    methods: tuple[recipes.Method, ...] = ("simclr",)
    attributes: tuple[str, ...] = ("group", "background")
    thinned: str = "warm"  # the group (of the first attribute) that is thinned
    keep: float = Field(0.1, gt=0, lt=1)
    seeds: int = Field(1, ge=1)

    def stages(self) -> dict[str, Stage]:
        """METHOD/encoder, influence, features; METHOD/thinned S and METHOD/random S: scores of all images after a
        training without most of the group, and without as many images at random."""
        found = _per_method(self, self.methods)
        for method in self.methods:
            for seed in range(self.seeds):
                for name, at_random in (("thinned", False), ("random", True)):
                    thin = Thin(
                        data=self.data(), attribute=self.attributes[0], value=self.thinned, keep=self.keep,
                        at_random=at_random, seed=seed,
                    )  # fmt: skip
                    encoder = self.pretrain(method, self.seed + seed, thin)
                    found |= {
                        f"{method}/{name} {seed} positions": thin, f"{method}/{name} {seed} encoder": encoder,
                        f"{method}/{name} {seed}": self.influence(encoder),
                    }  # fmt: skip
        return found


class Pruning(Scored):
    """06_pruning: does removing the images of highest influence improve what is learned?"""

    notebook: ClassVar[str] = "06_pruning"

    methods: tuple[recipes.Method, ...] = ("simclr",)
    shares: tuple[float, ...] = (0.2,)
    seeds: int = Field(2, ge=1)

    def stages(self) -> dict[str, Stage]:
        """METHOD/influence of the encoder of the first seed; METHOD/WHICH SHARE/seed S: evaluation of an encoder
        trained anew without these, and METHOD/none 0/seed S of one trained on all."""
        found: dict[str, Stage] = {}
        for method in self.methods:
            scores = self.influence(self.pretrain(method))
            found[f"{method}/influence"] = scores
            # the seed that was scored is no judge of what was removed by its scores
            for seed in range(self.seed + 1, self.seed + 1 + self.seeds):
                found[f"{method}/none 0/seed {seed}"] = self.evaluate(self.pretrain(method, seed))
                for share in self.shares:
                    for which in ("top", "bottom", "random"):
                        chosen = Prune(
                            influence=scores, which=which, share=share, seed=seed if which == "random" else 0
                        )
                        found[f"{method}/{which} {share:g}/seed {seed}"] = self.evaluate(
                            self.pretrain(method, seed, chosen)
                        )
        return found


class Outliers(Scored):
    """07_outliers: does high influence find atypical images?"""

    notebook: ClassVar[str] = "07_outliers"

    methods: tuple[recipes.Method, ...] = SSL

    def stages(self) -> dict[str, Stage]:
        return _per_method(self, self.methods)


class SupervisedVsSSL(Scored):
    """08_supervised_vs_ssl: do supervised and self-supervised models depend on other images?"""

    notebook: ClassVar[str] = "08_supervised_vs_ssl"

    methods: tuple[recipes.Method, ...] = SSL
    share: float = Field(0.2, gt=0, lt=1)
    seeds: int = Field(2, ge=1)

    def stages(self) -> dict[str, Stage]:
        """METHOD/influence, features; supervised/influence (of the cross-entropy) and supervised/stability; for the
        first method and the supervised model TRAINED/WHICH by SCORE/seed S: evaluations after pruning."""
        found = _per_method(self, self.methods)
        supervised = self.pretrain("supervised")
        loss = self.influence(supervised, perturbation=Noise(mean=0.0, std=0.0), loss="cross_entropy")
        found |= {
            "supervised/encoder": supervised, "supervised/influence": loss,
            "supervised/stability": self.influence(supervised),
        }  # fmt: skip
        scores = {"ssl": self.influence(self.pretrain(self.methods[0])), "supervised": loss}
        for trained in (self.methods[0], "supervised"):
            for seed in range(self.seed + 1, self.seed + 1 + self.seeds):
                found[f"{trained}/none/seed {seed}"] = self.evaluate(self.pretrain(trained, seed))
                choices = {
                    f"top by {name}": Prune(influence=s, which="top", share=self.share) for name, s in scores.items()
                }
                choices["random"] = Prune(influence=scores["ssl"], which="random", share=self.share, seed=seed)
                for name, chosen in choices.items():
                    found[f"{trained}/{name}/seed {seed}"] = self.evaluate(self.pretrain(trained, seed, chosen))
        return found


class LinearTheory(Plan):
    """09_linear_theory: the closed form of a linear encoder, checked by retraining without a point."""

    notebook: ClassVar[str] = "09_linear_theory"

    points: int = Field(200, ge=20)
    side: int = Field(8, ge=2)
    outputs: int = Field(16, ge=1)
    anchor: float = Field(0.01, gt=0)
    removed: int = Field(60, ge=5)

    def stages(self) -> dict[str, Stage]:
        return {}


class ClaimsAudit(Plan):
    """11_claims_audit: all claims in one table, from the records that the other notebooks left."""

    notebook: ClassVar[str] = "11_claims_audit"
    last: ClassVar[bool] = True

    def stages(self) -> dict[str, Stage]:
        return {}

    def reads(self) -> list[Path]:
        """The records of this profile, and those of others that are kept with the figures."""
        kept = (Path(self.out) / "figures").glob("*/claims.json")
        return sorted([*self.results.glob("claim_*.json"), *(p for p in kept if p.parent != self.figures)])


def _per_method(plan: Scored, methods: tuple[recipes.Method, ...]) -> dict[str, Stage]:
    """METHOD/encoder, METHOD/influence, METHOD/features for each method."""
    found: dict[str, Stage] = {}
    for method in methods:
        encoder = plan.pretrain(method)
        found |= {
            f"{method}/encoder": encoder, f"{method}/influence": plan.influence(encoder),
            f"{method}/features": Embed(pretrain=encoder, data=plan.data()),
        }  # fmt: skip
    return found


PLANS: dict[str, type[Plan]] = {
    plan.notebook: plan
    for plan in (
        Method, SeedCorrelation, AugmentationAblation, BackgroundBias, Duplicates, Fairness, Pruning, Outliers,
        SupervisedVsSSL, LinearTheory, ClaimsAudit,
    )
}  # fmt: skip


def pick_device(name: str) -> torch.device:
    """auto is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise IsslError(f"device {name!r}: choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise IsslError("device 'cuda': torch sees no GPU here; use --device auto, or check the driver")
    return torch.device(name)
