"""Rows for `replay` from a corpus that several machines hold: candidates of each part, chosen from together.

A part keeps its candidates, by the rule of `replay.find_candidates`: they cover all that the part can cover, so that
those of all parts cover what the corpus can. Beside each file of them stands what they were chosen by.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from vocabguard.data.tables import DataFile
from vocabguard.files import read_json, write_file

_SCHEMA, _ENDING = 1, ".part.json"


@dataclass(frozen=True)
class Part:
    """What the candidates of a part were chosen by.

    Attributes:
        shard: which part of the rows, as ``index/count``.
        rows: that were read.
        vocabulary: SHA-256 of the tokenizer's pieces and ids.
        template: SHA-256 of its chat templates.
        need: SHA-256 of how often each token is needed.
        max_length: tokens of a row that count, or None.
        pool: candidates hold so many times the need.
        corpus: the files as they were named.
    """

    shard: str
    rows: int
    vocabulary: str
    template: str
    need: str
    max_length: int | None
    pool: int
    corpus: tuple[str, ...]


_ALIKE = {
    "vocabulary": "another tokenizer",
    "template": "another chat template",
    "need": "other needs (--targets, --coverage, --needs)",
    "max_length": "another --max-length",
    "pool": "another --pool",
    "corpus": "other files",
}


def need_hash(need: Tensor) -> str:
    """SHA-256 of (V,) int64."""
    return hashlib.sha256(need.contiguous().numpy().tobytes()).hexdigest()


def beside(path: Path) -> Path:
    """Where it stands what the candidates of a file were chosen by."""
    return path.with_name(f"{path.name}{_ENDING}")


def is_note(file: DataFile) -> bool:
    """Whether a file is such a one: of a folder both are named."""
    return file.name.endswith(_ENDING)


def save_part(path: Path, part: Part) -> None:
    """Write it beside a file of candidates.

    Raises:
        OSError: if it cannot be written.
    """
    write_file(beside(path), (json.dumps({"schema": _SCHEMA, **asdict(part)}, indent=1) + "\n").encode())


def load_part(path: Path) -> Part:
    """Read what `save_part` wrote beside a file of candidates.

    Raises:
        ValueError: if it is missing or damaged.
    """
    if not beside(path).is_file():
        raise ValueError(
            f"{beside(path)}: not found; `vocabguard replay --shard I/N --out {path}` writes it beside the rows"
        )
    try:
        told = read_json(beside(path))
        if told.pop("schema") != _SCHEMA:
            raise ValueError(f"{beside(path)}: is of another schema; this version reads schema {_SCHEMA}")
        return Part(**{**told, "corpus": tuple(told["corpus"])})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{beside(path)}: tells nothing of candidates ({error})") from error


def check_parts(parts: Sequence[Part], names: Sequence[str]) -> int:
    """The rows of the whole corpus, if these are all of its parts, chosen alike.

    Args:
        names: of the parts, for messages.

    Raises:
        ValueError: if they are not.
    """
    check_alike(parts, names)
    shards = [part.shard for part in parts]
    count = int(shards[0].partition("/")[2])
    wanted = [f"{index}/{count}" for index in range(1, count + 1)]
    twice = next((shard for shard in shards if shards.count(shard) > 1), None)
    if twice is not None:
        raise ValueError(f"{', '.join(names)}: the part {twice} comes twice")
    if sorted(shards) != sorted(wanted):
        missing = ", ".join(one for one in wanted if one not in shards) or "none"
        raise ValueError(f"{', '.join(names)}: are the parts {', '.join(shards)}; missing: {missing}")
    return sum(part.rows for part in parts)


def check_alike(parts: Sequence[Part], names: Sequence[str]) -> None:
    """Whether all were chosen by the same rules from the same files; see `check_parts`.

    Raises:
        ValueError: if one was not.
    """
    for part, name in zip(parts[1:], names[1:], strict=True):
        for rule, told in _ALIKE.items():
            if getattr(part, rule) != getattr(parts[0], rule):
                raise ValueError(f"{name}: has {told} than {names[0]}; allowed: parts chosen alike")
