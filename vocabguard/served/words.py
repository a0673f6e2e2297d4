"""Which words a served model is asked for, and in which lists: without its tokenizer, words are what can be named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random
from typing import Any

import regex
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vocabguard.measure.sampling import sample_weights, stratified_sample
from vocabguard.vocabulary.table import VocabTable, build_table

_LETTERS = regex.compile(r"[\p{L}\p{M}]+")
# Scripts that put no blanks between words: of a run of letters some make a word.
_UNSPACED = regex.compile(r"\p{Han}|\p{Hiragana}|\p{Katakana}|\p{Thai}|\p{Lao}|\p{Khmer}|\p{Myanmar}")
_LONGEST, _PART = 24, 2


def words_of_texts(texts: Iterable[str]) -> list[str]:
    """Words of natural text, each once, in their order; of scripts without blanks pieces of two letters.

    >>> words_of_texts(["The cat, the hat.", "東京は大きい"])
    ['The', 'cat', 'the', 'hat', '東京', 'は大', 'きい']
    """
    found: dict[str, None] = {}
    for text in texts:
        for run in _LETTERS.findall(text):
            unspaced = _UNSPACED.search(run) is not None
            parts = [run[at : at + _PART] for at in range(0, len(run), _PART)] if unspaced else [run]
            found |= dict.fromkeys(part for part in parts if 1 < len(part) <= _LONGEST)
    return list(found)


def words_of_table(table: VocabTable) -> list[str]:
    """Texts of live tokens that are words by themselves, without blanks around them, each once.

    >>> from vocabguard.vocabulary.table import plain_table
    >>> words_of_table(plain_table(2))
    []
    """
    letters = (table.texts[token].strip() for token in table.live.nonzero().flatten().tolist())
    return list(dict.fromkeys(text for text in letters if 1 < len(text) <= _LONGEST and _LETTERS.fullmatch(text)))


def word_table(words: Sequence[str]) -> VocabTable:
    """A table of words by script group, a row for each; for what is said of tokens to be said of words.

    >>> table = word_table(["cat", "東京"])
    >>> [table.group_of(0), table.group_of(1)], table.text(1)
    (['latin', 'zh'], '東京')
    """
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}))
    fast: Any = PreTrainedTokenizerFast
    return build_table(fast(tokenizer_object=inner), len(words))


def chosen_words(words: Sequence[str], size: int, seed: int) -> tuple[list[str], Tensor]:
    """A sample in which small script groups are not lost, and how many words each stands for.

    >>> chosen_words(["cat", "hat", "東京"], size=9, seed=0)
    (['cat', 'hat', '東京'], tensor([1., 1., 1.]))
    """
    table = word_table(words)
    strata, every = table.group.long(), torch.ones(len(words), dtype=torch.bool)
    sample = stratified_sample(strata, every, size, seed)
    return [words[place] for place in sample.tolist()], sample_weights(strata, every, sample)


def word_lists(count: int, k: int, seed: int, ask: int) -> list[list[int]]:
    """Places of words in shuffled lists of k, the last one filled up with the first words; others in each ask.

    >>> lists = word_lists(5, k=3, seed=0, ask=0)
    >>> sorted({place for one in lists for place in one}), [len(one) for one in lists]
    ([0, 1, 2, 3, 4], [3, 3])
    """
    order = list(range(count))
    Random(f"{seed}/{ask}").shuffle(order)
    k = min(k, count)
    order += order[: -count % k]
    return [order[at : at + k] for at in range(0, len(order), k)]
