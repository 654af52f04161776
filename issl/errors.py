"""The exceptions that a user of this library is meant to read."""

from __future__ import annotations

import math
from numbers import Integral, Real


class IsslError(Exception):
    """Bad input. The message names the thing, the value that was given, and what to do about it."""


def is_whole(value: object, least: int = 0, most: int | None = None) -> bool:
    """Whether it is a whole number in this range; a bool does not count."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        return False
    return least <= int(value) and (most is None or int(value) <= most)


def number_or_nan(value: object) -> float:
    """The number, or NaN (which fails every comparison) for anything that is not one."""
    return math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
