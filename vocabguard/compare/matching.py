"""Which row of the base is which row of the tuned model: by piece where both tokenizers are known, else by id."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vocabguard.compare.trial import require_readable, try_tokenizer
from vocabguard.files import full_path, one_line
from vocabguard.rows.baselines import Baseline, ChunkedRows, one_torch_thread
from vocabguard.vocabulary.table import VocabTable, build_table, ids_beyond, plain_table

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt",
)  # fmt: skip


@dataclass(frozen=True)
class Match:
    """Tuned rows and their base rows.

    Attributes:
        base_ids: (V,) int64, each tuned row's row of the base; -1 where it has none.
        by: ``id`` or ``piece``.
        added: tuned tokens without a base row.
        removed: base tokens without a tuned row.
    """

    base_ids: Tensor
    by: str
    added: int
    removed: int

    @property
    def in_order(self) -> bool:
        """Whether every row that has a base row has it at its own place."""
        own = torch.arange(len(self.base_ids))
        return bool(((self.base_ids == own) | (self.base_ids < 0)).all())

    @property
    def mask(self) -> Tensor:
        """(V,) bool: rows that have a base row."""
        return self.base_ids >= 0


class ReorderedRows(ChunkedRows):
    """Base rows in the order of (V,) int64 ``ids``, NaN where one is -1; a `Baseline`."""

    def __init__(self, base: Baseline, ids: Tensor) -> None:
        super().__init__(len(ids), base.width)
        self.base, self.ids = base, torch.where(ids < base.rows, ids, -1)

    def chunk(self, part: slice) -> Tensor:
        """Rows ``part``: (n, width) on the CPU, in the base's dtype, new."""
        ids = self.ids[part]
        found = torch.full((len(ids), self.width), torch.nan, dtype=self.base.chunk(slice(0, 1)).dtype)
        for places, wanted in _runs(ids):
            found[places] = self.base.chunk(wanted)
        return found

    def describe(self) -> str:
        """Where the rows are kept, in words."""
        return f"{self.base.describe()}, in the order of the tuned vocabulary"


@one_torch_thread()
def match_rows(base_tokenizer: Any, tuned_tokenizer: Any, base_rows: int, tuned_rows: int) -> Match:
    """Match two vocabularies.

    With two tokenizers that differ, a token's base row is that of the same piece, and rows without a token keep their
    id if neither side has a token there. Else rows are matched by id.

    Args:
        base_tokenizer: a transformers tokenizer, or None.
        tuned_tokenizer: the tuned model's, or None.
        tuned_rows: V, rows of the tuned model.
    """
    by_id = torch.arange(tuned_rows)
    before = None if base_tokenizer is None else base_tokenizer.get_vocab()
    now = None if tuned_tokenizer is None else tuned_tokenizer.get_vocab()
    if before is None or now is None or before == now:
        ids = torch.where(by_id < base_rows, by_id, -1)
        return Match(ids, "id", max(0, tuned_rows - base_rows), max(0, base_rows - tuned_rows))
    taken = torch.zeros(max(base_rows, tuned_rows), dtype=torch.bool)
    for vocabulary, rows in ((before, base_rows), (now, tuned_rows)):
        taken[torch.tensor([i for i in vocabulary.values() if i < rows], dtype=torch.int64)] = True
    ids = torch.where(taken[:tuned_rows] | (by_id >= base_rows), -1, by_id)
    shared = [(i, before[piece]) for piece, i in now.items() if piece in before and i < tuned_rows]
    shared = [pair for pair in shared if pair[1] < base_rows]
    pairs = torch.tensor(shared, dtype=torch.int64).reshape(-1, 2)
    ids[pairs[:, 0]] = pairs[:, 1]
    return Match(ids, "piece", len(now) - len(shared), len(before) - len(shared))


def folder_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a folder; None where the folder has none, or the path is a file.

    Raises:
        ValueError: if it is there and cannot be loaded.
    """
    folder = full_path(path)
    if not folder.is_dir() or not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        require_readable(folder)
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        try_tokenizer(loaded)
        return loaded
    except Exception as error:  # a tokenizer's loading raises what it likes
        raise ValueError(f"{folder}: its tokenizer cannot be loaded ({one_line(error)})") from error


@one_torch_thread()
def table_for(tokenizer: Any, rows: int) -> VocabTable:
    """The table of V rows; one group without a tokenizer.

    Raises:
        ValueError: if the tokenizer has ids beyond the rows.
    """
    if tokenizer is None:
        return plain_table(rows)
    if beyond := ids_beyond(tokenizer, rows):
        raise ValueError(
            f"a tokenizer that does not fit the model: it has {rows + beyond} ids, the matrix has {rows} rows"
        )
    return build_table(tokenizer, rows)


def _runs(ids: Tensor) -> Iterator[tuple[slice, slice]]:
    """Stretches of consecutive base rows: where they go, and which they are."""
    if len(ids) == 0:
        return
    breaks = ((ids.diff() != 1) | (ids[:-1] < 0)).nonzero().flatten() + 1
    edges = [0, *breaks.tolist(), len(ids)]
    for start, stop in pairwise(edges):
        first = int(ids[start])
        if first >= 0:
            yield slice(start, stop), slice(first, first + stop - start)
