"""`issl influence --out FOLDER`: scores in parts, by any number of processes, here, by torchrun, or
as Slurm arrays."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import submitit
import torch

from issl.audit.compute import executor_for
from issl.audit.profiles import sbatch_options
from issl.commands.measuring import computing_of, load_images, measured, write_broken
from issl.devices import keep_freed_memory, pick_device
from issl.errors import IsslError
from issl.influence.fitted import load_fitted
from issl.influence.in_parts import InParts
from issl.pretraining.other_encoders import encoder_asked_for
from issl.shards import ONE

Phase = Literal["fit", "merge", "score"]


@dataclass(frozen=True)
class Work:
    """What one process does: complete a phase, beside others that do the same."""

    options: argparse.Namespace
    phase: Phase
    number: int  # of this process among `many`
    many: int

    def __call__(self) -> int:
        """Complete the phase; how many parts were made here."""
        options = self.options
        keep_freed_memory()
        device = pick_device(options.device)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        opened = encoder_asked_for(options)
        what, kept = measured(options, opened)
        parts = InParts(options.out, load_images(options, opened), start=self.number / self.many)
        computing = computing_of(options, ONE, device)
        if self.phase != "score":
            return 0 if kept is not None else parts.fit(opened.encoder, what, computing)
        return parts.score(
            load_fitted(kept or parts.curvature, opened.encoder, device=device), computing
        )


def main(options: argparse.Namespace) -> int:
    """Run the command; raises IsslError for bad input, before any long work."""
    out, began = options.out, time.monotonic()
    if options.store is not None or options.save_curvature is not None:
        raise IsslError(
            f"--out {out} is a folder, where curvature.safetensors is kept, and no gradients: drop --store "
            "and --save-curvature"
        )
    if options.jobs < 1:
        raise IsslError(f"--jobs {options.jobs}: need 1 or more")
    opened = encoder_asked_for(options)
    what, _ = measured(options, opened)
    images = load_images(options, opened)  # names broken images before any work
    number, many = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if number == 0:
        side = images.pixels.shape[-1]
        several = f" on {many} processes" if many > 1 else ""
        print(
            f"{len(images)} images of {images.name} at {side} px, {opened.about}, {what.curvature}{several}",
            flush=True,
        )
    if options.cluster == "slurm":
        _submit(options)
    else:
        made = [Work(options, phase, number, many)() for phase in ("fit", "score")]
        print(f"process {number} of {many}: {made[0]} parts fitted, {made[1]} scored", flush=True)
    if number == 0:
        from issl.audit import figures  # slow to import

        columns = ["index", "influence", "stability_loss"]
        figures.style(screen=False)
        about = f"{Path(options.encoder).name}, {type(what.curvature).__name__}"
        figures.write(
            figures.scored(InParts(out, images).table(columns), images, about), out / "scores.png"
        )
        left_out = write_broken(out / "scores", images)
        print(
            f"{out}/scores/*.parquet (scores.png): {len(images)} scores in {time.monotonic() - began:.0f} s{left_out}"
        )
    return 0


def _submit(options: argparse.Namespace) -> None:
    """Three steps on Slurm, each after the one before: an array that fits, a job that merges, an
    array that scores.

    A step also makes what the one before left undone, so a job that is killed costs its part alone.
    """
    submitted: dict[Phase, list[Any]] = {}
    steps: list[tuple[Phase, int]] = [("fit", options.jobs), ("merge", 1), ("score", options.jobs)]
    before: list[Any] = []
    for phase, many in steps:
        executor = executor_for("slurm", options.out / "jobs", many, sbatch_options(options.slurm))
        if before:
            number = before[0].job_id.split("_")[0]  # of the whole array
            executor.update_parameters(
                slurm_additional_parameters={"dependency": f"afterany:{number}"}
            )
        with executor.batch():
            before = [executor.submit(Work(options, phase, k, many)) for k in range(many)]
        submitted[phase] = before
        print(f"{phase}: {many} jobs, {before[0].job_id}", flush=True)
    for phase, jobs in submitted.items():
        errors = [error for job in jobs if (error := _error(job)) is not None]
        if errors and phase == "score":
            raise IsslError(
                f"{len(errors)} of {len(jobs)} scoring jobs failed ({errors[0]}); see {options.out}/jobs, then "
                "start the same command again: what is done is kept"
            )
        if errors:
            print(
                f"{phase}: {len(errors)} of {len(jobs)} jobs failed ({errors[0]}); the next step takes over",
                flush=True,
            )
    print(
        f"{sum(job.result() for job in submitted['score'])} parts scored by {options.jobs} jobs",
        flush=True,
    )


def _error(job: Any) -> str | None:
    """Wait for a job; the last line of its error, if it failed or left no result."""
    try:
        error = job.exception()
    except submitit.core.utils.UncompletedJobError as gone:  # killed from outside
        error = gone
    return None if error is None else str(error).strip().splitlines()[-1]
