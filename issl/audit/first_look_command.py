"""The first look of a run: real photos under a released encoder, where CIFAR-10 is found, before
all else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from issl.audit.cache import Artifacts
from issl.audit.data.usual_places import Place, find_cifar10
from issl.audit.first_look import FirstLook
from issl.audit.notebooks import fingerprint, is_current, note_made
from issl.audit.profiles import ProfileOptions
from issl.devices import device_name
from issl.errors import IsslError
from issl.files import PACKAGE

PLOTS = PACKAGE / "audit" / "plots" / "first_look.py"


@dataclass(frozen=True)
class Found:
    """A first look that can be made: its plan, and where its photos are."""

    plan: FirstLook
    place: Place


def find(options: ProfileOptions) -> tuple[Found | None, list[str]]:
    """The first look of this run, or None; and what the reader should know about it, in lines.

    Only profiles with an entry `first_look` have one, where all their notebooks are run. What
    stands in its way is said and ends nothing.
    """
    fields = options.first_look()
    if fields is None:
        return None, []
    if options.from_scratch:
        return None, [
            "first look: left out, for it shows an encoder that comes with the repository (--from-scratch)"
        ]
    wanted, root = FirstLook(**fields), None if options.root is None else Path(options.root)
    try:
        place, wrong = find_cifar10(root, wanted.n)
        lines = [f"first look: not at {text}" for text in wrong]
        if place is None:
            more = "" if wrong else "no CIFAR-10 in the usual places (docs/data.md); "
            get = "`issl download cifar10 --data-root DIR`, and the same run with --data-root DIR"
            return None, [
                *lines,
                f"first look: left out, {more}for real photos before all else: {get}",
            ]
        plan = FirstLook(
            **fields
            | {"dataset": place.dataset, "data_root": str(place.root) if place.root else None}
        )
        plan.pretrain()  # is the encoder there?
    except IsslError as error:
        return None, [f"first look: left out, {error}"]
    return Found(plan, place), [*lines, f"first look: CIFAR-10 at {place.folder} ({place.layout})"]


def show(found: Found, artifacts: Artifacts, again: bool) -> tuple[Path, str]:
    """Draw the picture from its scores, which are there, unless it is current; returns where it is,
    and what is seen (nothing new in a current one)."""
    plan = found.plan
    key = fingerprint(PLOTS, plan, device_name(artifacts.device))
    picture = plan.figures / f"{plan.notebook}.png"
    if not again and is_current(plan.notebook, plan, key):
        return picture, ""
    import matplotlib.pyplot as plt  # slow to import, as are these two

    from issl.audit import figures
    from issl.audit.plots import first_look as plots

    images, scores = plan.data().load(), plan.scores().read(artifacts)
    ranked = plots.table(scores, images)
    sentences, encoder = plots.seen(ranked, plan.shown), plan.encoder_in_words()
    figures.style(screen=False)
    figure = plots.draw(ranked, images, plan.shown, encoder, sentences)
    about = {"encoder": encoder, "images": plan.n, "layout": found.place.layout, "seen": sentences}
    figures.save(figure, plan.notebook, ranked, plan.figures, plan.source(artifacts) | about)
    plt.close(figure)
    plan.results.mkdir(parents=True, exist_ok=True)
    note_made(plan.notebook, plan, key)
    return picture, sentences[0]
