"""What a published data set is, whatever files it came in: the hash of its labels and pixels.

A record is a label byte and then the pixels, channel first, as in CIFAR's binary files. So
torchvision's pickles, Hugging Face's PNG and lossless WebP of the same images have one identity,
and the MD5 sums of CIFAR-10's published files check ours (tests/test_identity.py). A set of lossy
photos is known by its files' bytes: decoders may differ.

`reference/` holds 8 bytes an image of each known set (a hash of the pixels, one pixel, the label).
With them, data that are something else can be named: how many images differ, and by how much.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8

from issl.files import PACKAGE, atomic

VERSION = 1  # of what is remembered
DIGITS = 16  # of a digest
REFERENCE = np.dtype([("pixels", "<u4"), ("sample", "u1", 3), ("label", "u1")])
# of 255: the largest median difference of a pixel that lossy compression is believed to make
REENCODED = 16
Records = UInt8[np.ndarray, "n r"]


@dataclass(frozen=True)
class SetIdentity:
    """Which images these are.

    digest  of all records, in the set's order, or of the files' bytes
    name    for readers; where they are not the published ones, it says so
    about   what differs from the published set, how a derived copy was made, or which files of a
            folder were left out; "" for the set as it should be
    order   the row in the files of each image, where the set has an order of its own; None: as they
            stand there
    """

    digest: str
    name: str
    about: str = ""
    order: tuple[int, ...] | None = None


def as_records(labels: UInt8[np.ndarray, " n"], pixels: UInt8[np.ndarray, "n 3 h w"]) -> Records:
    """Each image's label byte and pixels, in a row."""
    return np.concatenate([labels[:, None], pixels.reshape(len(pixels), -1)], axis=1)


def digest(data: bytes) -> str:
    """The hash that stands in keys."""
    return hashlib.sha256(data).hexdigest()[:DIGITS]


def canonical_order(records: Records) -> Int64[np.ndarray, " n"]:
    """The rows in the order of their own hashes, which any copy of a set gives."""
    return np.argsort(
        np.array([hashlib.sha256(row.tobytes()).digest() for row in records]), kind="stable"
    )


def reference_of(records: Records) -> np.ndarray:
    """What `reference/` keeps of these images, see `REFERENCE`."""
    found = np.empty(len(records), REFERENCE)
    found["label"] = records[:, 0]
    pixels = records[:, 1:].reshape(len(records), 3, -1)
    found["pixels"] = [
        int.from_bytes(hashlib.sha256(p.tobytes()).digest()[:4], "little") for p in pixels
    ]
    rows = np.arange(len(records))
    found["sample"] = pixels[rows, :, rows * 7919 % pixels.shape[2]]
    return found


def differences(name: str, split: str, records: Records, resized: int) -> tuple[str, str]:
    """What these images are instead of the published ones, in a word or two; and what differs, in a
    sentence.

    resized   how many of them are stored at another size than the published ones
    """
    found, known = reference_of(records), _reference(name, split)
    by_hash = np.argsort(known["pixels"], kind="stable")
    place = by_hash[
        np.searchsorted(known["pixels"], found["pixels"], sorter=by_hash).clip(max=len(known) - 1)
    ]
    there = known["pixels"][place] == found["pixels"]
    moved = there & (known["pixels"][np.arange(len(found)) % len(known)] != found["pixels"])
    relabelled = there & (known["label"][place] != found["label"])
    kinds, texts, n = [], [], f"{len(found):,}"
    if resized:
        kinds.append("of another size")
        texts.append(f"{resized:,} of {n} images are stored at another size")
    if not there.all():
        changed = np.flatnonzero(~there)
        at = changed[changed < len(known)]
        by = (
            np.median(np.abs(known["sample"][at].astype(int) - found["sample"][at]))
            if len(at)
            else np.nan
        )
        kinds.append(
            "re-encoded?" if by <= REENCODED else "other images, or re-encoded in another order?"
        )
        texts.append(
            f"{len(changed):,} of {n} images have other pixels (median difference {by:.0f} of 255)"
        )
    if len(found) != len(known):
        kinds.append(f"{n} images")
        texts.append(f"there are {n} images instead of {len(known):,}")
    elif moved.any():
        kinds.append("shuffled?")
        texts.append(f"{moved.sum():,} of {n} images stand in another place")
    if relabelled.any():
        kinds.append("other labels")
        texts.append(f"{relabelled.sum():,} of {n} labels differ")
    return kinds[0] if kinds else "not the same", ", ".join(texts)


@lru_cache
def _reference(name: str, split: str) -> np.ndarray:
    kept: np.ndarray = np.load(PACKAGE / "data" / "reference" / f"{name}-{split}.npy")
    return kept


def remembered(files: Sequence[Path], identify: Callable[[], SetIdentity]) -> SetIdentity:
    """The identity of what is in these files, worked out once for each path, size and time of
    change.

    It is kept in $XDG_CACHE_HOME/issl (~/.cache/issl); where that cannot be written, a line says
    so.
    """
    return _remembered(
        tuple((str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns) for p in files), identify
    )


_known: dict[tuple[tuple[str, int, int], ...], SetIdentity] = {}  # in this process


def _remembered(
    files: tuple[tuple[str, int, int], ...], identify: Callable[[], SetIdentity]
) -> SetIdentity:
    if files in _known:
        return _known[files]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "issl" / "identities"
    kept = cache / f"{digest(repr((VERSION, files)).encode())}.json"
    try:
        content = json.loads(kept.read_text())
        order = content.pop("order")
        found = SetIdentity(**content, order=None if order is None else tuple(order))
    except (OSError, ValueError, TypeError, KeyError):  # not there, or damaged: it is made again
        found = identify()
        try:
            with atomic(kept) as part:
                part.write_text(json.dumps(asdict(found)))
        except Exception as error:  # noqa: BLE001 (it is said; the identity itself is right)
            print(
                f"which images {files[0][0]} holds cannot be remembered: {error}",
                file=sys.stderr,
                flush=True,
            )
    _known[files] = found
    return found
