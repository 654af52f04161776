"""What the audit adds to data sets: labels of ours, injected images, people's choices."""
