"""The plan of the report's image explorer."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from issl.audit.cache import Stage
from issl.audit.plan import Readable
from issl.audit.settings import Data
from issl.audit.stages import Influence, Lists
from issl.pretraining import recipes


class Explorer(Readable):
    """The report's image explorer; no notebook. It shows the first `shown` images of the
    profile."""

    notebook: ClassVar[str] = "report"
    takes_checkpoints: ClassVar[bool] = True

    methods: tuple[recipes.Method, ...] = recipes.SSL
    shown: int = Field(2000, ge=16)
    neighbours: int = Field(6, ge=1)

    def images(self) -> Data:
        data = self.data()
        return data if self.shown >= self.n else data.model_copy(update={"first": self.shown})

    def scores(self, method: recipes.Method) -> Influence:
        return self.influence(self.pretrain(method), data=self.images())

    def lists(self, method: recipes.Method) -> Lists:
        """For each image, those nearest to it and those of the highest influence on it, both by the
        output that is scored."""
        features = self.features(self.pretrain(method), self.images())
        return Lists(
            features=features.model_copy(update={"output": self.output}),
            perturbation=self.noise,
            curvature=self.curvature,
            seed=self.noise_seed,
            k=self.neighbours,
        )

    def stages(self) -> list[Stage]:
        return [
            stage for method in self.methods for stage in (self.scores(method), self.lists(method))
        ]
