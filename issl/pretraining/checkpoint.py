"""All that the next step of a training run reads, and the file from which a run is continued."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from issl.errors import IsslError
from issl.files import read_safetensors, write_safetensors
from issl.pretraining.learner import Learner

History = list[dict[str, int | float]]  # one entry per epoch
State = dict[str, Tensor]
MOMENTUM = "momentum."  # comes before the name of its weight


def snapshot(learner: Learner, optimizer: torch.optim.Optimizer) -> State:
    """All that the next step reads: a copy of weights, momenta and BatchNorm's statistics."""
    state = {name: value.detach().clone() for name, value in learner.state_dict().items()}
    for name, p in learner.named_parameters():
        if p.requires_grad:
            found = optimizer.state.get(p, {}).get("momentum_buffer")
            state[MOMENTUM + name] = torch.zeros_like(p) if found is None else found.clone()
    return state


def restore(state: State, learner: Learner, optimizer: torch.optim.Optimizer) -> None:
    """The opposite of `snapshot`."""
    learner.load_state_dict({k: v for k, v in state.items() if not k.startswith(MOMENTUM)})
    for name, p in learner.named_parameters():
        if (momentum := state.get(MOMENTUM + name)) is not None:
            optimizer.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(momentum)


@dataclass(frozen=True)
class Checkpoint:
    """Where a run is saved, and how often.

    With it, a killed run continues where it was and takes the same steps. On a CPU it ends with the
    same weights, on a GPU up to rounding, because cuDNN's fastest algorithms sum in another order
    each time. On a machine with another precision, it continues in that precision and says so.

    Attributes:
        path: The file to resume from and to write to; None: nothing is saved.
        seconds: The minimum time between two saves.
    """

    path: Path | None = None
    seconds: float = 20.0

    def save(
        self,
        learner: Learner,
        optimizer: torch.optim.Optimizer,
        identity: dict[str, Any],
        history: History,
    ) -> None:
        """Save weights, momenta and history; the file is replaced atomically. `identity` holds all
        that decides the run."""
        if self.path is None:
            return
        state = snapshot(learner, optimizer)
        tensors = {k if k.startswith(MOMENTUM) else f"model.{k}": v for k, v in state.items()}
        header = {"identity": json.dumps(identity), "history": json.dumps(history)}
        write_safetensors(self.path, tensors, header)

    def resume(
        self, learner: Learner, optimizer: torch.optim.Optimizer, identity: dict[str, Any]
    ) -> History:
        """Load what was saved into learner and optimizer. Returns the history, which is empty if
        there is no file."""
        if self.path is None or not self.path.exists():
            return []
        header, tensors = read_safetensors(self.path, "checkpoint")
        saved = json.loads(header.get("identity", "{}"))
        differing = sorted(k for k in {*saved, *identity} if saved.get(k) != identity.get(k))
        if differing == ["bf16"]:
            was, now = ("bf16" if run["bf16"] else "fp32" for run in (saved, identity))
            print(f"{self.path} was computed in {was}: going on in {now}", file=sys.stderr)
        elif differing:
            raise IsslError(
                f"checkpoint {self.path} belongs to another run: {', '.join(differing)} differ; "
                "delete or move it"
            )
        state = {name.removeprefix("model."): value for name, value in tensors.items()}
        restore(state, learner, optimizer)
        history: History = json.loads(header["history"])
        return history


def weights_digest(encoder: nn.Module) -> str:
    """The hash of an encoder's weights, sixteen hex digits."""
    digest = hashlib.sha256()
    for name, value in encoder.state_dict().items():
        values = value.cpu().contiguous().reshape(-1).view(torch.uint8)  # numpy knows no bf16
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]
