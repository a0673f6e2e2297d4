from checkpoint_kit import kit, tokenizer

__all__ = ["kit", "tokenizer"]
