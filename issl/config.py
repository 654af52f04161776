"""What every validated setting shares, and how a bad one is told to its user."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError

from issl.errors import IsslError


class Config(BaseModel):
    """Frozen, and strict about its fields: a typo is an error, not a default."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def explain(error: ValidationError, what: str) -> IsslError:
    """A pydantic error as one line that names the field, the value and the remedy."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return IsslError(f"{what}: unknown field {where!r} (value {first['input']!r}); remove it or correct its name")
    return IsslError(f"{what}: {where} = {first.get('input')!r}: {first['msg']}")
