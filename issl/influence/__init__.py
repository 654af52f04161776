"""The score: perturbation, per-example gradients, curvature. `reference` computes it directly from
the formula."""
