"""Rows of the vocabulary matrices: where they are in a model or a checkpoint, read chunk by chunk."""
