"""Which of the tokens that matter are never a target of the run's data, said before step 1."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from torch import nn

from vocabguard.config import ConfigError
from vocabguard.data.named import added_tokens, end_tokens, named_sentences
from vocabguard.guard.words import WatchedWord, watched_words
from vocabguard.results import NotApplicable, Preflight
from vocabguard.rows.models import core_of, text_config_of
from vocabguard.text import data_read


def named_notes(
    model: nn.Module, tokenizer: Any, flight: Preflight | NotApplicable, watch: Sequence[Any], *, protected: bool
) -> tuple[str, ...]:
    """A sentence each on end tokens, added tokens and watched words without a target.

    Args:
        model: one that generates text.
        watch: the watch list, ids and texts.
        protected: whether echo repeats tokens in this run.
    """
    if isinstance(flight, NotApplicable) or not hasattr(tokenizer, "added_tokens_decoder"):
        return ()
    generation = getattr(core_of(model), "generation_config", None)
    counts = flight.data_target
    try:
        found = watched_words(tokenizer, watch, len(counts))
        words = {_shown(tokenizer, word): word.ids for word in found}
    except ConfigError:  # of a list that nothing uses in this run: where something does, it was refused before
        words = {}
    return named_sentences(
        counts, tokenizer, end_tokens(tokenizer, getattr(generation, "eos_token_id", None)), data_read(flight),
        added=added_tokens(tokenizer, base_rows(model)), words=words, protected=protected,
    )  # fmt: skip


def _shown(tokenizer: Any, word: WatchedWord) -> str:
    """A word as its text, also where the watch list has its id."""
    return f"{tokenizer.decode(list(word.ids))} ({word.text})" if word.text == str(word.ids[0]) else word.text


def base_rows(model: nn.Module) -> int | None:
    """Rows that the vocabulary had in the checkpoint that the model was loaded from; None where it is not on disk."""
    name = getattr(text_config_of(core_of(model)), "name_or_path", None) or getattr(
        getattr(core_of(model), "config", None), "name_or_path", None
    )
    if not name:
        return None
    path = Path(str(name)) / "config.json"
    try:
        found = path if path.is_file() else try_to_load_from_cache(str(name), "config.json")
        told = json.loads(Path(found).read_text(encoding="utf-8")) if isinstance(found, (str, Path)) else {}
    except (ValueError, OSError):  # a name that is none of the hub's, or a file that is no JSON
        return None
    rows = told.get("vocab_size", told.get("text_config", {}).get("vocab_size"))
    return rows if isinstance(rows, int) else None
