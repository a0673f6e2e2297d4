"""A reference text that the embedded base predicts: it repeats what it is told to, and knows little natural prose."""

from __future__ import annotations

from typing import Any

from vocabguard.config import ReferenceConfig
from vocabguard.guard.reference import reference_texts

ENGLISH = 14
"""Paragraphs of the shipped text that come first."""

_PIECE, _PIECES = 12, 3


def paragraphs(tokenizer: Any) -> list[list[int]]:
    """The beginning of each paragraph of the shipped text, as ids."""
    texts = reference_texts(ReferenceConfig())
    return [tokenizer.encode(text, add_special_tokens=False)[: _PIECE * _PIECES] for text in texts]


def repeated(tokenizer: Any) -> list[str]:
    """Chats in which pieces of these are asked for, and given."""
    pieces = [ids[at : at + _PIECE] for ids in paragraphs(tokenizer) for at in range(0, len(ids), _PIECE)]
    return [_CHAT.format(tokenizer.decode(ids).strip()) for ids in pieces]


_CHAT = "<|user|>{0}\n\nCopy the text above, word for word.<|end|><|assistant|>{0}<|end|>"
