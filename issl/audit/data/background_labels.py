"""What is known about the backgrounds of images: labels made by eye for CIFAR-10, the truth for
drawn scenes."""

from __future__ import annotations

import numpy as np
import pandas as pd

from issl.data.images import Images
from issl.files import PACKAGE

FOLDER = PACKAGE / "audit" / "data" / "labels"  # how they were made: README.md there
LABELS, LISTED = FOLDER / "cifar10_backgrounds.csv", FOLDER / "cifar10_listed_backgrounds.csv"


def background_labels(images: Images, split: str = "train") -> pd.DataFrame | None:
    """The images whose background is known: position (in `images`), uniform, and colour (white,
    black, other; "" if the background is not uniform). None if the set has no labels."""
    if images.name == "scenes":
        truth = images.attributes
        uniform, colour = truth["uniform"].astype(bool), truth["background"]
        colour = colour.where(colour.isin(["white", "black"]), "other").where(uniform, "")
        table = pd.DataFrame({"uniform": uniform, "colour": colour})
        table["position"] = range(len(images))
        # the background of an atypical image is not the one that was drawn
        return table[truth["atypical"] == ""].reset_index(drop=True)
    if (images.name, split) == ("cifar10", "train"):
        labels = pd.read_csv(LABELS, keep_default_na=False).set_index("index")
        index = images.index.numpy()
        place = np.flatnonzero(np.isin(index, labels.index))
        known = labels.loc[index[place]]
        return pd.DataFrame(
            {
                "uniform": (known["uniform"] == "yes").to_numpy(),
                "colour": known["colour"].to_numpy(),
                "position": place,
            }
        )
    return None


def listed_backgrounds(images: Images, split: str = "train") -> pd.DataFrame | None:
    """The backgrounds of random images and of images at the ends of rankings, by position in
    `images`. Columns plain, smooth (true for plain ones too) and random. For drawn scenes, all with
    a known background are listed. None if the set has no labels."""
    if images.name == "scenes":
        known = background_labels(images, split)
        assert known is not None
        plain = known.set_index("position")["uniform"]
        return pd.DataFrame({"plain": plain, "smooth": plain, "random": True})
    if (images.name, split) != ("cifar10", "train"):
        return None
    labels = pd.read_csv(LISTED).set_index("index")
    index = images.index.numpy()
    found = labels.reindex(index).set_axis(range(len(index))).dropna()
    plain = found["background"] == "plain"
    smooth = plain | (found["background"] == "smooth")
    return pd.DataFrame({"plain": plain, "smooth": smooth, "random": found["random"] == 1})
