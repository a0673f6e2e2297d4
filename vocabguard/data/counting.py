"""How often each token is a target of a few examples: pure functions of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from itertools import islice
from operator import add

import numpy as np
from numpy.typing import NDArray

from vocabguard.data.encode import Batch, TargetEncoder
from vocabguard.data.readers import Completion, Example, Text, TokenRows
from vocabguard.data.render import TurnTally

CHUNK = 512
"""Examples that are encoded at once, fewer where they are long."""

_LONG, _MOST_ROWS = 2**19, 8192  # characters, or token ids, and rows that are encoded at once


@dataclass(frozen=True)
class RowTally:
    """Rows that were read, in one pass.

    Attributes:
        without_targets: those without a target, e.g. since their answer was cut off; a trainer may drop them.
        cut: those that were longer than the longest allowed.
        turns_exact: assistant turns found exactly, where the template does not mark them; see `TurnTally`.
        turns_by_text: found by their text.
        turns_missing: not found, so that they count as no target.
        turns_silent: out of the loss by ``weight: 0`` or ``train: false``.
        chats_marked: conversations whose template marks the assistant's text.
        chats_trl: conversations encoded with TRL's training template.
        calls_lost: turns whose tool calls the template does not write.
    """

    rows: int = 0
    without_targets: int = 0
    cut: int = 0
    turns_exact: int = 0
    turns_by_text: int = 0
    turns_missing: int = 0
    turns_silent: int = 0
    chats_marked: int = 0
    chats_trl: int = 0
    calls_lost: int = 0

    @property
    def conversations(self) -> bool:
        """Whether the assistant's turns of any conversation were looked for."""
        return any((self.chats_marked, self.chats_trl, self.turns_exact, self.turns_by_text, self.turns_missing))

    def __add__(self, other: RowTally) -> RowTally:
        return RowTally(*(getattr(self, spec.name) + getattr(other, spec.name) for spec in fields(self)))


Sequences = tuple[tuple[int, ...], ...]
"""The ways in which a word is encoded."""


@dataclass(frozen=True, eq=False)
class Counted:
    """Counts of a few examples.

    Attributes:
        ids: (n,) int64, those that occur.
        counts: (2, n) int64, how often each is a target and an input.
        rows: what was counted.
        words: (k, 2) int64, how often each word is a target, whole, and an input.
    """

    ids: NDArray[np.int64]
    counts: NDArray[np.int64]
    rows: RowTally
    words: NDArray[np.int64]

    def add_to(self, counts: NDArray[np.int64]) -> None:
        """Add to (2, V) int64 counts."""
        counts[:, self.ids] += self.counts


def sum_counted(parts: Sequence[Counted]) -> Counted:
    """The counts of several parts together; at least one."""
    total = np.zeros((2, 1 + max((int(part.ids[-1]) for part in parts if len(part.ids)), default=-1)), dtype=np.int64)
    for part in parts:
        part.add_to(total)
    ids = np.flatnonzero(total[1])
    rows = reduce(add, (part.rows for part in parts))
    return Counted(ids, total[:, ids], rows, np.sum([part.words for part in parts], axis=0))


def count_rows(encoder: TargetEncoder, examples: Sequence[Example], words: Sequence[Sequences] = ()) -> Counted:
    """Counts of a few examples: a pure function of them, for `datasets.map(batched=True)` and the like.

    Args:
        examples: at least one.
        words: the ways in which words of several tokens are encoded, to be counted too.

    Raises:
        DataError: for an example that cannot be used.
    """
    sources = encoder.render(examples)
    return count_batches(encoder.batches(sources), encoder.renderer.take_tally(), words)


def count_batches(batches: Sequence[Batch], turns: TurnTally, words: Sequence[Sequences]) -> Counted:
    """Counts of the batches of a few examples."""
    # Counting into a vector is linear; sorting the ids, as `numpy.unique` does, took as long as the tokenizer.
    counts = [(seen := np.bincount(batch.ids), _asked(batch, seen)) for batch in batches]
    read, asked = (sum_counts([pair[side] for pair in counts]) for side in (0, 1))
    ids = np.flatnonzero(read)
    cut = sum(int(batch.cut.sum()) for batch in batches)
    rows, without = sum(batch.count for batch in batches), sum(batch.without_targets for batch in batches)
    tally = RowTally(
        rows,
        without,
        cut,
        turns.exact,
        turns.by_text,
        turns.missing,
        turns.silent,
        turns.marked,
        turns.trl,
        turns.calls_lost,
    )
    of_words = [
        [sum(counts) for counts in zip(*(_occurrences(batch, ways) for batch in batches), strict=True)]
        for ways in words
    ]
    return Counted(ids, np.stack([asked[ids], read[ids]]), tally, np.array(of_words, dtype=np.int64).reshape(-1, 2))


def _asked(batch: Batch, read: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each id is a target, by the fewer of those that are and those that are not."""
    if batch.asked is None:
        return read - np.bincount(batch.ids[batch.firsts], minlength=len(read))
    few = 2 * np.count_nonzero(batch.target) < len(batch.target)
    found = np.bincount(batch.ids[batch.target if few else ~batch.target], minlength=len(read))
    return found if few else read - found


def _occurrences(batch: Batch, ways: Sequences) -> tuple[int, int]:
    """How often a word is a target, all of it, and how often it is read."""
    starts = np.zeros(len(batch.ids) + 1, dtype=np.bool_)
    starts[np.cumsum(batch.lengths)] = True
    targets = inputs = 0
    for way in ways:
        at = np.flatnonzero(batch.ids[: max(0, len(batch.ids) - len(way) + 1)] == way[0])
        asked = batch.target[at]
        for place, token in enumerate(way[1:], start=1):
            same = (batch.ids[at + place] == token) & ~starts[at + place]
            at, asked = at[same], asked[same] & batch.target[at[same] + place]
        targets, inputs = targets + int(asked.sum()), inputs + len(at)
    return targets, inputs


def sum_counts(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The sum of vectors of which some are shorter.

    >>> sum_counts([np.array([1, 2]), np.array([5])]).tolist()
    [6, 2]
    """
    total = np.zeros(max(map(len, parts), default=0), dtype=np.int64)
    for part in parts:
        total[: len(part)] += part
    return total


def chunks_of(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """The examples, as many at a time as are encoded at once: no more than memory has room for."""
    remaining, size, chunk, weight = iter(examples), 1, list[Example](), 0
    while part := list(islice(remaining, size)):
        chunk += part
        of_part = _weight(part)
        weight += of_part
        # A few at first: how long they are is not known before they are read.
        size = max(1, min(2 * size, CHUNK, _LONG * len(part) // (4 * of_part + 1)))
        if weight >= _LONG or len(chunk) >= (_MOST_ROWS if of_part else CHUNK):
            yield chunk
            chunk, weight = [], 0
    if chunk:
        yield chunk


def _weight(examples: Sequence[Example]) -> int:
    """Characters or token ids; 0 of examples that are not measured."""
    kinds = set(map(type, examples))
    if kinds == {Text}:
        return sum([len(example.text) for example in examples])  # type: ignore[union-attr, misc]
    if kinds == {TokenRows}:
        return sum([len(example.ids) for example in examples])  # type: ignore[union-attr, misc]
    if kinds == {Completion}:
        return sum([len(example.prompt) + len(example.completion) for example in examples])  # type: ignore[union-attr, misc]
    return sum(len(getattr(example, "text", "")) for example in examples)
