"""Checkpoint files of other projects: their tensors, and one encoder of the several that they may
hold. Nothing in a file is executed."""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from issl.errors import IsslError
from issl.files import read_safetensors

State = dict[str, Tensor]
Names = dict[str, str] | None  # the usual name of each place; None: the names are usual

DEEPEST = 16  # dictionaries within dictionaries; VISSL's files have 4
# of two kinds of encoders the first is taken, if there is one
PREFERRED = (
    ("teacher", "student"),  # DINO, iBOT, DINOv2: their authors evaluate the teacher
    # the trained one before the one that follows it: MoCo, BYOL, solo-learn, lightly, timm
    ("", r"momentum|teacher|target|(^|[._])(ema|key)([._]|$)|_k\."),
)
# first words of names that are no part of an encoder: heads, and what only a loss needs. BEiT, MAE
# and DINOv2 have a mask token, SwAV has prototypes, MoCo a queue
HEADS = re.compile(
    "heads?|fc|linear|classif(ier|ication)?|(aux)?logits|aux|proj(ector|ection)?|predict(or|ion)|"
    "prototypes?|neck|mlp|decoder|mask|queue|center|loss|criterion"
)
# what torch wraps a module in, at any depth; and the names in torchvision's own files of DenseNets
WRAPPERS = r"(^|(?<=\.))((_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
DENSE = r"(denselayer\d+\.(norm|conv))\.([12])\."

# --- the tensors of a file


def read_tensors(path: Path) -> State:
    """All tensors of a .safetensors file, or of what PyTorch, Lightning, solo-learn or lightly
    write; names of dictionaries around them come first, as in `state_dict.conv1.weight`."""
    if path.suffix == ".safetensors":
        return read_safetensors(path, "weights")[1]
    content = _content(path)
    if not isinstance(content, dict):
        raise IsslError(f"{path} holds a {type(content).__name__}, not a state dict")
    state = _flat(content, set())
    if not state:
        entries = ", ".join(map(str, list(content)[:8]))
        raise IsslError(f"{path} holds no state dict; its entries are {entries}")
    for name, value in state.items():
        # strides may say of one number that it is a thousand million
        declared = value.numel() * value.itemsize
        if value.layout == torch.strided and declared > value.untyped_storage().nbytes():
            raise IsslError(
                f"{path}: {name} declares shape {tuple(value.shape)} but holds less; get the file "
                "again"
            )
    return state


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
    with path.open("rb") as file:
        begins = file.read(2)
    if begins != b"PK" and begins[:1] != b"\x80":  # neither a zip archive nor a pickle
        raise IsslError(
            f"{path} is no checkpoint; give a .safetensors file, or what torch.save wrote (.pt, "
            ".pth, .ckpt)"
        )
    try:
        if begins == b"PK":  # torch.save does not compress
            with zipfile.ZipFile(path) as archive:
                declared = sum(member.file_size for member in archive.infolist()) / 1e6
            if declared > (held := path.stat().st_size / 1e6):
                raise IsslError(
                    f"{path} declares {declared:,.1f} MB of content in a file of {held:,.1f} MB, "
                    "which torch.save never writes; get it from its source again"
                )
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
    except IsslError:
        raise
    except Exception as error:  # of a file that is damaged, whatever torch's reader stumbles over
        said = str(error).splitlines() or [type(error).__name__]
        raise IsslError(
            f"{path} cannot be read as weights ({said[0]}); it is damaged: get it again"
        ) from error


# --- one encoder of several


def usual_names(state: State) -> State:
    """The names that modules have today, and without those of torch's wrappers."""
    renamed = {re.sub(DENSE, r"\1\3.", re.sub(WRAPPERS, "", k)): v for k, v in state.items()}
    return renamed if len(renamed) == len(state) else state


def of_part(copies: dict[str, State], part: str | None, what: str) -> dict[str, State]:
    """Those encoders that the user asked for."""
    if part is None:
        return copies
    word = f".{part.strip('.')}."
    asked = {prefix: own for prefix, own in copies.items() if word in f".{prefix}"}
    if not asked:
        raise IsslError(
            f"{what}: part={part!r} names none of its encoders; they are {_named(copies)}"
        )
    return asked


def chosen(copies: dict[str, State], what: str, kind: str) -> str:
    """The prefix of the encoder to take. IsslError where nothing decides between several."""
    left = list(copies)
    for taken, other in PREFERRED:
        rest = [prefix for prefix in left if not re.search(other, prefix, re.I)]
        if rest and any(re.search(taken, prefix, re.I) for prefix in left):
            left = rest
    first, *more = left
    if not all(_one_module(copies, first, prefix) for prefix in more):
        example = (first or more[0]).rstrip(".")
        raise IsslError(
            f"{what}: several {kind} among its keys ({_named(left)}); choose one with "
            f"part={example!r}"
        )
    return first


def _one_module(copies: dict[str, State], a: str, b: str) -> bool:
    """Whether two encoders are one module that is also a part of another: backbone and
    model.backbone."""
    one, other = copies[a], copies[b]
    same_end = a.split(".")[-2:] == b.split(".")[-2:] and one.keys() == other.keys()
    return same_end and all(torch.equal(one[k], other[k]) for k in one)


def _named(prefixes: Iterable[str]) -> str:
    """Prefixes, for a reader."""
    return ", ".join(prefix.rstrip(".") or "the one of plain keys" for prefix in prefixes)


def said_of(copies: Iterable[str], taken: str, heads: list[str]) -> str:
    """What to say of the encoders that were not taken, and of the heads that were left out."""
    others = [prefix for prefix in copies if prefix != taken]
    beside = f" (not {_named(others)}; part= takes another)" if others else ""
    return beside + (f", left out: {', '.join(heads)}" if heads else "")


def under(state: State, found: dict[str, Names]) -> dict[str, State]:
    """What lies under each prefix, but not under the longer one of another encoder, by its usual
    names; what is at another place, a head, is left out."""
    copies: dict[str, State] = {}
    for prefix, places in found.items():
        inner = tuple(p for p in found if p != prefix and p.startswith(prefix))
        own = {
            k.removeprefix(prefix): v
            for k, v in state.items()
            if k.startswith(prefix) and not k.startswith(inner)
        }
        if places is not None:
            split = [(*k.partition("."), v) for k, v in own.items()]
            own = {f"{places[p]}.{rest}": v for p, _, rest, v in split if p in places}
        copies[prefix] = own
    return copies


def _is_head(name: str) -> bool:
    first = name.split(".")[0]
    return first != "fc_norm" and any(map(HEADS.fullmatch, re.split(r"[_\d]+", first.lower())))


def load(model: nn.Module, state: State, what: str) -> list[str]:
    """Load an encoder; returns the heads in `state`, which are left out. IsslError where anything
    else is over or missing."""
    expected = model.state_dict()
    buffers = dict(model.named_buffers())  # some that are not saved were, in old versions
    over = {k for k in state if _is_head(k) and k not in expected and k not in buffers}
    constant = {
        k
        for k in state.keys() & buffers.keys() - expected.keys()
        if torch.equal(state[k], buffers[k].to(state[k].dtype))
    }
    kept = {k: v for k, v in state.items() if k not in over | constant}
    # no use in eval mode
    counts = {k: v for k, v in expected.items() if k.endswith("num_batches_tracked")}
    versioned = OrderedDict(counts | kept)
    versioned._metadata = expected._metadata  # type: ignore[attr-defined]
    reasons: list[Exception] = []
    # without versions, modules look for the names of their older ones; some (MNASNet) refuse that
    for attempt in (kept, versioned):
        try:
            model.load_state_dict(attempt)
            return sorted({k.split(".")[0] for k in over})
        except (RuntimeError, ValueError) as error:
            reasons.append(error)
    misfit = _misfit(kept, expected) or str(reasons[-1]).splitlines()[-1].strip()
    raise IsslError(f"{what}: the weights do not fit ({misfit})") from reasons[0]


def _misfit(state: State, expected: State) -> str:
    """What is missing, left over, and of another shape."""
    both = [k for k in expected if k in state and state[k].shape != expected[k].shape]
    listed = {
        "missing": [k for k in expected if k not in state and "num_batches" not in k],
        "left over": [k for k in state if k not in expected],
        "of another shape": [
            f"{k} {tuple(state[k].shape)} for {tuple(expected[k].shape)}" for k in both
        ],
    }
    said = []
    for what, names in listed.items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        said += [f"{what}: {', '.join(names[:4])}{more}"] if names else []
    return "; ".join(said)


def fits(model: nn.Module, state: State) -> bool:
    try:
        load(model, state, "")
    except IsslError:
        return False
    return True


def copies_of(state: State, model: nn.Module) -> dict[str, State]:
    """Where half of a model's weights or more lie under one prefix: prefix → all that does, under
    the model's names. Its parts may also be called by their places, as in
    `nn.Sequential(*list(model.children())[:-1])`."""
    places = {str(k): name for k, (name, _) in enumerate(model.named_children())}
    expected = model.state_dict()
    found: dict[str, Names] = {}
    for used in (None, places):
        hits: Counter[str] = Counter()
        for key in state:
            for start in (0, *(dot.end() for dot in re.finditer(r"\.", key))):
                first, _, rest = key[start:].partition(".")
                name = key[start:] if used is None else f"{used.get(first)}.{rest}"
                hits[key[:start]] += name in expected
        found |= {p: used for p, n in hits.items() if p not in found and 2 * n >= len(expected)}
    return under(state, found)
