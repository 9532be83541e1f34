"""Named experiments, and sweeps: many runs that answer one question in a table."""
