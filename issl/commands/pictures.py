"""Pictures of images in rows, by Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from issl.data.images import Images
from issl.files import atomic

SIDE, GAP, LINE = 88, 8, 13  # px: of an image, between two, of a line of text
WIDE = 14  # characters that fit under an image


@dataclass(frozen=True)
class Row:
    """A title, and images with a few lines of text below each."""

    title: str
    images: Sequence[tuple[np.ndarray, str]]  # pixels (3, h, w), 0 to 255


def write(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Draw the rows below each other, and write the picture (.png or .pdf).

    Args:
        path: The file.
        title: Above all; it may have several lines.
        rows: At least one.
    """
    lines = [1 + max((t.count("\n") + 1 for _, t in row.images), default=0) for row in rows]
    heights = [LINE * n + SIDE + 2 * GAP for n in lines]
    head = LINE * (title.count("\n") + 1) + 2 * GAP
    longest = max(len(line) for line in [*title.split("\n"), *(row.title for row in rows)])
    font = ImageFont.load_default(11)
    images = GAP + max(len(row.images) for row in rows) * (SIDE + GAP)
    sheet = Image.new("RGB", (max(images, 7 * longest), head + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), title, "black", font, spacing=LINE - 11)
    top = head
    for row, height in zip(rows, heights, strict=True):
        draw.text((GAP, top), row.title, "black", font)
        for k, (pixels, text) in enumerate(row.images):
            left = GAP + k * (SIDE + GAP)
            image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
            sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top + LINE))
            draw.text((left, top + LINE + SIDE + 2), text, "black", font, spacing=LINE - 11)
        top += height
    with atomic(path) as part:
        sheet.save(part)


def contact_sheet(
    path: Path, scores: pd.DataFrame, images: Images, about: str, k: int = 10
) -> None:
    """The images of the highest and of the lowest influence.

    Args:
        path: Where to write it.
        scores: As `issl.self_influence` returns them, in the order of the images.
        images: The images.
        about: The encoder and the curvature, for the title.
        k: Images a row.
    """
    influence = scores["influence"].to_numpy()
    order = influence.argsort(kind="stable")[::-1]
    known = images.attributes["path" if "path" in images.attributes else "index"]
    rows = [
        Row(
            f"{which} influence",
            [
                (images.pixels[int(i)].numpy(), f"{short(known.iloc[i])}\n{influence[i]:.3g}")
                for i in places[:k]
            ],
        )
        for which, places in (("highest", order), ("lowest", order[::-1]))
    ]
    write(path, f"Influence of {len(images):,} images of {images.name} ({about})", rows)


def short(name: object) -> str:
    """The end of a file's name or label, as much as fits under an image."""
    text = Path(str(name)).name.replace("\n", " ")
    return text if len(text) <= WIDE else ".." + text[2 - WIDE :]
