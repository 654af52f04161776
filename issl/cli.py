"""The command line, `issl COMMAND`: influence, fit, explain, attribute, pretrain, download, and the
commands of the audit."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from issl import __version__
from issl.engine import in_short
from issl.errors import IsslError

COMMANDS = {  # each has a module in issl.commands, with `add_arguments` and `main`
    "influence": "score your own images under your own encoder",
    "fit": "save the curvature of a set of images, to score other images with it",
    "explain": "show which training images taught an encoder about an image",
    "attribute": "differentiate a training run: what each image did to others",
    "pretrain": "train an encoder on your own images",
}
AUDIT = ("run", "verdicts", "doctor")  # of issl.audit.commands
EXTRA = ("pydantic", "papermill")  # of issl[audit]: if these are installed, so is the rest


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"issl: error: {message}; see {self.prog} --help\n")


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """All commands. Only `command` itself gets its options, because some of them list what the
    library knows and so import torch."""
    top = Parser(prog="issl", description="Label-free influence for self-supervised learning.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        one = commands.add_parser(name, help=text)
        if name == command:
            module = import_module(f"issl.commands.{name}")
            module.add_arguments(one)
            one.set_defaults(run=module.main)
    download = commands.add_parser("download", help="download a data set from its public source")
    download.add_argument("name", help="cifar10, cifar100 or fairface")
    download.add_argument(
        "--data-root", type=Path, metavar="DIR", help="folder to write to (default: $ISSL_DATA)"
    )
    download.set_defaults(run=_download)
    if all(find_spec(package) for package in EXTRA):
        import_module("issl.audit.commands").add(commands)
    else:
        for name in AUDIT:
            commands.add_parser(name, help="needs: pip install 'issl[audit]'", add_help=False)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code, which is 2 for bad input, with one line on stderr."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    # libgomp reads this when torch is imported, here and in child processes: waiting threads then
    # soon sleep. By default they spin, and processes that share the cores slow each other down
    # several times
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    options, rest = parser(given[0] if given else None).parse_known_args(given)
    try:
        if not hasattr(options, "run"):
            raise IsslError(f"issl {options.command} needs the audit; pip install 'issl[audit]'")
        if rest:
            parser(given[0]).parse_args(given)  # exits and names the unknown ones
        with _ended_like_an_interrupt():
            if options.command != "download":
                from issl.devices import keep_freed_memory

                keep_freed_memory()
            return int(options.run(options))
    except IsslError as error:
        print(f"issl: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("issl: stopped; run the same command again to continue from here", file=sys.stderr)
        return 130
    except Exception as error:
        if (said := in_short(error)) is None:
            raise
        print(f"issl: error: {said}", file=sys.stderr)
        return 2


def _download(options: argparse.Namespace) -> int:
    from issl.data.published import download

    print(download(options.name, options.data_root))
    return 0


@contextmanager
def _ended_like_an_interrupt() -> Iterator[None]:
    """SIGTERM, which batch systems and `kill` send, ends a command as Ctrl-C does: kernels and
    workers end with it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set a handler
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
