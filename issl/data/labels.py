"""Turns labels that are whole numbers, strings or booleans into numbers with names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from issl.errors import IsslError


def class_labels(values: Iterable[Any], what: str, names: Sequence[str] = ()) -> pd.DataFrame:
    """One row per label: `label`, a whole number, and `label_name`; both missing if the label is.

    Args:
        values: Whole numbers, strings (numbered in sorted order) or booleans, of Python, numpy or
            torch.
        what: What they are, for messages.
        names: The names of the classes from 0; a class without one is named by its number.
    """
    known = [plain(value) for value in values]
    one_of = {type(value): value for value in known if value is not None}
    if not one_of.keys() <= {int, bool, str} or len(one_of) > 1:
        some = " and ".join(f"{value!r:.40}" for value in one_of.values())
        raise IsslError(f"{what} holds {some}; need whole numbers, or texts")
    texts = sorted(set(known) - {None}) if str in one_of else []
    number = {text: k for k, text in enumerate(texts)}
    numbers = [value if value is None else number.get(value, value) for value in known]
    if any(k is not None and not -(2**63) <= k < 2**63 for k in numbers):
        raise IsslError(f"{what} holds numbers beyond 64 bits; number the classes from 0")
    label = pd.Series(numbers, dtype="Int64")
    called = [_name(value, names) for value in known]
    return pd.DataFrame(
        {"label": label if label.isna().any() else label.astype(np.int64), "label_name": called}
    )


def plain(value: Any) -> Any:
    """A label as Python's int, bool or str; None where it is missing; anything else as it is."""
    if isinstance(value, Tensor | np.ndarray | np.generic) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _name(value: Any, names: Sequence[str]) -> str | None:
    if type(value) is int and 0 <= value < len(names):
        return names[value]
    return None if value is None else str(value)
