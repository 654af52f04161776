"""The one exception that a user of this library is meant to read."""

from __future__ import annotations


class IsslError(Exception):
    """Bad input. The message names the thing, the value that was given, and what to do about it."""
