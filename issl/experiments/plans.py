"""All plans by the name of their notebook."""

from __future__ import annotations

from issl.experiments.explorer import Explorer
from issl.experiments.plan import Plan
from issl.experiments.plans_own import OWN
from issl.experiments.plans_paper import PAPER

PLANS: dict[str, type[Plan]] = {p.notebook: p for p in sorted(PAPER + OWN, key=lambda p: p.notebook)}
EXPLORER = Explorer  # of the report
