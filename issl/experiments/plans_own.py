"""The plans of the notebooks that go beyond the paper; see `issl.experiments.plan` for what all plans share."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from issl.experiments.cache import Stage
from issl.experiments.plan import Plan, Scored
from issl.experiments.settings import Curvature, Data
from issl.experiments.stages import Cross, Draw, Embed, Lists, Nearness, Pick, Pretrain, Stability, Top
from issl.pretraining import recipes

MEASURED = 1000  # the noise seed of measurements: no score has seen these draws
FURTHER = 100  # the seeds of order and views of trainings that go on
Kind = Literal["further", "anew"]


class Retrained(Scored):
    """A notebook that trains again without some images, and measures what that changed.

    queries          the first so many test images
    draws            perturbation draws an image, in scores and in measurements
    further_epochs   "further": the encoder goes on training, without the images
    further_lr       with this learning rate (for a batch of 256), on small views
    """

    n: int = Field(256, ge=16)  # many small trainings
    width: int = Field(4, ge=1)
    queries: int = Field(24, ge=4)
    draws: int = Field(4, ge=1)
    seeds: int = Field(2, ge=2)
    further_epochs: int = Field(4, ge=1)
    further_lr: float = Field(0.05, gt=0)

    def again(self, kind: Kind, seed: int, without: Draw | Pick | Top | None, gaps: bool = False) -> Pretrain:
        """Training number `seed` without these images: anew from fresh weights, or further from the first encoder."""
        if kind == "anew":
            return self.pretrain(seed=self.seed + seed, without=without, gaps=gaps)
        first = self.pretrain()
        recipe = first.recipe.model_copy(update={"lr": self.further_lr, "small": 1.0})
        return first.model_copy(
            update={
                "start": first, "recipe": recipe, "epochs": self.further_epochs, "seed": self.seed + FURTHER + seed,
                "without": without, "gaps": gaps,
            }
        )  # fmt: skip

    def cross(self, encoder: Pretrain, curvature: Curvature | None = None) -> Cross:
        """Cross-influence of all images on the queries."""
        return Cross(
            pretrain=encoder, data=self.data(), query=self.asked_for(), perturbation=self.noise,
            curvature=curvature or self.curvature, seed=self.noise_seed, draws=self.draws,
        )  # fmt: skip

    def nearness(self, encoder: Pretrain) -> Nearness:
        train, query = (Embed(pretrain=encoder, data=data) for data in (self.data(), self.asked_for()))
        return Nearness(train=train, query=query)

    def stability(self, encoder: Pretrain, data: Data) -> Stability:
        return Stability(pretrain=encoder, data=data, perturbation=self.noise, seed=MEASURED, draws=self.draws)

    def asked_for(self) -> Data:
        """The queries."""
        return self.data("test").model_copy(update={"first": self.queries})


class Validation(Retrained):
    """10_validation: does the score foretell what retraining shows?"""

    notebook: ClassVar[str] = "10_validation"

    images: int = Field(6, ge=4)  # left out one at a time, spread evenly over the ranks of the score
    subsets: int = Field(12, ge=4)
    share: float = Field(0.5, gt=0, lt=1)  # of the images, in a subset
    ranks: tuple[int, ...] = (4, 64)  # of LoGra, beside `rank`
    dampings: tuple[float, ...] = (0.001, 10.0)  # beside `damping`
    kinds: tuple[str, ...] = ("logra-pca", "ekfac", "diagonal", "exact")  # other curvatures
    points: int = Field(200, ge=20)
    side: int = Field(8, ge=2)
    outputs: int = Field(16, ge=1)
    anchor: float = Field(0.01, gt=0)

    def curvatures(self) -> dict[str, Curvature]:
        """By name; the first is the paper's."""
        usual = self.curvature
        found = {f"LoGra, rank {self.rank}": usual}
        found |= {f"LoGra, rank {r}": usual.model_copy(update={"rank": r}) for r in self.ranks}
        names = {"logra-pca": "LoGra, PCA", "ekfac": "EK-FAC"}
        found |= {names.get(k, k): usual.model_copy(update={"kind": k}) for k in self.kinds}
        found |= {f"λ = {d:g} × mean": usual.model_copy(update={"damping": d}) for d in self.dampings}
        return found | {"none (identity)": usual.model_copy(update={"kind": "identity"})}

    def stages(self) -> dict[str, Stage]:
        """`influence`, `cross NAME`, `nearness`, `queries` (their losses) of the first encoder; KIND/S: losses of all
        images after training S on all, KIND/without I/S: without the image `pick I`, KIND/features … the features;
        KIND/subset K/S: losses of the queries after training on what `draw K` leaves."""
        first = self.pretrain()
        scores = self.influence(first, draws=self.draws)
        found: dict[str, Stage] = {"encoder": first, "influence": scores, "nearness": self.nearness(first)}
        found |= {"evaluation": self.evaluate(first), "queries": self.stability(first, self.asked_for())}
        found |= {f"cross {name}": self.cross(first, c) for name, c in self.curvatures().items()}
        picks = {i: Pick(influence=scores, quantile=i / (self.images - 1)) for i in range(self.images)}
        draws = {k: Draw(data=self.data(), share=1 - self.share, seed=k) for k in range(self.subsets)}
        found |= {f"pick {i}": pick for i, pick in picks.items()} | {f"draw {k}": draw for k, draw in draws.items()}
        kinds: tuple[Kind, ...] = ("further", "anew")
        for kind in kinds:
            for s in range(self.seeds):
                every = self.again(kind, s, None)
                found |= {
                    f"{kind}/{s}": self.stability(every, self.data()),
                    f"{kind}/features {s}": self._features(every),
                }
                for i, pick in picks.items():
                    without = self.again(kind, s, pick, gaps=True)
                    found[f"{kind}/without {i}/{s}"] = self.stability(without, self.data())
                    found[f"{kind}/features without {i}/{s}"] = self._features(without)
                for k, draw in draws.items():
                    found[f"{kind}/subset {k}/{s}"] = self.stability(self.again(kind, s, draw), self.asked_for())
        return found

    def _features(self, encoder: Pretrain) -> Embed:
        return Embed(pretrain=encoder, data=self.data())


class Continual(Scored):
    """12_continual: an encoder learns a second task. Does influence foretell which images of the first it forgets?"""

    notebook: ClassVar[str] = "12_continual"

    width: int = Field(4, ge=1)
    tasks: tuple[Literal["classes", "style"], ...] = ("classes", "style")
    classes: int = Field(5, ge=1)  # so many are the first task, the others the second
    drawn: int = Field(256, ge=32)  # scenes of each style
    legs: int = Field(2, ge=1)
    leg_epochs: int = Field(2, ge=1)
    seeds: int = Field(1, ge=1)
    neighbours: int = Field(10, ge=1)

    def sets(self, task: str, split: str = "train") -> tuple[Data, Data]:
        """The images of the first task and of the second."""
        if task == "style":
            n = self.drawn if split == "train" else self.n_test
            first, second = (Data(name="scenes", split=split, n=n, uniform=u) for u in (0.0, 1.0))
            return first, second
        both = self.data(split)
        labels = range(100)  # more than any set has
        return (
            both.model_copy(update={"classes": tuple(labels[: self.classes])}),
            both.model_copy(update={"classes": tuple(labels[self.classes :])}),
        )

    def stages(self) -> dict[str, Stage]:
        """TASK/S/first/0, TASK/S/second/L and TASK/S/more/L (L = 1 … legs): the encoder after the first task, after L
        legs on the second, and after as many more on the first. Of each /influence and /features of the first task's
        images, and /old and /new, evaluations on both tasks."""
        found: dict[str, Stage] = {}
        for task in self.tasks:
            old, new = self.sets(task)
            for s in range(self.seeds):
                first = self.pretrain(seed=self.seed + s).model_copy(update={"data": old})
                found |= self._looked_at(f"{task}/{s}/first/0", first, task)
                for way, data in (("second", new), ("more", old)):
                    encoder = first
                    for leg in range(1, self.legs + 1):
                        encoder = first.model_copy(
                            update={
                                "data": data, "start": encoder, "epochs": self.leg_epochs,
                                "seed": self.seed + s + FURTHER * leg,
                            }
                        )  # fmt: skip
                        found |= self._looked_at(f"{task}/{s}/{way}/{leg}", encoder, task)
        return found

    def _looked_at(self, label: str, encoder: Pretrain, task: str) -> dict[str, Stage]:
        (old, new), tests = self.sets(task), self.sets(task, "test")
        found: dict[str, Stage] = {
            f"{label}/encoder": encoder, f"{label}/influence": self.influence(encoder, data=old),
            f"{label}/features": Embed(pretrain=encoder, data=old),
        }  # fmt: skip
        for name, train, test in (("old", old, tests[0]), ("new", new, tests[1])):
            found[f"{label}/{name}"] = self.evaluate(encoder, train, test)
        return found


class Explained(Scored):
    """13_explained: how much of the score do simple statistics explain?"""

    notebook: ClassVar[str] = "13_explained"

    methods: tuple[recipes.Method, ...] = recipes.SSL
    neighbours: int = Field(10, ge=1)

    def stages(self) -> dict[str, Stage]:
        """METHOD/encoder, METHOD/features, METHOD/influence S of two noise seeds."""
        found: dict[str, Stage] = {}
        for method in self.methods:
            encoder = self.pretrain(method)
            found |= {f"{method}/encoder": encoder, f"{method}/features": Embed(pretrain=encoder, data=self.data())}
            found |= {f"{method}/influence {s}": self.influence(encoder, self.noise_seed + s) for s in range(2)}
        return found


class Bridges(Scored):
    """14_bridges: do images of high influence hold the classes together? Does rarity raise a background's influence?"""

    notebook: ClassVar[str] = "14_bridges"

    methods: tuple[recipes.Method, ...] = recipes.SSL
    neighbours: int = Field(10, ge=1)
    shares: tuple[float, ...] = (0.05, 0.1)
    draws: int = Field(40, ge=20)  # removals at random
    doses: tuple[float, ...] = Field((0.1, 0.5, 0.9), min_length=3)  # shares of uniform backgrounds in training
    drawn: int = Field(512, ge=32)
    drawn_epochs: int = Field(4, ge=1)
    dose_seeds: int = Field(1, ge=1)

    def stages(self) -> dict[str, Stage]:
        """METHOD/encoder, influence, features, test (features); dose P/S and dose P/S encoder: scores of training S
        on scenes of which the share P has a uniform background, by the first method."""
        found, test = self.per_method(self.methods), self.data("test")
        found |= {f"{method}/test": Embed(pretrain=self.pretrain(method), data=test) for method in self.methods}
        for dose in self.doses:
            data = self.dose(dose)
            for s in range(self.dose_seeds):
                encoder = self.pretrain(self.methods[0], self.seed + s).model_copy(
                    update={"data": data, "epochs": self.drawn_epochs}
                )
                found |= {
                    f"dose {dose:g}/{s} encoder": encoder, f"dose {dose:g}/{s}": self.influence(encoder, data=data),
                }  # fmt: skip
        return found

    def dose(self, share: float) -> Data:
        """Scenes of which this share has a uniform background; all else is the same at every share."""
        return Data(name="scenes", n=self.drawn, uniform=share)


class Taught(Retrained):
    """15_taught: which training images taught the encoder about this test image? Against nearest neighbours."""

    notebook: ClassVar[str] = "15_taught"

    asked: int = Field(4, ge=2)  # the first so many queries are retrained for
    share: float = Field(0.1, gt=0, lt=1)  # of the training images, removed for a query
    drawn: int = Field(4, ge=2)  # removals at random
    shown: int = Field(3, ge=1)
    top: int = Field(8, ge=1)

    @property
    def k(self) -> int:
        return max(1, round(self.share * self.n))

    def stages(self) -> dict[str, Stage]:
        """`cross`, `nearness`, `queries` (their features) of the encoder; KIND/S/NAME: losses of the queries after
        training S without `set NAME`, and KIND/S/NAME features; NAME: influence Q and nearest Q for query Q, random R,
        none."""
        first = self.pretrain()
        cross, near = self.cross(first), self.nearness(first)
        found: dict[str, Stage] = {"encoder": first, "cross": cross, "nearness": near, "queries": near.query}
        sets: dict[str, Draw | Top | None] = {"none": None}
        for q in range(self.asked):
            sets[f"influence {q}"] = Top(scores=cross, query=q, k=self.k)
            sets[f"nearest {q}"] = Top(scores=near, query=q, k=self.k)
        sets |= {f"random {r}": Draw(data=self.data(), share=self.share, seed=r) for r in range(self.drawn)}
        found |= {f"set {name}": chosen for name, chosen in sets.items() if chosen is not None}
        kinds: tuple[Kind, ...] = ("further", "anew")
        for kind in kinds:
            for s in range(self.seeds):
                for name, chosen in sets.items():
                    encoder = self.again(kind, s, chosen)
                    found[f"{kind}/{s}/{name}"] = self.stability(encoder, self.asked_for())
                    found[f"{kind}/{s}/{name} features"] = Embed(pretrain=encoder, data=self.asked_for())
        return found


class Explorer(Scored):
    """The report's image explorer; no notebook. Its images are the first so many of the profile's."""

    notebook: ClassVar[str] = "report"

    methods: tuple[recipes.Method, ...] = recipes.SSL
    shown: int = Field(2000, ge=16)
    neighbours: int = Field(6, ge=1)

    def images(self) -> Data:
        data = self.data()
        return data if self.shown >= self.n else data.model_copy(update={"first": self.shown})

    def stages(self) -> dict[str, Stage]:
        """METHOD/influence, METHOD/lists."""
        found: dict[str, Stage] = {}
        for method in self.methods:
            encoder = self.pretrain(method)
            found[f"{method}/influence"] = self.influence(encoder, data=self.images())
            found[f"{method}/lists"] = Lists(
                features=Embed(pretrain=encoder, data=self.images()), perturbation=self.noise,
                curvature=self.curvature, seed=self.noise_seed, k=self.neighbours,
            )  # fmt: skip
        return found


BEYOND: tuple[type[Plan], ...] = (Validation, Continual, Explained, Bridges, Taught)
