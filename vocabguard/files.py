"""Files that others read while they are written: the only place that writes one, strict JSON, and words for errors."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vocabguard.results import NotApplicable

if TYPE_CHECKING:
    from torch import Tensor

_KINDS = {
    stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device", stat.S_IFBLK: "device",
}  # fmt: skip
# Of a name with other things around it: file systems take 255 bytes, a character up to 4 of them.
_NAME = 40


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A file that gets its name only when it is whole: neither a reader nor a crash sees half of it.

    A symbolic link stays, and what it points to is written. A file keeps its permissions.

    Yields:
        A path beside it, to write to. An exception leaves what was at `path` before, and nothing else.

    Raises:
        OSError: for what is no regular file, such as a device or a FIFO, which would be replaced by one.
    """
    path = Path(os.path.realpath(path))
    found = kind_of(path)
    if found not in (None, "file"):
        raise OSError(errno.EINVAL, f"is a {found}, not a regular file", str(path))
    temporary = path.with_name(f".{path.name[:_NAME]}.{os.getpid()}.tmp")
    try:
        yield temporary
        if found is not None:
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def kind_of(path: Path) -> str | None:
    """What a path leads to, in a word: ``file`` for a regular one; None where nothing is there.

    Raises:
        OSError: if that cannot be told, as in a loop of links.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    return _KINDS.get(stat.S_IFMT(mode), "special file")


def require_regular(path: str | Path) -> Path:
    """The path, where reading it cannot wait for a writer that never comes.

    Raises:
        OSError: for a FIFO, a device, a folder, or what cannot be looked at; also if nothing is there.
    """
    path = Path(path)
    if (found := kind_of(path)) != "file":
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "not found", str(path))
        raise OSError(errno.EINVAL, f"is a {found}, not a regular file", str(path))
    return path


def read_text(path: str | Path) -> str:
    """The UTF-8 text of a file; see `require_regular`, and a ValueError where it is not UTF-8."""
    return require_regular(path).read_text(encoding="utf-8")


def full_path(path: str | Path) -> Path:
    """The path in full, with ``~`` and links followed.

    Raises:
        ValueError: for a home that nobody knows, or a loop of links.
    """
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: is no path that can be followed ({one_line(error)})") from error


def write_file(path: str | Path, content: bytes | str) -> None:
    """Write a whole file, text as UTF-8; see `replacing`."""
    with replacing(path) as new:
        new.write_bytes(content.encode() if isinstance(content, str) else content)


def tensor_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file in which the same content is the same bytes.

    The library writes metadata in the order of a hash table, another one in each process; here names are sorted.

    >>> import torch
    >>> content = tensor_file({"a": torch.ones(1)}, {"y": "2", "x": "1"})
    >>> content[8:41]
    b'{"__metadata__":{"x":"1","y":"2"}'
    """
    import safetensors.torch

    content = safetensors.torch.save({name: one.contiguous() for name, one in tensors.items()}, metadata=dict(metadata))
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write texts as the lines of a new file, in UTF-8. Readers see them come: give it what `replacing` yields."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line of JSON to a file, made if missing; the line is anything that `plain` takes."""
    # A lone surrogate in a token's text becomes an escape that JSON knows.
    with path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.write(json.dumps(plain(line), ensure_ascii=False, allow_nan=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, without a last one that is not whole: it may be being written.

    Raises:
        ValueError: for another line that is no JSON.
    """
    return list(each_line(path))


def each_line(path: Path) -> Iterator[dict[str, Any]]:
    """What `read_lines` gives, one at a time: a long run's lines need not fit in memory.

    Raises:
        ValueError: for a line, not the last, that is no JSON.
    """
    if not path.exists():
        return
    broken: Exception | None = None
    with require_regular(path).open("rb") as file:
        for line in file:
            if broken is not None:
                break
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:
                broken = error
                continue
            if not isinstance(found, dict):
                raise ValueError(f"{path} has a line that is no JSON object")
            yield found
        else:
            return
    raise ValueError(f"{path} has a line, not its last, that is not JSON: {one_line(broken)}") from broken


def mend(path: Path) -> None:
    """End a file of lines with a whole line: the process before may have died while it wrote."""
    content = require_regular(path).read_bytes() if path.exists() else b""
    whole, newline, tail = content.rpartition(b"\n")
    if tail:
        write_file(path, content + b"\n" if _is_json(tail) else whole + newline)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        ValueError: if it holds none.
    """
    try:
        found = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON ({one_line(error)})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}; expected a JSON object")
    return found


def plain(value: Any) -> Any:
    """The value as what strict JSON can hold: NaN and infinities are null, a tensor is its shape and dtype.

    >>> plain({"cosine": float("nan"), 3: (True, NotApplicable("no head"))})
    {'cosine': None, '3': [True, {'not_applicable': 'no head'}]}
    """
    if isinstance(value, NotApplicable):
        return {"not_applicable": value.reason}
    if is_dataclass(value):
        return {spec.name: plain(getattr(value, spec.name)) for spec in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    # A tensor or a number of numpy's, known by what it has: most of what comes needs neither package.
    if hasattr(value, "dtype") and hasattr(value, "item"):
        value = {"shape": list(value.shape), "dtype": str(value.dtype)} if value.ndim > 0 else value.item()
    return value if isinstance(value, dict) else _plain_leaf(value)


def why_unwritable(folder: Path) -> str | None:
    """Why no file can be written to a folder, which is made if missing; None where one can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return one_line(error)


def one_line(error: BaseException, limit: int | None = 200) -> str:
    """The first line of an error's message, or its class.

    >>> one_line(ValueError("no head\\nin this model")), one_line(KeyError())
    ('no head', 'KeyError')
    """
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__


def some(names: Collection[str], shown: int = 6) -> str:
    """A few names for an error message.

    >>> some(["c", "b", "a"], shown=2)
    "['a', 'b'] and 1 more"
    """
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{sorted(names)[:shown]}{more}"


def _plain_leaf(value: Any) -> bool | int | float | str | None:
    if value is None or isinstance(value, (bool, str)):
        return value
    # The abstract kinds, so that other libraries' numbers count.
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def copy_files(folder: Path, out: Path, but: Collection[Path]) -> None:
    """Copy the files of a folder, and nothing below it, into another one, which is made if missing."""
    out.mkdir(parents=True, exist_ok=True)
    for item in sorted(folder.iterdir()):
        if item.is_file() and item not in but:
            shutil.copyfile(item, out / item.name)
