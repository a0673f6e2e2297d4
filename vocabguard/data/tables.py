"""Data files row by row: JSON and its lines, CSV, Parquet, Arrow, plain text, folders that `datasets` saved.

Nothing is read whole: lines, Parquet row groups and Arrow batches pass by, and only the columns that are wanted.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from vocabguard.files import one_line
from vocabguard.results import VocabGuardError

_LINES, _JSON, _CSV, _TEXT = (".jsonl", ".ndjson"), (".json",), (".csv", ".tsv"), (".txt", ".text", ".md")
_TABLE = (".parquet", ".arrow", ".feather")
SUFFIXES = (*_LINES, *_JSON, *_CSV, *_TABLE, *_TEXT)
"""Endings of data files; all but the binary tables may have one of `PACKED` after them."""

PACKED = (".gz", ".zst", ".bz2", ".xz")
"""Endings of packed files."""

Row = tuple[str, Any]
"""(place, value): where a row was read, for messages, and its columns by name or, of plain text, the line."""

_BATCH_ROWS = 1024
_BATCH_NUMBERS, _FEWEST_BATCH_ROWS, _MOST_BATCH_ROWS = 2**20, 64, 2**16  # of rows that are lists of numbers
_BETWEEN = re.compile(r"[ \t\r\n,]*")
_JSON_CHUNK = 2**18
_LONGEST = 2**28  # bytes of a line, or characters of a JSON value: more is not training data


class DataError(VocabGuardError, ValueError):
    """Data that cannot be read; the message names the file, the place in it and what is allowed."""


@dataclass(frozen=True)
class RemoteFile:
    """A file that `fsspec` reads: ``s3://...``, ``hf://datasets/...``, ``memory://...``."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.url.rsplit("/", 1)[-1]

    def open(self) -> IO[bytes]:
        """The file's bytes.

        Raises:
            OSError: if they cannot be had.
        """
        import fsspec  # type: ignore[import-untyped, unused-ignore]

        try:
            opened: IO[bytes] = fsspec.open(self.url, "rb").open()
        except OSError:
            raise
        except Exception as error:  # of the storage's own library
            raise OSError(one_line(error)) from error
        return opened


DataFile = Path | RemoteFile


@dataclass(frozen=True)
class RowShard:
    """Every `count`-th row, or batch of a table's rows: all shards together have each row once.

    >>> [place for place in range(7) if RowShard(2, 3).takes(place)]
    [1, 4]

    Attributes:
        index: from 1 to `count`.
        reader, readers: which of several processes reads, from 0, each an equal part of the shard.
    """

    index: int = 1
    count: int = 1
    reader: int = 0
    readers: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise ValueError(f"the shard is {self.index}/{self.count}; allowed: 1/N to N/N")

    def takes(self, place: int) -> bool:
        """Whether the row or batch at a place, from 0, is in this shard."""
        turn, own = divmod(place, self.count)
        return own == self.index - 1 and turn % self.readers == self.reader


WHOLE = RowShard()
"""All rows."""


def data_files(patterns: Sequence[str | Path]) -> list[DataFile]:
    """The files that the arguments name, each once, in order.

    Args:
        patterns: files, glob patterns, addresses that fsspec knows, and folders: one that `datasets` saved stands for
            itself, of another all data files in it and below it are taken.

    Raises:
        DataError: if one names nothing, or no data file.
    """
    found: dict[Any, DataFile] = {}
    for pattern in patterns:
        if "://" in str(pattern):
            found |= {file.url: file for file in _remote_files(str(pattern)) if file.url not in found}
            continue
        path = Path(pattern)
        matches = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True))]
        if not matches:
            raise DataError(f"{pattern}: not found; allowed: data files, folders of them and glob patterns")
        for match in matches:
            # The same file by a folder and by a pattern is one file.
            found |= {file.resolve(): file for file in _files_of(match) if file.resolve() not in found}
    return list(found.values())


def _remote_files(address: str) -> list[RemoteFile]:
    """The data files at an address: a file, a pattern, or all below a folder."""
    try:
        import fsspec
    except ImportError as error:
        raise DataError(f"{address}: reading it needs fsspec; `pip install fsspec` brings it ({error})") from error
    try:
        system, path = fsspec.core.url_to_fs(address)
        if "*" in address or "?" in address:
            names = sorted(system.glob(path))
        elif system.isfile(path):
            return [RemoteFile(address)]
        else:
            names = sorted(system.find(path))
        found = [RemoteFile(system.unstrip_protocol(name)) for name in names]
    except Exception as error:  # of the storage's own library, or that one is missing
        raise DataError(f"{address}: cannot be read ({one_line(error)})") from error
    if not (files := [file for file in found if _form(file.name) is not None]):
        raise DataError(f"{address}: no data file there; allowed: {_allowed_files()}")
    return files


def rows_of(file: DataFile, names: Collection[str] = (), shard: RowShard = WHOLE, first: int = 0) -> Iterator[Row]:
    """The rows of a file, or of a folder that `datasets` saved.

    Args:
        file: as `data_files` gives them.
        names: columns that are wanted; of a wide table others are not read, unless it has none of these.
        shard: the rows to take; those of others are not decoded.
        first: number of the file's first row among all, so that small files share shards evenly.

    Raises:
        DataError: for a file that cannot be read.
    """
    if is_table(file):
        for place, batch in batches_of(file, names, shard, first):
            for number, row in enumerate(batch.to_pylist(), start=place):
                yield f"{file}, row {number}", row
        return
    yield from _ROWS_OF[_known_form(file)](file, shard, first)


def is_table(file: DataFile) -> bool:
    """Whether a file is read in Arrow batches: Parquet, Arrow, folders that `datasets` saved."""
    return (isinstance(file, Path) and file.is_dir()) or _known_form(file) in _TABLE


def is_plain_text(file: DataFile) -> bool:
    """Whether the rows of a file are lines of text, without columns."""
    return (isinstance(file, RemoteFile) or file.is_file()) and _form(file.name) in _TEXT


def batches_of(
    file: DataFile, names: Collection[str] = (), shard: RowShard = WHOLE, first: int = 0, *, large: bool = False
) -> Iterator[tuple[int, Any]]:
    """The Arrow record batches of a table, each with the number of its first row, from 1; see `rows_of`.

    Args:
        large: give more rows at a time where they are short lists of numbers and all are taken.

    Raises:
        DataError: for a file that cannot be read.
    """
    is_folder = not isinstance(file, RemoteFile) and file.is_dir()
    kind = "saved dataset" if is_folder else {".parquet": "Parquet"}.get(_known_form(file), "Arrow")
    try:
        import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise DataError(f"{file}: reading {kind} needs pyarrow; `pip install pyarrow` brings it ({error})") from error
    number = 0
    # Shards take their batches by number, so that those must not be few.
    quick = partial(_parquet_batches, large=large and shard.count == 1)
    read = _saved_batches if is_folder else quick if kind == "Parquet" else _arrow_batches
    try:
        if kind == "Parquet" and shard.count == 1 and shard.readers > 1 and _groups_of(file) >= 2 * shard.readers:
            yield from _own_groups(file, names, large, shard)
            return
        for place, batch in enumerate(read(file, names), start=first):
            if shard.takes(place):
                yield number + 1, batch
            number += batch.num_rows
    except DataError:
        raise
    except (pa.ArrowException, Exception) as error:  # Arrow's own errors have several bases
        after = "" if is_folder else f" after row {number}"
        kind = "a saved dataset" if is_folder else kind
        raise DataError(f"{file}: cannot be read as {kind}{after} ({one_line(error)})") from error


def _parquet_batches(file: Any, names: Collection[str], large: bool = False) -> Iterator[Any]:
    from pyarrow import parquet  # type: ignore[import-untyped, unused-ignore]

    source = file if isinstance(file, Path) else file.open()
    with parquet.ParquetFile(source) as opened:
        wanted = _wanted(opened.schema_arrow.names, names)
        yield from opened.iter_batches(_rows_a_batch(opened, wanted) if large else _BATCH_ROWS, columns=wanted)


def _groups_of(file: Any) -> int:
    from pyarrow import parquet

    with parquet.ParquetFile(file if isinstance(file, Path) else file.open()) as opened:
        return int(opened.num_row_groups)


def _own_groups(file: Any, names: Collection[str], large: bool, shard: RowShard) -> Iterator[tuple[int, Any]]:
    """The row groups of one of several readers, so that none is decoded twice: batches with their first row."""
    from pyarrow import parquet

    with parquet.ParquetFile(file if isinstance(file, Path) else file.open()) as opened:
        wanted, number = _wanted(opened.schema_arrow.names, names), 1
        size = _rows_a_batch(opened, wanted) if large else _BATCH_ROWS
        for group in range(opened.num_row_groups):
            at = number
            if group % shard.readers == shard.reader:
                for batch in opened.iter_batches(size, row_groups=[group], columns=wanted):
                    yield at, batch
                    at += batch.num_rows
            number += opened.metadata.row_group(group).num_rows


def _rows_a_batch(opened: Any, wanted: list[str]) -> int:
    """As many as hold `_BATCH_NUMBERS`, for columns of lists of numbers alone: to slice a batch takes its time."""
    import pyarrow as pa

    kinds = [opened.schema_arrow.field(name).type for name in wanted]
    if not all(hasattr(kind, "value_type") and pa.types.is_integer(kind.value_type) for kind in kinds):
        return _BATCH_ROWS
    groups = [opened.metadata.row_group(place) for place in range(opened.metadata.num_row_groups)]
    numbers = [
        group.column(place).num_values / max(1, group.num_rows)
        for group in groups
        for place in range(group.num_columns)
        if group.column(place).path_in_schema.split(".")[0] in wanted
    ]
    return int(min(_MOST_BATCH_ROWS, max(_FEWEST_BATCH_ROWS, _BATCH_NUMBERS / max(1.0, *numbers, 1.0))))


def _arrow_batches(file: Any, names: Collection[str]) -> Iterator[Any]:
    """Arrow's file and stream formats; local ones are mapped, not read."""
    import pyarrow as pa

    source = pa.memory_map(str(file)) if isinstance(file, Path) else pa.PythonFile(file.open())
    with source:
        begin = source.read(6)
        source.seek(0)
        if begin == b"ARROW1":
            opened = pa.ipc.open_file(source)
            batches = (opened.get_batch(place) for place in range(opened.num_record_batches))
        else:
            batches = opened = pa.ipc.open_stream(source)
        wanted = _wanted(opened.schema.names, names)
        for batch in batches:
            for begin in range(0, batch.num_rows, _BATCH_ROWS):
                yield batch.select(wanted).slice(begin, _BATCH_ROWS)


def _saved_batches(folder: Any, names: Collection[str]) -> Iterator[Any]:
    try:
        import datasets  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise DataError(f"{folder}: reading it needs datasets; `pip install datasets` brings it ({error})") from error
    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, dict):
        if "train" not in saved:
            raise DataError(f"{folder}: has the splits {list(saved)}, none named 'train'; name one, {folder}/SPLIT")
        saved = saved["train"]
    chosen = saved.select_columns(_wanted(saved.column_names, names)).with_format("arrow")
    for table in chosen.iter(_BATCH_ROWS):
        yield from table.to_batches()


def _wanted(there: list[str], names: Collection[str]) -> list[str]:
    """The columns to read: wide tables may hold much else. All if none fits, for the error message to name them."""
    return [name for name in there if name in names] or there


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if _is_saved_dataset(path):
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and _form(file.name) is not None)
    if not files:
        raise DataError(f"{path}: no data file in it; allowed: {_allowed_files()}")
    return files


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _packed(name: str) -> str:
    return next((suffix for suffix in PACKED if name.lower().endswith(suffix)), "")


def _form(name: str) -> str | None:
    """The ending that tells how to read a file, without the one of the packing; None for other files."""
    packing = _packed(name)
    suffix = Path(name.lower().removesuffix(packing)).suffix
    return suffix if suffix in SUFFIXES and not (packing and suffix in _TABLE) else None


def _known_form(file: DataFile) -> str:
    form = _form(file.name)
    if form is None:
        raise DataError(f"{file}: unknown kind of file; allowed: {_allowed_files()}")
    return form


def _allowed_files() -> str:
    packed = ", ".join(PACKED)
    return f"{', '.join(SUFFIXES)} (all but {', '.join(_TABLE)} also {packed}), folders of `datasets.save_to_disk`"


@contextmanager
def _open(file: DataFile) -> Iterator[IO[bytes]]:
    unpack: dict[str, Callable[[Any], Any]] = {
        ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _unzstd, "": nullcontext
    }  # fmt: skip
    with file.open("rb") if isinstance(file, Path) else file.open() as raw, unpack[_packed(file.name)](raw) as opened:
        yield opened


def _unzstd(raw: IO[bytes]) -> IO[bytes]:
    try:
        import zstandard  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return _unzstd_by_arrow(raw)
    stream: Any = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=False)
    return io.BufferedReader(stream)


def _unzstd_by_arrow(raw: IO[bytes]) -> IO[bytes]:
    try:
        import pyarrow as pa
    except ImportError as error:
        raise DataError(f"{raw.name}: reading .zst needs zstandard or pyarrow; `pip install zstandard`") from error
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd"))


def _read_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    known: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, lzma.LZMAError, *more)
    try:
        import zstandard
    except ImportError:
        return known
    return (*known, zstandard.ZstdError)


def _lines(file: DataFile) -> Iterator[tuple[int, bytes]]:
    """(number, line) of the lines that are not blank, without their ends."""
    number = 0
    try:
        with _open(file) as opened:
            while line := opened.readline(_LONGEST + 1):
                number += 1
                if len(line) > _LONGEST:
                    raise DataError(f"{file}, line {number}: is longer than {_LONGEST:,} bytes")
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line := line.rstrip(b"\r\n"):
                    yield number, line
    except _read_errors() as error:
        raise DataError(f"{file}: cannot be read after line {number} ({error})") from error


def _text_lines(file: DataFile, shard: RowShard, first: int) -> Iterator[Row]:
    for number, (at, line) in enumerate(_lines(file), start=first):
        if shard.takes(number):
            place = f"{file}, line {at}"
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: is not UTF-8 ({error.reason} at byte {error.start})") from error
            if not text.isspace():
                yield place, text


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


def _json_lines(file: DataFile, shard: RowShard, first: int) -> Iterator[Row]:
    lines = (found for found in _lines(file) if not found[1].isspace())
    for number, (at, line) in enumerate(lines, start=first):
        if shard.takes(number):
            place = f"{file}, line {at}"
            yield place, decode_json(place, line)


def _json_rows(file: DataFile, shard: RowShard, first: int) -> Iterator[Row]:
    """The items of a JSON list, or JSON values one after the other."""
    place = f"{file}, at the beginning"
    try:
        with _open(file) as opened, io.TextIOWrapper(opened, encoding="utf-8-sig") as stream:
            for number, value in enumerate(_values(stream), start=1):
                place = f"{file}, item {number}"
                if shard.takes(first + number - 1):
                    yield place, value
                place = f"{file}, after item {number}"
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: is not UTF-8 ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: is not JSON ({error.msg})") from error
    except _read_errors(RecursionError) as error:
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


def _csv_rows(file: DataFile, shard: RowShard, first: int) -> Iterator[Row]:
    """Rows of a table with a head line; every value is a text."""
    csv.field_size_limit(_LONGEST)  # the library's own is shorter than an answer may be
    between = "\t" if _form(file.name) == ".tsv" else ","
    number = 1
    try:
        with _open(file) as opened, io.TextIOWrapper(opened, encoding="utf-8-sig", newline="") as stream:
            table = csv.reader(stream, delimiter=between, strict=True)
            head = next(table, [])
            for place, values in enumerate((row for row in table if row), start=first):
                number = table.line_num
                if len(values) != len(head):
                    raise DataError(f"{file}, line {number}: has {len(values)} values; allowed: {len(head)}, one for "
                                    f"each of {head[:20]}")  # fmt: skip
                if shard.takes(place):
                    yield f"{file}, line {number}", dict(zip(head, values, strict=True))
    except UnicodeDecodeError as error:
        raise DataError(f"{file}, after line {number}: is not UTF-8 ({error.reason})") from error
    except _read_errors(csv.Error) as error:
        raise DataError(f"{file}: cannot be read after line {number} ({error})") from error


_ROWS_OF: dict[str, Callable[[DataFile, RowShard, int], Iterator[Row]]] = {
    **dict.fromkeys(_LINES, _json_lines),
    **dict.fromkeys(_JSON, _json_rows),
    **dict.fromkeys(_CSV, _csv_rows),
    **dict.fromkeys(_TEXT, _text_lines),
}
