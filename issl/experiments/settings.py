"""Settings that stages are made of: which images, which perturbation, which curvature."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, computed_field, model_validator

from issl.config import Config
from issl.data import datasets, scenes
from issl.data.images import Images
from issl.data.injection import inject
from issl.errors import IsslError
from issl.influence import curvature as curvatures
from issl.influence import perturbation as perturbations


def absent(value: object) -> bool:
    """Fields that came later are no part of a config while they are not set, so what was computed before is found."""
    return value is None or value is False


class Injection(Config):
    """What is put into the set, see `issl.data.injection.inject`."""

    duplicates: float = Field(0.0, ge=0, le=0.5)
    atypical: float = Field(0.0, ge=0, le=1)
    seed: int = Field(0, ge=0)


class Data(Config):
    """Which images. `root` says where they lie and is no part of what they are; `fingerprint` is."""

    name: str
    split: str = "train"
    n: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)
    size: int | None = None
    inject: Injection | None = None
    first: int | None = Field(None, ge=1)  # of the images thus chosen, only so many (the others are not scored)
    uniform: float | None = Field(None, ge=0, le=1, exclude_if=absent)  # of scenes: the share of uniform backgrounds
    classes: tuple[int, ...] | None = Field(None, exclude_if=absent)  # of the images thus chosen, these classes alone
    root: Path | None = Field(None, exclude=True)

    @model_validator(mode="after")
    def _drawn(self) -> Data:
        if self.uniform is not None and self.name != "scenes":
            raise ValueError(f"uniform applies to scenes, not to {self.name!r}")
        return self

    @computed_field  # type: ignore[prop-decorator]
    @property
    def fingerprint(self) -> str:
        return datasets.fingerprint(self.name, self.split, self.root)

    def available(self) -> int | None:
        """How many images the source holds; None where any number can be drawn."""
        return datasets.count(self.name, self.split, self.root)

    def load(self) -> Images:
        if self.uniform is None:
            images = datasets.load(self.name, self.split, self.n, self.root, self.seed, self.size)
        else:
            images = scenes.draw(self.n, self.split, self.seed, scenes.ScenesConfig(uniform=self.uniform))
        if self.classes is not None:
            images = images.subset(torch.isin(images.require_labels(), torch.tensor(self.classes)))
            if len(images) == 0:
                raise IsslError(f"{self.name}: none of its images is of the classes {self.classes}")
        images = images if self.inject is None else inject(images, **self.inject.model_dump())
        return images if self.first is None else images.subset(range(min(self.first, len(images))))


class Noise(Config):
    """Gaussian noise of the perturbed view (the paper's default)."""

    mean: float = 0.05
    std: float = Field(0.2, ge=0)

    def build(self) -> perturbations.GaussianNoise:
        return perturbations.GaussianNoise(self.mean, self.std)


class Augmentation(Config):
    """An augmentation in place of the noise, for the ablation; see `issl.influence.perturbation.Augmentation`."""

    kind: perturbations.Kind
    strength: float = Field(1.0, gt=0, le=1)

    def build(self) -> perturbations.Augmentation:
        return perturbations.Augmentation(self.kind, self.strength)


class Curvature(Config):
    """The inverse curvature that weighs the gradients."""

    kind: Literal["logra", "logra-pca", "ekfac", "diagonal", "identity", "exact"] = "logra"
    rank: int | float = Field(16, gt=0)  # of logra, per side; below 1 a fraction of the layer
    damping: float = Field(0.1, gt=0)
    seed: int = Field(0, ge=0)

    def build(self) -> curvatures.Curvature:
        match self.kind:
            case "identity":
                return curvatures.Identity()
            case "exact":
                return curvatures.Exact(self.damping)
            case "diagonal":
                return curvatures.Diagonal(self.damping)
            case "ekfac":
                return curvatures.EKFAC(self.damping)
            case "logra-pca":
                return curvatures.LoGra(self.rank, self.damping, self.seed, projection="pca")
        return curvatures.LoGra(self.rank, self.damping, self.seed)
