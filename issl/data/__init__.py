"""Images: where they come from (data sets, drawn scenes), what is put into them, and their augmented views."""
