"""The plan of the first look: real photos, ranked by their influence under a released encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from issl.audit.cache import Stage
from issl.audit.given import CheckpointFile, Given
from issl.audit.plan import Scored
from issl.audit.stages import Influence
from issl.files import provided
from issl.pretraining import recipes
from issl.pretraining.encoder import load_encoder, read_encoder


class FirstLook(Scored):
    """A run's first picture; no notebook. It is made where CIFAR-10 is found, before all else.

    encoder   the name of a released one (released/README.md), scored as a file: whoever has other
              images can use it too
    shown     images at each end of the ranking
    """

    notebook: ClassVar[str] = "first_look"

    dataset: str = "cifar10"
    n: int = Field(3000, ge=16)
    encoder: str = "cifar10-simclr-w16-0"
    shown: int = Field(24, ge=1)
    duplicates: float = Field(0.0, ge=0, le=0.3)
    atypical: float = Field(0.0, ge=0, le=0.3)

    @property
    def released(self) -> Path:
        """The file of the released encoder. Raises IsslError where it is missing or damaged."""
        path = provided("released") / "encoders" / f"{self.encoder}.safetensors"
        load_encoder(path)
        return path

    def pretrain(self, method: recipes.Method | None = None, seed: int | None = None) -> Given:
        """The released encoder."""
        return Given(method=self.method, checkpoint=CheckpointFile(file=self.released))

    def scores(self) -> Influence:
        """Of n images, under one draw of the noise."""
        return self.influence(self.pretrain())

    def encoder_in_words(self) -> str:
        """How it was trained, by its header."""
        how = read_encoder(self.released)[0]["config"]
        method = recipes.NAMES[how["recipe"]["method"]]
        return f"{method} encoder, width {how['width']}, {how['epochs']} epochs on {how['data']['n']:,} images"

    def stages(self) -> list[Stage]:
        return [self.scores()]

    def settings(self) -> dict[str, Any]:
        """The fields that decide the picture."""
        own = ("n", "encoder", "shown", "method", "mean", "std", "rank", "damping", "noise_seed")
        return {"dataset": self.set_name, **{name: getattr(self, name) for name in own}}
