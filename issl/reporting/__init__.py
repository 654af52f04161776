"""What people look at: figures, verdicts, the report."""
