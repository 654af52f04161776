"""RESULTS.md from the numbers in measured/: what was measured, where, and how to read it."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

HEAD = """# Benchmarks

Written by the programs in benchmarks/; do not edit. All methods of a table
ran in one process, taking turns batch by batch, so the ratios compare methods that met the same machine.
Seconds are this machine's. For influence, the ratio is the time over that of a plain forward and backward pass of the
same loss on the same images. The whole time is from the encoder to the scores; the median batch, for methods of one
pass, is the same without what comes before and after, and without the odd batch that the machine was busy elsewhere.
Forward and backward with respect to the data is what no method of this kind can save.

At width 64, an earlier version computed wide 3 x 3 convolutions by Winograd's algorithm: LoGra rank 16 took 0.62 times
a plain pass on one thread (512 images; 0.66 without). That kernel was removed: it only gained on one fp32 thread.
Convolutions no longer absorb the BatchNorm after them either: measured alone, that saved 1 to 2% of a LoGra rank 16
pass at widths 64 and 16, 3% at width 8, and 4% in bf16. LogIX at its default rank of 64 took 3.43 times a plain pass
then. From run to run the ratio of LoGra rank 16 varies: 0.68 and 0.70 on one thread, 0.73 twice on two.

LogIX and dattri have a LoGra, too. LogIX's caps its rank at a convolution's input channels, ignores dilation and
groups, and takes the second view as another call of each layer. dattri's LoGra and EK-FAC (0.3.0) hook Linear layers
alone, so a ResNet leaves them nothing to score; its TRAK is compared.
"""


Part = Mapping[str, Any]
# for each part: its title, a note, and its columns with templates of their cells; > before numbers
TIMINGS = (
    "ResNet-18, width {width}, {images} images of {data}",
    "",
    {
        "method": "{method}",
        ">whole time ÷ plain": "{ratio:.2f}",
        ">median batch ÷ plain": "{batch_ratio:.2f}",
        ">seconds": "{seconds:.0f}",
        "cannot": "{error}",
    },
)
TABLES = {
    "wide": TIMINGS,
    "wide-2": TIMINGS,
    "narrow": TIMINGS,
    "agreement": (
        "Agreement on a trained encoder",
        "SimCLR, ResNet-18 width {width}, trained by the {profile} profile; {images} images of "
        "{data}.",
        {"scores": "{a}", "and": "{b}", ">Spearman": "{spearman:.4f}"},
    ),
    "memory": (
        "Memory and time against the number of images",
        "ResNet-18 width {width}, LoGra rank 16, each row a process of its own.",
        {
            "gradients are": "{memory}",
            ">images": "{images:,}",
            ">seconds": "{s:.0f}",
            ">peak MB": "{peak_mb:.0f}",
            ">MB before the pass": "{before_mb:.0f}",
        },
    ),
    "pretraining": (
        "SimCLR pretraining, ResNet-18 width {width}, batches of {batch_size} images",
        "One step on {data}: two views of each image, forward, backward, update; {steps} steps each, "
        "in turns on one thread. The ratio is that of median steps.",
        {"loop": "{loop}", ">views/s": "{views_per_second:.0f}", ">× plain": "{ratio:.2f}"},
    ),
    "duplicates": (
        "Who finds duplicates?",
        "{images:,} images of CIFAR-10, {in_pairs} of them in pairs that people judged duplicates, "
        "under `{encoder}`.",
        {"by": "{by}", "average precision": "{precision}", "AUC": "{auc}"},
    ),
    "again": (
        "Released tables, made again from the encoders",
        "{done} of the {of} tables that the default run draws from, in {hours:.1f} hours of a core. "
        "Differences are relative to the larger of a number and its column's standard deviation.",
        {
            "kind": "{kind}",
            ">tables": "{table}",
            ">minutes": "{minutes:.0f}",
            ">largest difference": "{most:.0e}",
            ">lowest rank correlation": "{rank:.6f}",
        },
    ),
    "once": (
        "Measured once",
        "By hand, with the version of that day.",
        {"what": "{what}", "measured": "{measured}", "on": "{machine}", "day": "{date}"},
    ),
}
EPOCHS = (
    "Pretraining at width 64 (bf16, NHWC, batches of 256), an epoch of CIFAR-10",
    "",
    {
        "method": "{method}",
        "compiled": "{compiled}",
        ">images/s": "{images_per_second:,.0f}",
        ">seconds an epoch": "{epoch_seconds:.1f}",
        ">peak GB": "{peak_gb:.1f}",
    },
)
SMALL = (
    "Trainings as in the profile `overnight` (width 16, compiled), {at_once} at once on one GPU",
    "A process each; images a second, as the views grow to their full side.",
    {"method": "{method}", "images/s": "{images_per_second}"},
)
ON_A_GPU = {"small": SMALL, "pretraining": EPOCHS}


def keep(name: str, part: Part) -> None:
    """Write measured/NAME.json, and RESULTS.md from all parts."""
    measured = Path(__file__).with_name("measured")
    measured.mkdir(exist_ok=True)
    (measured / f"{name}.json").write_text(json.dumps(part, indent=1) + "\n")
    write_report(measured, measured.with_name("RESULTS.md"))


def write_report(results: Path, out: Path) -> None:
    """Write RESULTS.md from the parts that have been measured."""
    text = HEAD
    for name, table in TABLES.items():
        if (path := results / f"{name}.json").is_file():
            text += _section(json.loads(path.read_text()), *table)
    if (path := results / "gpu.json").is_file():
        for name, part in json.loads(path.read_text()).items():
            table = ON_A_GPU.get(name, (f"On a GPU: {name}", _facts(part), {}))
            text += _section(part, *table)
    out.write_text(text)


def _section(part: Part, title: str, text: str, columns: Mapping[str, str]) -> str:
    lines = [f"\n## {title.format(**part)}\n", text.format(**part) + "\n"]
    rows = [[_cell(c, row) for c in columns.values()] for row in part["rows"]] if columns else []
    said = [any(cells) for cells in zip(*rows, strict=True)]  # empty columns are dropped
    names = [name for name, some in zip(columns, said, strict=True) if some]
    if names:
        lines.append(f"| {' | '.join(n.removeprefix('>') for n in names)} |")
        lines.append(f"|{'|'.join('---:' if n[0] == '>' else '---' for n in names)}|")
    for row in rows:
        cells = [cell for cell, some in zip(row, said, strict=True) if some]
        lines.append(f"| {' | '.join(cells)} |")
    if part.get("shares"):
        lines.append(f"\nOf LoGra rank 16's time: {_rounded(part['shares'])}.")
    if part.get("errors"):
        lines.append(f"\nCould not be run: {_rounded(part['errors'])}.")
    peers = f"; {part['peers']}" if part["peers"] else ""
    about = f"{part['machine']}, torch {part['torch']}, Python {part['python']}{peers}"
    return "\n".join([*lines, f"\n_{part['date']}, {about}._\n"]).replace("\n\n\n", "\n\n")


def _cell(template: str, row: Part) -> str:
    """The text of a cell; empty if a number that it needs was not measured."""
    missing = any(f"{{{k}" in template for k, v in row.items() if v is None)
    return "" if missing else template.format(**row)


def _facts(part: Part) -> str:
    """Everything in a part except where, when and with what it was measured."""
    known = {k: v for k, v in part.items() if k not in machine("")}
    return "\n".join(f"- {k.replace('_', ' ')}: {_rounded(v)}" for k, v in known.items())


def _rounded(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_rounded(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine(peers: str, threads: int = 1) -> dict[str, str]:
    """Where and with what it was measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    told = (line.split(":")[1].strip() for line in lines if "model name" in line)
    many = "one thread" if threads == 1 else f"{threads} threads"
    return {
        "machine": f"{next(told, '?')} ({platform.machine()}), {many}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "peers": peers,
        "date": time.strftime("%Y-%m-%d"),
    }
