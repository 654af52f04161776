"""The command line, `issl COMMAND`: run, pretrain, influence, fit, explain, doctor and so on."""

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
from issl.audit import commands as audit
from issl.errors import IsslError, OutOfTime

IMAGES = {  # commands about your own images: each has a module with `add_arguments` and `main`
    "influence": "score your own images under your own encoder",
    "fit": "keep the curvature of a set of images, to score others under it",
    "explain": "show which training images taught an encoder about an image",
    "pretrain": "train an encoder on your own images",
}
COMPUTING = ("run", "doctor", *IMAGES)  # the commands that use torch's threads


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
    audit.add(commands)
    download = commands.add_parser("download", help="download a data set from its public source")
    download.add_argument("name", help="cifar10, cifar100 or fairface")
    download.add_argument(
        "--data-root", type=Path, metavar="DIR", help="folder to write to (default: $ISSL_DATA)"
    )
    parsers = {name: commands.add_parser(name, help=text) for name, text in IMAGES.items()}
    if command in parsers:
        import_module(f"issl.commands.{command}").add_arguments(parsers[command])
    return top


def _run(options: argparse.Namespace) -> int:
    """Run a command; its modules are imported here, so that no command waits for those of
    another."""
    if options.command == "download":
        from issl.data.published import download

        print(download(options.name, options.data_root))
        return 0
    from issl.devices import keep_freed_memory

    keep_freed_memory()
    if options.command in IMAGES:
        code: int = import_module(f"issl.commands.{options.command}").main(options)
        return code
    return int(options.run(options))


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
        from issl.engine import in_short

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
