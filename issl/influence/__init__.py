"""The score: perturbation, per-example gradients, curvature. `reference` is the formula as it is
written."""
