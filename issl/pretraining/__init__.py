"""Training an encoder: network, recipes, objectives and the loop. It knows nothing of influence."""
