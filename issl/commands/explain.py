"""`issl explain`: which training images taught the encoder about this image, as a picture and a
table."""

from __future__ import annotations

import argparse
import io
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from issl.commands import pictures
from issl.commands.options import add_image_arguments
from issl.data import datasets
from issl.data.decoding import decode
from issl.data.images import Images, own_names
from issl.devices import pick_device
from issl.errors import IsslError
from issl.evaluate import embed, stability_losses
from issl.files import atomic, read_safetensors, writable
from issl.influence.curvature import LoGra
from issl.influence.layers import find_layers
from issl.influence.passes import Computing
from issl.influence.perturbation import GaussianNoise
from issl.influence.scores import as_queries, cross_influence
from issl.pretraining.encoder import read_header
from issl.pretraining.learner import load_learner
from issl.pretraining.other_encoders import Opened, encoder_asked_for
from issl.training_aware import training_influence

LISTS = {
    "taught": "most positive influence",
    "opposed": "most negative influence",
    "nearest": "nearest in features",
    "trained": "most positive training-aware influence",
}
MATES = 32  # of an image in the batches that training-aware influence is measured in
# settings of a notebook's training set that `issl.load` has none of
ALTERED = ("inject", "first", "uniform", "classes")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `issl explain`."""
    add = command.add_argument
    add(
        "image",
        metavar="IMAGE",
        help="an image file, or test:17 (train:17) for an image of the data set itself",
    )
    add_image_arguments(command)
    add(
        "--out",
        type=Path,
        default=Path("explain.png"),
        metavar="FILE",
        help="picture, .png or .pdf (explain.png)",
    )
    add("--k", type=int, default=8, help="images in each list (8)")
    add("--fit", action="store_true", help="crop IMAGE to its centre, resize it to the data's size")
    add("--any-data", action="store_true", help="allow images that the encoder was not trained on")
    add("--rank", type=int, default=16, help="of LoGra, per side (16)")
    add("--damping", type=float, default=0.1, help="fraction of the mean diagonal (0.1)")
    add("--draws", type=int, default=4, help="perturbations per image, gradients averaged (4)")
    add("--seed", type=int, default=0, help="of the perturbation (0)")
    add(
        "--training-aware",
        action="store_true",
        help="another list: by influence through the gradient that training follows (64 passes)",
    )
    add("--untrained", action="store_true", help="ask an encoder as initialised, as a control")
    add("--skip", default="", metavar="A,B", help="layers or parameters to leave out, by name")


def main(options: argparse.Namespace) -> int:
    """Run the command; raises IsslError for bad input, before any long work."""
    began = time.monotonic()
    writable(options.out, (".png", ".pdf"))
    if options.k < 1:
        raise IsslError(f"--k {options.k}: must be 1 or more")
    device = pick_device(options.device)
    opened = encoder_asked_for(options)
    encoder, skip = opened.encoder, opened.own_names(options.skip.split(","))
    find_layers(encoder, skip, options.untrained)
    images, known = training_images(options, opened)
    query = read_query(options, images)
    about = f"{len(images):,} images of {images.name}{known}; {opened.about}"
    print(f"{query.attributes['what'][0]} among {about}", flush=True)
    trained_on = bool(query.attributes["trained_on"][0])
    queries, noise = query if trained_on else as_queries(query), GaussianNoise()
    scores = cross_influence(
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
    )[0]
    features, asked = (
        torch.nn.functional.normalize(embed(encoder, some, device), dim=1)
        for some in (images, query)
    )
    near = (features @ asked[0]).double().numpy()
    draws = options.seed, options.draws
    loss = float(stability_losses(encoder, queries, noise, *draws, device)[0])
    trained = by_training(options, images, queries, device) if options.training_aware else None
    own = images.index.numpy() == int(query.index[0]) if trained_on else None
    table = lists(images, scores.numpy(), near, options.k, own, trained)
    with atomic(options.out.with_suffix(".csv")) as part:
        table.to_csv(part, index=False)
    title = f"Where did the encoder learn this? {in_common(table)}\n{about}; LoGra({options.rank})"
    draw(options.out, title, query, images, table, loss)
    print(_summary(table))
    seconds = time.monotonic() - began
    print(f"{options.out}, {options.out.with_suffix('.csv')}: {seconds:.0f} s", flush=True)
    return 0


def by_training(
    options: argparse.Namespace, images: Images, query: Images, device: torch.device
) -> np.ndarray:
    """Training-aware influence of each image on the query, on views of the size that the training
    ended on."""
    if not options.encoder.endswith(".safetensors"):
        raise IsslError(
            f"--training-aware: {options.encoder} does not say how it was trained; it needs a file "
            "that `issl pretrain` or a notebook wrote"
        )
    learner = load_learner(options.encoder)
    height, width = images.pixels.shape[2:]
    return training_influence(
        learner,
        images,
        query,
        seed=options.seed,
        draws=options.draws,
        batch_size=min(MATES, len(images)),
        size=(height // 2, width // 2) if learner.recipe.small == 1 else None,
        computing=Computing(device=device, progress=sys.stderr.isatty()),
    )[0].numpy()


# --- which training images, which query ---


def training_images(options: argparse.Namespace, opened: Opened) -> tuple[Images, str]:
    """The images that the encoder was trained on, and a note on how that is known.

    Our own checkpoints say what they were trained on: another set, or another number of images, is
    an error. Nothing is known about other encoders, and the output says so.
    """
    size = options.size
    if size is None and datasets.is_resized(options.data):
        size = opened.size
    header = _header(options.encoder)
    if header is None:
        return _load(options, options.n, size), " (the file does not say what it was trained on)"
    config = header.get("config")  # of a notebook's stage
    known = config["data"] if config else {"name": header["data"], "n": header["n"]}
    name, count = known["name"], known["n"]
    if options.any_data:
        return _load(options, options.n, size), f" (it was trained on {name})"
    encoder = f"encoder {options.encoder} was trained on"
    remedy = "or add --any-data to ask about images that it has not seen"
    if name not in (datasets.without_place(options.data), options.data):
        raise IsslError(f"{encoder} {name}, not on {options.data}: use --data {name}, {remedy}")
    if options.n is not None and options.n != count:
        raise IsslError(
            f"{encoder} {count} images of {name}, not on {options.n}: leave out --images, {remedy}"
        )
    if not config:
        return _load(options, count, size), " it was trained on"
    if altered := [key for key in ALTERED if known.get(key) is not None]:
        raise IsslError(
            f"{encoder} images of {name} that a notebook altered ({', '.join(altered)}): add "
            "--any-data to ask about the set as it is"
        )
    which = datasets.identity(options.data, known["split"], options.data_root)
    if which.digest != known.get("identity"):
        raise IsslError(
            f"{encoder} other images of {name} than those here (their content differs): point "
            f"--data-root to the right ones, {remedy}"
        )
    images = datasets.load(
        options.data, known["split"], count, options.data_root, known["seed"], known["size"]
    )
    some = config.get("without") or config.get("left_out")
    return images, " (it was trained on a part of them)" if some else " it was trained on"


def _load(options: argparse.Namespace, n: int | None, size: int | None) -> Images:
    return datasets.load(options.data, "train", n, options.data_root, size=size)


def _header(encoder: str) -> dict[str, Any] | None:
    """What our own checkpoint says about its training."""
    if not encoder.endswith(".safetensors") or not Path(encoder).is_file():
        return None
    entry = read_header(read_safetensors(Path(encoder), "encoder")[0], Path(encoder))
    return entry if entry is not None and ("config" in entry or "data" in entry) else None


def read_query(options: argparse.Namespace, images: Images) -> Images:
    """The one image that is asked about; attributes: index, what (for titles), trained_on (is it
    one of `images`?)."""
    side = int(images.pixels.shape[2])
    # a name may hold a newline
    member = re.fullmatch(r"train:(.+)|test:(\d+)", options.image, re.DOTALL)
    if member and member[1]:
        place = _place(options.image, member[1], images)
        paths, named = images.attributes.get("path"), f"training image {member[1]}"
        if paths is not None and paths.iloc[place] != member[1]:
            named += f" ({paths.iloc[place]})"
        return _one(images.pixels[place], int(images.index[place]), named, True)
    if member:
        same = options.size or side if options.data == "fairface" else None
        test = datasets.load(options.data, "test", None, options.data_root, size=same)
        if int(member[2]) >= len(test):
            raise IsslError(
                f"{options.image}: the test set of {options.data} has {len(test)} images, numbered "
                "from 0"
            )
        return _one(test.pixels[int(member[2])], int(member[2]), f"test image {member[2]}", False)
    path = Path(options.image)
    if not path.is_file():
        part = "train" if options.data.startswith("folder:") else "test"  # a folder has no test set
        raise IsslError(
            f"image {options.image!r} does not exist; give an image file, or {part}:17 for one of "
            f"{options.data}"
        )
    with path.open("rb") as opened:
        data = read_all(opened, str(path))
    try:
        with Image.open(io.BytesIO(data)) as file:
            size = file.size
            file.verify()
    except Exception as error:
        raise IsslError(
            f"{path} is not an image that can be read ({in_words(error)}); give a PNG, JPEG or the "
            "like"
        ) from error
    # a folder's own images are resized as they are read; a set of a fixed size takes no other
    if size != (side, side) and not options.fit and not options.data.startswith("folder:"):
        raise IsslError(
            f"{path} is {size[0]} × {size[1]} px, the images of {images.name} are {side} × {side}: "
            "add --fit to take its centred square and resize it, or bring it to that size yourself"
        )
    return _one(torch.from_numpy(decode(data, side, str(path)).copy()), 0, path.name, False)


def _place(option: str, which: str, images: Images) -> int:
    """Where an image is among the training images: by its index or, of files, by its path or its
    place."""
    known = images.attributes
    matches = np.flatnonzero(known["path"] == which) if "path" in known else np.empty(0, np.int64)
    if not len(matches) and which.isdigit():
        matches = np.flatnonzero(known["index"] == int(which))
        if not len(matches) and "path" in known and int(which) < len(images):
            return int(which)
    if not len(matches):
        raise IsslError(
            f"{option}: the encoder's {len(images)} training images have no index {which}"
        )
    return int(matches[0])


def _one(pixels: torch.Tensor, index: int, what: str, trained_on: bool) -> Images:
    about = pd.DataFrame({"index": [index], "what": [what], "trained_on": [trained_on]})
    return Images(pixels[None], None, about, "query")


# --- the answer ---


def lists(
    images: Images,
    influence: np.ndarray,
    similarity: np.ndarray,
    k: int,
    leave_out: np.ndarray | None = None,
    trained: np.ndarray | None = None,
) -> pd.DataFrame:
    """The training images of each list.

    Args:
        images: The n training images.
        influence: Of each on the query, (n,).
        similarity: Cosine similarity of each to the query, (n,).
        k: Images in a list.
        leave_out: A mask, (n,): the query itself, if it is one of them. It comes last, in a list of
            its own (`itself`).
        trained: Training-aware influence, (n,), which adds a list (`trained`) and two columns.

    Returns:
        One row for each image of the lists: list (see LISTS), rank in it, index, influence on the
        query, similarity to it, the ranks by both among all training images (1 is the highest), and
        what is known about the image.
    """
    own = np.zeros(len(images), bool) if leave_out is None else leave_out
    k = min(k, int((~own).sum()))
    scores = {"influence": influence, "similarity": similarity}
    scores |= {} if trained is None else {"training_influence": trained}
    ranks = {
        f"{name}_rank": pd.Series(np.where(own, np.nan, -values))
        .rank(method="first")
        .astype("Int64")
        for name, values in scores.items()
    }
    known = own_names(images.attributes, [*scores, *ranks, "position", "list", "rank"])
    known = known.assign(**scores, **ranks, position=np.arange(len(images)))
    others = known[~own]
    parts = {
        "taught": others.nsmallest(k, "influence_rank"),
        "opposed": others.nlargest(k, "influence_rank"),
        "nearest": others.nsmallest(k, "similarity_rank"),
    }
    parts |= {} if trained is None else {"trained": others.nsmallest(k, "training_influence_rank")}
    parts["itself"] = known[own]
    table = pd.concat(
        [p.assign(list=name, rank=np.arange(1, len(p) + 1)) for name, p in parts.items() if len(p)]
    )
    front = ["list", "rank", "index", *scores, *ranks]
    return table[[*front, *(c for c in table if c not in front)]].reset_index(drop=True)


def draw(
    path: Path, title: str, query: Images, images: Images, table: pd.DataFrame, loss: float
) -> None:
    """The query above lists of training images, each with its influence (in parts of the greatest)
    and similarity; `table` from `lists`, `loss` the query's stability loss."""
    others = table[table["list"] != "itself"]
    greatest = float(others["influence"].abs().max()) or 1.0
    what = f"{query.attributes['what'][0]}, stability loss {loss:.3f}"
    rows = [pictures.Row(what, [(query.pixels[0].numpy(), "")])]
    for name, members in others.groupby("list", sort=False):
        shown = []
        for member in members.to_dict("records"):
            label = member.get("label_name", member.get("path", member["index"]))
            text = (
                f"{pictures.short(label)}\n{member['influence'] / greatest:+.2f} "
                f"(#{member['influence_rank']})\ncos {member['similarity']:.2f} "
                f"(#{member['similarity_rank']})"
            )
            shown.append((images.pixels[member["position"]].numpy(), text))
        rows.append(pictures.Row(LISTS[str(name)], shown))
    legend = (
        "±: influence / the greatest (negative: a step that makes that image more stable makes "
        "this one less so)\ncos: similarity of features; #: rank of all"
    )
    pictures.write(path, f"{title}\n{legend}", rows)


def in_common(table: pd.DataFrame) -> str:
    """How many images the lists of influence and of nearness share."""
    taught, nearest = (
        set(table.loc[table["list"] == name, "index"]) for name in ("taught", "nearest")
    )
    return (
        f"{len(taught & nearest)} of the {len(taught)} most influential are among the "
        f"{len(nearest)} nearest"
    )


def _summary(table: pd.DataFrame) -> str:
    lines = []
    for name, part in table[table["list"] != "itself"].groupby("list", sort=False):
        each = part["index"].astype(str)
        if "path" in part:  # of files, the index is the hash of this
            each = part["path"].astype(str)
        elif "label_name" in part:
            each = each + " (" + part["label_name"].astype(str) + ")"
        lines.append(f"{LISTS[str(name)]}: {', '.join(each)}")
    return "\n".join([*lines, in_common(table)])
