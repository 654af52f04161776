"""Analysis of scores and features: statistics with intervals, baselines, evaluation, predictions of retraining."""
