"""Data files row by row: JSON and its lines, Parquet, plain text, folders that `datasets` saved.

Nothing is read whole: lines, Parquet row groups and Arrow batches pass by, and only the columns that are wanted.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, TypeVar, get_args

from vocabguard.files import one_line
from vocabguard.results import VocabGuardError

_LINES, _JSON, _TABLE, _TEXT = (".jsonl", ".ndjson"), (".json",), (".parquet",), (".txt", ".text", ".md")
SUFFIXES = (*_LINES, *_JSON, *_TABLE, *_TEXT)
"""Endings of data files; all but Parquet may have ``.gz`` after them."""

Row = tuple[str, Any]
"""(place, value): where a row was read, for messages, and its columns by name or, of plain text, the line."""

_Item = TypeVar("_Item")
_BATCH_ROWS = 1024
_BETWEEN = re.compile(r"[ \t\r\n,]*")
_JSON_CHUNK = 2**18
_LONGEST = 2**28  # bytes of a line, or characters of a JSON value: more is not training data


class DataError(VocabGuardError, ValueError):
    """Data that cannot be read; the message names the file, the place in it and what is allowed."""


def data_files(patterns: Sequence[str | Path]) -> list[Path]:
    """The files that the arguments name, each once, in order.

    Args:
        patterns: files, glob patterns, and folders: one that `datasets` saved stands for itself, of another all data
            files in it and below it are taken.

    Raises:
        DataError: if one names nothing, or no data file.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        path = Path(pattern)
        matches = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True))]
        if not matches:
            raise DataError(f"{pattern}: not found; allowed: data files, folders of them and glob patterns")
        for match in matches:
            # The same file by a folder and by a pattern is one file.
            found |= {file.resolve(): file for file in _files_of(match) if file.resolve() not in found}
    return list(found.values())


def rows_of(file: Path, names: Collection[str] = ()) -> Iterator[Row]:
    """The rows of a file, or of a folder that `datasets` saved.

    Args:
        file: as `data_files` gives them.
        names: columns that are wanted; of a wide table others are not read, unless it has none of these.

    Raises:
        DataError: for a file that cannot be read.
    """
    form = None if file.is_dir() else _form(file)
    if form is None and not file.is_dir():
        raise DataError(f"{file}: unknown kind of file; allowed: {_allowed_files()}")
    return _dataset_rows(file, names) if form is None else _ROWS_OF[form](file, names)


def is_plain_text(file: Path) -> bool:
    """Whether the rows of a file are lines of text, without columns."""
    return file.is_file() and _form(file) in _TEXT


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if _is_saved_dataset(path):
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and _form(file) is not None)
    if not files:
        raise DataError(f"{path}: no data file in it; allowed: {_allowed_files()}")
    return files


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _form(file: Path) -> str | None:
    """The ending that tells how to read a file, without ``.gz``; None for other files."""
    name = file.name.lower().removesuffix(".gz")
    suffix = Path(name).suffix
    packed_table = suffix in _TABLE and name != file.name.lower()
    return suffix if suffix in SUFFIXES and not packed_table else None


def _allowed_files() -> str:
    return f"{', '.join(SUFFIXES)} (all but .parquet also .gz), folders of `datasets.save_to_disk`"


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file) if file.name.lower().endswith(".gz") else file.open("rb")  # type: ignore[return-value]


def _lines(file: Path) -> Iterator[tuple[str, bytes]]:
    """(place, line) of the lines that are not blank, without their ends."""
    number = 0
    try:
        with _open(file) as opened:
            while line := opened.readline(_LONGEST + 1):
                number += 1
                if len(line) > _LONGEST:
                    raise DataError(f"{file}, line {number}: is longer than {_LONGEST:,} bytes")
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line := line.rstrip(b"\r\n"):
                    yield f"{file}, line {number}", line
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read after line {number} ({error})") from error


def _text_lines(file: Path, _: Collection[str]) -> Iterator[Row]:
    for place, line in _lines(file):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{place}: is not UTF-8 ({error.reason} at byte {error.start})") from error
        if not text.isspace():
            yield place, text


def in_chunks(items: Iterable[_Item], size: int) -> Iterator[tuple[_Item, ...]]:
    """The items, so many at a time; the last chunk may be smaller.

    >>> list(in_chunks("abc", 2))
    [('a', 'b'), ('c',)]
    """
    remaining = iter(items)
    return iter(lambda: tuple(islice(remaining, size)), ())


def decode_json(place: str, content: bytes | str) -> Any:
    """The value of a JSON text.

    Args:
        content: the text; bytes are UTF-8.

    Raises:
        DataError: if it is not JSON.
    """
    try:
        return json.loads(content)
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: is not UTF-8 ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: is not JSON ({error})") from error


def _json_lines(file: Path, _: Collection[str]) -> Iterator[Row]:
    return ((place, decode_json(place, line)) for place, line in _lines(file) if not line.isspace())


def _json_rows(file: Path, _: Collection[str]) -> Iterator[Row]:
    """The items of a JSON list, or JSON values one after the other."""
    place = f"{file}, at the beginning"
    try:
        with _open(file) as opened, io.TextIOWrapper(opened, encoding="utf-8-sig") as stream:
            for number, value in enumerate(_values(stream), start=1):
                place = f"{file}, item {number}"
                yield place, value
                place = f"{file}, after item {number}"
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: is not UTF-8 ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: is not JSON ({error.msg})") from error
    except (OSError, EOFError, zlib.error, RecursionError) as error:
        raise DataError(f"{place}: cannot be read ({error})") from error


def _values(stream: IO[str]) -> Iterator[Any]:
    """Decode values from a stream; a value that is not whole is tried again with twice as much text."""
    decoder, size = json.JSONDecoder(), _JSON_CHUNK
    while (text := stream.read(size)).isspace():
        pass
    at = len(text) - len(text.lstrip())
    in_list = text[at : at + 1] == "["
    at += in_list
    while True:
        # A regular expression, since cutting the text at every value would copy it again and again.
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
        if in_list and text[at : at + 1] == "]":
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            more = stream.read(size)
            if not more and at == len(text) and not in_list:
                return
            if not more or len(text) - at > _LONGEST:
                raise
            text, at, size = text[at:] + more, 0, 2 * size
            continue
        yield value
        size = _JSON_CHUNK


def _parquet_rows(file: Path, names: Collection[str]) -> Iterator[Row]:
    try:
        from pyarrow import parquet  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise DataError(f"{file}: reading Parquet needs pyarrow; `pip install pyarrow` brings it ({error})") from error
    number = 0
    try:
        with parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(_BATCH_ROWS, columns=_wanted(opened.schema_arrow.names, names)):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except DataError:
        raise
    except Exception as error:  # Arrow's own errors have several bases
        raise DataError(f"{file}: cannot be read as Parquet after row {number} ({one_line(error)})") from error


def _dataset_rows(folder: Path, names: Collection[str]) -> Iterator[Row]:
    try:
        import datasets  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise DataError(f"{folder}: reading it needs datasets; `pip install datasets` brings it ({error})") from error
    number = 0
    try:
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, dict):
            if "train" not in saved:
                raise DataError(f"{folder}: has the splits {list(saved)}, none named 'train'; name one, {folder}/SPLIT")
            saved = saved["train"]
        for row in saved.with_format(None).select_columns(_wanted(saved.column_names, names)):
            number += 1
            yield f"{folder}, row {number}", row
    except DataError:
        raise
    except Exception as error:  # whatever datasets and Arrow find wrong with a folder
        raise DataError(f"{folder}: cannot be read as a saved dataset ({one_line(error)})") from error


def _wanted(there: list[str], names: Collection[str]) -> list[str]:
    """The columns to read: wide tables may hold much else. All if none fits, for the error message to name them."""
    return [name for name in there if name in names] or there


_ROWS_OF: dict[str, Callable[[Path, Collection[str]], Iterator[Row]]] = {
    **dict.fromkeys(_LINES, _json_lines),
    **dict.fromkeys(_JSON, _json_rows),
    **dict.fromkeys(_TABLE, _parquet_rows),
    **dict.fromkeys(_TEXT, _text_lines),
}


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
    """A prompt and what should follow it: two texts, or two lists of messages; options as in `Chat`."""

    place: str
    prompt: str | list[Turn]
    completion: str | list[Turn]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Text:
    """A document."""

    place: str
    text: str


Example = Chat | Completion | Text


def read_examples(files: Iterable[Path], *, kind: Kind | None = None, columns: Sequence[str] = ()) -> Iterator[Example]:
    """All examples of the files, as they are read.

    A file's first row decides what its columns hold: ``messages`` (or ``conversations``), ``prompt`` and
    ``completion``, or ``text``. Empty lines are left out.

    Args:
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
