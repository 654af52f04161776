"""The notebooks' own figures, one module per notebook: tables in, figure out."""
