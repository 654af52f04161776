"""Statistics of scores, features and encoders."""
