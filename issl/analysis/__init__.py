"""What is asked of scores and features: statistics with intervals, baselines, evaluation, retraining."""
