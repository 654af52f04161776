"""`issl explain`: which training images taught the encoder about this image, as a picture and a
table."""

from __future__ import annotations

import argparse
import io
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from issl.commands import pictures
from issl.commands.options import add_image_arguments, load_images
from issl.data import datasets
from issl.data.images import Images, decode, own_names
from issl.devices import pick_device
from issl.engine import whole
from issl.errors import IsslError
from issl.files import atomic, read_safetensors, writable
from issl.influence.curvature import LoGra
from issl.influence.layers import find_layers
from issl.influence.perturbation import GaussianNoise
from issl.influence.scorer import Computing
from issl.influence.scores import as_queries, cross_influence
from issl.measures import embed, stability_losses
from issl.pretraining.encoder import read_header
from issl.pretraining.other_encoders import Opened, encoder_asked_for

LISTS = {
    "taught": "most positive influence",
    "opposed": "most negative influence",
    "nearest": "nearest in features",
}
# settings of a notebook's training set that `issl.load` does not have
ALTERED = ("inject", "first", "uniform", "classes")


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    text = "an image file, or test:17 (train:17) for an image of the data set itself"
    add("image", metavar="IMAGE", help=text)
    add_image_arguments(command)
    command.set_defaults(split="train", skip_broken=False, workers=None)
    out, text = Path("explain.png"), "picture, .png or .pdf (explain.png)"
    add("--out", type=Path, default=out, metavar="FILE", help=text)
    add("--k", type=whole(1), default=8, help="images in each list (8)")
    add("--fit", action="store_true", help="crop IMAGE to its centre, resize it to the data's size")
    add("--any-data", action="store_true", help="allow images that the encoder was not trained on")
    add("--rank", type=int, default=16, help="of LoGra, per side (16)")
    add("--damping", type=float, default=0.1, help="fraction of the mean diagonal (0.1)")
    add("--draws", type=int, default=4, help="perturbations per image, gradients averaged (4)")
    add("--seed", type=int, default=0, help="of the perturbation (0)")
    add("--untrained", action="store_true", help="explain an encoder as initialised, as a control")
    add("--skip", default="", metavar="A,B", help="layers or parameters to leave out, by name")


def main(options: argparse.Namespace) -> int:
    began, out = time.monotonic(), options.out
    writable(out, (".png", ".pdf"))
    device = pick_device(options.device)
    opened = encoder_asked_for(options)
    encoder, skip = opened.encoder, opened.own_names(options.skip.split(","))
    find_layers(encoder, skip, options.untrained)
    images, known = training_images(options, opened)
    query, what, own = read_query(options, images)
    about = f"{len(images):,} images of {images.name}{known}; {opened.about}"
    print(f"{what} among {about}", flush=True)
    queries, noise = query if own.any() else as_queries(query), GaussianNoise()
    influence = cross_influence(
        encoder,
        images,
        queries,
        noise,
        LoGra(options.rank, options.damping),
        options.seed,
        draws=options.draws,
        skip=skip,
        untrained=options.untrained,
        computing=Computing(device=device, batch_size=64),
    )
    features, asked = (
        torch.nn.functional.normalize(embed(encoder, some, device), dim=1)
        for some in (images, query)
    )
    similarity = (features @ asked[0]).double().numpy()
    losses = stability_losses(encoder, queries, noise, options.seed, options.draws, device)
    table = lists(images, influence[0].numpy(), similarity, options.k, own)
    with atomic(out.with_suffix(".csv")) as part:
        table.to_csv(part, index=False)
    shared = in_common(table)
    title = f"Where did the encoder learn this? {shared}\n{about}; LoGra({options.rank})"
    what = f"{what}, stability loss {losses[0]:.3f}"
    draw(out, title, (what, query), images, table)
    print(f"{_summary(table)}\n{shared}")
    print(f"{out}, {out.with_suffix('.csv')}: {time.monotonic() - began:.0f} s", flush=True)
    return 0


def training_images(options: argparse.Namespace, opened: Opened) -> tuple[Images, str]:
    """The images that the encoder was trained on, and a note on how that is known.

    Our own checkpoints say what they were trained on: another set, or another number of images, is
    an error. Nothing is known about other encoders, and the output says so.
    """
    header = _header(Path(options.encoder))
    if header is None:
        note = " (the file does not say what it was trained on)"
        return load_images(options, opened), note
    config = header.get("config")  # of a notebook's stage
    known = config["data"] if config else {"name": header["data"], "n": header["n"]}
    name, count = known["name"], known["n"]
    if options.any_data:
        return load_images(options, opened), f" (it was trained on {name})"
    encoder = f"encoder {options.encoder} was trained on"
    remedy = "or add --any-data to ask about images that it has not seen"
    if name not in (datasets.without_place(options.data), options.data):
        raise IsslError(f"{encoder} {name}, not on {options.data}: use --data {name}, {remedy}")
    if options.n not in (None, count):
        raise IsslError(
            f"{encoder} {count} images of {name}, not on {options.n}: leave out --images, {remedy}"
        )
    if not config:
        options.n, options.split = count, header.get("split", "train")
        return load_images(options, opened), " it was trained on"
    if altered := [key for key in ALTERED if known.get(key) is not None]:
        raise IsslError(
            f"{encoder} images of {name} that a notebook altered ({', '.join(altered)}): add "
            "--any-data to ask about the set as it is"
        )
    place = options.data, known["split"]
    if datasets.identity(*place, options.data_root).digest != known.get("identity"):
        raise IsslError(
            f"{encoder} other images of {name} than those here (their content differs): point "
            f"--data-root to the right ones, {remedy}"
        )
    images = datasets.load(*place, count, options.data_root, size=known["size"])
    some = config.get("without") or config.get("left_out")
    return images, " (it was trained on a part of them)" if some else " it was trained on"


def _header(path: Path) -> dict[str, Any] | None:
    """What our own checkpoint says about its training."""
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    entry = read_header(read_safetensors(path, "encoder")[0], path)
    return entry if entry is not None and ("config" in entry or "data" in entry) else None


def read_query(options: argparse.Namespace, images: Images) -> tuple[Images, str, np.ndarray]:
    """The image that is asked about; its name in titles; and a mask of its place among `images`,
    all false if it is not one of them."""
    side, data, none = int(images.pixels.shape[2]), options.data, np.zeros(len(images), bool)
    # a name may hold a newline
    member = re.fullmatch(r"train:(.+)|test:(\d+)", options.image, re.DOTALL)
    if member and member[1]:
        own, what = _own(options.image, member[1], images), f"training image {member[1]}"
        paths = images.attributes.get("path")
        if paths is not None and paths[own].iloc[0] != member[1]:
            what += f" ({paths[own].iloc[0]})"
        return images.subset(own).in_memory(), what, own
    if member:
        same, place = side if datasets.is_resized(data) else None, int(member[2])
        test = datasets.load(data, "test", None, options.data_root, size=same)
        if place >= len(test):
            raise IsslError(
                f"{options.image}: the test set of {data} has {len(test)} images, numbered from 0"
            )
        return _one(test.pixels[place], place), f"test image {place}", none
    path = Path(options.image)
    if not path.is_file():
        part = "train" if data.startswith("folder:") else "test"  # a folder has no test set
        raise IsslError(
            f"image {options.image!r} does not exist; give an image file, or {part}:17 for one of "
            f"{data}"
        )
    encoded = path.read_bytes()
    pixels = decode(encoded, side, str(path))
    width, height = Image.open(io.BytesIO(encoded)).size
    # a folder's images are resized as they are read, and so is this; other sets need --fit
    if (width, height) != (side, side) and not options.fit and not data.startswith("folder:"):
        raise IsslError(
            f"{path} is {width} × {height} px, the images of {images.name} are {side} × {side}: "
            "add --fit to take its centred square and resize it, or bring it to that size yourself"
        )
    return _one(torch.from_numpy(pixels.copy()), 0), path.name, none


def _own(option: str, which: str, images: Images) -> np.ndarray:
    """A training image, as a mask. It is given by its index or, for files, by its path or place."""
    known, places = images.attributes, np.arange(len(images))
    found = np.zeros(len(images), bool)
    if "path" in known:
        found = (known["path"] == which).to_numpy()
    if not found.any() and which.isdigit():
        found = (known["index"] == int(which)).to_numpy()
        if not found.any() and "path" in known:
            found = places == int(which)
    if not found.any():
        raise IsslError(
            f"{option}: the encoder's {len(images)} training images have no index {which}"
        )
    return found


def _one(pixels: torch.Tensor, index: int) -> Images:
    return Images(pixels[None], None, pd.DataFrame({"index": [index]}), "query")


def lists(
    images: Images, influence: np.ndarray, similarity: np.ndarray, k: int, own: np.ndarray
) -> pd.DataFrame:
    """The k training images of each list, by their influence on the query and their similarity to
    it, both (n,). If the query is a training image, `own` is its mask, and it comes last, in a list
    of its own, `itself`.

    Returns:
        One row for each image of the lists: list (see LISTS), rank in it, index, influence,
        similarity, the ranks by both among all training images (1 is the highest), and what is
        known about the image.
    """
    scores = {"influence": influence, "similarity": similarity}
    ranks = {}
    for name, values in scores.items():
        falling = pd.Series(np.where(own, np.nan, -values))
        ranks[f"{name}_rank"] = falling.rank(method="first").astype("Int64")
    known = own_names(images.attributes, [*scores, *ranks, "position", "list", "rank"])
    known = known.assign(**scores, **ranks, position=np.arange(len(images)))
    others = known[~own]
    parts = {
        "taught": others.nsmallest(k, "influence_rank"),
        "opposed": others.nlargest(k, "influence_rank"),
        "nearest": others.nsmallest(k, "similarity_rank"),
    }
    if own.any():
        parts["itself"] = known[own]
    table = pd.concat(
        [part.assign(list=name, rank=range(1, len(part) + 1)) for name, part in parts.items()]
    )
    front = ["list", "rank", "index", *scores, *ranks]
    return table[[*front, *(c for c in table if c not in front)]].reset_index(drop=True)


def draw(
    path: Path, title: str, query: tuple[str, Images], images: Images, table: pd.DataFrame
) -> None:
    """Draw the query, under its name, above the training images of `table`, from `lists`, each with
    its influence (as a fraction of the greatest) and similarity."""
    others = table[table["list"] != "itself"]
    greatest = float(others["influence"].abs().max()) or 1.0
    rows = [(query[0], [(query[1].pixels[0].numpy(), "")])]
    for list_, members in others.groupby("list", sort=False):
        shown = []
        for member in members.to_dict("records"):
            names = member.get("label_name"), member.get("path"), member["index"]
            name = pictures.short(next(name for name in names if pd.notna(name)))
            text = (
                f"{name}\n{member['influence'] / greatest:+.2f} (#{member['influence_rank']})\n"
                f"cos {member['similarity']:.2f} (#{member['similarity_rank']})"
            )
            shown.append((images.pixels[member["position"]].numpy(), text))
        rows.append((LISTS[str(list_)], shown))
    legend = (
        "±: influence / the greatest (negative: a step that makes that image more stable makes "
        "this one less so)\ncos: similarity of features; #: rank of all"
    )
    pictures.write(path, f"{title}\n{legend}", rows)


def in_common(table: pd.DataFrame) -> str:
    """How many images the lists of influence and of nearness share."""
    taught, nearest = (set(table["index"][table["list"] == k]) for k in ("taught", "nearest"))
    return (
        f"{len(taught & nearest)} of the {len(taught)} most influential are among the "
        f"{len(nearest)} nearest"
    )


def _summary(table: pd.DataFrame) -> str:
    """The members of each list, by name."""
    members: dict[str, list[str]] = {name: [] for name in table["list"] if name in LISTS}
    for one in table[table["list"].isin(members)].to_dict("records"):
        label = one.get("label_name")
        name = f"{one['index']}" if pd.isna(label) else f"{one['index']} ({label})"
        members[one["list"]].append(one.get("path", name))  # a file's index is its hash
    return "\n".join(f"{LISTS[name]}: {', '.join(names)}" for name, names in members.items())
