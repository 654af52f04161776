"""What all validated settings share; a bad one is a single clear error."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from issl.errors import IsslError

C = TypeVar("C", bound="Config")  # not typing.Self, which a checker of shapes at run time cannot resolve


class Config(BaseModel):
    """Frozen, and strict about its fields: a typo is an error, not a default.

    Raises IsslError where pydantic raises ValidationError: one line with each bad setting's path, its value and the
    remedy.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise _explained(type(self), error) from error

    # Pydantic then validates nested configs without this __init__, so the outermost error names the whole path, and a
    # union tries all its members
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def model_validate(cls: type[C], obj: Any, **options: Any) -> C:
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise _explained(cls, error) from error


def _explained(config: type[Config], error: ValidationError) -> IsslError:
    problems = []
    for item in error.errors(include_url=False):
        where, value = ".".join(map(str, item["loc"])), repr(item["input"])
        value = value if len(value) <= 80 else value[:77] + "..."
        if item["type"] == "extra_forbidden":
            known = _fields(config, item["loc"][:-1])
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"its fields are {', '.join(known)}"
            problems.append(f"unknown field {where!r} (value {value}); {remedy}")
        elif item["type"] == "missing":
            problems.append(f"{where!r} is missing; give it a value")
        else:
            said = item["msg"].removeprefix("Value error, ")
            problems.append(f"{where} = {value}: {said}" if where else said)
    return IsslError(f"{config.__name__}: {'; '.join(problems)}")


def _fields(config: type[Config], path: tuple[int | str, ...]) -> list[str]:
    """The fields of the config at this path below `config`; in a union the path names the member's class."""
    found = [config]
    for part in path:
        fields = [c.model_fields[str(part)] for c in found if part in c.model_fields]
        named = [c for c in found if c.__name__ == part]
        found = [c for field in fields for c in _configs(field.annotation)] or named or found
    return [name for c in found for name in c.model_fields]


def _configs(annotation: Any) -> list[type[Config]]:
    """The configs among the members of a type."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [c for member in get_args(annotation) for c in _configs(member)]
