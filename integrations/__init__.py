"""Thin adapters: one callback for Hugging Face `Trainer`, one for Lightning."""
