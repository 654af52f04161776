"""All plans by the name of their notebook."""

from __future__ import annotations

from issl.audit.plan import Plan
from issl.audit.plans_own import OWN
from issl.audit.plans_paper import PAPER

PLANS: dict[str, type[Plan]] = {
    p.notebook: p for p in sorted(PAPER + OWN, key=lambda p: p.notebook)
}
