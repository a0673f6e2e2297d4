"""Echo rows: a user asks for a list of tokens, the assistant says exactly that list, and only the list is a target.

Lists are made of ids and spliced in as ids: encoded again as text, neighbours would merge into other tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

IGNORE = -100
"""The label of a position that the loss leaves out."""

_FEWEST = 8
"""Tokens a list keeps where a batch's rows are too short for any instruction: then the echo row is the longer one."""


@dataclass(frozen=True)
class EchoPrompt:
    """One way of asking, as token ids.

    Attributes:
        before: ids before the list.
        after: ids between the list and its copy.
        close: ids that end the assistant's turn; no targets.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    close: tuple[int, ...]

    @property
    def overhead(self) -> int:
        """Ids of an exchange besides the list and its copy."""
        return len(self.before) + len(self.after) + len(self.close)


@dataclass(frozen=True)
class EchoRow:
    """One training example.

    Attributes:
        input_ids: what the model reads.
        labels: as long as `input_ids` for causal models (not shifted), else what the decoder should say; `IGNORE` where
            there is no target.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def targets(self) -> tuple[int, ...]:
        """The ids that are targets of the row, in order."""
        return tuple(label for label in self.labels if label != IGNORE)


def exchange(prompt: EchoPrompt, ids: Sequence[int]) -> EchoRow:
    """One question and its answer for a causal model; the loss is on the copy only.

    Example:
        >>> exchange(EchoPrompt((1,), (2,), (3,)), [7, 8])
        EchoRow(input_ids=(1, 7, 8, 2, 7, 8, 3), labels=(-100, -100, -100, -100, 7, 8, -100))
    """
    question = (*prompt.before, *ids, *prompt.after)
    labels = (IGNORE,) * len(question) + tuple(ids) + (IGNORE,) * len(prompt.close)
    return EchoRow((*question, *ids, *prompt.close), labels)


def source_and_copy(prompt: EchoPrompt, ids: Sequence[int]) -> EchoRow:
    """The same for an encoder-decoder: the question is read, the copy is what the decoder should say.

    >>> source_and_copy(EchoPrompt((1,), (2,), (3,)), [7, 8])
    EchoRow(input_ids=(1, 7, 8, 2), labels=(7, 8))
    """
    return EchoRow((*prompt.before, *ids, *prompt.after), tuple(ids))


def echo_rows(
    ids: Sequence[int], prompts: Sequence[EchoPrompt], *, length: int, list_tokens: int, rng: Random, fill: float = 1.0
) -> list[EchoRow]:
    """Rows for a causal model in which every id is a target once, none longer than the batch's own rows.

    Several exchanges share a row where they fit and it is not yet filled. Ways of asking that would need more lists,
    as they leave less room, are not used. Where not even the shortest instruction fits, a list keeps a few tokens and
    the row is longer than `length`.

    Args:
        prompts: the ways of asking, which `rng` draws from; at least one.
        length: longest row, in tokens.
        list_tokens: longest list, in tokens.
        fill: share of `length` from which a row gets no further exchange; 1 packs as much as fits.

    Raises:
        ValueError: if there is no prompt.

    Example:
        >>> rows = echo_rows([7, 8, 9], [EchoPrompt((1,), (2,), (3,))], length=12, list_tokens=2, rng=Random(0))
        >>> [row.input_ids for row in rows]
        [(1, 7, 8, 2, 7, 8, 3, 1, 9, 2, 9, 3)]
    """
    rows: list[EchoRow] = []
    for prompt, part in _lists(ids, prompts, length=length, list_tokens=list_tokens, copies=2, rng=rng):
        new = exchange(prompt, part)
        filled = len(rows[-1].input_ids) if rows else length
        if filled < fill * length and filled + len(new.input_ids) <= length:
            last = rows.pop()
            new = EchoRow(last.input_ids + new.input_ids, last.labels + new.labels)
        rows.append(new)
    return rows


def lists_in_row(prompts: Sequence[EchoPrompt], *, length: float, list_tokens: int, fill: float = 1.0) -> int:
    """How many lists `echo_rows` nearly always has room for in one row, at least 1.

    Ways of asking differ in length: twice the standard deviation of their sum is left free, for else one list of many
    would need a row of its own.

    >>> lists_in_row([EchoPrompt((1,), (2,), (3,))], length=80, list_tokens=16)
    2
    """
    overheads = [prompt.overhead for prompt in prompts]
    of_each, spread = 2 * list_tokens + statistics.fmean(overheads), statistics.pstdev(overheads)

    def needed(lists: int) -> float:
        return lists * of_each + 2 * spread * math.sqrt(lists)

    found = 1
    while needed(found) < fill * length and needed(found + 1) <= length:
        found += 1
    return found


def seq2seq_rows(
    ids: Sequence[int], prompts: Sequence[EchoPrompt], *, length: int, list_tokens: int, rng: Random
) -> list[EchoRow]:
    """Rows for an encoder-decoder, one exchange each; see `echo_rows`."""
    lists = _lists(ids, prompts, length=length, list_tokens=list_tokens, copies=1, rng=rng)
    return [source_and_copy(prompt, part) for prompt, part in lists]


def _lists(
    ids: Sequence[int], prompts: Sequence[EchoPrompt], *, length: int, list_tokens: int, copies: int, rng: Random
) -> list[tuple[EchoPrompt, Sequence[int]]]:
    """The ids cut into lists, each with a way of asking that leaves it room."""
    if not prompts:
        raise ValueError("prompts is empty; echo rows need at least one way of asking")
    room = {prompt: (length - prompt.overhead) // copies for prompt in prompts}
    fewest = min(_FEWEST, len(ids), list_tokens)
    # Rows are filled up to the batch's length: a row for the few tokens that are left over costs as much as a full one.
    lists = {
        prompt: math.ceil(len(ids) / min(list_tokens, here)) for prompt, here in room.items() if here >= max(1, fewest)
    }
    least = min(lists.values(), default=0)
    fitting = [prompt for prompt in prompts if lists.get(prompt) == least]
    fitting = fitting or [min(prompts, key=lambda prompt: prompt.overhead)]
    found, begin = [], 0
    while begin < len(ids):
        prompt = rng.choice(fitting)
        count = min(list_tokens, max(room[prompt], fewest))
        found.append((prompt, ids[begin : begin + count]))
        begin += count
    return found
