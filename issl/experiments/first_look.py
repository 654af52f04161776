"""The plan of the first look: real photos, ranked by their influence under a released encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from issl.errors import IsslError
from issl.experiments.cache import MANIFEST, Stage, damaged
from issl.experiments.given import CheckpointFile, Given
from issl.experiments.plan import Scored
from issl.experiments.stages import Influence
from issl.files import provided
from issl.pretraining import recipes


class FirstLook(Scored):
    """A run's first picture; no notebook. It is made where CIFAR-10 is found, before all else.

    encoder   the key of a released training (released/README.md), scored as a file: whoever has the data set in another
              layout, and so under another fingerprint, can read it too
    shown     images at each end of the ranking
    """

    notebook: ClassVar[str] = "first_look"

    dataset: str = "cifar10"
    n: int = Field(3000, ge=16)
    encoder: str = "e5fc9138317555fc"
    shown: int = Field(24, ge=1)
    duplicates: float = Field(0.0, ge=0, le=0.3)
    atypical: float = Field(0.0, ge=0, le=0.3)

    @property
    def released(self) -> Path:
        """The folder of the released encoder. Raises IsslError where it is missing or damaged."""
        folder = provided("released") / "pretrain" / self.encoder
        if (damage := damaged(folder)) is not None:
            raise IsslError(f"the released encoder {self.encoder}: {damage}")
        return folder

    def pretrain(self, method: recipes.Method | None = None, seed: int | None = None) -> Given:
        """The released encoder."""
        return Given(method=self.method, checkpoint=CheckpointFile(file=self.released / "encoder.safetensors"))

    def scores(self) -> Influence:
        """Of n images, under one draw of the noise."""
        return self.influence(self.pretrain())

    def encoder_in_words(self) -> str:
        """How it was trained, by its manifest."""
        how = json.loads((self.released / MANIFEST).read_text())["config"]
        method = recipes.NAMES[how["recipe"]["method"]]
        return f"{method} encoder, width {how['width']}, {how['epochs']} epochs on {how['data']['n']:,} images"

    def stages(self) -> list[Stage]:
        return [self.scores()]

    def settings(self) -> dict[str, Any]:
        """The fields that decide the picture."""
        own = ("n", "encoder", "shown", "method", "mean", "std", "rank", "damping", "noise_seed")
        return {"dataset": self.set_name, **{name: getattr(self, name) for name in own}}
