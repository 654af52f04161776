"""Pictures of images in rows, by Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from issl.data.images import Images
from issl.files import atomic

SIDE, GAP, LINE = 88, 8, 13  # px: of an image, between two, of a line of text
WIDE = 14  # characters that fit under an image
# a title, and images (pixels (3, h, w), 0 to 255) with a few lines of text below each
Row = tuple[str, Sequence[tuple[np.ndarray, str]]]


def write(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Draw one row or more below each other, under a title that may have several lines, and write
    the picture (.png or .pdf)."""
    lines = [1 + max((t.count("\n") + 1 for _, t in images), default=0) for _, images in rows]
    heights = [LINE * n + SIDE + 2 * GAP for n in lines]
    top = LINE * (title.count("\n") + 1) + 2 * GAP
    longest = max(len(line) for line in [*title.split("\n"), *(name for name, _ in rows)])
    width = GAP + max(len(images) for _, images in rows) * (SIDE + GAP)
    sheet = Image.new("RGB", (max(width, 7 * longest), top + sum(heights)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    draw.text((GAP, GAP), title, "black", font, spacing=LINE - 11)
    for (name, images), height in zip(rows, heights, strict=True):
        draw.text((GAP, top), name, "black", font)
        for k, (pixels, text) in enumerate(images):
            left = GAP + k * (SIDE + GAP)
            image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
            sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top + LINE))
            draw.text((left, top + LINE + SIDE + 2), text, "black", font, spacing=LINE - 11)
        top += height
    with atomic(path) as part:
        sheet.save(part)


def contact_sheet(path: Path, scores: pd.DataFrame, images: Images, about: str) -> None:
    """Draw the ten images with the highest and the ten with the lowest influence. `scores` are as
    `issl.self_influence` returns them, in the order of the images. `about` names the encoder and
    the curvature, for the title."""
    influence = scores["influence"].to_numpy()
    order = influence.argsort(kind="stable")[::-1]
    known = images.attributes["path" if "path" in images.attributes else "index"]
    rows = []
    for which, places in (("highest", order[:10]), ("lowest", order[::-1][:10])):
        texts = [f"{short(known.iloc[i])}\n{influence[i]:.3g}" for i in places]
        pixels = (images.pixels[int(i)].numpy() for i in places)
        rows.append((f"{which} influence", list(zip(pixels, texts, strict=True))))
    write(path, f"Influence of {len(images):,} images of {images.name} ({about})", rows)


def short(name: object) -> str:
    """The end of a file's name or label, as much as fits under an image."""
    text = Path(str(name)).name.replace("\n", " ")
    return text if len(text) <= WIDE else ".." + text[2 - WIDE :]
