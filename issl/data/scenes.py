"""`scenes`: drawn images whose ground truth is known exactly.

Each shows one of ten shapes, in a random pose, on a background that is uniform (white, black, a
colour) or textured. What the paper can only observe on photographs is known here: the kind of
background, the foreground mask, a group with a chosen skew, injected exact and near duplicates,
and injected atypical images.

Each property has its own random stream, keyed by (seed, split, property). So the first n images of
a larger set are the set of size n. And `background="white"` changes only the backgrounds, not the
objects and their poses, which gives every image a counterfactual twin.
"""

from __future__ import annotations

import zlib

import numpy as np
import pandas as pd
import torch

from issl.data.images import Images
from issl.errors import IsslError

SIDE = 32
CLASSES = "disc ring square frame triangle star plus crescent dumbbell ell".split()
BACKGROUNDS = ("white", "black", "colour", "texture")
GROUPS = ("warm", "cool")
ATYPICAL = ("static", "shuffled", "empty")
MINORITY = 0.2  # share of images of the group `cool`
NOISE = 0.01  # standard deviation of the sensor noise
DEFAULT_SIZE = {"train": 10_000, "test": 2_000}
SWAPPED = 10_000_000  # more than any number of scenes
VERSION = 1  # part of every cache key: raise it when a drawn pixel changes


def draw(
    n: int | None = None,
    split: str = "train",
    seed: int = 0,
    *,
    uniform: float = 0.3,
    exact_duplicates: float = 0.01,
    near_duplicates: float = 0.01,
    atypical: float = 0.01,
    background: str | None = None,
) -> Images:
    """Draw the first `n` images of the set (`seed`, `split`).

    Args:
        n: None gives 10,000 train or 2,000 test images.
        split: `train` or `test`.
        uniform: Share of backgrounds that are white, black or one colour. Each share is a
            probability per image.
        exact_duplicates: Share of images that are copies of another one.
        near_duplicates: Share of copies shifted by 1–2 px, a little brighter.
        atypical: Share of static, shuffled or empty images.
        background: One of BACKGROUNDS, for every image.

    Returns:
        Images with masks and these attributes: index, label_name, background ("none" for static and
        shuffled images), uniform, group, duplicate_of (index of the original, always an earlier
        image; −1 for none), duplicate_kind, atypical ("" for ordinary ones).
    """
    if split not in DEFAULT_SIZE:
        raise IsslError(f"split {split!r}: scenes has {' and '.join(DEFAULT_SIZE)}")
    if background not in (None, *BACKGROUNDS):
        raise IsslError(f"background {background!r}: choose {', '.join(BACKGROUNDS)}")
    shares = exact_duplicates, near_duplicates, atypical
    if not 0 <= uniform <= 1 or min(shares) < 0 or not sum(shares) <= 1:
        raise IsslError(
            f"shares of scenes: uniform={uniform}, duplicates and atypical images {shares}; give "
            "numbers from 0 to 1; the last three may add up to at most 1"
        )
    n = DEFAULT_SIZE[split] if n is None else n
    if n < 1:
        raise IsslError(f"n={n}: scenes draws 1 image or more")

    def stream(name: str) -> np.random.Generator:
        return np.random.default_rng([seed, zlib.crc32(split.encode()), zlib.crc32(name.encode())])

    label = stream("class").integers(0, len(CLASSES), n)
    is_uniform = stream("uniform").random(n) < uniform
    behind = np.where(is_uniform, stream("background").integers(0, 3, n), 3)
    if background is not None:
        behind = np.full(n, BACKGROUNDS.index(background))
    group = (stream("group").random(n) < MINORITY).astype(int)
    # one uniform number decides all three injections, so they exclude each other
    kind = np.digitize(stream("inject").random(n), np.cumsum(shares))
    # 0 exact, 1 near, 2 atypical, 3 ordinary
    kind[0] = 3  # the first image has no earlier one to copy
    strange = np.where(kind == 2, stream("atypical").integers(0, len(ATYPICAL), n), -1)

    poses = "x y angle size hue sat val light".split()
    pose = {k: stream(k).random(n).astype(np.float32) for k in poses}
    texture = stream("texture").random((n, 20)).astype(np.float32)
    colour = stream("colour").random((n, 3)).astype(np.float32)
    grain, static = stream("grain"), stream("static")
    pixels, masks = np.empty((n, 3, SIDE, SIDE), np.uint8), np.empty((n, SIDE, SIDE), np.uint8)
    for at in range(0, n, 1000):
        s = slice(at, min(at + 1000, n))
        mask = _mask(label[s], {k: v[s] for k, v in pose.items()})
        mask[strange[s] == ATYPICAL.index("empty")] = 0
        back = _background(behind[s], colour[s], texture[s])
        image = _paint(mask, back, group[s], {k: v[s] for k, v in pose.items()})
        size = (len(image), 3, SIDE, SIDE)
        static_block = static.random(size, dtype=np.float32)
        image = np.where((strange[s] == 0)[:, None, None, None], static_block, image)
        image += NOISE * grain.standard_normal(size, dtype=np.float32)
        pixels[s] = np.rint(255 * image.clip(0, 1))
        masks[s] = np.rint(255 * mask)
    masks[strange == ATYPICAL.index("static")] = 0
    order = np.argsort(stream("shuffle").random((n, 16)), axis=1)
    for i in np.flatnonzero(strange == ATYPICAL.index("shuffled")):
        pixels[i], masks[i] = _shuffle(pixels[i], order[i]), 0

    pick, shift = stream("source").random(n), stream("shift").random((n, 3))
    source = _inject_duplicates(pixels, masks, kind, pick, shift)
    root = np.where(source >= 0, source, np.arange(n))
    behind, group, label, strange = behind[root], group[root], label[root], strange[root]
    behind[(strange >= 0) & (strange != ATYPICAL.index("empty"))] = len(BACKGROUNDS)
    duplicate_kind = np.where(source >= 0, np.array(["exact", "near", "", ""])[kind], "")
    attributes = {
        "index": np.arange(n),
        "label_name": np.array(CLASSES)[label],
        "background": np.array([*BACKGROUNDS, "none"])[behind],
        "uniform": behind < 3,
        "group": np.array(GROUPS)[group],
        "duplicate_of": source,
        "duplicate_kind": duplicate_kind,
        "atypical": np.array([*ATYPICAL, ""])[strange],
    }
    labels = torch.from_numpy(label.astype(np.int64))
    table, masked = pd.DataFrame(attributes), torch.from_numpy(masks)
    return Images(torch.from_numpy(pixels), labels, table, "scenes", masked)


def swapped(n: int | None = None, split: str = "train", seed: int = 0) -> Images:
    """Each of the first n scenes on every background: white, black, one colour, textured; 4n
    images.

    Objects and poses stay the same, so an image and its twins differ only in the background.
    Attributes: `scene`, the index of the scene they come from, and those of `draw`; index = scene +
    SWAPPED · (position of the background). There are no duplicates and no atypical images.
    """
    sets, tables = [], []
    for k, background in enumerate(BACKGROUNDS):
        none = dict.fromkeys(("exact_duplicates", "near_duplicates", "atypical"), 0.0)
        sets.append(draw(n, split, seed, background=background, **none))
        scene = sets[k].attributes["index"]
        tables.append(sets[k].attributes.assign(index=scene + SWAPPED * k, scene=scene))
    pixels = torch.cat([part.tensor() for part in sets])
    labels = torch.cat([part.require_labels() for part in sets])
    masks = torch.cat([part.masks for part in sets if part.masks is not None])
    return Images(pixels, labels, pd.concat(tables, ignore_index=True), "scenes-swapped", masks)


def _inject_duplicates(
    pixels: np.ndarray, masks: np.ndarray, kind: np.ndarray, pick: np.ndarray, shift: np.ndarray
) -> np.ndarray:
    """Overwrite the images of kind 0 and 1 with (changed) copies of earlier ordinary ones; returns
    sources."""
    source = np.full(len(kind), -1)
    ordinary = np.flatnonzero(kind == 3)
    for i in np.flatnonzero(kind < 2):
        earlier = ordinary[: np.searchsorted(ordinary, i)]
        source[i] = j = earlier[int(pick[i] * len(earlier))]
        pixels[i], masks[i] = pixels[j], masks[j]
        if kind[i] == 1:
            dy, dx = (int(1 + 2 * v) * (1 if v > 0.5 else -1) for v in shift[i, :2] * 0.999)
            bright = 1.05 + 0.1 * shift[i, 2]
            moved = np.pad(pixels[j], ((0, 0), (2, 2), (2, 2)), mode="edge")
            window = np.s_[..., 2 + dy : 2 + dy + SIDE, 2 + dx : 2 + dx + SIDE]
            pixels[i] = np.rint(moved[window] * bright).clip(0, 255)
            masks[i] = np.pad(masks[j], 2, mode="edge")[window]
    return source


def _mask(label: np.ndarray, pose: dict[str, np.ndarray]) -> np.ndarray:
    """Foreground opacity in [0, 1], (n, SIDE, SIDE): signed distance to each shape, one pixel of
    soft edge."""
    axis = (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE * 2 - 1  # image spans [-1, 1]
    column = {k: v[:, None, None] for k, v in pose.items()}
    left = axis[None, None, :] - 0.4 * (column["x"] - 0.5)
    top = axis[None, :, None] - 0.4 * (column["y"] - 0.5)
    angle, size = 2 * np.pi * column["angle"], 0.55 + 0.3 * column["size"]
    x = (np.cos(angle) * left + np.sin(angle) * top) / size
    y = (np.cos(angle) * top - np.sin(angle) * left) / size
    distance = np.empty((len(label), SIDE, SIDE), np.float32)
    for k, name in enumerate(CLASSES):
        rows = label == k
        distance[rows] = SHAPES[name](x[rows], y[rows])
    return (0.5 - distance * size * SIDE / 2).clip(0, 1)


def _box(x: np.ndarray, y: np.ndarray, a: float, b: float) -> np.ndarray:
    return np.maximum(np.abs(x) - a, np.abs(y) - b)


def _disc(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return np.hypot(x, y) - r


def _polygon(x: np.ndarray, y: np.ndarray, sides: int, r: float) -> np.ndarray:
    turns = [2 * np.pi * k / sides for k in range(sides)]
    return np.maximum.reduce([np.cos(t) * x + np.sin(t) * y for t in turns]) - r


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - (0.62 + 0.28 * np.cos(5 * np.arctan2(y, x)))


# signed distance (negative inside) in the object's own frame, where it roughly fills the unit disc
SHAPES = {
    "disc": lambda x, y: _disc(x, y, 0.8),
    "ring": lambda x, y: np.abs(_disc(x, y, 0.68)) - 0.19,
    "square": lambda x, y: _box(x, y, 0.68, 0.68),
    "frame": lambda x, y: np.abs(_box(x, y, 0.6, 0.6)) - 0.17,
    "triangle": lambda x, y: _polygon(x, y, 3, 0.48),
    "star": _star,
    "plus": lambda x, y: np.minimum(_box(x, y, 0.85, 0.26), _box(x, y, 0.26, 0.85)),
    "crescent": lambda x, y: np.maximum(_disc(x, y, 0.82), -_disc(x - 0.38, y, 0.66)),
    "dumbbell": lambda x, y: np.minimum.reduce(
        [_disc(x - 0.58, y, 0.36), _disc(x + 0.58, y, 0.36), _box(x, y, 0.58, 0.13)]
    ),
    "ell": lambda x, y: np.minimum(_box(x + 0.35, y, 0.25, 0.8), _box(x, y - 0.55, 0.6, 0.25)),
}


def _hsv(hue: np.ndarray, sat: np.ndarray, val: np.ndarray) -> np.ndarray:
    """(n,) hue, saturation, value in [0, 1] to (n, 3) RGB."""
    k = (np.array([5, 3, 1], np.float32)[None] + 6 * hue[:, None]) % 6
    return val[:, None] * (1 - sat[:, None] * np.minimum(k, 4 - k).clip(0, 1))


def _paint(
    mask: np.ndarray, back: np.ndarray, group: np.ndarray, pose: dict[str, np.ndarray]
) -> np.ndarray:
    """The object in a colour of its group, lit from one side, blended over `back` by its mask."""
    # warm: magenta-red to yellow; cool: cyan to violet
    hue = np.where(group == 0, -0.05, 0.5) + 0.2 * pose["hue"]
    colour = _hsv((hue % 1).astype(np.float32), 0.55 + 0.45 * pose["sat"], 0.45 + 0.5 * pose["val"])
    axis = np.linspace(-0.15, 0.15, SIDE, dtype=np.float32)
    tilt = 2 * np.pi * pose["light"][:, None, None]
    light = 1 + np.cos(tilt) * axis[None, None, :] + np.sin(tilt) * axis[None, :, None]
    front = colour[:, :, None, None] * light[:, None]
    alpha = mask[:, None]
    return (alpha * front + (1 - alpha) * back).astype(np.float32)


def _background(kind: np.ndarray, colour: np.ndarray, texture: np.ndarray) -> np.ndarray:
    """(n, 3, SIDE, SIDE): flat white, black or colour, or three plane waves in three colours."""
    flat = np.where((kind == 1)[:, None], 0.03, 0.15 + 0.7 * colour)
    flat = np.where((kind == 0)[:, None], 0.97, flat)
    out = np.broadcast_to(flat[:, :, None, None], (len(kind), 3, SIDE, SIDE)).astype(np.float32)
    rows = kind == 3
    t, axis = texture[rows], np.arange(SIDE, dtype=np.float32)
    wave = np.zeros((len(t), 3, SIDE, SIDE), np.float32)
    for k in range(3):
        angle, pitch, phase, *tint = (t[:, 6 * k + j, None, None] for j in range(6))
        frequency = 2 * np.pi * (1 + 7 * pitch**2) / SIDE
        across, down = axis[None, None, :], axis[None, :, None]
        along = np.cos(np.pi * angle) * across + np.sin(np.pi * angle) * down
        wave += np.sin(frequency * along + 2 * np.pi * phase)[:, None] * (np.stack(tint, 1) - 0.5)
    base = 0.3 + 0.4 * colour[rows][:, :, None, None]
    out[rows] = (base + 0.35 * wave).clip(0, 1)
    return out


def _shuffle(image: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The image's 4 × 4 tiles in another order: it keeps its colours and textures and loses its
    object."""
    q = SIDE // 4
    tiles = image.reshape(3, 4, q, 4, q).transpose(1, 3, 0, 2, 4).reshape(16, 3, q, q)[order]
    return tiles.reshape(4, 4, 3, q, q).transpose(2, 0, 3, 1, 4).reshape(3, SIDE, SIDE)
