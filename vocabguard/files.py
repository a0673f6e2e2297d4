"""Strict JSON in files that are written while someone reads them: whole files, and files of lines."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from torch import Tensor

from vocabguard.results import NotApplicable


def plain(value: Any) -> Any:
    """The value as what strict JSON can hold: NaN and infinities are null, a tensor is its shape and dtype."""
    if isinstance(value, NotApplicable):
        return {"not_applicable": value.reason}
    if is_dataclass(value):
        return {spec.name: plain(getattr(value, spec.name)) for spec in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Tensor) and value.ndim > 0:
        return {"shape": list(value.shape), "dtype": str(value.dtype)}
    return _plain_leaf(value.item() if isinstance(value, Tensor) else value)


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line to a file of lines.

    Args:
        path: made if missing.
        line: anything that `plain` takes.
    """
    # A lone surrogate in a token's text becomes an escape that JSON knows.
    with path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.write(json.dumps(plain(line), ensure_ascii=False, allow_nan=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, without a last one that is not whole: it may be being written.

    Raises:
        ValueError: for another line that is no JSON.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    if lines and not _is_json(lines[-1]):
        lines.pop()
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path} has a line, not its last, that is not JSON: {error}") from error


def mend(path: Path) -> None:
    """End a file of lines with a whole line: the process before may have died while it wrote."""
    content = path.read_bytes() if path.exists() else b""
    whole, newline, tail = content.rpartition(b"\n")
    if tail:
        replace_file(path, content + b"\n" if _is_json(tail) else whole + newline)


def replace_file(path: Path, content: bytes) -> None:
    """Write a whole file so that no reader sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain_leaf(value: Any) -> bool | int | float | str | None:
    if value is None or isinstance(value, (bool, str)):
        return value
    # The abstract kinds, so that NumPy's numbers count.
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
