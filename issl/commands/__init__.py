"""The command line: one module per command. `add_arguments` adds its options; `main` runs it, and
raises IsslError for bad input before any long work."""
