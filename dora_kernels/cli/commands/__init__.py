"""A file for each command: `add` declares its arguments, `run` runs it."""
