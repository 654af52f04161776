"""The base class of all validated settings: a bad setting is a single clear error."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import is_dataclass
from functools import cache
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from issl.errors import IsslError

# dataclasses whose name is left out of keys, because they were configs when the keys were made
UNTYPED = ("Head", "Recipe", "View")
C = TypeVar("C", bound="Config")  # the run-time shape checker cannot resolve typing.Self


class Config(BaseModel):
    """Frozen, and strict about its fields: a typo is an error, not a default.

    Raises IsslError where pydantic raises ValidationError: one line with each bad setting's path,
    its value and the remedy.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise _explained(type(self), error) from error

    def settings(self) -> dict[str, Any]:
        """The fields that are not at their defaults, as plain data; a key is the hash of these."""
        return differing(
            {k: (getattr(self, k), default) for k, default in _defaults(type(self)).items()}
        )

    def plain(self) -> Any:
        """The config as it stands in another config's settings."""
        return self.settings()

    def __copy__(self: C) -> C:
        copied = super().__copy__()
        # drop cached properties: `model_copy` is about to change the fields
        for name in copied.__dict__.keys() - type(self).model_fields:
            del copied.__dict__[name]
        return copied

    # Pydantic then validates nested configs without this __init__, so the outermost error names the
    # whole path, and a union tries all its members
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def model_validate(cls: type[C], obj: Any, **options: Any) -> C:
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise _explained(cls, error) from error


@cache
def _defaults(config: type[Config]) -> dict[str, Any]:
    """The defaults of the fields that count; PydanticUndefined for required ones."""
    counted = {name: f for name, f in config.model_fields.items() if not f.exclude}
    return {name: f.get_default(call_default_factory=True) for name, f in counted.items()}


def differing(fields: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    """The values that differ from their defaults, as plain data; `fields`: (value, default)."""
    return {name: as_plain(value) for name, (value, default) in fields.items() if value != default}


def as_plain(value: Any) -> Any:
    """A setting as JSON would hold it: configs and dataclasses (`{"type": NAME, …}`) without their
    defaults."""
    if isinstance(value, Config):
        return value.plain()
    if is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: (getattr(value, f.name), f.default) for f in dataclasses.fields(value)}
        kind = {} if type(value).__name__ in UNTYPED else {"type": type(value).__name__}
        return {**kind, **differing(fields)}
    if isinstance(value, list | tuple):
        return [as_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): as_plain(v) for k, v in value.items()}
    if isinstance(value, float) and value.is_integer():
        return int(value)  # 1 and 1.0 are one setting
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise IsslError(
        f"{value!r} ({type(value).__name__}): settings must be made of numbers, strings, configs "
        "or dataclasses"
    )


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
    """The fields of the config at this path below `config`; in a union the path names the member's
    class."""
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
