"""The audit's commands: run, compute, verdicts, doctor."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from issl.commands.arguments import finite
from issl.errors import IsslError


def add(parsers: argparse._SubParsersAction[Any]) -> None:
    """Add the audit's commands to those of `issl`; each sets `run`, a function of the options."""
    run = parsers.add_parser("run", help="compute a profile's stages and execute its notebooks")
    _profile_arguments(run)
    run.add_argument("--jobs", type=int, metavar="N", help="how many stages at once")
    run.add_argument("--again", action="store_true", help="run notebooks even if nothing changed")
    run.set_defaults(run=_run)
    compute = parsers.add_parser("compute", help="compute only a profile's missing stages")
    _profile_arguments(compute)
    compute.add_argument("--jobs", type=int, default=1, metavar="N", help="how many at once (1)")
    compute.add_argument("--cluster", default="local", help="local (default) or slurm")
    compute.add_argument("--slurm", default=[], nargs="*", metavar="KEY=VALUE", help="for sbatch")
    compute.set_defaults(run=_run)
    verdicts = parsers.add_parser("verdicts", help="the kept records' verdicts, as one table")
    verdicts.add_argument("--readme", action="store_true", help="write it into README.md and docs")
    verdicts.set_defaults(run=_verdicts)
    doctor = parsers.add_parser("doctor", help="what is installed, and which profiles can run")
    doctor.add_argument("--data-root", type=Path, metavar="DIR", help="folder of the data sets")
    doctor.add_argument("--out", type=Path, metavar="DIR", help="where a run would write")
    doctor.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    doctor.add_argument("--profile", help="only this profile: its stages by kind")
    doctor.set_defaults(run=_doctor)


def _profile_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--profile", default="quick", help="quick (default), mini, overnight or paper")
    add("--only", metavar="03,…", help="only these notebooks, by number or name")
    add("--data-root", type=Path, metavar="DIR", help="folder of the data sets ($ISSL_DATA)")
    add("--device", default="auto", help="auto (default), cpu or cuda")
    add("--out", type=Path, metavar="DIR", help="where figures/, results/, artifacts/ go")
    add("--from-scratch", action="store_true", help="make again what comes with the repository")
    add("--time-budget", type=finite, metavar="MIN", help="stop in time, with checkpoints")
    add("--checkpoint", action="append", default=[], metavar="METHOD=FILE", help="score this one")


def _run(options: argparse.Namespace) -> int:
    from issl.audit.profiles import ProfileOptions, pairs, sbatch_options

    names = ("profile", "only", "data_root", "device", "out", "from_scratch")
    example = "METHOD=FILE, such as simclr=weights.ckpt"
    shared = ProfileOptions(
        **{name: getattr(options, name) for name in names},
        minutes=options.time_budget,
        checkpoints=pairs(options.checkpoint, "--checkpoint", example),
    )
    if options.command == "compute":
        from issl.audit.compute import compute

        return compute(shared, options.jobs, options.cluster, sbatch_options(options.slurm))
    from issl.audit.run import run

    return run(shared, options.again, options.jobs)


def _verdicts(options: argparse.Namespace) -> int:
    from issl.audit.verdicts import kept_records, markdown, pages
    from issl.files import REPOSITORY, atomic, installed, provided

    if not options.readme:
        print(markdown(kept_records(provided("figures"))), end="")
        return 0
    if installed():
        raise IsslError("--readme writes into a checkout, and this is an installed wheel")
    for page, text in pages(REPOSITORY).items():
        with atomic(page) as part:
            part.write_text(text)
        print(page)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from issl.audit.doctor import doctor, stage_list

    if options.profile is not None:
        return stage_list(options.profile)
    return doctor(options.data_root, options.out, options.device)
