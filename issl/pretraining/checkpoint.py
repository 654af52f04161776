"""The checkpoint of a training run: all that the loop needs to continue, in one file."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from issl.errors import IsslError
from issl.files import atomic, read_safetensors
from issl.pretraining.learner import Learner

History = list[dict[str, int | float]]  # one entry per epoch


@dataclass(frozen=True)
class Checkpoint:
    """Where a run is saved, and how often.

    With it, a killed run continues where it was and takes the same steps: on a CPU it ends with the
    same weights, on a GPU up to rounding, for cuDNN's fastest algorithms sum in another order each
    time. On a machine of another precision it continues in that one, and says so.

    Attributes:
        path: The file to resume from and to write to; None: nothing is saved.
        seconds: The least time between two saves.
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
        """Weights, momenta and history; the file is replaced in one step. `identity` is all that
        decides the run."""
        if self.path is None:
            return
        tensors = {f"model.{k}": v for k, v in learner.state_dict().items()}
        for name, p in learner.named_parameters():
            if p in optimizer.state:
                tensors[f"momentum.{name}"] = optimizer.state[p]["momentum_buffer"]
        header = {"identity": json.dumps(identity), "history": json.dumps(history)}
        with atomic(self.path) as part:
            save_file({k: v.contiguous() for k, v in tensors.items()}, part, header)

    def resume(
        self, learner: Learner, optimizer: torch.optim.Optimizer, identity: dict[str, Any]
    ) -> History:
        """Load what was saved into learner and optimizer; returns the history, which is empty if
        there is no file. Raises IsslError for a damaged file, and for one of another run."""
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
        learner.load_state_dict(
            {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        )
        for name, p in learner.named_parameters():
            if (saved_momentum := tensors.get(f"momentum.{name}")) is not None:
                optimizer.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(saved_momentum)
        history: History = json.loads(header["history"])
        return history


def weights_digest(encoder: nn.Module) -> str:
    """The hash of an encoder's weights, sixteen hex digits."""
    digest = hashlib.sha256()
    for name, value in encoder.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
