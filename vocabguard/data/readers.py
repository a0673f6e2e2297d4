"""Training examples from the rows of data files, in the formats that people have.

A file's first row decides what its columns hold; see `FORMATS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vocabguard.data.choices import KINDS, Kind
from vocabguard.data.roles import RoleReader, Turn, shown
from vocabguard.data.tables import (
    WHOLE,
    DataError,
    DataFile,
    Row,
    RowShard,
    batches_of,
    data_files,
    decode_json,
    is_plain_text,
    is_table,
    rows_of,
)

__all__ = ["Chat", "Completion", "DataError", "Example", "Examples", "Kind", "Preference", "Text", "TokenRows", "Turn",
           "data_files", "in_chunks", "is_plain_text", "read_examples", "rows_of"]  # fmt: skip

FORMATS: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "tokens": (("input_ids",),),
    "preference": (("chosen", "rejected"),),
    "messages": (("messages",), ("conversations",), ("conversation",)),
    "completion": (("prompt", "completion"),),
    "text": (("text",),),
    "alpaca": (("instruction", "output"), ("instruction", "response")),
    "question": (
        ("question", "answer"), ("prompt", "response"), ("query", "response"), ("query", "answer"),
        ("problem", "solution"), ("input", "output"),
    ),
}  # fmt: skip
"""What the rows hold -> the columns that show it. ``tokens`` and ``preference`` go before the others, as in TRL."""

_MASKS = ("labels", "assistant_masks", "completion_mask", "attention_mask")
_OPTIONS = ("tools", "chat_template_kwargs")
_BESIDE = ("system", "input", "context", "history", "prompt")
_IGNORED = -100  # a label that the loss leaves out
_Item = TypeVar("_Item")
_Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation.

    Attributes:
        place: where it was read, for messages.
        turns: its messages, at least one.
        options: further arguments of the chat template, ``tools`` among them.
    """

    place: str
    turns: list[Turn]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what should follow it: two texts, or two lists of messages; options as in `Chat`."""

    place: str
    prompt: str | list[Turn]
    completion: str | list[Turn]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with a chosen and a rejected answer, as texts or as lists of messages; options as in `Chat`."""

    place: str
    prompt: str | list[Turn]
    chosen: str | list[Turn]
    rejected: str | list[Turn]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Text:
    """A document."""

    place: str
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows:
    """Rows that are token ids already, one after the other.

    Attributes:
        place: of the first.
        ids: (T,) whole numbers of the data's own kind, which int64 can hold, of all rows.
        target: (T,) bool, this token is a target.
        lengths: (n,) int64, tokens of each row.
    """

    place: str
    ids: NDArray[np.integer[Any]]
    target: NDArray[np.bool_]
    lengths: _Ids


Example = Chat | Completion | Preference | Text | TokenRows


@dataclass(frozen=True)
class _Columns:
    kind: Kind
    names: tuple[str, ...]


class Examples:
    """All examples of some files, as they are read; see `read_examples`.

    Attributes:
        kinds: files by what their rows were read as.
        roles: what the turns' roles were read as.
        notes: rows by what was done with them that one should know.
        shard: the part of the rows.
    """

    def __init__(
        self, files: Iterable[DataFile], kind: Kind | None, columns: tuple[str, ...], roles: Mapping[str, str],
        chats: bool, shard: RowShard, blocks: bool, chosen: Sequence[_Columns | None] = (),
    ) -> None:  # fmt: skip
        self.kinds: Counter[str] = Counter()
        self.roles = RoleReader(roles)
        self.notes: Counter[str] = Counter()
        self._files, self._kind, self._columns, self._named, self._chosen = tuple(files), kind, columns, roles, chosen
        self._chats, self.shard, self._blocks = chats, shard, blocks

    def __iter__(self) -> Iterator[Example]:
        for place, file in enumerate(self._files):
            yield from self._of(file, place)

    def readers(self, count: int) -> list[Examples]:
        """As many that have the same examples together, for processes of their own; all read a file in one way."""
        if not self._chosen:
            self._chosen = [self._first(file, place) for place, file in enumerate(self._files)]
        shards = [replace(self.shard, reader=reader, readers=count) for reader in range(count)]
        return [
            Examples(
                self._files, self._kind, self._columns, self._named, self._chats, shard, self._blocks, self._chosen
            )
            for shard in shards
        ]

    def add_seen(self, other: Examples) -> None:
        """Take in what one of the `readers` saw."""
        self.notes.update(other.notes)
        self.roles.renamed.update(other.roles.renamed)
        self.roles.seen.update(other.roles.seen)

    def _first(self, file: DataFile, place: int) -> _Columns | None:
        """How a file's first row says that it is read; None of plain text and of files without rows."""
        if is_plain_text(file):
            self._read_plainly(file)
            return None
        first = next(iter(rows_of(file, self._names(), self.shard, place)), None)
        return None if first is None else self._choose(first[0], _as_row(*first))

    def _names(self) -> set[str]:
        known = (name for alternatives in FORMATS.values() for names in alternatives for name in names)
        return {*(self._columns or known), *_OPTIONS, *_MASKS, *_BESIDE}

    def _read_plainly(self, file: DataFile) -> None:
        if self._kind not in (None, "text") or self._columns:
            raise DataError(
                f"{file}: plain text has no columns; allowed without --kind and --column, a document a line"
            )
        self.kinds["text, a document a line"] += 1

    def _of(self, file: DataFile, first: int) -> Iterator[Example]:
        if is_plain_text(file):
            self._read_plainly(file)
            yield from (Text(place, text) for place, text in rows_of(file, shard=self.shard, first=first))
            return
        chosen = self._chosen[first] if self._chosen else None
        if self._blocks and is_table(file):
            yield from self._of_table(file, self._names(), first, chosen)
        else:
            yield from self.of_rows(rows_of(file, self._names(), self.shard, first), chosen)

    def of_rows(self, rows: Iterable[Row], chosen: _Columns | None = None) -> Iterator[Example]:
        """The examples of the rows of one file, or of another source.

        Args:
            chosen: how they are read; None for the first row to tell.

        Raises:
            DataError: for a row that cannot be used.
        """
        for place, value in rows:
            row = _as_row(place, value)
            chosen = chosen or self._choose(place, row)
            yield self._example(place, row, chosen)

    def _of_table(self, file: DataFile, names: set[str], first: int, chosen: _Columns | None) -> Iterator[Example]:
        """Of a table of token ids a whole batch is one example: no row becomes Python objects."""
        for number, batch in batches_of(file, names, self.shard, first, large=True):
            if not batch.num_rows:
                continue
            place = f"{file}, row {number}"
            chosen = chosen or self._choose(place, batch.slice(0, 1).to_pylist()[0])
            if chosen.kind == "tokens":
                yield _token_block(place, batch, chosen.names[0])
                continue
            for at, row in enumerate(batch.to_pylist(), start=number):
                yield self._example(f"{file}, row {at}", row, chosen)

    def _choose(self, place: str, row: Mapping[str, Any]) -> _Columns:
        found = _choose(place, row, self._kind, self._columns)
        self.kinds[self._told(found, row)] += 1
        return found

    def _told(self, columns: _Columns, row: Mapping[str, Any]) -> str:
        """How rows are read, in words."""
        named = f"column{'s' * (len(columns.names) > 1)} {', '.join(columns.names)}"
        if columns.kind == "tokens":
            masks = [name for name in _MASKS if row.get(name) is not None]
            return f"tokens ({named}; targets by {', '.join(masks) if masks else 'no mask: every token'})"
        if columns.kind == "preference":
            return f"preference pairs ({named}): targets are the chosen answers', the rejected ones are only read"
        if columns.kind in ("alpaca", "question"):
            how = "conversations by the chat template" if self._chats else "plain text, a prompt and a completion"
            return f"{columns.kind} rows ({named}), as {how}"
        return f"{columns.kind} ({named})"

    def _example(self, place: str, row: Mapping[str, Any], columns: _Columns) -> Example:
        for name in columns.names:
            if name not in row:
                raise DataError(f"{place}: no column {name!r}; allowed: one of {list(row)[:20]}")
        values = [row[name] for name in columns.names]
        if columns.kind == "text":
            return Text(place, _string(place, columns.names[0], values[0]))
        if columns.kind == "tokens":
            return _token_row(place, columns.names[0], row)
        if columns.kind == "messages":
            return Chat(place, self._conversation(place, columns.names[0], row), _options(place, row))
        if columns.kind in ("alpaca", "question"):
            return self._question(place, row, columns.names)
        return self._answered(place, row, columns, values)

    def _conversation(self, place: str, name: str, row: Mapping[str, Any]) -> list[Turn]:
        turns, system = self.roles.turns(place, name, row[name]), row.get("system")
        if not isinstance(system, str) or not system or turns[0]["role"] == "system":
            return turns
        if isinstance(row[name], list) and not any("from" in turn for turn in row[name]):
            self.notes["column 'system' not read beside 'messages', as in TRL"] += 1
            return turns
        self.notes["column 'system' read as the first message"] += 1
        return [{"role": "system", "content": system}, *turns]

    def _question(self, place: str, row: Mapping[str, Any], names: Sequence[str]) -> Example:
        """An instruction with its input, or a question, and the answer."""
        asked, answer = (_string(place, name, row[name]) for name in names)
        beside = [row.get(name) for name in ("input", "context") if name not in names]
        question = "\n".join([asked, *(text for text in beside if isinstance(text, str) and text)])
        if not self._chats:
            return Completion(place, question + "\n", answer)
        system = row.get("system")
        turns: list[Turn] = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
        for past in row.get("history") or ():
            if not isinstance(past, list) or len(past) != 2 or not all(isinstance(text, str) for text in past):
                raise DataError(f"{place}: 'history' holds {shown(past)}; allowed: pairs of texts")
            turns += [{"role": "user", "content": past[0]}, {"role": "assistant", "content": past[1]}]
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return Chat(place, turns)

    def _answered(self, place: str, row: Mapping[str, Any], columns: _Columns, values: list[Any]) -> Example:
        """A prompt with a completion, or with a chosen and a rejected one."""
        pair = columns.kind == "preference"
        strings = [
            isinstance(value, str) for value in (*values, *([row["prompt"]] if pair and "prompt" in row else []))
        ]
        if all(strings) and (not pair or len(strings) == 3):
            return Preference(place, row["prompt"], *values) if pair else Completion(place, *values)
        if any(strings[:2]):
            kinds = " and ".join(shown(value) for value in values)
            beside = " and a 'prompt' like them" if pair else ""
            raise DataError(
                f"{place}: {columns.names} hold {kinds}; allowed: two texts, or two lists of messages{beside}"
            )
        first, second = (self.roles.turns(place, name, row[name]) for name in columns.names)
        if not pair:
            return Completion(place, first, second, _options(place, row))
        if isinstance(row.get("prompt"), list):
            return Preference(
                place, self.roles.turns(place, "prompt", row["prompt"]), first, second, _options(place, row)
            )
        common = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(first, second, strict=False)))
        if not common or common == min(len(first), len(second)):
            raise DataError(f"{place}: 'chosen' and 'rejected' begin with no common messages that a prompt can be, or "
                            "are the same; allowed: a column 'prompt', or both with the prompt's messages")  # fmt: skip
        return Preference(place, first[:common], first[common:], second[common:], _options(place, row))


def read_examples(
    files: Iterable[DataFile], *, kind: Kind | None = None, columns: Sequence[str] = (),
    roles: Mapping[str, str] | None = None, chats: bool = True, shard: RowShard = WHOLE, blocks: bool = False,
) -> Examples:  # fmt: skip
    """All examples of the files, as they are read.

    A file's first row decides what its columns hold; see `FORMATS`. Empty lines are left out.

    Args:
        kind: what the rows hold, where the columns do not tell.
        columns: names of the columns, where they are others: one, or two for a prompt and its completion.
        roles: roles by the names that the data has for them, beside `roles.ROLE_OF`.
        chats: questions and instructions become conversations; else plain texts.
        shard: the part of the rows to read.
        blocks: give token ids of tables a batch at a time.

    Raises:
        DataError: for a file or a row that cannot be used, when it is reached.
    """
    if kind not in (None, *KINDS):
        raise DataError(f"the kind is {kind!r}; allowed: {', '.join(KINDS)}")
    if len(columns) > 2 or (kind and columns and len(columns) != len(FORMATS[kind][0])):
        needed = "one, or two for prompt and completion" if kind is None else ("one", "two")[len(FORMATS[kind][0]) - 1]
        raise DataError(f"{len(columns)} columns are named, {list(columns)}; allowed: {needed}")
    return Examples(files, kind, tuple(columns), roles or {}, chats, shard, blocks)


def in_chunks(items: Iterable[_Item], size: int) -> Iterator[tuple[_Item, ...]]:
    """The items, so many at a time; the last chunk may be smaller.

    >>> list(in_chunks("abc", 2))
    [('a', 'b'), ('c',)]
    """
    remaining = iter(items)
    return iter(lambda: tuple(islice(remaining, size)), ())


def _choose(place: str, row: Mapping[str, Any], kind: Kind | None, columns: tuple[str, ...]) -> _Columns:
    """What a file's rows hold, by its first row."""
    if columns:
        one: Kind = "text" if isinstance(row.get(columns[0]), str) else "messages"
        return _Columns(kind or ("completion" if len(columns) == 2 else one), columns)
    possible = [
        _Columns(name, next(names for names in FORMATS[name] if row.keys() >= set(names)))
        for name in ([kind] if kind else FORMATS)
        if any(row.keys() >= set(names) for names in FORMATS[name])
    ]
    if not possible:
        wanted = _allowed_columns([kind] if kind else KINDS)
        raise DataError(f"{place}: has the columns {list(row)[:20]}; allowed: {wanted}, or others named with --column")
    if possible[0].kind in ("tokens", "preference"):
        return possible[0]
    if len(possible) > 1 and possible[0].kind in ("completion", "alpaca") and possible[-1].names[0] in _BESIDE:
        possible.pop()  # a prompt with a completion, or an instruction with an input, has a question's columns too
    if len(possible) > 1:
        kinds = " or ".join(f"--kind {choice.kind}" for choice in possible)
        raise DataError(f"{place}: has the columns {list(row)[:20]}, which can be read in several ways; say {kinds}")
    return possible[0]


def _allowed_columns(kinds: Sequence[Kind] = KINDS) -> str:
    return " or ".join("+".join(repr(name) for name in FORMATS[kind][0]) for kind in kinds)


def _as_row(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: holds {shown(value)}; allowed: an object with {_allowed_columns()}")
    return value


def _string(place: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: {name!r} holds {shown(value)}; allowed: a text")
    return value


def _options(place: str, row: Mapping[str, Any]) -> dict[str, Any]:
    tools, further = (row.get(name) for name in _OPTIONS)
    if isinstance(tools, str):
        tools = decode_json(place, tools) if tools.strip() else None
    if isinstance(further, str):
        further = decode_json(place, further) if further.strip() else None
    if not isinstance(tools, list | None) or not isinstance(further, dict | None):
        raise DataError(f"{place}: 'tools' is {shown(tools)}, 'chat_template_kwargs' {shown(further)}; "
                        "allowed: a list and an object, or none")  # fmt: skip
    return {**({} if tools is None else {"tools": tools}), **(further or {})}


def _token_row(place: str, name: str, row: Mapping[str, Any]) -> TokenRows:
    columns = {key: _numbers(place, key, row[key]) for key in (name, *_MASKS) if row.get(key) is not None}
    return _token_rows(place, columns, name, np.array([len(columns[name])]))


def _numbers(place: str, name: str, value: Any) -> _Ids:
    if isinstance(value, str):
        value = decode_json(place, value)
    if not isinstance(value, list) or any(type(one) not in (int, bool) for one in value):
        raise DataError(f"{place}: {name!r} holds {shown(value)}; allowed: a list of whole numbers")
    try:
        return np.array(value, dtype=np.int64)
    except OverflowError as error:
        raise DataError(f"{place}: {name!r} holds a number that is no token id; allowed: below 2**63") from error


def _token_block(place: str, batch: Any, name: str) -> TokenRows:
    """The rows of an Arrow batch, without a Python object for each."""
    found = {key: batch.column(key) for key in (name, *_MASKS) if key in batch.schema.names}
    found = {key: column for key, column in found.items() if key == name or column.null_count < len(column)}
    flat: dict[str, _Ids] = {}
    edges: Any = None
    for key, column in found.items():
        values = column.flatten() if hasattr(column, "flatten") else None
        if values is None or column.null_count or values.null_count or not hasattr(column.type, "value_type"):
            raise DataError(f"{place}: {key!r} holds {column.type} or nulls; allowed: lists of whole numbers")
        lengths = np.asarray(column.value_lengths())
        if edges is not None and not np.array_equal(edges, lengths):
            raise DataError(f"{place}: {key!r} is not as long as {name!r} in each row; allowed: a value for each token")
        edges = lengths
        numbers = values.to_numpy(zero_copy_only=False)
        if numbers.dtype.kind not in "iub":
            raise DataError(f"{place}: {key!r} holds {column.type}; allowed: lists of whole numbers")
        flat[key] = numbers
    return _token_rows(place, flat, name, edges.astype(np.int64))


def _token_rows(place: str, columns: Mapping[str, _Ids], name: str, lengths: _Ids) -> TokenRows:
    """Rows with the targets of their labels, as TRL builds them: labels as they are, else the masks, else all."""
    ids = columns[name]
    for key, column in columns.items():
        if len(column) != len(ids):
            raise DataError(f"{place}: {key!r} has {len(column)} values, {name!r} {len(ids)}; allowed: as many")
    if (labels := columns.get("labels")) is not None:
        same = labels == ids  # ids below 0, which a label may be, are refused where they are counted
        target = same if bool(same.all()) else labels != _IGNORED
        if target is not same and not bool((same | ~target).all()):
            raise DataError(f"{place}: 'labels' has other tokens than 'input_ids' has there; allowed: the same "
                            f"id or {_IGNORED} (labels are not shifted: the trainer does that)")  # fmt: skip
    else:
        target = np.ones(len(ids), dtype=np.bool_)
        for key in _MASKS[1:]:
            if key in columns:
                target &= columns[key] != 0
    if not np.can_cast(ids.dtype, np.int64):
        ids = ids.astype(np.int64)
    read = columns.get("attention_mask")
    if read is None or bool((read != 0).all()):
        return TokenRows(place, ids, target, lengths)
    # Padding is not read. Labels that are padding are kept: the loss has them.
    kept = (read != 0) | target
    rows = np.repeat(np.arange(len(lengths)), lengths)[kept]
    return TokenRows(place, ids[kept], target[kept], np.bincount(rows, minlength=len(lengths)))
