"""Plans: what each notebook needs, declared once.

A plan's fields are the notebook's parameters (the same names and defaults stand in its `parameters` cell; a
test compares them), and `stages` names every artifact that it reads. So `issl run` can compute them all
before any notebook starts, and a notebook then only reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from issl import recipes
from issl.config import Config
from issl.errors import IsslError
from issl.stages import Artifacts, Curvature, Data, Embed, Influence, Noise, Pretrain, Stage


class Plan(Config):
    """What all notebooks share: where to read and write, and the encoder that is trained."""

    notebook: ClassVar[str]

    profile: str = "quick"
    out: str = "."
    data_root: str | None = None
    device: str = "auto"
    dataset: str = "scenes"
    n: int = Field(640, ge=16)
    method: recipes.Method = "simclr"
    recipe: recipes.Variant = "short"
    width: int = Field(8, ge=1)
    epochs: int = Field(5, ge=1)
    batch_size: int = Field(64, ge=2)
    seed: int = Field(0, ge=0)

    def data(self, split: str = "train", n: int | None = None) -> Data:
        root = None if self.data_root is None else Path(self.data_root)
        return Data(name=self.dataset, split=split, n=self.n if n is None else n, root=root)

    def pretrain(self) -> Pretrain:
        return Pretrain(
            data=self.data(), recipe=recipes.recipe(self.method, self.recipe), width=self.width, epochs=self.epochs,
            batch_size=self.batch_size, seed=self.seed,
        )  # fmt: skip

    def stages(self) -> dict[str, Stage]:
        """Every artifact that the notebook reads, by the name it has there."""
        return {"encoder": self.pretrain()}

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


class Method(Plan):
    """00_method: the score step by step on a few images."""

    notebook: ClassVar[str] = "00_method"

    images: int = Field(48, ge=8)
    rank: int = Field(16, ge=1)
    damping: float = Field(0.1, gt=0)


class BackgroundBias(Plan):
    """03_background_bias: do images of high influence have uniform backgrounds?"""

    notebook: ClassVar[str] = "03_background_bias"

    n_test: int = Field(300, ge=16)
    mean: float = 0.05
    std: float = Field(0.2, ge=0)
    rank: int = Field(16, ge=1)
    damping: float = Field(0.1, gt=0)
    noise_seed: int = Field(0, ge=0)
    gallery: int = Field(24, ge=1)

    def stages(self) -> dict[str, Stage]:
        encoder, train = self.pretrain(), self.data()
        return {
            "encoder": encoder,
            "influence": Influence(
                pretrain=encoder, data=train, perturbation=Noise(mean=self.mean, std=self.std),
                curvature=Curvature(rank=self.rank, damping=self.damping), seed=self.noise_seed,
            ),
            "train_features": Embed(pretrain=encoder, data=train),
            "test_features": Embed(pretrain=encoder, data=self.data("test", self.n_test)),
        }  # fmt: skip


PLANS: dict[str, type[Plan]] = {plan.notebook: plan for plan in (Method, BackgroundBias)}


def pick_device(name: str) -> torch.device:
    """auto is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise IsslError(f"device {name!r}: choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise IsslError("device 'cuda': torch sees no GPU here; use --device auto, or check the driver")
    return torch.device(name)
