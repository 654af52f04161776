"""Reading and writing files; what is written is complete or not there at all."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from issl.errors import IsslError

PACKAGE = Path(__file__).parent  # of this library
REPOSITORY = PACKAGE.parent  # the checkout, where the library runs from one


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write to the yielded path; on success it becomes `path` in one step, on failure nothing is left.

    Each call has its own temporary name, so two processes that write the same file do not mix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def writable(out: Path, suffixes: Sequence[str], option: str = "--out") -> None:
    """Make the folder of an output file; IsslError for a suffix that is not allowed, or if it cannot be written."""
    if out.suffix not in suffixes:
        raise IsslError(f"{option} {out}: give a file name that ends in {' or '.join(suffixes)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IsslError(f"{option} {out}: its folder cannot be made ({error})") from error
    if not os.access(out.parent, os.W_OK) or out.is_dir():
        raise IsslError(f"{option} {out}: cannot be written there")


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_safetensors(path: Path, what: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a safetensors file; if it is damaged, an IsslError that says `what` it is."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise IsslError(f"{what} {path} is damaged ({error}); delete it and run again") from error
