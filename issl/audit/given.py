"""An encoder that somebody else trained, used instead of training one: a file, identified by its
digest."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator
from torch import nn

from issl.audit.cache import Artifacts, Stage, digest_once
from issl.audit.config import Config, differing
from issl.errors import IsslError
from issl.files import write_json
from issl.pretraining.encoder import Output
from issl.pretraining.other_encoders import Opened, open_encoder
from issl.pretraining.recipes import Method

Triple = tuple[float, float, float]


class CheckpointFile(Config):
    """A file with an encoder that `issl.pretraining.other_encoders.open_encoder` can read.

    mean, std   of the pixels it was trained on; default: what its layout says (solo-learn's of
                CIFAR), else ImageNet's
    part        which encoder, if the file holds several
    """

    file: Path
    mean: Triple | None = None
    std: Triple | None = None
    part: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return {"file": value} if isinstance(value, str | Path) else value

    @field_validator("file")
    @classmethod
    def _absolute(cls, file: Path) -> Path:
        return file.expanduser().resolve()  # notebooks run in another folder

    @property
    def sha256(self) -> str:
        """The digest of the file's bytes. Raises IsslError if there is no file."""
        if not self.file.is_file():
            raise IsslError(
                f"checkpoint {str(self.file)!r} is not a file; check the path in --checkpoint "
                "METHOD=FILE"
            )
        return digest_once(self.file)

    def described(self) -> dict[str, str]:
        """For records: the file's name and its digest."""
        return {"file": self.file.name, "sha256": self.sha256}

    def open(self) -> Opened:
        """The encoder. Raises IsslError for a file that is missing, damaged, or in no known
        layout."""
        self.sha256  # noqa: B018 (a missing file is named with its remedy)
        return open_encoder(str(self.file), mean=self.mean, std=self.std, part=self.part)


@lru_cache
def _width(checkpoint: CheckpointFile, sha256: str) -> int:
    first = next(m for m in checkpoint.open().encoder.modules() if isinstance(m, nn.Conv2d))
    return first.out_channels


class Given(Stage):
    """A given encoder, where a notebook would otherwise train one: about.json. Its key depends on
    the file's digest, not its name. The weights stay in the file, which must not change."""

    name: ClassVar[str] = "given"

    method: Method
    checkpoint: CheckpointFile = Field(exclude=True)

    def settings(self) -> dict[str, Any]:
        given = differing({k: (getattr(self.checkpoint, k), None) for k in ("mean", "std", "part")})
        return {**super().settings(), **given, "sha256": self.checkpoint.sha256}

    @property
    def width(self) -> int:
        """Channels of the encoder's first convolution."""
        return _width(self.checkpoint, self.checkpoint.sha256)

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        opened = self.checkpoint.open()
        about = {
            **self.checkpoint.described(),
            "method": self.method,
            "layout": opened.about,
            "size": opened.size,
        }
        write_json(folder / "about.json", about, indent=1)

    def encoder(self, artifacts: Artifacts, output: Output = "features") -> nn.Module:
        """The encoder, in eval mode: only the backbone, because we could not be sure that something
        in the file is its projector."""
        if output != "features":
            raise IsslError(
                f"checkpoint {self.checkpoint.file.name}: only its backbone is read, not its "
                f"{output}"
            )
        artifacts.get(self)
        return self.checkpoint.open().encoder

    def read(self, artifacts: Artifacts) -> nn.Module:
        """The encoder, in eval mode."""
        return self.encoder(artifacts)
