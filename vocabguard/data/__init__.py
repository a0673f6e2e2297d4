"""Training data: readers, the targets that a trainer makes of them, coverage, replay and echo rows."""
