"""Training an encoder: network, recipes, objectives, and the loop. Knows nothing of influence."""
