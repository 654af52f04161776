"""Pretraining methods, one class per file; every file of this package is imported."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from issl.errors import IsslError
from issl.pretraining.methods.base import LearningMethod

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

SSL = ("simclr", "byol", "barlow_twins")  # the paper's three
_FOUND = {kind.name: kind() for kind in LearningMethod.__subclasses__()}
METHODS = {name: _FOUND[name] for name in (*SSL, *sorted(_FOUND.keys() - set(SSL)))}


def method_named(name: str) -> LearningMethod:
    """The method of this name; raises IsslError for an unknown one."""
    if name not in METHODS:
        raise IsslError(f"method {name!r}: known are {', '.join(METHODS)}")
    return METHODS[name]
