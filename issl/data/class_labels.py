"""Labels as people keep them, in tables and data sets of their own: as numbers, each with a
name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from issl.errors import IsslError


def class_labels(values: Iterable[Any], what: str, names: Sequence[str] = ()) -> pd.DataFrame:
    """One row a label: `label`, a whole number, and `label_name`; both are missing where the label
    is.

    values   whole numbers, texts (numbered in their order) or truth values, as Python, numpy and
             torch have them
    names    of the classes from 0; a class without one is named by its number

    Raises IsslError, which says `what` they are, for labels of another kind or of several.
    """
    known = [plain(value) for value in values]
    kinds = {type(value) for value in known if value is not None}
    if not kinds <= {int, bool, str}:
        odd = next(
            value for value in known if value is not None and type(value) not in (int, bool, str)
        )
        raise IsslError(f"{what} holds {odd!r:.80}; need whole numbers, or texts")
    if len(kinds) > 1:
        some = [next(value for value in known if type(value) is kind) for kind in kinds]
        raise IsslError(
            f"{what} holds {some[0]!r:.40} and {some[1]!r:.40}; need whole numbers, or texts"
        )
    of_text = (
        {text: k for k, text in enumerate(sorted(set(known) - {None}))} if kinds == {str} else {}
    )
    numbers = [value if value is None else of_text.get(value, value) for value in known]
    if any(number is not None and not -(2**63) <= number < 2**63 for number in numbers):
        raise IsslError(f"{what} holds numbers beyond 64 bits; number the classes from 0")
    called = [
        names[value]
        if type(value) is int and 0 <= value < len(names)
        else None
        if value is None
        else str(value)
        for value in known
    ]
    label = pd.Series(numbers, dtype="Int64")
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
