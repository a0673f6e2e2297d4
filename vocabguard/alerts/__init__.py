"""Rules over logged keys, the machine that follows them, and where transitions go."""
