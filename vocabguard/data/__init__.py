"""Training data: readers, targets a trainer would ask for, coverage, replay and echo rows."""
