"""A curvature as a file: the sums over the images that the inverse is made from, and the settings
they belong to.

By layer, in double precision, Σ_i g_i g_iᵀ, of which the lower triangle is written (LoGra, Exact),
or Σ_i g_i² (EKFAC, Diagonal). H is the sum divided by the number of images, so the sums of two sets
add up to those of both. Random projections follow from a seed and are not written; bases made from
images (PCA, EKFAC) are. It is a safetensors file: nothing in it is executed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from issl.errors import IsslError
from issl.files import atomic, read_safetensors
from issl.influence.perturbation import describe

VERSION = 3
HEADER = "issl_curvature"  # the entry in the file's metadata
COMPUTES = "computes"  # see `Scorer.computes`: equal up to rounding


@dataclass(frozen=True)
class KeptCurvature:
    """Sums over some images, with everything they depend on; needs no encoder.

    Attributes:
        settings: JSON values: encoder (digest), computes, layers (name → numbers kept), size
            (h, w), curvature, perturbation, seed, draws, loss, skip, untrained, marks.
        parts: The sets of images that were added: name, n, digest of their indices.
        sums: By layer, float64: (r, r) or (r,).
        bases: "LAYER.in" (k_in, d_in) and "LAYER.out" (k_out, c_out), where made from images.
    """

    settings: Mapping[str, Any]
    parts: tuple[Mapping[str, Any], ...]
    sums: Mapping[str, Tensor]
    bases: Mapping[str, Tensor]

    @property
    def n(self) -> int:
        """How many images were summed."""
        return sum(part["n"] for part in self.parts)

    def add(self, other: KeptCurvature) -> KeptCurvature:
        """The sums over both sets of images.

        Raises:
            IsslError: If they belong to different settings or bases, or share a part.
        """
        if different := first_difference(self.settings, other.settings):
            raise IsslError(
                f"curvatures cannot be added: {different}; fit both with the same encoder, "
                "settings and size"
            )
        self.check_new(other.parts)
        for name in self.bases:
            if not torch.equal(self.bases[name], other.bases[name]):
                raise IsslError(
                    f"curvatures cannot be added: they project onto different bases ({name}), each "
                    "made from its own images; fit the second with `fitted.extend(images)`, or use "
                    "random projections (logra)"
                )
        sums = {name: self.sums[name] + other.sums[name] for name in self.sums}
        return replace(self, parts=(*self.parts, *other.parts), sums=sums)

    def check_new(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """IsslError if one of these sets was added before. (Sets that overlap are not noticed.)"""
        for part in parts:
            if part in self.parts:
                raise IsslError(
                    f"curvature: the same {part['n']} images of {part['images']} were added before "
                    "and would count twice; add each set once"
                )

    def save(self, path: str | Path) -> None:
        """Write a .safetensors file, in one step."""
        path = Path(path)
        if path.suffix != ".safetensors":
            raise IsslError(f"curvature file {path}: give a name that ends in .safetensors")
        header = {"version": VERSION, "settings": self.settings, "parts": self.parts}
        tensors = {f"basis.{name}": value.cpu().contiguous() for name, value in self.bases.items()}
        for name, value in self.sums.items():
            kind = "vector" if value.ndim == 1 else "triangle"
            tensors[f"{kind}.{name}"] = pack(value.cpu())
        with atomic(path) as part:
            save_file(tensors, part, {HEADER: json.dumps(header)})


def read_curvature(path: str | Path) -> KeptCurvature:
    """A curvature from its file.

    Raises:
        IsslError: If there is none, and for a damaged file or one of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise IsslError(
            f"curvature file {str(path)!r} does not exist; make one with issl.fit(…).save, or "
            "`issl fit`"
        )
    metadata, tensors = read_safetensors(path, "curvature file")
    header = json.loads(metadata.get(HEADER, "{}"))
    if "version" not in header:
        raise IsslError(
            f"{path} is no curvature file: its header has no entry {HEADER}; give what Fitted.save "
            "wrote"
        )
    if header["version"] != VERSION:
        raise IsslError(
            f"curvature file {path} has version {header['version']}, this library reads {VERSION}; "
            "fit it again, or use the library that wrote it"
        )
    kinds: dict[str, dict[str, Tensor]] = {"vector": {}, "triangle": {}, "basis": {}}
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        kinds[kind][name] = value
    sums = kinds["vector"] | {name: unpack(values) for name, values in kinds["triangle"].items()}
    return KeptCurvature(header["settings"], tuple(header["parts"]), sums, kinds["basis"])


def as_setting(value: object) -> dict[str, Any]:
    """A frozen dataclass as JSON values, its name and fields; a function by its name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"kind": type(value).__name__, "fields": dataclasses.asdict(value)}
    return {"kind": describe(value), "fields": {}}


def first_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The first setting that is not the same, in words."""
    for key in [*ours, *(k for k in theirs if k not in ours)]:
        if key != COMPUTES and ours.get(key) != theirs.get(key):
            one, other = (json.dumps(side.get(key))[:120] for side in (ours, theirs))
            return f"{key} is {one} in one and {other} in the other"
    if not np.allclose(ours.get(COMPUTES, ()), theirs.get(COMPUTES, ()), rtol=1e-3, atol=1e-6):
        return "the encoder, the perturbation or the loss makes other numbers of the same images"
    return None


def encoder_digest(encoder: nn.Module) -> str:
    """sha256 of the encoder's parameters and buffers with their names, types and shapes, in hex."""
    digest = hashlib.sha256()
    for name, value in encoder.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def pack(total: Float[Tensor, "..."]) -> Float[Tensor, " m"]:
    """The lower triangle of a symmetric (r, r) matrix, row by row; a vector as it is."""
    if total.ndim == 1:
        return total.contiguous()
    return torch.cat([row[: k + 1] for k, row in enumerate(total)])


def unpack(values: Float[Tensor, " m"]) -> Float[Tensor, "r r"]:
    """The symmetric matrix with this lower triangle; m = r (r + 1) / 2."""
    width = (math.isqrt(8 * len(values) + 1) - 1) // 2
    total = values.new_zeros(width, width)
    for k, row in enumerate(values.split(list(range(1, width + 1)))):
        total[k, : k + 1] = row
    return total + total.tril(-1).T
