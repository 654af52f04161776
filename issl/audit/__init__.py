"""The audit of the paper's claims: stages, plans, claims and their verdicts, figures and the
report."""
