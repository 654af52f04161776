"""Reading and writing files; a written file is complete or not there at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from issl.errors import IsslError

PACKAGE = Path(__file__).parent  # of this library
REPOSITORY = PACKAGE.parent  # the checkout, where the library runs from one
BUNDLED = PACKAGE / "bundled"  # the parts of it in a wheel: notebooks, encoders, records
PART = ".issl-part-"  # in the names of files being written, and of no others
READING = {errno.EACCES, errno.EPERM, errno.EIO}  # reading a file can fail with these too
# why the system cannot write a file, where no program is to blame
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, *READING}
UMASK = os.umask(0)  # which can only be read by setting it
os.umask(UMASK)


def installed() -> bool:
    """Is this library installed from a wheel, away from its checkout?"""
    return BUNDLED.is_dir()


def provided(name: str) -> Path:
    """A folder that comes with the code, beside the library itself: `notebooks`, `released` or
    `figures`."""
    return (BUNDLED if installed() else REPOSITORY) / name


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write to the yielded path; on success it becomes `path` in one step, on failure nothing is
    left.

    Each call has its own temporary name, so two processes that write the same file do not mix.
    `remove_leftovers` removes what a killed process leaves. Raises IsslError if there is no room or
    no permission to write the file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, made = tempfile.mkstemp(
            suffix=path.suffix, prefix=f".{path.name}{PART}", dir=path.parent
        )
        os.close(handle)
    except OSError as error:
        raise _cannot_write(path, error) from error
    part = Path(made)
    try:
        yield part
        part.chmod(0o666 & ~UMASK)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        if not part.exists():
            raise IsslError(
                f"{path} was deleted while it was written; leave its folder alone, and run the "
                "same command again"
            ) from error
        if why_no_room(error) is None:
            raise
        raise _cannot_write(path, error) from error
    finally:
        part.unlink(missing_ok=True)


def remove_leftovers(folder: Path, age: float = 3600.0) -> None:
    """Remove the unfinished files that killed processes left in this folder: those that nobody has
    written to for `age` seconds. 0: all, whatever the clock of the file system says."""
    for path in folder.glob(f".*{PART}*"):
        with suppress(OSError):  # it was just finished, or is another user's
            if age == 0 or time.time() - path.stat().st_mtime >= age:
                path.unlink()


def why_no_room(error: BaseException) -> str | None:
    """Why the system cannot write a file; None for any other error."""
    code = error.errno if isinstance(error, OSError) else None
    if found := re.search(r"os error (\d+)", str(error)):  # safetensors gives it as text
        code = int(found[1])
    return os.strerror(code) if code in NO_ROOM else None


def _cannot_write(path: Path, error: Exception) -> IsslError:
    return IsslError(
        f"{path} cannot be written: {why_no_room(error) or error}; make room or choose another "
        "place, and run the same command again: what was finished is kept"
    )


def writable(out: Path, suffixes: Sequence[str]) -> None:
    """Make the folder of a command's output file. Raises IsslError for a suffix that is not
    allowed, or if the file cannot be written."""
    if out.suffix not in suffixes:
        raise IsslError(f"--out {out}: give a file name that ends in {' or '.join(suffixes)}")
    if out.is_dir():
        raise IsslError(f"--out {out}: is a folder; give the name of a file")
    check_writable(out.parent, f"--out {out}")
    remove_leftovers(out.parent)


def check_writable(folder: Path, what: str) -> None:
    """Make this folder; IsslError if it, or a file in it, cannot be written. This writes a file,
    because a check of permissions always succeeds for root."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise IsslError(
            f"{what}: cannot be written there ({error.strerror}); choose another place"
        ) from error


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any, **how: Any) -> None:
    """Write a JSON file in one step; `how`: options of json.dumps."""
    with atomic(path) as part:
        part.write_text(json.dumps(content, **how) + "\n")


def write_safetensors(
    path: Path, tensors: Mapping[str, Any], header: dict[str, str] | None = None
) -> None:
    """Write a safetensors file in one step."""
    from safetensors.torch import save_file  # slow to import

    with atomic(path) as part:
        save_file({k: v.contiguous() for k, v in tensors.items()}, part, header)


def read_safetensors(path: Path, what: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Header and tensors of a safetensors file. If it is damaged, raises an IsslError that says
    `what` it is."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise IsslError(f"{what} {path} is damaged ({error}); delete it and run again") from error
