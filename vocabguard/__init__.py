"""See and prevent the forgetting of sparse tokens while a language model is fine-tuned."""
