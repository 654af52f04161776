"""What a published data set is, whatever files it came in: the hash of its labels and pixels.

A record is a label byte and then the pixels, channel first, as in CIFAR's binary files. So
torchvision's pickles, Hugging Face's PNG and lossless WebP of the same images have one identity,
and the MD5 sums of CIFAR-10's published files check ours (tests/test_data.py). A set of lossy
photos is identified by its files' bytes, because decoders may differ.

`reference/` holds 8 bytes per image of each known set (a hash of the pixels, one pixel, the label).
These bytes show how other data differ from the set: in how many images, and by how much.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from issl.errors import IsslError
from issl.files import PACKAGE, write_json

VERSION = 2  # of what is remembered
DIGITS = 16  # of a digest
REFERENCE = np.dtype([("pixels", "<u4"), ("sample", "u1", 3), ("label", "u1")])
# of 255: the largest median difference of a pixel that is attributed to lossy compression
REENCODED = 16
Records = UInt8[np.ndarray, "n r"]


@dataclass(frozen=True)
class SetIdentity:
    """Which images these are.

    Attributes:
        digest: Of all records in the set's order, or of the encoded images.
        name: For readers; where they are not the published ones, it says so.
        about: What differs from the published set, how a derived copy was made, or which files of a
            folder were left out; "" for the set as it should be.
        order: Each image's row in the files, if the set has an order of its own; None if it keeps
            the order of the files.
    """

    digest: str
    name: str
    about: str = ""
    order: list[int] | None = None


def digest(data: bytes) -> str:
    """The hash used in keys."""
    return hashlib.sha256(data).hexdigest()[:DIGITS]


def stamp(paths: Iterable[Path]) -> str:
    """The paths, sizes and modification times of files, as one hash."""
    whole = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        whole.update(repr((str(path), stat.st_size, stat.st_mtime_ns)).encode())
    return whole.hexdigest()


def as_records(labels: np.ndarray, pixels: UInt8[np.ndarray, "n 3 h w"]) -> Records:
    """Each image's label byte and pixels, in a row."""
    first = labels.astype(np.uint8)[:, None]
    return np.concatenate([first, pixels.reshape(len(pixels), -1)], axis=1)


def in_short(records: Records) -> np.ndarray:
    """The 8 bytes per image that `reference/` holds."""
    found = np.empty(len(records), REFERENCE)
    pixels, rows = records[:, 1:].reshape(len(records), 3, -1), np.arange(len(records))
    hashes = (hashlib.sha256(p.tobytes()).digest() for p in pixels)
    found["pixels"] = [int.from_bytes(h[:4], "little") for h in hashes]
    found["sample"] = pixels[rows, :, rows * 7919 % pixels.shape[2]]
    found["label"] = records[:, 0]
    return found


def differences(name: str, split: str, records: Records, resized: int) -> tuple[str, str]:
    """How these images differ from the published ones: in a word or two, and in a sentence. Of
    these images, `resized` are stored at another size."""
    known = np.load(PACKAGE / "data" / "reference" / f"{name}-{split}.npy")
    found, rows = in_short(records), np.arange(len(records))
    by_hash = np.argsort(known["pixels"], kind="stable")
    nearest = np.searchsorted(known["pixels"], found["pixels"], sorter=by_hash)
    place = by_hash[nearest.clip(max=len(known) - 1)]
    there = known["pixels"][place] == found["pixels"]
    moved = there & (known["pixels"][rows % len(known)] != found["pixels"])
    relabelled = there & (known["label"][place] != found["label"])
    of, said = f"of {len(found):,}", []
    if resized:
        said.append(("of another size", f"{resized:,} {of} images are stored at another size"))
    if not there.all():
        at = np.flatnonzero(~there[: len(known)])
        change = known["sample"][at].astype(int) - found["sample"][at]
        by = np.median(np.abs(change)) if len(at) else np.nan
        other = "other images, or re-encoded in another order?"
        text = (
            f"{(~there).sum():,} {of} images have other pixels (median difference {by:.0f} of 255)"
        )
        said.append(("re-encoded?" if by <= REENCODED else other, text))
    if len(found) != len(known):
        number = f"{len(found):,} images"
        said.append((number, f"there are {number} instead of {len(known):,}"))
    elif moved.any():
        said.append(("shuffled?", f"{moved.sum():,} {of} images stand in another place"))
    if relabelled.any():
        said.append(("other labels", f"{relabelled.sum():,} {of} labels differ"))
    return said[0][0] if said else "not the same", ", ".join(text for _, text in said)


def cache_folder(name: str) -> Path:
    """Where this library caches what it can recompute: $XDG_CACHE_HOME/issl or ~/.cache/issl."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "issl" / name


def remembered(
    what: str, files: Sequence[Path], identify: Callable[[], SetIdentity]
) -> SetIdentity:
    """The identity of `what`, which these files hold, computed once for each path, size and
    modification time.

    It is kept in `cache_folder`; a line says so if that cannot be written.
    """
    key = digest(f"{what} {stamp(path.absolute() for path in files)}".encode())
    if key in _known:
        return _known[key]
    kept = cache_folder("identities") / f"{key}-{VERSION}.json"
    try:
        found = SetIdentity(**json.loads(kept.read_text()))
    except (OSError, ValueError, TypeError):  # not there, or damaged
        found = identify()
        try:
            write_json(kept, asdict(found))
        except (IsslError, OSError) as error:  # the identity itself is still right
            said = f"which images {files[0]} holds cannot be remembered: {error}"
            print(said, file=sys.stderr, flush=True)
    _known[key] = found
    return found


_known: dict[str, SetIdentity] = {}  # in this process
