"""Echo rows joined to the examples of a batch, before the user's own collate function makes tensors of them.

Rows appended as *examples* come out right whatever the collator does: it pads, packs or flattens them like the data's.
What it does to labels is put right afterwards, and a private key tells echo from data.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from random import Random
from typing import Any

import torch
from torch import Tensor

from vocabguard.protect.feed import EchoFeed
from vocabguard.protect.rows import IGNORE, EchoPrompt, EchoRow, echo_rows, lists_in_row, seq2seq_rows
from vocabguard.results import VocabGuardError

ECHO_KEY = "vocabguard_echo"
"""Key of a batch's echo mask: (B,) bool, or (1, T) where the collator joins all rows into one."""

logger = logging.getLogger("vocabguard")


class EchoError(VocabGuardError, ValueError):
    """Echo would be wrong here; the message says why."""


class RowMaker:
    """Makes a batch's echo rows: a function of the ids, the seed, the process and the batch's number and length.

    See `echo_rows` for the arguments; `seq2seq` is whether the model is an encoder-decoder.
    """

    def __init__(
        self, prompts: Sequence[EchoPrompt], *, list_tokens: int, fill: float = 1.0, seed: int, seq2seq: bool = False
    ) -> None:
        self.list_tokens, self.seq2seq = list_tokens, seq2seq
        self._prompts, self._fill, self._seed = tuple(prompts), fill, seed

    def lists_in_row(self, length: float) -> int:
        """How many lists a row of `length` tokens holds."""
        if self.seq2seq:
            return 1
        return lists_in_row(self._prompts, length=length, list_tokens=self.list_tokens, fill=self._fill)

    def __call__(self, ids: Sequence[int], *, batch: int, rank: int, length: int) -> list[EchoRow]:
        """Rows that ask for all `ids`, none longer than `length` if an instruction fits."""
        rng = Random(f"{self._seed} {rank} {batch}")
        if self.seq2seq:
            return seq2seq_rows(ids, self._prompts, length=length, list_tokens=self.list_tokens, rng=rng)
        return echo_rows(ids, self._prompts, length=length, list_tokens=self.list_tokens, rng=rng, fill=self._fill)


class EchoCollator:
    """Wraps a collate function: examples and echo rows in, a batch with `ECHO_KEY` out.

    Examples may come as lists of those that are packed into one row: each echo row is then such a list.

    A batch that gets no echo rows passes through untouched. If a batch cannot take echo rows it goes on without them,
    and echo is off from then on: a run is never ended.

    Args:
        joined: the collate function is known to join all rows into one, so none needs to be filled up.
    """

    def __init__(
        self, inner: Callable[[list[Any]], Any], feed: EchoFeed, maker: RowMaker, *, joined: bool = False
    ) -> None:
        self.inner, self.feed, self.maker, self._joined = inner, feed, maker, joined

    def __call__(self, features: list[Any]) -> Any:
        """Collate one batch."""
        number = self.feed.next_batch()
        ids = self.feed.ids(number)
        if not ids:
            return self.inner(features)
        try:
            return self.with_echo(features, ids, number)
        except Exception as error:
            self.feed.fail()
            # A collate function's own error may be a mere key.
            reason = str(error) if isinstance(error, EchoError) else f"{type(error).__name__}: {error}"
            logger.warning("vocabguard: echo is off from batch %d on, training goes on: %s", number, reason)
            return self.inner(features)

    def with_echo(self, features: list[Any], ids: Sequence[int], number: int) -> Any:
        """A batch with echo rows, as far as the dose's limit lets it have them; the examples are not changed.

        An `EchoError` says that the examples or the batch cannot take such rows.
        """
        batch = self._collated(features, ids, number)
        # The targets of the data are known only now: collate functions make labels of their own.
        asked = data_targets(batch["labels"], seq2seq=self.maker.seq2seq, echo_mask=batch[ECHO_KEY])
        room = self.feed.room(number, asked)
        if len(ids) <= room:
            return batch
        return self._collated(features, ids[:room], number) if room else self.inner(features)

    def _collated(self, features: list[Any], ids: Sequence[int], number: int) -> Any:
        """The examples and the rows of all `ids` in one batch."""
        began = time.perf_counter()
        like, length = _first(features), max(_lengths(features))
        rows = self.maker(ids, batch=number, rank=self.feed.rank, length=length)
        stacked = _all_as_long(features, length) and not (self.maker.seq2seq or self._joined)
        fill = length if stacked else 0
        nested = isinstance(features[0], list)
        extra = [_as_example(row, like, fill) for row in rows]
        made = time.perf_counter()
        # Some collate functions take keys out of the examples, which are needed once more if this fails.
        kept = [[*map(copy, pack)] for pack in features] if nested else [*map(copy, features)]
        batch = self.inner([*kept, *([row] for row in extra)] if nested else [*kept, *extra])
        collated = time.perf_counter()
        batch[ECHO_KEY] = _mark(batch, len(features), rows, fill, seq2seq=self.maker.seq2seq)
        self.feed.spend(time.perf_counter() - collated + made - began)
        return batch


def data_targets(labels: Tensor, *, seq2seq: bool, echo_mask: Tensor | None = None) -> int:
    """How many targets of a batch, with (B, T) labels, are the data's.

    Args:
        seq2seq: whether labels stand apart from inputs; else nothing predicts a row's first label.
        echo_mask: (B,) bool, or (1, T) where all rows are joined into one; None where there are no echo rows yet.

    Example:
        >>> labels = torch.tensor([[5, 6, IGNORE], [8, 9, 9]])
        >>> data_targets(labels, seq2seq=False, echo_mask=torch.tensor([False, True]))  # only 6: nothing predicts 5
        1
    """
    asked = labels != IGNORE
    if echo_mask is not None:
        asked &= ~(echo_mask if echo_mask.ndim == 2 else echo_mask[:, None])
    return int((asked if seq2seq else asked[:, 1:]).sum())


def _first(features: list[Any]) -> Mapping[str, Any]:
    """An example that echo rows are made like."""
    first = features[0][0] if isinstance(features[0], list) and features[0] else features[0]
    if not isinstance(first, Mapping) or "input_ids" not in first:
        got = f"the keys {sorted(first)}" if isinstance(first, Mapping) else type(first).__name__
        raise EchoError(f"an example holds {got}; echo rows need examples with 'input_ids'")
    return first


def _lengths(features: list[Any]) -> list[int]:
    """Tokens of each row: of an example, or of all that are packed into it."""
    packs = (one if isinstance(one, list) else [one] for one in features)
    return [sum(len(example["input_ids"]) for example in pack) for pack in packs]


def _all_as_long(features: list[Any], length: int) -> bool:
    """Whether the rows are of one length, so that the collator may not pad at all."""
    return all(one == length for one in _lengths(features))


def _as_example(row: EchoRow, like: Mapping[str, Any], fill: int) -> dict[str, Any]:
    """The row with the keys of the data's examples that mean something for it, filled up to their common length."""
    size = len(row.input_ids)
    spare = max(0, fill - size)
    target = [int(label != IGNORE) for label in row.labels]
    known: dict[str, list[int]] = {
        "input_ids": [*row.input_ids, *[0] * spare],
        "labels": [*row.labels, *[IGNORE] * (spare if len(row.labels) == size else 0)],
        "attention_mask": [1] * size + [0] * spare,
        "position_ids": list(range(size + spare)),
        "completion_mask": target + [0] * spare,
        "assistant_masks": target + [0] * spare,
        "seq_lengths": [size + spare],
        "token_type_ids": [0] * (size + spare),
        "special_tokens_mask": [0] * (size + spare),
    }
    found: dict[str, Any] = {key: _like(values, like[key]) for key, values in known.items() if key in like}
    return found | ({"length": size + spare} if isinstance(like.get("length"), int) else {})


def _like(values: list[int], example: Any) -> Any:
    return torch.tensor(values, dtype=example.dtype) if isinstance(example, Tensor) else values


def _mark(batch: Any, count: int, rows: Sequence[EchoRow], fill: int, *, seq2seq: bool) -> Tensor:
    """Put the labels of the echo rows, which follow `count` examples, right, in place.

    Where they are is returned: (B,) bool, or (1, T) bool where all rows became one.
    """
    ids, labels = _tensor(batch, "input_ids"), _tensor(batch, "labels")
    if ids.shape[0] == count + len(rows):
        for place, row in enumerate(rows, start=count):
            _put_labels(ids[place], labels[place], row, fill, seq2seq=seq2seq)
        mask = torch.zeros(len(ids), dtype=torch.bool)
        mask[count:] = True
        return mask
    total = sum(len(row.input_ids) for row in rows)
    if ids.shape[0] == 1 and ids.shape[1] > total and not seq2seq:
        return _mark_joined(ids, labels, rows)
    shape = tuple(ids.shape)
    raise EchoError(f"the collate function made input_ids of shape {shape} of {count} + {len(rows)} examples")


def _mark_joined(ids: Tensor, labels: Tensor, rows: Sequence[EchoRow]) -> Tensor:
    """The same where the collator joins all rows into one, the echo rows last."""
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    end = ids.shape[1]
    # Rows were filled up alike, or not at all: the last one's length tells.
    for row in reversed(rows):
        begin = _find_back(ids[0], row, end)
        place = slice(begin, begin + len(row.input_ids))
        labels[0, begin:end] = IGNORE
        labels[0, place] = torch.tensor(row.labels, dtype=labels.dtype)
        mask[0, begin:end] = True
        end = begin
    return mask


def _find_back(ids: Tensor, row: EchoRow, end: int) -> int:
    """Where a row that ends at `end`, but for what it was filled up with, begins."""
    wanted = torch.tensor(row.input_ids, dtype=ids.dtype)
    for begin in range(end - len(wanted), -1, -1):
        if torch.equal(ids[begin : begin + len(wanted)], wanted):
            return begin
    raise EchoError("the collate function changed the ids of echo rows")


def _put_labels(ids: Tensor, labels: Tensor, row: EchoRow, fill: int, *, seq2seq: bool) -> None:
    if seq2seq:
        if tuple(labels[labels != IGNORE].tolist()) != row.targets:
            raise EchoError("the collate function changed the labels of echo rows")
        return
    wanted, size = torch.tensor(row.input_ids, dtype=ids.dtype), len(row.input_ids)
    for begin in (0, len(ids) - max(size, fill)):  # padded on the right, on the left
        if begin >= 0 and torch.equal(ids[begin : begin + size], wanted):
            labels[:] = IGNORE
            labels[begin : begin + size] = torch.tensor(row.labels, dtype=labels.dtype)
            return
    raise EchoError(f"the collate function changed the ids of an echo row of {size} tokens (or cut it)")


def _tensor(batch: Any, key: str) -> Tensor:
    value = batch.get(key) if isinstance(batch, Mapping) else None
    if not isinstance(value, Tensor) or value.ndim != 2:
        got = f"the keys {sorted(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
        raise EchoError(f"a batch holds {got}; echo rows need '{key}' of shape (B, T)")
    return value
