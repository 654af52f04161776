"""What the audit adds to data sets: our own labels, injected images, people's choices."""
