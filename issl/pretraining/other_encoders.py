"""Encoders from other projects: torchvision and timm models, and checkpoints in several key layouts.

Each maps float pixels in [0, 1] to features, with its normalisation inside and its head removed, in eval mode, as
`issl.self_influence` needs it. Files are read without executing anything in them.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from issl.errors import IsslError
from issl.files import read_safetensors
from issl.pretraining.encoder import PIXEL_MEAN, PIXEL_STD, Normalize, load_encoder, read_header

State = dict[str, Tensor]
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Opened:
    """An encoder, and the side in pixels of the images it was made for."""

    encoder: nn.Module
    size: int
    about: str
    prefix: str = ""  # before the names of the model's own layers, which follow the normalisation

    def own_names(self, names: Sequence[str]) -> list[str]:
        """The encoder's names of these layers or parameters; the model's own are accepted, empty ones dropped."""
        known = {name for name, _ in [*self.encoder.named_modules(), *self.encoder.named_parameters()]}
        return [name if name in known else self.prefix + name for name in names if name]


def add_encoder_arguments(command: argparse.ArgumentParser) -> None:
    """The options that `open_encoder` takes."""
    add = command.add_argument
    add("--encoder", required=True, metavar="E", help="a checkpoint file, torchvision:NAME or timm:NAME")
    add("--weights", metavar="FILE", help="a state dict for torchvision:NAME or timm:NAME (default: pretrained)")
    add("--mean", type=_triple, metavar="R,G,B", help="of the pixels the encoder was trained on (default: the model's)")
    add("--std", type=_triple, metavar="R,G,B", help="likewise, the standard deviation")


def _triple(text: str) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(p) for p in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: three numbers, R,G,B") from error
    return red, green, blue


def open_encoder(
    spec: str, weights: str | None = None, mean: Triple | None = None, std: Triple | None = None
) -> Opened:
    """The encoder that `spec` names.

    spec      a file (ours, solo-learn's, lightly's, or a plain state dict of a ResNet), `torchvision:NAME` or
              `timm:NAME`
    weights   for the last two: a file with a state dict; default: the model's own pretrained weights (downloaded)
    mean, std of the pixels in training; default: the model's own if it has them or its layout tells them, else
              ImageNet's
    Raises IsslError for an unknown name, a missing or damaged file, and keys in no known layout.
    """
    for what, values, least in (("mean", mean, -math.inf), ("std", std, 0.0)):
        if values is not None and not all(least < v < math.inf for v in values):
            raise IsslError(
                f"{what}={values}: need finite numbers{', above 0' if what == 'std' else ''}, one a channel"
            )
    kind, _, name = spec.partition(":")
    if kind == "torchvision":
        return _torchvision(name, weights, mean or PIXEL_MEAN, std or PIXEL_STD)
    if kind == "timm":
        return _timm(name, weights, mean, std)
    if weights is not None:
        raise IsslError(f"weights {weights!r}: go with torchvision:NAME or timm:NAME, not with the file {spec!r}")
    path = Path(spec)
    if not path.is_file():
        raise IsslError(
            f"encoder {spec!r} is not a file; give one, or torchvision:NAME such as torchvision:resnet50, or timm:NAME"
        )
    header = read_header(read_safetensors(path, "encoder")[0], path) if path.suffix == ".safetensors" else None
    if header is not None:
        return Opened(load_encoder(path), 32, _own(header, path.name))
    return resnet_from(read_state(path), str(path), mean, std)


def _own(header: dict[str, Any], name: str) -> str:
    """A description of an encoder that this library trained."""
    recipe = header.get("recipe") or header.get("config", {}).get("recipe") or {}
    return f"{recipe.get('method', 'encoder')} of width {header['width']} ({name})"


def read_state(path: Path) -> State:
    """A state dict from .safetensors, or from a torch file as PyTorch, Lightning, solo-learn or lightly write it."""
    if path.suffix == ".safetensors":
        return read_safetensors(path, "weights")[1]
    try:
        with path.open("rb") as file:
            begins = file.read(2)
        if begins != b"PK" and begins[:1] != b"\x80":  # neither a zip archive nor a pickle
            raise IsslError(
                f"{path} is no checkpoint; give a .safetensors file, or what torch.save wrote (.pt, .pth, .ckpt)"
            )
        if begins == b"PK":
            _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))  # what the file asks for, by torch's message
        asks = f" (it asks for {named[1]})" if named else ""
        raise IsslError(
            f"{path} holds more than tensors{asks}, and reading that could run code. If you trust its source, save its "
            "weights alone: torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'weights.pt')"
        ) from error
    except IsslError:
        raise
    except Exception as error:  # of a file that is damaged, whatever torch's reader stumbles over
        said = str(error).splitlines() or [type(error).__name__]
        raise IsslError(f"{path} cannot be read as weights ({said[0]}); it is damaged: get it again") from error
    while isinstance(content, dict) and not any(isinstance(v, Tensor) for v in content.values()):
        inside = [k for k in ("state_dict", "model", "model_state_dict") if isinstance(content.get(k), dict)]
        if not inside:
            raise IsslError(f"{path} holds no state dict; its entries are {', '.join(map(str, list(content)[:8]))}")
        content = content[inside[0]]
    if not isinstance(content, dict):
        raise IsslError(f"{path} holds a {type(content).__name__}, not a state dict")
    state = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    for name, value in state.items():
        # strides may say of one number that it is a thousand million
        if value.layout == torch.strided and value.numel() * value.itemsize > value.untyped_storage().nbytes():
            raise IsslError(f"{path}: {name} declares shape {tuple(value.shape)} but holds less; get the file again")
    return state


def _check_archive(path: Path) -> None:
    """IsslError for a zip archive that would unpack to more than the file holds: torch.save does not compress."""
    try:
        with zipfile.ZipFile(path) as archive:
            declared = sum(member.file_size for member in archive.infolist())
    except zipfile.BadZipFile as error:
        raise IsslError(f"{path} cannot be read as weights ({error}); it is damaged: get it again") from error
    if declared > path.stat().st_size:
        raise IsslError(
            f"{path} declares {declared / 1e6:,.1f} MB of content in a file of {path.stat().st_size / 1e6:,.1f} MB, "
            "which torch.save never writes; get it from its source again"
        )


# --- ResNets in other key layouts ------------------------------------------------------------------------

# `nn.Sequential(*list(resnet.children())[:-1])`, the usual lightly backbone, names layers by their place; its own
# ResNetGenerator has no ReLU and no max-pooling among the children
PLACES = {
    "torchvision": {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"},
    "generator": {"0": "conv1", "1": "bn1", "2": "layer1", "3": "layer2", "4": "layer3", "5": "layer4"},
}
TEACHERS = ("momentum", "teacher", "target", "ema")  # second encoders, which follow the trained one
# mean and std of the pixels, by the classes of solo-learn's online classifier, where the stem is that for CIFAR
# (its solo/data/pretrain_dataloader.py)
SOLO_CIFAR: dict[int, tuple[Triple, Triple]] = {
    10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def resnet_from(state: State, what: str, mean: Triple | None = None, std: Triple | None = None) -> Opened:
    """A ResNet with basic or bottleneck blocks; the shapes of the weights give its form.

    A 7×7 stem has stride 2 and max-pooling; a 3×3 one has neither (and solo-learn pads it by 2).
    mean, std   of the pixels in training; default: those that solo-learn trains on CIFAR with, else ImageNet's
    """
    found = {p: s for p, s in _prefixes(state).items() if not any(t in p for t in TEACHERS)}
    if len(found) != 1:
        which, names = ("several ResNets", list(found)) if found else ("no ResNet", list(state)[:6])
        raise IsslError(
            f"{what}: {which} among its keys ({', '.join(names)}); known are the layouts of torchvision, solo-learn "
            "and lightly, of one encoder"
        )
    ((prefix, own),) = found.items()
    own = {re.sub(r"\.shortcut\.", ".downsample.", k): v for k, v in own.items()}
    solo = prefix in ("backbone.", "encoder.") and "classifier.weight" in state
    stem = own["conv1.weight"]
    large = stem.shape[-1] == 7
    padding = 3 if large else 2 if solo else 1
    conv = nn.Conv2d(3, len(stem), stem.shape[-1], 2 if large else 1, padding, bias=False)
    net = nn.Sequential()
    net.add_module("conv1", conv)
    net.add_module("bn1", nn.BatchNorm2d(len(stem)))
    net.add_module("relu", nn.ReLU(inplace=True))
    if large:
        net.add_module("maxpool", nn.MaxPool2d(3, 2, 1))
    for stage in range(1, 5):
        net.add_module(f"layer{stage}", _stage(own, stage))
    net.add_module("avgpool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flatten", nn.Flatten())
    _load(net, {k: v for k, v in own.items() if not k.startswith(("fc.", "linear."))}, what)
    layout = "solo-learn" if solo else f"keys {prefix}…" if prefix else "plain keys"
    classes = len(state["classifier.weight"]) if solo and not large else 0
    usual_mean, usual_std = SOLO_CIFAR.get(classes, (PIXEL_MEAN, PIXEL_STD))
    normalize = Normalize(mean or usual_mean, std or usual_std)
    return Opened(nn.Sequential(normalize, net).eval(), 224 if large else 32, f"ResNet, {layout}", "1.")


def _prefixes(state: State) -> dict[str, State]:
    """Every ResNet in a state dict: prefix → its weights under torchvision's names."""
    found = {}
    for key in state:
        for places in (None, *PLACES.values()):
            first = "layer1" if places is None else next(k for k, v in places.items() if v == "layer1")
            end, stem = f"{first}.0.conv1.weight", "conv1.weight" if places is None else "0.weight"
            prefix = key.removesuffix(end)
            if not key.endswith(end) or (prefix and prefix[-1] != ".") or f"{prefix}{stem}" not in state:
                continue
            if places is PLACES["torchvision"] and f"{prefix}2.0.conv1.weight" in state:
                continue  # place 2 would be the ReLU, so it is the other layout
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if places is not None:
                own = {
                    ".".join([places[p], *rest]): v
                    for k, v in own.items()
                    for p, *rest in [k.split(".")]
                    if p in places
                }
            found[prefix] = own
    return found


def _stage(own: State, stage: int) -> nn.Sequential:
    from torchvision.models.resnet import BasicBlock, Bottleneck  # slow to import

    blocks: list[nn.Module] = []
    while (key := f"layer{stage}.{len(blocks)}.conv1.weight") in own:
        place, weight = key.removesuffix("conv1.weight"), own[key]
        bottleneck = f"{place}conv3.weight" in own
        outside = len(own[f"{place}conv{3 if bottleneck else 2}.weight"])
        stride = 2 if stage > 1 and not blocks else 1
        down = None
        if f"{place}downsample.0.weight" in own:
            down = nn.Sequential(nn.Conv2d(weight.shape[1], outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
        if bottleneck:
            # a wide ResNet's inner width differs from a quarter of its output
            inner = len(weight)
            wide = {"base_width": 64 * inner * Bottleneck.expansion // outside}
            blocks.append(Bottleneck(weight.shape[1], outside // Bottleneck.expansion, stride, down, **wide))
        else:
            blocks.append(BasicBlock(weight.shape[1], outside, stride, down))
    return nn.Sequential(*blocks)


# --- models by name ----------------------------------------------------------------------------------------


def _torchvision(name: str, weights: str | None, mean: Triple, std: Triple) -> Opened:
    import torchvision  # slow to import

    if name not in torchvision.models.list_models(module=torchvision.models):
        raise IsslError(f"torchvision has no model {name!r}; see torchvision.models.list_models()")
    model = _built(lambda: torchvision.models.get_model(name, weights="DEFAULT" if weights is None else None), name)
    linear = [k for k, m in model.named_modules() if isinstance(m, nn.Linear)]
    state = None if weights is None else _weights(weights)
    if not linear:
        raise IsslError(f"torchvision:{name} has no Linear head to remove, so its features are not known")
    head = linear[-1]
    parent, _, last = head.rpartition(".")
    setattr(model.get_submodule(parent), last, nn.Identity())
    if state is not None:
        _load(model, {k: v for k, v in state.items() if not k.startswith(f"{head}.")}, f"{weights} for {name}")
    return Opened(nn.Sequential(Normalize(mean, std), model).eval(), 224, f"torchvision {name} without {head}", "1.")


def _timm(name: str, weights: str | None, mean: Triple | None, std: Triple | None) -> Opened:
    try:
        import timm
        from timm.data.config import resolve_model_data_config
    except ImportError as error:
        raise IsslError(f"timm:{name} needs the package timm: pip install timm") from error
    if not timm.is_model(name):
        raise IsslError(f"timm has no model {name!r}; see timm.list_models()")
    model = _built(lambda: timm.create_model(name, pretrained=weights is None, num_classes=0), name)
    if weights is not None:
        known = model.state_dict().keys()
        state = _weights(weights)
        _load(model, {k: v for k, v in state.items() if k in known or not k.startswith(("head.", "fc."))}, weights)
    config = resolve_model_data_config(model)
    normalize = Normalize(mean or tuple(config["mean"]), std or tuple(config["std"]))
    return Opened(nn.Sequential(normalize, model).eval(), config["input_size"][-1], f"timm {name} without head", "1.")


def _built(build: Callable[[], Any], name: str) -> nn.Module:
    try:
        model: nn.Module = build()
    except (OSError, RuntimeError, ValueError) as error:
        raise IsslError(
            f"model {name}: its pretrained weights could not be downloaded ({str(error).splitlines()[0]}); give a "
            "file with --weights FILE"
        ) from error
    return model


def _weights(path: str) -> State:
    if not Path(path).is_file():
        raise IsslError(f"weights {path!r} do not exist")
    return read_state(Path(path))


def _load(model: nn.Module, state: State, what: str) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise IsslError(f"{what}: the weights do not fit ({' '.join(lines)[:300]})") from error
