"""The exceptions that a user of this library is meant to read."""

from __future__ import annotations

import math
from numbers import Integral, Real


class IsslError(Exception):
    """Bad input. The message names the thing, the value that was given, and what to do about it."""


class OutOfTime(IsslError):
    """The time budget is spent; with a checkpoint, nothing that was computed is lost."""

    def __init__(self, what: str, resumable: bool = True):
        remedy = (
            "the same command continues from here"
            if resumable
            else "give a checkpoint file to be able to continue"
        )
        super().__init__(f"{what}, the time budget is spent; {remedy}")


def is_whole(value: object, least: int = 0, most: int | None = None) -> bool:
    """Is it a whole number in this range? A truth value is none."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        return False
    return least <= int(value) and (most is None or int(value) <= most)


def number_or_nan(value: object) -> float:
    """The number, or NaN (which fails every comparison) for anything that is not one."""
    return math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
