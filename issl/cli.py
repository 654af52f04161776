"""The command line: `issl run`, `issl influence`, `issl download`."""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path

from issl import __version__
from issl.errors import IsslError


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """All commands; the options of `influence` only where it is the one asked for, they need the library."""
    top = argparse.ArgumentParser(prog="issl", description="Label-free influence for self-supervised learning.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="compute a profile's stages and execute its notebooks")
    run.add_argument("--profile", default="quick", help="quick (default), mini or paper")
    run.add_argument("--only", metavar="03,…", help="these notebooks alone, by number or name")
    run.add_argument("--data-root", type=Path, metavar="DIR", help="folder of the data sets (default: $ISSL_DATA)")
    run.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    run.add_argument("--out", type=Path, metavar="DIR", help="where figures/, results/, artifacts/ go (default: here)")
    run.add_argument("--again", action="store_true", help="run notebooks even where nothing they depend on has changed")
    download = commands.add_parser("download", help="fetch a data set from its public home")
    download.add_argument("name", help="cifar10, cifar100 or fairface")
    download.add_argument("--data-root", type=Path, metavar="DIR", help="where to (default: $ISSL_DATA)")
    influence = commands.add_parser("influence", help="score your own images under your own encoder")
    if command == "influence":
        from issl.score import add_arguments

        add_arguments(influence)
    return top


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor instead of handing it back to the system.

    Each step allocates and frees the same large tensors; without this every one is mapped anew, page by
    page, which on virtual machines costs more than the arithmetic. Elsewhere than on glibc: no effect.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # malloc.h
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_max, 0)
        mallopt(m_arena_max, 1)  # a thread's own arena would map large tensors all the same


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; bad input ends in one line on stderr and exit code 2."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser(given[0] if given else None).parse_args(given)
    try:
        if options.command == "download":
            from issl.datasets import download

            print(download(options.name, options.data_root))
            return 0
        keep_freed_memory()
        if options.command == "influence":
            from issl.score import score

            return score(options)
        from issl.run import run

        return run(options.profile, options.only, options.data_root, options.device, options.out, options.again)
    except IsslError as error:
        print(f"issl: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("issl: stopped; run the same command again to go on from here", file=sys.stderr)
        return 130
