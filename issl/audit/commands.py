"""The audit's commands: run, verdicts, doctor."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from issl import engine
from issl.audit import RELEASED
from issl.errors import IsslError


def add(parsers: argparse._SubParsersAction[Any]) -> None:
    """Add the audit's commands to those of `issl`.

    Args:
        parsers: what `ArgumentParser.add_subparsers` returned. Each command sets `run`, a function
            of the parsed options that returns the exit code.
    """
    run = parsers.add_parser("run", help="make a profile's stages and execute its notebooks")
    add_option = run.add_argument
    add_option("--profile", help=f"{RELEASED} (default), quick, mini, overnight, paper …")
    add_option("--only", metavar="03,…", help="only these notebooks, by number or name")
    _places(run)
    add_option(
        "--from",
        choices=["tables", "encoders", "images"],
        dest="door",
        help="start from the released tables (needs no data; the default profile does this), from "
        "the released encoders, or from the images; the first two draw only what is released",
    )
    again = "compute one whole released table again from its encoder, and compare"
    add_option("--check", action="store_true", help=again)
    add_option(
        "--checkpoint",
        action="append",
        default=[],
        metavar="METHOD=FILE",
        help="score this encoder instead of training one (repeatable; a method may have several)",
    )
    add_option(
        "--again",
        action="store_true",
        help="execute notebooks even if nothing they depend on has changed",
    )
    add_option("--stages", action="store_true", help="only make what the notebooks would read")
    engine.add_arguments(run)
    run.set_defaults(run=_run)

    verdicts = parsers.add_parser("verdicts", help="the kept records' verdicts, as one table")
    verdicts.add_argument(
        "--readme",
        action="store_true",
        help="write it into README.md and docs/verdicts.md instead of printing it",
    )
    verdicts.set_defaults(run=_verdicts)

    doctor = parsers.add_parser("doctor", help="what is installed, and what the profiles need")
    _places(doctor)
    doctor.set_defaults(run=_doctor)


def _places(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    root = "folder of the data sets (default: $ISSL_DATA)"
    add("--data-root", type=Path, metavar="DIR", help=root)
    add("--device", default="auto", help="auto (default), cpu or cuda")
    add("--out", type=Path, metavar="DIR", help="where a run writes (default: here)")


def _run(options: argparse.Namespace) -> int:
    from issl.audit.again import check_again
    from issl.audit.profiles import ProfileOptions
    from issl.audit.run import run

    example = "METHOD=FILE, such as simclr=weights.ckpt"
    profile = options.profile or ("quick" if options.checkpoint else RELEASED)
    chosen = ProfileOptions(
        profile,
        options.only,
        options.data_root,
        options.device,
        options.out,
        engine.pairs(options.checkpoint, "--checkpoint", example),
        options.door or ("tables" if profile == RELEASED else None),
    )
    if options.check:
        return check_again(chosen)
    return run(chosen, options.again, engine.asked_for(options), notebooks=not options.stages)


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
    from issl.audit.doctor import doctor

    return doctor(options.data_root, options.out, options.device)
