"""Encoders of other projects: models of torchvision and timm, and checkpoints in many layouts.

Each maps float pixels in [0, 1] to features, with its normalisation inside and its head removed, in
eval mode, as `issl.self_influence` needs it. In a file, an encoder is found by the names of its
weights, under any prefix. If there are several, a fixed rule or the user chooses one, and `about`
says which. Nothing in a file is executed.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from issl.errors import IsslError
from issl.files import read_safetensors
from issl.pretraining.encoder import PIXEL_MEAN, PIXEL_STD, Normalize, load_encoder, read_header

State = dict[str, Tensor]
Layout = dict[str, str]  # position → layer; empty if the file has the layers' own names
Triple = tuple[float, float, float]
Scale = tuple[Triple, Triple]  # mean and std of the pixels

# `nn.Sequential(*list(resnet.children())[:-1])`, the usual backbone in lightly, names layers by
# their position; the children of lightly's ResNetGenerator have no ReLU and no max-pooling
_LAYERS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
RESNETS: tuple[Layout, ...] = (
    {},
    dict(zip("014567", _LAYERS, strict=True)),
    dict(zip("012345", _LAYERS, strict=True)),
)
OF_A_RESNET = [f"{name}.weight" for name in ("conv1", *(f"layer{k}.0.conv1" for k in (1, 2, 3)))]
# by the number of classes of solo-learn's online classifier, for encoders with the stem for CIFAR
# (its solo/data/pretrain_dataloader.py)
SOLO_CIFAR: dict[int, Scale] = {
    10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
# if a file has both kinds of encoders, the first is taken
PREFERRED = (
    ("teacher", "student"),  # DINO, iBOT, DINOv2: their authors evaluate the teacher
    # the trained one before the one that follows it: MoCo, BYOL, solo-learn, lightly, timm
    ("", r"momentum|teacher|target|(^|[._])(ema|key)([._]|$)|_k\."),
)
# first words of names that are not part of an encoder: heads, and what only a loss needs. BEiT, MAE
# and DINOv2 have a mask token, SwAV has prototypes, MoCo a queue
HEADS = re.compile(
    "heads?|fc|linear|classif(ier|ication)?|(aux)?logits|aux|proj(ector|ection)?|predict(or|ion)|"
    "prototypes?|neck|mlp|decoder|mask|queue|center|loss|criterion"
)
# names of torch's wrappers around modules, at any depth; names in torchvision's files of DenseNets
WRAPPERS = r"(^|(?<=\.))((_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
DENSE = r"(denselayer\d+\.(norm|conv))\.([12])\."


@dataclass(frozen=True)
class Opened:
    """An encoder, and the side in pixels of the images it was made for."""

    encoder: nn.Module
    size: int
    about: str

    def own_names(self, names: Sequence[str]) -> list[str]:
        """The encoder's names for these layers or parameters. Names of the model inside, which
        follows the normalisation, are accepted; empty names are dropped."""
        layers, weights = self.encoder.named_modules(), self.encoder.named_parameters()
        known = {name for name, _ in (*layers, *weights)}
        return [f"1.{n}" if n not in known and f"1.{n}" in known else n for n in names if n]


def add_encoder_arguments(command: argparse.ArgumentParser) -> None:
    """The options that `encoder_asked_for` reads."""
    add = command.add_argument
    what = "a checkpoint file, torchvision:NAME or timm:NAME"
    add("--encoder", required=True, metavar="E", help=what)
    weights = "a state dict for torchvision:NAME or timm:NAME (default: pretrained)"
    add("--weights", metavar="FILE", help=weights)
    mean = "mean of the pixels the encoder was trained on (default: the model's)"
    add("--mean", type=_triple, metavar="R,G,B", help=mean)
    add("--std", type=_triple, metavar="R,G,B", help="standard deviation of these pixels, likewise")
    part = "if a file holds several encoders: a word in the keys of the one to take"
    add("--part", metavar="WORD", help=part)


def encoder_asked_for(options: argparse.Namespace) -> Opened:
    """The encoder that these options name."""
    return open_encoder(options.encoder, options.weights, options.mean, options.std, options.part)


def _triple(text: str) -> Triple:
    try:
        red, green, blue = (float(p) for p in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: give three numbers, R,G,B") from error
    return red, green, blue


def open_encoder(
    spec: str,
    weights: str | None = None,
    mean: Triple | None = None,
    std: Triple | None = None,
    part: str | None = None,
) -> Opened:
    """The encoder that `spec` names.

    Args:
        spec: A file (ours, or one with a ResNet under any prefix), `torchvision:NAME` or
            `timm:NAME`.
        weights: For the last two, a file with the model's weights, under any prefix; default: its
            own pretrained weights, which are downloaded.
        mean: Mean of the pixels in training; default: the model's own if it has one or its layout
            implies one, else ImageNet's.
        std: Their standard deviation, likewise.
        part: Which of a file's encoders to take, by words of its keys, such as `student` or
            `module.encoder_k`; default: by the rules in PREFERRED.
    """
    for what, values, least in (("mean", mean, -math.inf), ("std", std, 0.0)):
        if values is not None and not all(least < v < math.inf for v in values):
            raise IsslError(f"{what}={values}: need finite numbers (std: above 0), one per channel")
    kind, _, name = spec.partition(":")
    if kind in ("torchvision", "timm"):
        opened = _model(kind, name, weights, part, once=mean is not None or std is not None)
    elif weights is not None:
        raise IsslError(
            f"weights {weights!r}: use them with torchvision:NAME or timm:NAME, not with the file "
            f"{spec!r}"
        )
    else:
        opened = _file(Path(spec), part)
    for what, values in (("mean", mean), ("std", std)):
        if values is not None:
            channels = torch.tensor(values)[:, None, None]
            opened.encoder.get_submodule("0").register_buffer(what, channels)
    return opened


def _file(path: Path, part: str | None) -> Opened:
    if not path.is_file():
        raise IsslError(
            f"encoder {str(path)!r} is not a file; give one, or torchvision:NAME such as "
            "torchvision:resnet50, or timm:NAME"
        )
    header = None
    if path.suffix == ".safetensors":
        header = read_header(read_safetensors(path, "encoder")[0], path)
    if header is None:
        return resnet_from(read_tensors(path), str(path), part)
    if part is not None:
        raise IsslError(
            f"part={part!r}: leave it out; {path} is this library's own file and holds one encoder"
        )
    encoder = load_encoder(path)
    config = header.get("config", {})  # of a notebook's stage
    recipe = header.get("recipe") or config.get("recipe") or {}
    size = header.get("size") or config.get("data", {}).get("size") or 32
    about = f"{recipe.get('method', 'encoder')} of width {header['width']} ({path.name})"
    return Opened(encoder, size, about)


# --- ResNets from their weights alone


def resnet_from(state: State, what: str, part: str | None = None) -> Opened:
    """A ResNet with basic or bottleneck blocks; the shapes of the weights give its form.

    A 7×7 stem has stride 2 and max-pooling; a 3×3 one has neither (and solo-learn pads it by 2).
    Pixels are normalised as in solo-learn on CIFAR if the layout is its own, else by ImageNet's
    statistics. `part` is as in `open_encoder`.
    """
    found = encoders_in(state, RESNETS, lambda name, _: name in OF_A_RESNET, len(OF_A_RESNET))
    if not found:
        raise IsslError(
            f"{what}: no ResNet among its keys ({', '.join(list(state)[:6])}); the known "
            "layouts are those of torchvision, solo-learn and lightly. Open other architectures by "
            "name: torchvision:NAME or timm:NAME, with these weights"
        )
    prefix = chosen(found, part, what)
    own = {k.replace(".shortcut.", ".downsample."): v for k, v in found[prefix].items()}
    solo = re.fullmatch(r"(state_dict\.)?(momentum_)?(backbone|encoder)\.", prefix)
    classifier = state.get(f"{solo[1] or ''}classifier.weight") if solo else None
    width, _, side, _ = own["conv1.weight"].shape
    large = side == 7
    stride, padding = (2, 3) if large else (1, 1 if classifier is None else 2)
    layers = {
        "conv1": nn.Conv2d(3, width, side, stride, padding, bias=False),
        "bn1": nn.BatchNorm2d(width),
        "relu": nn.ReLU(inplace=True),
        "maxpool": nn.MaxPool2d(3, 2, 1) if large else nn.Identity(),
        **{f"layer{stage}": _stage(own, stage) for stage in range(1, 5)},
        "avgpool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
    }
    net = nn.Sequential(OrderedDict(layers))
    note = load(net, found | {prefix: own}, prefix, what)
    classes = 0 if classifier is None or large else len(classifier)
    scale = SOLO_CIFAR.get(classes, (PIXEL_MEAN, PIXEL_STD))
    about = f"ResNet{'' if classifier is None else ' of solo-learn'}{note}"
    return Opened(nn.Sequential(Normalize(*scale), net).eval(), 224 if large else 32, about)


def _stage(own: State, stage: int) -> nn.Sequential:
    from torchvision.models.resnet import BasicBlock, Bottleneck  # slow to import

    blocks: list[nn.Module] = []
    while f"{(place := f'layer{stage}.{len(blocks)}.')}conv1.weight" in own:
        inner, inside, _, _ = own[f"{place}conv1.weight"].shape
        block, last = (Bottleneck, 3) if f"{place}conv3.weight" in own else (BasicBlock, 2)
        outside = len(own[f"{place}conv{last}.weight"])
        stride = 2 if stage > 1 and not blocks else 1
        down = None
        if f"{place}downsample.0.weight" in own:
            shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False)
            down = nn.Sequential(shortcut, nn.BatchNorm2d(outside))
        planes = outside // block.expansion
        # a wide ResNet has another inner width
        base = 64 if block is BasicBlock else 64 * inner * block.expansion // outside
        blocks.append(block(inside, planes, stride, down, base_width=base))
    return nn.Sequential(*blocks)


# --- models by name


def _model(kind: str, name: str, weights: str | None, part: str | None, once: bool) -> Opened:
    """A model without its head. `once`: the pixels are normalised only by the statistics that the
    user gave."""
    if weights is None and part is not None:
        raise IsslError(
            f"part={part!r}: use it with a file of weights; the pretrained {kind}:{name} is one "
            "encoder"
        )
    if weights is not None and not Path(weights).is_file():
        raise IsslError(f"weights {weights!r} do not exist")
    try:
        make = _torchvision if kind == "torchvision" else _timm
        model, head, scale, size = make(name, weights is None)
    except (OSError, RuntimeError, ValueError) as error:
        raise IsslError(
            f"model {name}: its pretrained weights could not be downloaded "
            f"({str(error).splitlines()[0]}); give a file with --weights FILE"
        ) from error
    note = ""
    if weights is not None:
        note = _load_file(model, weights, name, part)
        if hasattr(model, "transform_input"):
            # torchvision's Inceptions take pixels normalised by ImageNet's statistics, and
            # normalise them again by 0.5 and 0.5: their pretrained weights were trained this way
            model.transform_input = not once  # type: ignore[assignment]
            note += f"; {'no' if once else 'pixels normalised again by'} transform_input"
    about = f"{kind} {name} without {head}{note}"
    return Opened(nn.Sequential(Normalize(*scale), model).eval(), size, about)


def _torchvision(name: str, pretrained: bool) -> tuple[nn.Module, str, Scale, int]:
    from torchvision import models  # slow to import

    if name not in models.list_models(module=models):
        raise IsslError(f"torchvision has no model {name!r}; see torchvision.models.list_models()")
    # these two are slow to draw weights, which are then replaced
    slow = name in ("googlenet", "inception_v3") and not pretrained
    options = {"init_weights": False} if slow else {}
    model = models.get_model(name, weights="DEFAULT" if pretrained else None, **options)
    for auxiliary in ("aux1", "aux2", "AuxLogits"):  # heads that are only called in training
        if hasattr(model, auxiliary):
            setattr(model, auxiliary, None)
    linear = [k for k, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise IsslError(
            f"torchvision:{name} has no Linear head to remove, so its features are not known"
        )
    model.set_submodule(linear[-1], nn.Identity())
    usual = models.get_model_weights(name).DEFAULT.transforms()
    return model, linear[-1], (tuple(usual.mean), tuple(usual.std)), 224


def _timm(name: str, pretrained: bool) -> tuple[nn.Module, str, Scale, int]:
    try:
        import timm
        from timm.data.config import resolve_model_data_config
    except ImportError as error:
        raise IsslError(f"timm:{name} needs the package timm: pip install timm") from error
    if not timm.is_model(name):
        raise IsslError(f"timm has no model {name!r}; see timm.list_models()")
    model = timm.create_model(name, pretrained=pretrained, num_classes=0)
    config = resolve_model_data_config(model)
    scale = tuple(config["mean"]), tuple(config["std"])
    return model, "head", scale, config["input_size"][-1]


def _load_file(model: nn.Module, path: str, name: str, part: str | None) -> str:
    """Load a model's weights, wherever they are in a file, and whether its layers are keyed by name
    or by position. Returns a note for `about`."""
    what, state, expected = f"{path} for {name}", read_tensors(Path(path)), model.state_dict()
    places = {str(k): child for k, (child, _) in enumerate(model.named_children())}

    def fits(key: str, value: Tensor) -> bool:
        return key in expected and expected[key].shape == value.shape

    found = encoders_in(state, ({}, places), fits, (len(expected) + 1) // 2)
    if not found:
        raise IsslError(
            f"{what}: fewer than half of the model's weights are among its keys in the same shape "
            f"({', '.join(list(state)[:6])}); give weights of this model, or name their model"
        )
    return load(model, found, chosen(found, part, what), what)


# --- one encoder of several


def encoders_in(
    state: State, layouts: Sequence[Layout], known: Callable[[str, Tensor], bool], least: int
) -> dict[str, State]:
    """The encoders in a file: prefix → the tensors under it that have a place in the encoder's
    layout and are not under the longer prefix of another encoder.

    A prefix belongs to an encoder if at least `least` tensors under it are `known` by their usual
    names; `layouts` lists how its layers may be named.
    """
    best: dict[str, tuple[int, Layout]] = {}
    for layout in layouts:
        hits: Counter[str] = Counter()
        for key, value in state.items():
            for start in (0, *(dot.end() for dot in re.finditer(r"\.", key))):
                hits[key[:start]] += known(_usual(key[start:], layout), value)
        for prefix, n in hits.items():
            if n >= least and n > best.get(prefix, (0,))[0]:
                best[prefix] = n, layout
    found: dict[str, State] = {}
    for prefix, (_, layout) in best.items():
        inner = tuple(p for p in best if p != prefix and p.startswith(prefix))
        keys = [k for k in state if k.startswith(prefix) and not k.startswith(inner)]
        named = {_usual(k.removeprefix(prefix), layout): state[k] for k in keys}
        found[prefix] = {name: value for name, value in named.items() if name}
    return found


def _usual(name: str, layout: Layout) -> str:
    """A tensor's usual name; empty if it has no place in the layout."""
    if not layout:
        return name
    place, dot, rest = name.partition(".")
    return layout[place] + dot + rest if place in layout else ""


def chosen(found: dict[str, State], part: str | None, what: str) -> str:
    """The prefix of the encoder to take. Raises IsslError if the user's choice does not exist, or
    if no rule decides between several."""
    word = "." if part is None else f".{part.strip('.')}."
    left = [prefix for prefix in found if word in f".{prefix}"]
    if not left:
        raise IsslError(
            f"{what}: part={part!r} names none of its encoders; they are {_listed(found)}"
        )
    for taken, other in PREFERRED:
        rest = [prefix for prefix in left if not re.search(other, prefix, re.I)]
        if rest and any(re.search(taken, prefix, re.I) for prefix in left):
            left = rest
    first = left[0]
    for prefix in left[1:]:
        a, b = found[first], found[prefix]
        # one module may appear under two names: backbone and model.backbone
        if a.keys() != b.keys() or not all(torch.equal(a[k], b[k]) for k in a):
            raise IsslError(
                f"{what}: several encoders among its keys ({_listed(left)}); choose one with "
                f"part={(first or prefix).rstrip('.')!r}"
            )
    return first


def _listed(prefixes: Iterable[str]) -> str:
    return ", ".join(prefix.rstrip(".") or "the one of plain keys" for prefix in prefixes)


def _is_head(name: str) -> bool:
    first = name.split(".")[0]
    return first != "fc_norm" and any(map(HEADS.fullmatch, re.split(r"[_\d]+", first.lower())))


def load(model: nn.Module, found: dict[str, State], prefix: str, what: str) -> str:
    """Load the encoder with this prefix. Returns a note with its prefix, the encoders that were not
    taken and the heads that were left out. Raises IsslError if anything else is left over or
    missing."""
    state, expected = found[prefix], model.state_dict()
    unsaved = {k: v for k, v in model.named_buffers() if k not in expected}
    heads = {k for k in state if k not in expected and k not in unsaved and _is_head(k)}
    # constants that old versions saved, and new ones do not
    old = {k for k in state.keys() & unsaved if torch.equal(state[k], unsaved[k].to(state[k]))}
    weights = OrderedDict((k, v) for k, v in state.items() if k not in heads | old)
    # modules without a version also accept older names; MNASNet refuses to have no version
    weights._metadata = {"": expected._metadata[""]}  # type: ignore[attr-defined]
    try:
        model.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        reasons = str(error).split("\n\t")
        said = "; ".join(shorten(reason, 160) for reason in reasons[1:5] or reasons)
        raise IsslError(f"{what}: the weights do not fit ({said})") from error
    others = [p for p in found if p != prefix]
    note = f", keys {prefix}…" if prefix else ""
    note += f" (not {_listed(others)}; part= takes another)" if others else ""
    left_out = ", ".join(sorted({k.split(".")[0] for k in heads}))
    return note + (f", left out: {left_out}" if heads else "")


# --- the tensors of a file


def read_tensors(path: Path) -> State:
    """All tensors of a .safetensors file, or of a file by PyTorch, Lightning, solo-learn or
    lightly. Names of torch's wrappers are removed. Names of enclosing dictionaries come first, as
    in `state_dict.conv1.weight`."""
    safe = path.suffix == ".safetensors"
    content = read_safetensors(path, "weights")[1] if safe else _content(path)
    if not isinstance(content, dict):
        raise IsslError(f"{path} holds a {type(content).__name__}, not a state dict")
    state: State = {}
    seen, left = set(), [("", content)]
    for prefix, part in left:  # which grows; a dictionary may hold itself
        for name, value in part.items() if id(part) not in seen else ():
            if isinstance(name, str) and isinstance(value, Tensor):
                state[prefix + name] = value
            elif isinstance(name, str) and isinstance(value, dict):
                left.append((f"{prefix}{name}.", value))
        seen.add(id(part))
    if not state:
        entries = ", ".join(map(str, list(content)[:8]))
        raise IsslError(f"{path} holds no state dict; its entries are {entries}")
    for name, value in state.items():
        # strides can make one number look like a thousand million
        declared = value.numel() * value.itemsize
        if value.layout == torch.strided and declared > value.untyped_storage().nbytes():
            raise IsslError(
                f"{path}: {name} declares shape {tuple(value.shape)} but holds less; get the file "
                "again"
            )
    renamed = {re.sub(DENSE, r"\1\3.", re.sub(WRAPPERS, "", k)): v for k, v in state.items()}
    return renamed if len(renamed) == len(state) else state


def _content(path: Path) -> Any:
    """What torch.save wrote, if it is tensors, numbers, text, and the options of a command line."""
    try:
        with path.open("rb") as file:
            begins = file.read(2)
        if begins == b"PK":  # torch.save does not compress
            with zipfile.ZipFile(path) as archive:
                declared = sum(member.file_size for member in archive.infolist()) / 1e6
            if declared > (held := path.stat().st_size / 1e6):
                raise ValueError(
                    f"declares {declared:.1f} MB of content in a file of {held:.1f} MB"
                )
        elif begins[:1] != b"\x80":
            raise ValueError("neither a zip archive nor a pickle")
        # many keep their options beside the weights; a Namespace only holds values
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))  # what it asks for, by torch's message
        asks = f" (it asks for {named[1]})" if named else ""
        raise IsslError(
            f"{path} holds more than tensors{asks}, and reading that could run code. If you trust "
            "its source, save its weights alone: torch.save(torch.load(FILE, weights_only=False)"
            "['state_dict'], 'weights.pt') (or the entry that holds them)"
        ) from error
    except Exception as error:  # whatever torch's reader raises for a damaged file
        raise IsslError(
            f"{path} is no checkpoint; give a .safetensors file, or what torch.save wrote "
            f"({shorten(str(error), 200) or type(error).__name__}); if it was one, get it from its "
            "source again"
        ) from error
