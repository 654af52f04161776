"""An experiment declared: settings, stages and their cache, a plan for each notebook, the claims and their tests."""
