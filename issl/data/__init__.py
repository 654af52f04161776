"""Images: data sets, drawn scenes, injected duplicates and atypical images, and augmented views."""
