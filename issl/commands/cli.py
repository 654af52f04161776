"""The command line, `issl COMMAND`: run, compute, pretrain, influence, fit, merge, explain, doctor
and so on."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from issl import __version__
from issl.commands.arguments import finite
from issl.errors import IsslError, OutOfTime

IMAGES = {  # commands about your own images: each has a module with `add_arguments` and `main`
    "influence": "score your own images under your own encoder",
    "fit": "keep the curvature of a set of images, to score others under it",
    "merge": "add kept curvatures of different images",
    "explain": "show which training images taught an encoder about an image",
    "pretrain": "train an encoder on your own images",
}
COMPUTING = ("run", "compute", "doctor", *IMAGES)  # the commands that use torch's threads


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"issl: error: {message}; see {self.prog} --help\n")


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """All commands. Options that list what the library knows are added for `command` alone: they
    import torch."""
    top = Parser(prog="issl", description="Label-free influence for self-supervised learning.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="compute a profile's stages and execute its notebooks")
    _profile_arguments(run)
    run.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="how many stages at once (default: one per core, up to 4; up to 4 per GPU)",
    )
    run.add_argument(
        "--again",
        action="store_true",
        help="run notebooks even if nothing they depend on has changed",
    )
    compute = commands.add_parser(
        "compute", help="compute only a profile's missing stages, several at once or on Slurm"
    )
    _profile_arguments(compute)
    compute.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="how many stages at once (1)"
    )
    compute.add_argument("--cluster", default="local", help="local (default) or slurm")
    compute.add_argument(
        "--slurm",
        default=[],
        nargs="*",
        metavar="KEY=VALUE",
        help="sbatch's options: partition=gpu gpus_per_node=1 …",
    )
    verdicts = commands.add_parser(
        "verdicts", help="the verdicts of the records under figures/, as one table"
    )
    verdicts.add_argument(
        "--readme",
        action="store_true",
        help="write it into README.md and docs/verdicts.md instead of printing it",
    )
    download = commands.add_parser("download", help="download a data set from its public source")
    download.add_argument("name", help="cifar10, cifar100 or fairface")
    download.add_argument(
        "--data-root", type=Path, metavar="DIR", help="folder to write to (default: $ISSL_DATA)"
    )
    doctor = commands.add_parser(
        "doctor", help="what is installed, what is missing, and which profiles can run here"
    )
    doctor.add_argument(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="folder of the data sets (default: $ISSL_DATA)",
    )
    doctor.add_argument(
        "--out", type=Path, metavar="DIR", help="where a run would write (default: here)"
    )
    doctor.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    doctor.add_argument(
        "--profile", help="only this profile: its stages by kind, with hours and memory"
    )
    parsers = {name: commands.add_parser(name, help=text) for name, text in IMAGES.items()}
    if command in parsers:
        import_module(f"issl.commands.{command}").add_arguments(parsers[command])
    return top


def _profile_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--profile", default="quick", help="quick (default), mini, overnight or paper")
    add("--only", metavar="03,…", help="only these notebooks, by number or name")
    add(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="folder of the data sets (default: $ISSL_DATA)",
    )
    add("--device", default="auto", help="auto (default), cpu or cuda")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="where figures/, results/, artifacts/ go (default: here)",
    )
    add(
        "--from-scratch",
        action="store_true",
        help="make again the encoders and scores that come with the repository",
    )
    add(
        "--time-budget",
        type=finite,
        metavar="MIN",
        help="stop in time, with checkpoints; the same command continues",
    )
    add(
        "--checkpoint",
        action="append",
        default=[],
        metavar="METHOD=FILE",
        help="score this encoder instead of training one (repeatable; a method may have several)",
    )


def _verdicts(into_readme: bool) -> int:
    from issl.audit.verdicts import kept_records, markdown, pages
    from issl.files import REPOSITORY, atomic, installed, provided

    if not into_readme:
        print(markdown(kept_records(provided("figures"))), end="")
        return 0
    if installed():
        raise IsslError(
            "--readme writes into the pages of a checkout, and this is an installed wheel: leave it out"
        )
    for page, text in pages(REPOSITORY).items():
        with atomic(page) as part:
            part.write_text(text)
        print(page)
    return 0


def _run(options: argparse.Namespace) -> int:
    """Run a command; its modules are imported here, so that no command waits for those of
    another."""
    if options.command == "download":
        from issl.data.published import download

        print(download(options.name, options.data_root))
        return 0
    if options.command == "verdicts":
        return _verdicts(options.readme)
    from issl.devices import keep_freed_memory

    keep_freed_memory()
    if options.command in IMAGES:
        code: int = import_module(f"issl.commands.{options.command}").main(options)
        return code
    if options.command == "doctor":
        from issl.audit.doctor import doctor, stage_list

        if options.profile is not None:
            return stage_list(options.profile)
        return doctor(options.data_root, options.out, options.device)
    from issl.audit.profiles import ProfileOptions, pairs, sbatch_options

    names = ("profile", "only", "data_root", "device", "out", "from_scratch")
    shared = ProfileOptions(
        **{name: getattr(options, name) for name in names},
        minutes=options.time_budget,
        checkpoints=pairs(
            options.checkpoint, "--checkpoint", "METHOD=FILE, such as simclr=weights.ckpt"
        ),
    )
    if options.command == "compute":
        from issl.audit.compute import compute

        return compute(shared, options.jobs, options.cluster, sbatch_options(options.slurm))
    from issl.audit.run import run

    return run(shared, options.again, options.jobs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; bad input gives one line on stderr and exit code 2, a spent time budget exit
    code 3."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given and given[0] in COMPUTING:
        # libgomp reads this when torch is imported, here and in the kernels and jobs that start
        # from here: threads that # wait for each other soon sleep. By default they spin, and
        # processes that share the cores (notebooks beside a # training) slow each other several
        # times
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    options = parser(given[0] if given else None).parse_args(given)
    try:
        with _ended_like_an_interrupt():
            return _run(options)
    except OutOfTime as late:
        print(f"issl: {late}", file=sys.stderr)
        return 3
    except IsslError as error:
        print(f"issl: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("issl: stopped; run the same command again to continue from here", file=sys.stderr)
        return 130
    except Exception as error:
        from issl.audit.scheduler import in_short

        if (said := in_short(error)) is None:
            raise
        print(f"issl: error: {said}", file=sys.stderr)
        return 2


@contextmanager
def _ended_like_an_interrupt() -> Iterator[None]:
    """SIGTERM, which batch systems and `kill` send, ends a command as Ctrl-C does: kernels and
    workers end with it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say so
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
