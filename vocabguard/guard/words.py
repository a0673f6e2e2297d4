"""The watch list: words of one or several tokens, by text or by id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vocabguard.config import ConfigError
from vocabguard.vocabulary.table import resolve_token


@dataclass(frozen=True)
class WatchedWord:
    """An entry of the watch list: its text, or its id as text, and the ids of its tokens."""

    text: str
    ids: tuple[int, ...]


def watched_words(tokenizer: Any, watch: Sequence[int | str], rows: int) -> tuple[WatchedWord, ...]:
    """The watch list, each entry once.

    Raises:
        ConfigError: for an entry that is neither an id of the vocabulary nor a text.
    """
    words: dict[tuple[int, ...], WatchedWord] = {}
    for item in watch:
        if isinstance(item, bool) or not isinstance(item, (int, str)) or item == "":
            raise ConfigError(f"probe.watch holds {item!r}; allowed: token ids, and texts of one or several tokens")
        word = _word(tokenizer, item, rows)
        words.setdefault(word.ids, word)
    return tuple(words.values())


def _word(tokenizer: Any, item: int | str, rows: int) -> WatchedWord:
    try:
        return WatchedWord(str(item), (resolve_token(tokenizer, item, rows),))
    except ValueError as error:
        ids = [] if isinstance(item, int) else tokenizer.encode(item, add_special_tokens=False)
        if not ids or tokenizer.unk_token_id in ids or max(ids) >= rows:
            raise ConfigError(f"probe.watch: {error}") from error
        return WatchedWord(str(item), tuple(ids))


def watched_ids(tokenizer: Any, watch: Sequence[int | str], rows: int) -> Tensor:
    """(w,) int64 ids of all tokens of the watch list.

    Raises:
        ConfigError: for an entry that is neither an id of the vocabulary nor a text.
    """
    ids = [token for word in watched_words(tokenizer, watch, rows) for token in word.ids]
    return torch.tensor(list(dict.fromkeys(ids)), dtype=torch.int64)
