"""Encoders of other projects: torchvision and timm models, and checkpoints in several key layouts.

Each maps float pixels in [0, 1] to features, with its normalisation inside and its head removed, in
eval mode, as `issl.self_influence` needs it. Files are read without executing anything in them. In
a file an encoder is found by the names of its weights, under any prefix; of several, one is taken
by a written rule or by the user, and `about` says so.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from issl.errors import IsslError
from issl.files import read_safetensors
from issl.pretraining.checkpoint_files import (
    Names,
    State,
    chosen,
    copies_of,
    fits,
    load,
    of_part,
    read_tensors,
    said_of,
    under,
    usual_names,
)
from issl.pretraining.encoder import PIXEL_MEAN, PIXEL_STD, Normalize, load_encoder, read_header

Triple = tuple[float, float, float]

# `nn.Sequential(*list(resnet.children())[:-1])`, the usual backbone in lightly, names layers by
# their place; lightly's ResNetGenerator has no ReLU and no max-pooling among the children
_PARTS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
TORCHVISIONS: Names = dict(zip("014567", _PARTS, strict=True))
GENERATORS: Names = dict(zip("012345", _PARTS, strict=True))
# mean and std of the pixels, by the classes of solo-learn's online classifier, where the stem is
# that for CIFAR (its solo/data/pretrain_dataloader.py)
SOLO_CIFAR: dict[int, tuple[Triple, Triple]] = {
    10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
# these take pixels normalised by ImageNet's statistics, and normalise them again by 0.5 and 0.5
# where `transform_input`: so their pretrained weights were trained
INCEPTIONS = ("googlenet", "inception_v3")
AUXILIARY = {"aux1", "aux2", "AuxLogits"}  # their heads that are called in training alone


@dataclass(frozen=True)
class Opened:
    """An encoder, and the side in pixels of the images it was made for."""

    encoder: nn.Module
    size: int
    about: str
    prefix: str = ""  # before the names of the model's own layers, which follow the normalisation

    def own_names(self, names: Sequence[str]) -> list[str]:
        """The encoder's names of these layers or parameters; the model's own are accepted, empty
        ones dropped."""
        layers, weights = self.encoder.named_modules(), self.encoder.named_parameters()
        known = {name for name, _ in (*layers, *weights)}
        return [name if name in known else self.prefix + name for name in names if name]


def add_encoder_arguments(command: argparse.ArgumentParser) -> None:
    """The options that `encoder_asked_for` reads."""
    add = command.add_argument
    what = "a checkpoint file, torchvision:NAME or timm:NAME"
    add("--encoder", required=True, metavar="E", help=what)
    weights = "a state dict for torchvision:NAME or timm:NAME (default: pretrained)"
    add("--weights", metavar="FILE", help=weights)
    mean = "of the pixels the encoder was trained on (default: the model's)"
    add("--mean", type=_triple, metavar="R,G,B", help=mean)
    add("--std", type=_triple, metavar="R,G,B", help="likewise, the standard deviation")
    part = "where a file holds several encoders: a word of the keys of the one to take"
    add("--part", metavar="WORD", help=part)


def encoder_asked_for(options: argparse.Namespace) -> Opened:
    """The encoder that these options name."""
    return open_encoder(options.encoder, options.weights, options.mean, options.std, options.part)


def _triple(text: str) -> Triple:
    try:
        red, green, blue = (float(p) for p in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: three numbers, R,G,B") from error
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
            own pretrained ones (downloaded).
        mean: Of the pixels in training; default: the model's own if it has one or its layout tells
            it, else ImageNet's.
        std: Likewise, the standard deviation.
        part: Which of a file's encoders, by words of its keys, such as `student` or
            `module.encoder_k`; default: as PREFERRED says.

    Raises:
        IsslError: For an unknown name, a missing or damaged file, keys in no known layout, several
            encoders that no rule decides between, and weights of the encoder that are missing or
            left over.
    """
    for what, values, least in (("mean", mean, -math.inf), ("std", std, 0.0)):
        if values is not None and not all(least < v < math.inf for v in values):
            above = ", above 0" if what == "std" else ""
            raise IsslError(f"{what}={values}: need finite numbers{above}, one a channel")
    kind, _, name = spec.partition(":")
    if kind in ("torchvision", "timm"):
        if part is not None and weights is None:
            raise IsslError(
                f"part={part!r}: goes with a file of weights; the pretrained {spec} is one encoder"
            )
        return (_torchvision if kind == "torchvision" else _timm)(name, weights, mean, std, part)
    if weights is not None:
        raise IsslError(
            f"weights {weights!r}: go with torchvision:NAME or timm:NAME, not with the file "
            f"{spec!r}"
        )
    path = Path(spec)
    if not path.is_file():
        raise IsslError(
            f"encoder {spec!r} is not a file; give one, or torchvision:NAME such as "
            "torchvision:resnet50, or timm:NAME"
        )
    header = None
    if path.suffix == ".safetensors":
        header = read_header(read_safetensors(path, "encoder")[0], path)
    if header is None:
        return resnet_from(read_tensors(path), str(path), mean, std, part)
    if part is not None:
        raise IsslError(
            f"part={part!r}: leave it out; {path} is this library's own file, of one encoder"
        )
    encoder = load_encoder(path)
    recipe = header.get("recipe") or header.get("config", {}).get("recipe") or {}
    about = f"{recipe.get('method', 'encoder')} of width {header['width']} ({path.name})"
    return Opened(encoder, 32, about)


# --- ResNets from their weights alone


def resnet_from(
    state: State,
    what: str,
    mean: Triple | None = None,
    std: Triple | None = None,
    part: str | None = None,
) -> Opened:
    """A ResNet with basic or bottleneck blocks; the shapes of the weights give its form.

    A 7×7 stem has stride 2 and max-pooling; a 3×3 one has neither (and solo-learn pads it by 2).
    Pixels are by default normalised as solo-learn does it on CIFAR where the layout is its own,
    else by ImageNet's statistics; the other arguments are those of `open_encoder`.
    """
    state = usual_names(state)
    found = _resnets(state)
    if not found:
        raise IsslError(
            f"{what}: no ResNet among its keys ({', '.join(list(state)[:6])}); known are the "
            "layouts of torchvision, solo-learn and lightly. Other architectures go by name: "
            "torchvision:NAME or timm:NAME, with these weights"
        )
    prefix = chosen(of_part(found, part, what), what, "ResNets")
    own = {re.sub(r"\.shortcut\.", ".downsample.", k): v for k, v in found[prefix].items()}
    outer = "state_dict." if prefix.startswith("state_dict.") else ""
    inner = prefix.removeprefix(outer)
    classifier = state.get(f"{outer}classifier.weight")
    solo = inner.removeprefix("momentum_") in ("backbone.", "encoder.") and classifier is not None
    width, _, side, _ = own["conv1.weight"].shape
    large = side == 7
    padding = 3 if large else 2 if solo else 1
    net = nn.Sequential()
    net.add_module("conv1", nn.Conv2d(3, width, side, 2 if large else 1, padding, bias=False))
    net.add_module("bn1", nn.BatchNorm2d(width))
    net.add_module("relu", nn.ReLU(inplace=True))
    if large:
        net.add_module("maxpool", nn.MaxPool2d(3, 2, 1))
    for stage in range(1, 5):
        net.add_module(f"layer{stage}", _stage(own, stage))
    net.add_module("avgpool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flatten", nn.Flatten())
    heads = load(net, own, what)
    layout = "solo-learn" if solo else f"keys {prefix}…" if inner else "plain keys"
    classes = len(classifier) if solo and classifier is not None and not large else 0
    usual_mean, usual_std = SOLO_CIFAR.get(classes, (PIXEL_MEAN, PIXEL_STD))
    encoder = nn.Sequential(Normalize(mean or usual_mean, std or usual_std), net).eval()
    about = f"ResNet, {layout}{said_of(found, prefix, heads)}"
    return Opened(encoder, 224 if large else 32, about, "1.")


def _resnets(state: State) -> dict[str, State]:
    """Every ResNet in a state dict: prefix → its weights under torchvision's names."""
    found: dict[str, Names] = {}
    layouts = (("layer1", "conv1", None), ("4", "0", TORCHVISIONS), ("2", "0", GENERATORS))
    for key in state:
        for first, stem, places in layouts:
            prefix = key.removesuffix(f"{first}.0.conv1.weight")
            if (
                prefix == key
                or prefix[-1:] not in ("", ".")
                or f"{prefix}{stem}.weight" not in state
            ):
                continue
            if places is TORCHVISIONS and f"{prefix}2.0.conv1.weight" in state:
                continue  # place 2 would be the ReLU, so it is the other layout
            found[prefix] = places
    return under(state, found)


def _stage(own: State, stage: int) -> nn.Sequential:
    from torchvision.models.resnet import BasicBlock, Bottleneck  # slow to import

    blocks: list[nn.Module] = []
    while (key := f"layer{stage}.{len(blocks)}.conv1.weight") in own:
        place = key.removesuffix("conv1.weight")
        inner, inside, _, _ = own[key].shape
        bottleneck = f"{place}conv3.weight" in own
        outside = len(own[f"{place}conv{3 if bottleneck else 2}.weight"])
        stride = 2 if stage > 1 and not blocks else 1
        down = None
        if f"{place}downsample.0.weight" in own:
            shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False)
            down = nn.Sequential(shortcut, nn.BatchNorm2d(outside))
        if bottleneck:
            # a wide ResNet's inner width differs from a quarter of its output
            quarter = outside // Bottleneck.expansion
            base = 64 * inner * Bottleneck.expansion // outside
            blocks.append(Bottleneck(inside, quarter, stride, down, base_width=base))
        else:
            blocks.append(BasicBlock(inside, outside, stride, down))
    return nn.Sequential(*blocks)


# --- models by name


def _torchvision(
    name: str, weights: str | None, mean: Triple | None, std: Triple | None, part: str | None
) -> Opened:
    import torchvision  # slow to import

    if name not in torchvision.models.list_models(module=torchvision.models):
        raise IsslError(f"torchvision has no model {name!r}; see torchvision.models.list_models()")
    options: dict[str, bool] = {}
    note = ""
    if name in INCEPTIONS and weights is not None:
        again = mean is None and std is None
        options = {"transform_input": again, "init_weights": False}
        note = "; pixels as for its pretrained weights (transform_input)"
        note = note if again else "; no transform_input"
    pretrained = "DEFAULT" if weights is None else None
    model = _built(lambda: torchvision.models.get_model(name, weights=pretrained, **options), name)
    for auxiliary in AUXILIARY & dict(model.named_children()).keys():
        setattr(model, auxiliary, None)
    linear = [k for k, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise IsslError(
            f"torchvision:{name} has no Linear head to remove, so its features are not known"
        )
    head = linear[-1]
    parent, _, last = head.rpartition(".")
    setattr(model.get_submodule(parent), last, nn.Identity())
    if weights is not None:
        note = _load_file(model, weights, name, part, head) + note
    usual = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    normalize = Normalize(mean or tuple(usual.mean), std or tuple(usual.std))
    about = f"torchvision {name} without {head}{note}"
    return Opened(nn.Sequential(normalize, model).eval(), 224, about, "1.")


def _timm(
    name: str, weights: str | None, mean: Triple | None, std: Triple | None, part: str | None
) -> Opened:
    try:
        import timm
        from timm.data.config import resolve_model_data_config
    except ImportError as error:
        raise IsslError(f"timm:{name} needs the package timm: pip install timm") from error
    if not timm.is_model(name):
        raise IsslError(f"timm has no model {name!r}; see timm.list_models()")
    model = _built(lambda: timm.create_model(name, pretrained=weights is None, num_classes=0), name)
    note = "" if weights is None else _load_file(model, weights, name, part)
    config = resolve_model_data_config(model)
    normalize = Normalize(mean or tuple(config["mean"]), std or tuple(config["std"]))
    about = f"timm {name} without head{note}"
    return Opened(nn.Sequential(normalize, model).eval(), config["input_size"][-1], about, "1.")


def _built(build: Callable[[], Any], name: str) -> nn.Module:
    try:
        model: nn.Module = build()
    except (OSError, RuntimeError, ValueError) as error:
        raise IsslError(
            f"model {name}: its pretrained weights could not be downloaded "
            f"({str(error).splitlines()[0]}); give a file with --weights FILE"
        ) from error
    return model


def _load_file(model: nn.Module, path: str, name: str, part: str | None, head: str = "") -> str:
    """Load a model's weights, wherever they lie in a file; returns what to say of the choice and of
    what was left out. `head`: the name of the model's head, which was taken off."""
    if not Path(path).is_file():
        raise IsslError(f"weights {path!r} do not exist")
    what = f"{path} for {name}"
    state = usual_names(read_tensors(Path(path)))
    copies = copies_of(state, model)
    if not copies:
        raise IsslError(
            f"{what}: fewer than half of the model's weights are among its keys "
            f"({', '.join(list(state)[:6])}); give weights of this model, or the name of theirs"
        )
    if head:
        for own in copies.values():
            for key in [k for k in own if k.startswith(f"{head}.")]:
                del own[key]
    asked = of_part(copies, part, what)
    fitting = {prefix: own for prefix, own in asked.items() if fits(model, own)}
    prefix = chosen(fitting or asked, what, f"copies of {name}")
    heads = load(model, copies[prefix], what)
    return (f", keys {prefix}…" if prefix else "") + said_of(copies, prefix, heads)
