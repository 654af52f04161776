"""Metrics in words: what people read in place of the short names that records hold."""

from __future__ import annotations

from functools import lru_cache

import yaml

from issl.errors import IsslError
from issl.files import PACKAGE


@lru_cache
def all_words() -> dict[str, str]:
    """The words of every metric that a claim's test asks for, and of others that tables show
    (metrics.yaml)."""
    found: dict[str, str] = yaml.safe_load((PACKAGE / "audit" / "metrics.yaml").read_text())
    return found


def words(metric: str) -> str:
    """What a metric is called. Raises IsslError for one without words."""
    if metric not in all_words():
        raise IsslError(
            f"metric {metric!r} has no words: say in issl/audit/metrics.yaml what it is called"
        )
    return all_words()[metric]
