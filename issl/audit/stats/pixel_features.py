"""Simple features of pixels: a score may follow them for reasons that involve no learning."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import torch
from PIL import Image

from issl.data.images import Images
from issl.data.views import luma

BORDER = 2  # px: width of the outer frame that stands for the background
UNIFORM_STD = 0.05  # a frame whose colour varies less than this (pixels in [0, 1]) is uniform


def pixel_features(images: Images) -> pd.DataFrame:
    """Brightness, contrast and outer frame of each image, pixels in [0, 1].

    The object rarely fills the frame of an image, so a flat frame suggests a flat background;
    notebook 03 measures how well this works where the truth is known.

    Returns:
        Columns index, brightness (mean grey), contrast (standard deviation of grey),
        pixel_variance (over all pixels and channels), border_std (root mean square over channels
        of the standard deviation in the outer BORDER px), border_grey, uniform (border_std <
        UNIFORM_STD).
    """
    parts = []
    for pixels in images.tensor().split(2048):
        x = pixels.float() / 255
        grey = luma(x).flatten(1)
        frame = torch.ones(x.shape[-2:], dtype=torch.bool)
        frame[BORDER:-BORDER, BORDER:-BORDER] = False
        border = x[:, :, frame]
        border_std = border.var(2, correction=0).mean(1).sqrt()
        parts.append(
            {
                "brightness": grey.mean(1),
                "contrast": grey.std(1, correction=0),
                "pixel_variance": x.flatten(1).var(1, correction=0),
                "border_std": border_std,
                "border_grey": luma(border[..., None]).mean((1, 2, 3)),
                "uniform": border_std < UNIFORM_STD,
            }
        )
    found = pd.DataFrame({k: torch.cat([p[k] for p in parts]).numpy() for k in parts[0]})
    return found.assign(index=images.index.numpy())


def texture(images: Images) -> pd.DataFrame:
    """How much there is to see in each image, n rows in the order of the set.

    Returns:
        Columns edge_density (mean size of the grey gradient per pixel, pixels in [0, 1]) and
        jpeg_size (bytes as a JPEG of quality 90).
    """
    edges, sizes = [], []
    for pixels in images.tensor():
        dy, dx = np.gradient(luma(pixels[None].float() / 255)[0].squeeze().numpy())
        edges.append(np.hypot(dy, dx).mean())
        with io.BytesIO() as file:
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=90)
            sizes.append(file.tell())
    return pd.DataFrame({"edge_density": edges, "jpeg_size": sizes})
