from checkpoint_kit import kit

__all__ = ["kit"]
