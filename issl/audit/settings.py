"""Settings that stages are made of: which images, and which curvature."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, InstanceOf, PlainSerializer, computed_field

from issl.audit.config import Config, as_plain
from issl.audit.data.injection import inject
from issl.data import datasets, scenes
from issl.data.identity import SetIdentity
from issl.data.images import Images
from issl.errors import IsslError
from issl.influence.curvature import Curvature


class Injection(Config):
    """What is injected into the set, see `issl.audit.data.injection.inject`."""

    duplicates: float = Field(0.0, ge=0, le=0.5)
    atypical: float = Field(0.0, ge=0, le=1)


class Data(Config):
    """Which images. In a key, their identity stands in place of their name and
    location."""

    name: str
    split: str = "train"
    n: int | None = Field(None, ge=1)
    size: int | None = None
    inject: Injection | None = None
    first: int | None = Field(None, ge=1)  # keep only the first ones (the others are not scored)
    uniform: float | None = Field(None, ge=0, le=1)  # of scenes: the share of uniform backgrounds
    classes: tuple[int, ...] | None = None  # only images of these classes
    root: Path | None = Field(None, exclude=True)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def identity(self) -> str:
        """The digest of the images' content, see `issl.data.datasets.identity`."""
        return self.which.digest

    @cached_property
    def which(self) -> SetIdentity:
        """The identity of the whole set that the images are taken from, as of the first call."""
        return datasets.identity(self.name, self.split, self.root)

    def settings(self) -> dict[str, Any]:
        own = super().settings()
        return {"images": self.identity, **{k: v for k, v in own.items() if k != "name"}}

    def available(self) -> int | None:
        """How many images the source holds; None where any number can be drawn."""
        return datasets.count(self.name, self.split, self.root)

    def load(self) -> Images:
        """The images. The last few sets are kept in memory, because many stages in a row read the
        same ones."""
        now = datasets.identity(self.name, self.split, self.root).digest
        if now != self.identity:
            raise IsslError(
                f"{self.name} changed while it was used (identity {self.identity}, now {now}): run "
                "the same command again; what was finished is kept"
            )
        images = _loaded(self, now)
        return replace(images, attributes=images.attributes.copy())  # a caller may add columns


@lru_cache(maxsize=4)
def _loaded(data: Data, identity: str) -> Images:
    if data.uniform is None:
        images = datasets.load(
            data.name, data.split, data.n, data.root, size=data.size, quiet=True
        ).in_memory()
    else:
        images = scenes.draw(data.n, data.split, uniform=data.uniform)
    if data.classes is not None:
        images = images.subset(torch.isin(images.require_labels(), torch.tensor(data.classes)))
        if len(images) == 0:
            raise IsslError(f"{data.name}: none of its images is of the classes {data.classes}")
    images = images if data.inject is None else inject(images, **data.inject.model_dump())
    return images if data.first is None else images.subset(range(min(data.first, len(images))))


Weighing = Annotated[InstanceOf[Curvature], PlainSerializer(as_plain)]
