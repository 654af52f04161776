"""The command line: `issl run`, `compute`, `pretrain`, `influence`, `explain`, `doctor`, `verdicts`, `download`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from issl import __version__
from issl.devices import keep_freed_memory
from issl.errors import IsslError, OutOfTime
from issl.files import REPOSITORY, atomic


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"issl: error: {message}; see {self.prog} --help\n")


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """All commands; those that need the library to be known, only for the command that is asked for."""
    top = Parser(prog="issl", description="Label-free influence for self-supervised learning.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="compute a profile's stages and execute its notebooks")
    _of_a_profile(run)
    run.add_argument("--again", action="store_true", help="run notebooks even where nothing they depend on has changed")
    compute = commands.add_parser("compute", help="compute a profile's missing stages alone, side by side or on Slurm")
    _of_a_profile(compute)
    compute.add_argument("--jobs", type=int, default=1, metavar="N", help="at most so many stages at once (1)")
    compute.add_argument("--cluster", default="local", help="local (default) or slurm")
    compute.add_argument(
        "--slurm", default=[], nargs="*", metavar="KEY=VALUE", help="sbatch's options: partition=gpu gpus_per_node=1 …"
    )
    verdicts = commands.add_parser("verdicts", help="all verdicts of the records kept under figures/, as one table")
    verdicts.add_argument("--readme", action="store_true", help="write the table into README.md instead of printing it")
    download = commands.add_parser("download", help="fetch a data set from its public home")
    download.add_argument("name", help="cifar10, cifar100 or fairface")
    download.add_argument("--data-root", type=Path, metavar="DIR", help="where to (default: $ISSL_DATA)")
    doctor = commands.add_parser("doctor", help="what is here, what is missing, and what each profile would cost here")
    doctor.add_argument("--data-root", type=Path, metavar="DIR", help="folder of the data sets (default: $ISSL_DATA)")
    doctor.add_argument("--out", type=Path, metavar="DIR", help="where a run would write (default: here)")
    doctor.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    influence = commands.add_parser("influence", help="score your own images under your own encoder")
    explain = commands.add_parser("explain", help="which training images taught an encoder about this image?")
    pretrain = commands.add_parser("pretrain", help="train an encoder on your own images")
    if command == "influence":
        from issl.commands.influence import add_arguments

        add_arguments(influence)
    if command == "explain":
        from issl.commands.explain import add_arguments

        add_arguments(explain)
    if command == "pretrain":
        from issl.commands.pretrain import add_arguments

        add_arguments(pretrain)
    return top


def _of_a_profile(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--profile", default="quick", help="quick (default), mini or paper")
    add("--only", metavar="03,…", help="these notebooks alone, by number or name")
    add("--data-root", type=Path, metavar="DIR", help="folder of the data sets (default: $ISSL_DATA)")
    add("--device", default="auto", help="auto (default), cpu or cuda")
    add("--out", type=Path, metavar="DIR", help="where figures/, results/, artifacts/ go (default: here)")
    add("--time-budget", type=float, metavar="MIN", help="end in time, with checkpoints; the same command goes on")


def _pairs(options: Sequence[str]) -> dict[str, str]:
    for option in options:
        if "=" not in option:
            raise IsslError(f"--slurm {option}: write KEY=VALUE, such as partition=gpu")
    return dict(option.split("=", 1) for option in options)


def _verdicts(into_readme: bool) -> int:
    from issl.reporting.verdicts import in_readme, kept_records, markdown

    records, readme = kept_records(REPOSITORY / "figures"), REPOSITORY / "README.md"
    if into_readme:
        text = in_readme(readme.read_text(), records)
        with atomic(readme) as part:
            part.write_text(text)
        print(f"{readme}: {len(records)} records")
    else:
        print(markdown(records), end="")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; bad input ends in one line on stderr and exit code 2, a spent time budget in exit code 3."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser(given[0] if given else None).parse_args(given)
    try:
        if options.command == "download":
            from issl.data.datasets import download

            print(download(options.name, options.data_root))
            return 0
        if options.command == "verdicts":
            return _verdicts(options.readme)
        keep_freed_memory()
        if options.command == "doctor":
            from issl.commands.doctor import doctor

            return doctor(options.data_root, options.out, options.device)
        if options.command == "influence":
            from issl.commands.influence import score

            return score(options)
        if options.command == "explain":
            from issl.commands.explain import explain

            return explain(options)
        if options.command == "pretrain":
            from issl.commands.pretrain import train

            return train(options)
        from issl.commands.profiles import ProfileOptions

        shared = ProfileOptions(
            options.profile, options.only, options.data_root, options.device, options.out, options.time_budget
        )
        if options.command == "compute":
            from issl.commands.compute import compute

            return compute(shared, options.jobs, options.cluster, _pairs(options.slurm))
        from issl.commands.run import run

        return run(shared, options.again)
    except OutOfTime as late:
        print(f"issl: {late}", file=sys.stderr)
        return 3
    except IsslError as error:
        print(f"issl: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("issl: stopped; run the same command again to go on from here", file=sys.stderr)
        return 130
