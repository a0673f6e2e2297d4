"""Two checkpoints side by side: scan, explain, repair."""
