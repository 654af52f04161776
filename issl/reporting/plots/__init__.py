"""The notebooks' own figures, one module a notebook: tables in, a figure out."""
