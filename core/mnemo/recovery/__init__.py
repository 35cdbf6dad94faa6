"""What happened to a run, and what was done about it."""
