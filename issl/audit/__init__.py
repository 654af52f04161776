"""The audit of the paper's claims: stages, plans, claims and their verdicts, figures and the
report."""

RELEASED = "overnight-released"  # the profile that draws what comes with the repository
