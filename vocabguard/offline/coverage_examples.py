"""Rows of data as training examples: chats, prompts with completions, plain text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from vocabguard.offline.readers import DataError, decode_json, is_plain_text, rows_of

Kind = Literal["messages", "completion", "text"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Turn = dict[str, Any]
"""One message: ``role`` and ``content``, and what else the chat template knows."""

_DEFAULT_COLUMNS: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",), ("conversations",)),
    "completion": (("prompt", "completion"),),
    "text": (("text",),),
}
_OPTIONS = ("tools", "chat_template_kwargs")
_ROLE_OF = {"human": "user", "gpt": "assistant"}


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
    """A prompt and what should follow it: two texts, or two lists of messages.

    Attributes:
        place: where it was read, for messages.
        prompt: what the model reads.
        completion: what it should say; of the same type.
        options: further arguments of the chat template, ``tools`` among them.
    """

    place: str
    prompt: str | list[Turn]
    completion: str | list[Turn]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Text:
    """A document.

    Attributes:
        place: where it was read, for messages.
        text: all of it.
    """

    place: str
    text: str


Example = Chat | Completion | Text


def read_examples(files: Iterable[Path], *, kind: Kind | None = None, columns: Sequence[str] = ()) -> Iterator[Example]:
    """All examples of the files, as they are read.

    A file's first row decides what its columns hold: ``messages`` (or ``conversations``), ``prompt`` and
    ``completion``, or ``text``. Empty lines are left out.

    Args:
        files: as `data_files` gives them.
        kind: what the rows hold, where the columns do not tell.
        columns: names of the columns, where they are others: one, or two for prompt and completion.

    Raises:
        DataError: for a file or a row that cannot be used.
    """
    if kind not in (None, *KINDS):
        raise DataError(f"the kind is {kind!r}; allowed: {', '.join(KINDS)}")
    if len(columns) > 2 or (kind and columns and len(columns) != len(_DEFAULT_COLUMNS[kind][0])):
        needed = {"completion": "two", None: "one, or two for prompt and completion"}.get(kind, "one")
        raise DataError(f"{len(columns)} columns are named, {list(columns)}; allowed: {needed}")
    for file in files:
        yield from _examples_of(file, kind, tuple(columns))


def _examples_of(file: Path, kind: Kind | None, columns: tuple[str, ...]) -> Iterator[Example]:
    if is_plain_text(file):
        if kind not in (None, "text") or columns:
            raise DataError(
                f"{file}: plain text has no columns; allowed without --kind and --column, a document a line"
            )
        yield from (Text(place, text) for place, text in rows_of(file))
        return
    known = (name for alternatives in _DEFAULT_COLUMNS.values() for names in alternatives for name in names)
    chosen: _Columns | None = None
    for place, row in rows_of(file, {*(columns or known), *_OPTIONS}):
        if not isinstance(row, dict):
            raise DataError(f"{place}: holds {_told(row)}; allowed: an object with {_allowed_columns()}")
        chosen = chosen or _choose(place, row, kind, columns)
        yield _example(place, row, chosen)


@dataclass(frozen=True)
class _Columns:
    kind: Kind
    names: tuple[str, ...]


def _choose(place: str, row: Mapping[str, Any], kind: Kind | None, columns: tuple[str, ...]) -> _Columns:
    """What a file's rows hold, by its first row."""
    if columns:
        one: Kind = "text" if isinstance(row.get(columns[0]), str) else "messages"
        return _Columns(kind or ("completion" if len(columns) == 2 else one), columns)
    possible = [
        _Columns(name, next(names for names in _DEFAULT_COLUMNS[name] if row.keys() >= set(names)))
        for name in ([kind] if kind else KINDS)
        if any(row.keys() >= set(names) for names in _DEFAULT_COLUMNS[name])
    ]
    if not possible:
        wanted = _allowed_columns([kind] if kind else KINDS)
        raise DataError(f"{place}: has the columns {list(row)[:20]}; allowed: {wanted}, or others named with --column")
    if len(possible) > 1:
        kinds = " or ".join(f"--kind {choice.kind}" for choice in possible)
        raise DataError(f"{place}: has the columns {list(row)[:20]}, which can be read in several ways; say {kinds}")
    return possible[0]


def _allowed_columns(kinds: Sequence[Kind] = KINDS) -> str:
    return " or ".join("+".join(repr(name) for name in _DEFAULT_COLUMNS[kind][0]) for kind in kinds)


def _example(place: str, row: Mapping[str, Any], columns: _Columns) -> Example:
    for name in columns.names:
        if name not in row:
            raise DataError(f"{place}: no column {name!r}; allowed: one of {list(row)[:20]}")
    values = [row[name] for name in columns.names]
    if columns.kind == "text":
        return Text(place, _string(place, columns.names[0], values[0]))
    if columns.kind == "messages":
        return Chat(place, _turns(place, columns.names[0], values[0]), _options(place, row))
    if all(isinstance(value, str) for value in values):
        return Completion(place, values[0], values[1])
    if any(isinstance(value, str) for value in values):
        kinds = " and ".join(_told(value) for value in values)
        raise DataError(f"{place}: {columns.names} hold {kinds}; allowed: two texts, or two lists of messages")
    prompt, completion = (_turns(place, name, row[name]) for name in columns.names)
    return Completion(place, prompt, completion, _options(place, row))


def _string(place: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: {name!r} holds {_told(value)}; allowed: a text")
    return value


def _turns(place: str, name: str, value: Any) -> list[Turn]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}: {name!r} holds {_told(value)}; allowed: a list of messages")
    return [_turn(place, name, turn) for turn in value]


def _turn(place: str, name: str, turn: Any) -> Turn:
    if isinstance(turn, dict) and "role" not in turn and isinstance(turn.get("from"), str):
        turn = {"role": _ROLE_OF.get(turn["from"], turn["from"]), "content": turn.get("value")}
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise DataError(f"{place}: {name!r} holds a message that is {_told(turn)}; allowed: 'role' and 'content'")
    # Tables fill what other rows have with nulls, which templates would read as given.
    turn = {key: part for key, part in turn.items() if part is not None}
    if not isinstance(turn.get("content", ""), (str, list)):
        raise DataError(f"{place}: a message's 'content' is {_told(turn['content'])}; allowed: a text, a list of parts")
    found: Turn = turn
    return found


def _options(place: str, row: Mapping[str, Any]) -> dict[str, Any]:
    tools, further = (row.get(name) for name in _OPTIONS)
    if isinstance(tools, str):
        tools = decode_json(place, tools)
    if not isinstance(tools, list | None) or not isinstance(further, dict | None):
        raise DataError(f"{place}: 'tools' is {_told(tools)}, 'chat_template_kwargs' {_told(further)}; "
                        "allowed: a list and an object, or none")  # fmt: skip
    return {**({"tools": tools} if tools else {}), **(further or {})}


def _told(value: Any) -> str:
    """A value for an error message."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    shown = repr(value)
    return f"{kinds.get(type(value), 'a ' + type(value).__name__)} ({shown[:40]}{'...' if len(shown) > 40 else ''})"
