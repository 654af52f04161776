"""Encoders from other projects: torchvision and timm models, and checkpoints in several key
layouts.

Each maps float pixels in [0, 1] to features, with its normalisation inside and its head removed, in
eval mode, as `issl.self_influence` needs it. Files are read without executing anything in them. In
a file an encoder is found by the names of its weights, under any prefix; of several, one is taken
by a written rule or by the user, and `about` says so.
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
        """The encoder's names of these layers or parameters; the model's own are accepted, empty
        ones dropped."""
        known = {
            name for name, _ in [*self.encoder.named_modules(), *self.encoder.named_parameters()]
        }
        return [name if name in known else self.prefix + name for name in names if name]


def add_encoder_arguments(command: argparse.ArgumentParser) -> None:
    """The options that `open_encoder` takes."""
    add = command.add_argument
    add(
        "--encoder",
        required=True,
        metavar="E",
        help="a checkpoint file, torchvision:NAME or timm:NAME",
    )
    add(
        "--weights",
        metavar="FILE",
        help="a state dict for torchvision:NAME or timm:NAME (default: pretrained)",
    )
    add(
        "--mean",
        type=_triple,
        metavar="R,G,B",
        help="of the pixels the encoder was trained on (default: the model's)",
    )
    add("--std", type=_triple, metavar="R,G,B", help="likewise, the standard deviation")
    add(
        "--part",
        metavar="WORD",
        help="where a file holds several encoders: a word of the keys of the one to take",
    )


def encoder_asked_for(options: argparse.Namespace) -> Opened:
    """The encoder that these options name."""
    return open_encoder(options.encoder, options.weights, options.mean, options.std, options.part)


def _triple(text: str) -> tuple[float, float, float]:
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

    spec      a file (ours, or one with a ResNet under any prefix), `torchvision:NAME` or
              `timm:NAME`
    weights   for the last two: a file with the model's weights, under any prefix; default: its own
              pretrained ones (downloaded)
    mean, std of the pixels in training; default: the model's own if it has them or its layout tells
    them, else
              ImageNet's
    part      which of a file's encoders, by words of its keys: student, module.encoder_k; default:
              as PREFERRED says
    Raises IsslError for an unknown name, a missing or damaged file, keys in no known layout,
    several encoders that no rule decides between, and weights of the encoder that are missing or
    left over.
    """
    for what, values, least in (("mean", mean, -math.inf), ("std", std, 0.0)):
        if values is not None and not all(least < v < math.inf for v in values):
            raise IsslError(
                f"{what}={values}: need finite numbers{', above 0' if what == 'std' else ''}, one a channel"
            )
    kind, _, name = spec.partition(":")
    if kind in ("torchvision", "timm"):
        if part is not None and weights is None:
            raise IsslError(
                f"part={part!r}: goes with a file of weights; the pretrained {spec} is one encoder"
            )
        return (_torchvision if kind == "torchvision" else _timm)(name, weights, mean, std, part)
    if weights is not None:
        raise IsslError(
            f"weights {weights!r}: go with torchvision:NAME or timm:NAME, not with the file {spec!r}"
        )
    path = Path(spec)
    if not path.is_file():
        raise IsslError(
            f"encoder {spec!r} is not a file; give one, or torchvision:NAME such as torchvision:resnet50, or timm:NAME"
        )
    header = (
        read_header(read_safetensors(path, "encoder")[0], path)
        if path.suffix == ".safetensors"
        else None
    )
    if header is not None:
        if part is not None:
            raise IsslError(
                f"part={part!r}: leave it out; {path} is this library's own file, of one encoder"
            )
        return Opened(load_encoder(path), 32, _own(header, path.name))
    return resnet_from(_tensors(path), str(path), mean, std, part)


def _own(header: dict[str, Any], name: str) -> str:
    """A description of an encoder that this library trained."""
    recipe = header.get("recipe") or header.get("config", {}).get("recipe") or {}
    return f"{recipe.get('method', 'encoder')} of width {header['width']} ({name})"


def read_state(path: Path) -> State:
    """A state dict from .safetensors, or from a torch file as PyTorch, Lightning, solo-learn or
    lightly write it.

    Dictionaries around the only one that holds tensors are taken off; where several do, all are in
    it, each name with those of the dictionaries around it before: `student.conv1.weight`.
    """
    return _tensors(path, taken_off=True)


def _tensors(path: Path, taken_off: bool = False) -> State:
    """All tensors of a file, with the names of the dictionaries around them, or without those
    around all of them."""
    if path.suffix == ".safetensors":
        return read_safetensors(path, "weights")[1]
    content = _content(path)
    if not isinstance(content, dict):
        raise IsslError(f"{path} holds a {type(content).__name__}, not a state dict")
    state = _flat(content, set())
    if not state and not any(isinstance(v, Tensor) for v in content.values()):
        raise IsslError(
            f"{path} holds no state dict; its entries are {', '.join(map(str, list(content)[:8]))}"
        )
    while (
        taken_off
        and len(inside := {k.split(".")[0] for k in state}) == 1
        and isinstance(content, dict)
    ):
        (name,) = inside
        content = content.get(name)
        if isinstance(content, dict):
            state = {k.removeprefix(f"{name}."): v for k, v in state.items()}
    for name, value in state.items():
        # strides may say of one number that it is a thousand million
        if (
            value.layout == torch.strided
            and value.numel() * value.itemsize > value.untyped_storage().nbytes()
        ):
            raise IsslError(
                f"{path}: {name} declares shape {tuple(value.shape)} but holds less; get the file again"
            )
    return state


DEEPEST = 16  # dictionaries within dictionaries; VISSL's files have 4


def _flat(content: dict[Any, Any], seen: set[int], prefix: str = "", depth: int = 0) -> State:
    """The tensors in nested dictionaries; each dictionary once, for one may hold itself."""
    state: State = {}
    if id(content) in seen or depth > DEEPEST:
        return state
    seen.add(id(content))
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            state[prefix + name] = value
        elif isinstance(name, str) and isinstance(value, dict):
            state |= _flat(value, seen, f"{prefix}{name}.", depth + 1)
    return state


def _content(path: Path) -> Any:
    """What torch.save wrote, if it is tensors, numbers, text, and the options of a command line."""
    try:
        with path.open("rb") as file:
            begins = file.read(2)
        if begins != b"PK" and begins[:1] != b"\x80":  # neither a zip archive nor a pickle
            raise IsslError(
                f"{path} is no checkpoint; give a .safetensors file, or what torch.save wrote (.pt, .pth, .ckpt)"
            )
        if begins == b"PK":
            _check_archive(path)
        # many keep their options beside the weights; a Namespace only holds values
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(
            r"GLOBAL ([\w.]+)", str(error)
        )  # what the file asks for, by torch's message
        asks = f" (it asks for {named[1]})" if named else ""
        raise IsslError(
            f"{path} holds more than tensors{asks}, and reading that could run code. If you trust its source, save its "
            "weights alone: torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'weights.pt') (or the entry "
            "that holds them)"
        ) from error
    except IsslError:
        raise
    except Exception as error:  # of a file that is damaged, whatever torch's reader stumbles over
        said = str(error).splitlines() or [type(error).__name__]
        raise IsslError(
            f"{path} cannot be read as weights ({said[0]}); it is damaged: get it again"
        ) from error


def _check_archive(path: Path) -> None:
    """IsslError for a zip archive that would unpack to more than the file holds: torch.save does
    not compress."""
    try:
        with zipfile.ZipFile(path) as archive:
            declared = sum(member.file_size for member in archive.infolist())
    except zipfile.BadZipFile as error:
        raise IsslError(
            f"{path} cannot be read as weights ({error}); it is damaged: get it again"
        ) from error
    if declared > path.stat().st_size:
        raise IsslError(
            f"{path} declares {declared / 1e6:,.1f} MB of content in a file of {path.stat().st_size / 1e6:,.1f} MB, "
            "which torch.save never writes; get it from its source again"
        )


# --- one encoder of a file
# -------------------------------------------------------------------------------

# of two kinds of encoders the first is taken, if there is one
PREFERRED = tuple(
    (re.compile(taken, re.I), re.compile(left, re.I))
    for taken, left in (
        ("teacher", "student"),  # DINO, iBOT, DINOv2: their authors evaluate the teacher
        # the trained one before the one that follows it: MoCo, BYOL, solo-learn, lightly, timm
        ("", r"momentum|teacher|target|(^|[._])(ema|key)([._]|$)|_k\."),
    )
)
# first words of names that are no part of an encoder: heads, and what only a loss needs. BEiT, MAE
# and DINOv2 have a # mask token, SwAV has prototypes, MoCo a queue
HEADS = {
    *(
        "head",
        "heads",
        "fc",
        "linear",
        "classif",
        "classifier",
        "classification",
        "logits",
        "aux",
        "auxlogits",
    ),
    *(
        "projector",
        "projection",
        "proj",
        "predictor",
        "prediction",
        "prototype",
        "prototypes",
        "neck",
        "mlp",
    ),
    *("decoder", "mask", "queue", "center", "loss", "criterion"),
}
# what torch wraps a module in, at any depth; and the names in torchvision's own files of DenseNets
WRAPPERS = r"(^|(?<=\.))((_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
DENSE = r"(denselayer\d+\.(norm|conv))\.([12])\."


def _usual(state: State) -> State:
    """The names that modules have today, and without those of torch's wrappers."""
    renamed = {
        re.sub(DENSE, r"\1\3.", re.sub(WRAPPERS, "", name)): value for name, value in state.items()
    }
    return renamed if len(renamed) == len(state) else state


def _of_part(copies: dict[str, State], part: str | None, what: str) -> dict[str, State]:
    """Those encoders that the user asked for."""
    if part is None:
        return copies
    asked = {
        prefix: own for prefix, own in copies.items() if f".{part.strip('.')}." in f".{prefix}"
    }
    if not asked:
        raise IsslError(
            f"{what}: part={part!r} names none of its encoders; they are {_named(copies)}"
        )
    return asked


def _chosen(copies: dict[str, State], what: str, kind: str) -> str:
    """The prefix of the encoder to take. IsslError where nothing decides between several."""
    left = list(copies)
    for taken, other in PREFERRED:
        rest = [prefix for prefix in left if not other.search(prefix)]
        if rest and any(taken.search(prefix) for prefix in left):
            left = rest
    first, *more = left
    if not all(_one_module(copies, first, prefix) for prefix in more):
        example = (first or more[0]).rstrip(".")
        raise IsslError(
            f"{what}: several {kind} among its keys ({_named(left)}); choose one with part={example!r}"
        )
    return first


def _one_module(copies: dict[str, State], a: str, b: str) -> bool:
    """Whether two encoders are one module that is also a part of another: backbone and
    model.backbone."""
    one, other = copies[a], copies[b]
    same_end = a.split(".")[-2:] == b.split(".")[-2:]
    return (
        same_end and one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    )


def _named(prefixes: Iterable[str]) -> str:
    """Prefixes, for a reader."""
    return ", ".join(prefix.rstrip(".") or "the one of plain keys" for prefix in prefixes)


def _beside(copies: Iterable[str], taken: str) -> str:
    """What to say of the encoders that were not taken."""
    others = [prefix for prefix in copies if prefix != taken]
    return f" (not {_named(others)}; part= takes another)" if others else ""


def _without(heads: list[str]) -> str:
    return f", left out: {', '.join(heads)}" if heads else ""


def _under(state: State, prefix: str, copies: Iterable[str] = ()) -> State:
    """What lies under a prefix, but not under the longer one of another encoder."""
    inner = tuple(p for p in copies if p != prefix and p.startswith(prefix))
    return {
        k.removeprefix(prefix): v
        for k, v in state.items()
        if k.startswith(prefix) and not k.startswith(inner)
    }


def _is_head(name: str) -> bool:
    first = name.split(".")[0]
    return first != "fc_norm" and not HEADS.isdisjoint(re.split(r"[_\d]+", first.lower()))


def _load(model: nn.Module, state: State, what: str) -> list[str]:
    """Load an encoder; returns the heads in `state`, which are left out. IsslError where anything
    else is over or missing."""
    known = {
        **dict(model.named_buffers()),
        **model.state_dict(),
    }  # buffers that are not saved were, in old versions
    constant = known.keys() - model.state_dict().keys()
    over = {k for k in state if _is_head(k) and k not in known}
    kept = {
        k: v
        for k, v in state.items()
        if k not in over and not (k in constant and torch.equal(v, known[k].to(v.dtype)))
    }
    counts = {
        k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")
    }  # no use in eval mode
    versioned = OrderedDict(counts | kept)
    versioned._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    reasons: list[Exception] = []
    # without versions, modules look for the names of their older ones; some (MNASNet) refuse that
    for attempt in (kept, versioned):
        try:
            model.load_state_dict(attempt)
            return sorted({k.split(".")[0] for k in over})
        except (RuntimeError, ValueError) as error:
            reasons.append(error)
    misfit = _misfit(kept, model.state_dict()) or str(reasons[-1]).splitlines()[-1].strip()
    raise IsslError(f"{what}: the weights do not fit ({misfit})") from reasons[0]


def _misfit(state: State, expected: State) -> str:
    """What is missing, left over, and of another shape."""
    shapes = [
        f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}"
        for k, v in expected.items()
        if k in state and state[k].shape != v.shape
    ]
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    listed = {
        "missing": missing,
        "left over": [k for k in state if k not in expected],
        "of another shape": shapes,
    }
    return "; ".join(
        f"{what}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        for what, names in listed.items()
        if names
    )


# --- ResNets in other key layouts
# ------------------------------------------------------------------------

# `nn.Sequential(*list(resnet.children())[:-1])`, the usual lightly backbone, names layers by their
# place; its own # ResNetGenerator has no ReLU and no max-pooling among the children
PLACES = {
    "torchvision": {
        "0": "conv1",
        "1": "bn1",
        "4": "layer1",
        "5": "layer2",
        "6": "layer3",
        "7": "layer4",
    },
    "generator": {
        "0": "conv1",
        "1": "bn1",
        "2": "layer1",
        "3": "layer2",
        "4": "layer3",
        "5": "layer4",
    },
}
# mean and std of the pixels, by the classes of solo-learn's online classifier, where the stem is
# that for CIFAR # (its solo/data/pretrain_dataloader.py)
SOLO_CIFAR: dict[int, tuple[Triple, Triple]] = {
    10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def resnet_from(
    state: State,
    what: str,
    mean: Triple | None = None,
    std: Triple | None = None,
    part: str | None = None,
) -> Opened:
    """A ResNet with basic or bottleneck blocks; the shapes of the weights give its form.

    A 7×7 stem has stride 2 and max-pooling; a 3×3 one has neither (and solo-learn pads it by 2).
    mean, std   of the pixels in training; default: those that solo-learn trains on CIFAR with, else
                ImageNet's
    part        of several: which, as in `open_encoder`
    """
    state = _usual(state)
    found = _prefixes(state)
    if not found:
        raise IsslError(
            f"{what}: no ResNet among its keys ({', '.join(list(state)[:6])}); known are the layouts of torchvision, "
            "solo-learn and lightly. Other architectures go by name: torchvision:NAME or timm:NAME, with these weights"
        )
    prefix = _chosen(_of_part(found, part, what), what, "ResNets")
    own = found[prefix]
    own = {re.sub(r"\.shortcut\.", ".downsample.", k): v for k, v in own.items()}
    outer = "state_dict." if prefix.startswith("state_dict.") else ""
    last = prefix.removeprefix(outer).removeprefix("momentum_")
    solo = last in ("backbone.", "encoder.") and f"{outer}classifier.weight" in state
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
    heads = _load(net, own, what)
    layout = (
        "solo-learn" if solo else f"keys {prefix}…" if prefix.removeprefix(outer) else "plain keys"
    )
    layout += _beside(found, prefix) + _without(heads)
    classes = len(state[f"{outer}classifier.weight"]) if solo and not large else 0
    usual_mean, usual_std = SOLO_CIFAR.get(classes, (PIXEL_MEAN, PIXEL_STD))
    normalize = Normalize(mean or usual_mean, std or usual_std)
    return Opened(
        nn.Sequential(normalize, net).eval(), 224 if large else 32, f"ResNet, {layout}", "1."
    )


def _prefixes(state: State) -> dict[str, State]:
    """Every ResNet in a state dict: prefix → its weights under torchvision's names."""
    found: dict[str, dict[str, str] | None] = {}
    for key in state:
        for places in (None, *PLACES.values()):
            first = (
                "layer1" if places is None else next(k for k, v in places.items() if v == "layer1")
            )
            end, stem = f"{first}.0.conv1.weight", "conv1.weight" if places is None else "0.weight"
            prefix = key.removesuffix(end)
            if (
                not key.endswith(end)
                or (prefix and prefix[-1] != ".")
                or f"{prefix}{stem}" not in state
            ):
                continue
            if places is PLACES["torchvision"] and f"{prefix}2.0.conv1.weight" in state:
                continue  # place 2 would be the ReLU, so it is the other layout
            found[prefix] = places
    return {
        prefix: _placed(_under(state, prefix, found), places) for prefix, places in found.items()
    }


def _placed(own: State, places: dict[str, str] | None) -> State:
    """Names for places; what is at other places, a head, is left out."""
    if places is None:
        return own
    return {
        f"{places[p]}.{rest}": v
        for k, v in own.items()
        for p, _, rest in [k.partition(".")]
        if p in places
    }


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
            down = nn.Sequential(
                nn.Conv2d(weight.shape[1], outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )
        if bottleneck:
            # a wide ResNet's inner width differs from a quarter of its output
            inner = len(weight)
            wide = {"base_width": 64 * inner * Bottleneck.expansion // outside}
            blocks.append(
                Bottleneck(weight.shape[1], outside // Bottleneck.expansion, stride, down, **wide)
            )
        else:
            blocks.append(BasicBlock(weight.shape[1], outside, stride, down))
    return nn.Sequential(*blocks)


# --- models by name
# ----------------------------------------------------------------------------------------


# these two take pixels normalised by ImageNet's statistics, and normalise them again by 0.5 and 0.5
# where # `transform_input`: so their pretrained weights were trained
INCEPTIONS = ("googlenet", "inception_v3")
AUXILIARY = {"aux1", "aux2", "AuxLogits"}  # their heads that are called in training alone


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
        note = (
            "; pixels as for its pretrained weights (transform_input)"
            if again
            else "; no transform_input"
        )
    model = _built(
        lambda: torchvision.models.get_model(
            name, weights="DEFAULT" if weights is None else None, **options
        ),
        name,
    )
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
    return Opened(
        nn.Sequential(normalize, model).eval(),
        224,
        f"torchvision {name} without {head}{note}",
        "1.",
    )


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
            f"model {name}: its pretrained weights could not be downloaded ({str(error).splitlines()[0]}); give a "
            "file with --weights FILE"
        ) from error
    return model


def _load_file(model: nn.Module, path: str, name: str, part: str | None, head: str = "") -> str:
    """Load a model's weights, wherever they lie in a file; returns what to say of the choice and of
    what was left out.

    head   the name of the model's head, which was taken off
    """
    if not Path(path).is_file():
        raise IsslError(f"weights {path!r} do not exist")
    what = f"{path} for {name}"
    state = _usual(_tensors(Path(path)))
    copies = {
        prefix: {k: v for k, v in own.items() if not head or not k.startswith(f"{head}.")}
        for prefix, own in _copies(state, model).items()
    }
    if not copies:
        raise IsslError(
            f"{what}: fewer than half of the model's weights are among its keys ({', '.join(list(state)[:6])}); give "
            "weights of this model, or the name of theirs"
        )
    asked = _of_part(copies, part, what)
    fitting = {prefix: own for prefix, own in asked.items() if _fits(model, own)}
    prefix = _chosen(fitting or asked, what, f"copies of {name}")
    heads = _load(model, copies[prefix], what)
    return (f", keys {prefix}…" if prefix else "") + _beside(copies, prefix) + _without(heads)


def _fits(model: nn.Module, state: State) -> bool:
    try:
        _load(model, state, "")
    except IsslError:
        return False
    return True


def _copies(state: State, model: nn.Module) -> dict[str, State]:
    """Where half of a model's weights or more lie under one prefix: prefix → all that does, under
    the model's names.

    Its parts may also be called by their places, as in
    `nn.Sequential(*list(model.children())[:-1])`.
    """
    places = {str(k): name for k, (name, _) in enumerate(model.named_children())}
    expected = model.state_dict()
    found: dict[str, dict[str, str] | None] = {}
    for used in (None, places):
        hits: Counter[str] = Counter()
        for key in state:
            for start in (0, *(dot.end() for dot in re.finditer(r"\.", key))):
                first, _, rest = key[start:].partition(".")
                hits[key[:start]] += (
                    key[start:] if used is None else f"{used.get(first)}.{rest}"
                ) in expected
        found |= {p: used for p, n in hits.items() if p not in found and 2 * n >= len(expected)}
    return {prefix: _placed(_under(state, prefix, found), used) for prefix, used in found.items()}
