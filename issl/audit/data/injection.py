"""Injection: put duplicates and atypical images into any set, so that we know what a score should
find.

Images at random positions are overwritten; each keeps its own index (and so its own noise). The
attributes duplicate_of, duplicate_kind and atypical say what was done, as they do in `scenes`.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from issl import keyed_random
from issl.audit.data.known_duplicates import marks
from issl.data import scenes
from issl.data.images import Images
from issl.data.views import hue
from issl.errors import IsslError

DuplicateKind = Literal["exact", "shifted", "recoloured", "recompressed"]
AtypicalKind = Literal["foreign", "corrupted", "inverted"]
DUPLICATES: tuple[DuplicateKind, ...] = get_args(DuplicateKind)
ATYPICAL: tuple[AtypicalKind, ...] = get_args(AtypicalKind)
JPEG_QUALITY = 30  # of a recompressed duplicate: visible blocks
Pixels = UInt8[Tensor, "3 h w"]


def inject(images: Images, duplicates: float = 0.0, atypical: float = 0.0, seed: int = 0) -> Images:
    """The set with shares of its images replaced.

    Args:
        duplicates: The share replaced by copies of others, in equal parts of these kinds: exact;
            shifted by 1–3 px; recoloured (brighter or darker, hue turned); recompressed as JPEG. An
            original is never replaced itself, and has one copy.
        atypical: The share replaced by atypical images, in equal parts of these kinds: foreign (a
            drawn scene; in `scenes` itself, the image with its tiles shuffled), corrupted (contrast
            cut to 0.3, with static added), inverted (255 − x).

    Returns:
        The set with the attributes duplicate_of (index of the original, −1 for none),
        duplicate_kind and atypical ("" for ordinary).

    Raises:
        IsslError: Shares below 0, or that leave no room for the originals.
    """
    if not duplicates >= 0 or not atypical >= 0 or 2 * duplicates + atypical > 1:
        raise IsslError(
            f"duplicates={duplicates}, atypical={atypical}: shares must be ≥ 0, and each duplicate "
            "needs an original"
        )
    n, rng = len(images), np.random.default_rng(seed)
    copies, strange = round(duplicates * n), round(atypical * n)
    places = rng.permutation(n)
    originals, copied, odd, _ = np.split(places, np.cumsum([copies, copies, strange]))
    pixels, index, attributes = images.tensor().clone(), images.index, images.attributes.copy()
    said = marks(images)
    of = said["duplicate_of"].to_numpy(np.int64, copy=True)
    kind, unusual = (said[c].to_numpy(object, copy=True) for c in ("duplicate_kind", "atypical"))
    labels = None if images.labels is None else images.labels.clone()
    masks = None if images.masks is None else images.masks.clone()
    for k, (source, place) in enumerate(zip(originals, copied, strict=True)):
        name = DUPLICATES[k % len(DUPLICATES)]
        generator = keyed_random.generator(seed, int(index[place]))
        pixels[place] = _COPIES[name](images.pixels[source], generator)
        for rows, of_rows in ((labels, images.labels), (masks, images.masks)):
            if rows is not None and of_rows is not None:
                rows[place] = of_rows[source]
        attributes.iloc[place] = attributes.iloc[source]
        of[place], kind[place], unusual[place] = int(index[source]), name, unusual[source]
    for k, place in enumerate(odd):
        what = ATYPICAL[k % len(ATYPICAL)]
        generator = keyed_random.generator(seed, int(index[place]))
        pixels[place] = _strange(what, images, int(place), generator)
        of[place], kind[place], unusual[place] = -1, "", what
    # a pair that the set already had is broken if its original was overwritten
    broken = np.isin(of, index.numpy()[[*copied, *odd]])
    of[broken], kind[broken] = -1, ""
    attributes = attributes.assign(
        index=index.numpy(), duplicate_of=of, duplicate_kind=kind, atypical=unusual
    )
    return Images(pixels, labels, attributes, images.name, masks)


def _shifted(x: Tensor, generator: np.random.Generator) -> Tensor:
    dy, dx = (int(s) for s in generator.choice([-3, -2, -1, 1, 2, 3], 2))
    h, w = x.shape[1:]
    padded = F.pad(x[None].float(), (3, 3, 3, 3), mode="replicate")[0]
    return padded[:, 3 + dy : 3 + dy + h, 3 + dx : 3 + dx + w].byte()


def _recoloured(x: Tensor, generator: np.random.Generator) -> Tensor:
    pixels = x[None].float() / 255
    factor = torch.tensor([float(generator.choice([0.8, 1.2]))])
    turn = torch.tensor([float(generator.choice([-0.05, 0.05]))])
    turned = hue((pixels * factor).clamp(0, 1), turn)
    return (255 * turned[0]).round().clamp(0, 255).byte()


def _recompressed(x: Tensor, _: np.random.Generator) -> Tensor:
    buffer = io.BytesIO()
    Image.fromarray(x.permute(1, 2, 0).numpy()).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    with Image.open(buffer) as opened:
        return torch.from_numpy(np.asarray(opened.convert("RGB")).transpose(2, 0, 1).copy())


_COPIES: dict[DuplicateKind, Callable[[Tensor, np.random.Generator], Tensor]] = {
    "exact": lambda x, _: x.clone(),
    "shifted": _shifted,
    "recoloured": _recoloured,
    "recompressed": _recompressed,
}


def _strange(
    what: AtypicalKind, images: Images, place: int, generator: np.random.Generator
) -> Tensor:
    x = images.pixels[place]
    if what == "inverted":
        return 255 - x
    if what == "corrupted":
        faded = x.float().mean() + 0.3 * (x.float() - x.float().mean())
        static = torch.from_numpy(generator.standard_normal(x.shape, dtype=np.float32))
        return (faded + 0.08 * 255 * static).round().clamp(0, 255).byte()
    if images.name == "scenes":
        q = x.shape[1] // 4
        order = torch.from_numpy(generator.permutation(16))
        tiles = x.unfold(1, q, q).unfold(2, q, q).flatten(1, 2)[:, order]
        return tiles.unflatten(1, (4, 4)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    # one seed per image: the same scene in any set and at any position
    seed = int(generator.integers(2**31))
    drawn = scenes.draw(1, seed=seed, atypical=0.0).tensor().float()
    grown = F.interpolate(drawn, x.shape[1:], mode="bilinear", antialias=True)
    return grown[0].round().clamp(0, 255).byte()
