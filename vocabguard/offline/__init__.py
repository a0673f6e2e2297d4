"""Before and after training: the same numbers from files, without a trainer."""
