from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vocabguard.compare.matching import ReorderedRows, folder_tokenizer, match_rows, table_for
from vocabguard.rows.baselines import CopiedBaseline


class Words:
    """As much of a tokenizer as matching asks for."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def get_vocab(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self.pieces)}


def test_by_id_without_tokenizers() -> None:
    match = match_rows(None, None, 5, 7)
    assert match.base_ids.tolist() == [0, 1, 2, 3, 4, -1, -1]
    assert (match.by, match.added, match.removed) == ("id", 2, 0)
    assert match.in_order
    assert match_rows(None, Words("a"), 9, 7).removed == 2


def test_by_piece() -> None:
    match = match_rows(Words("a", "b", "c", "d"), Words("x", "c", "a", "b"), 6, 6)
    # Rows 4 and 5 have a token on neither side and keep their place.
    assert match.base_ids.tolist() == [-1, 2, 0, 1, 4, 5]
    assert (match.by, match.added, match.removed) == ("piece", 1, 1)
    assert not match.in_order
    assert match.mask.tolist() == [False, True, True, True, True, True]


def test_a_row_that_was_another_token_is_no_padding() -> None:
    match = match_rows(Words("a", "b", "c"), Words("a", "b"), 3, 3)
    assert match.base_ids.tolist() == [0, 1, -1]
    match = match_rows(Words("a", "b"), Words("a", "b", "c"), 3, 3)
    assert match.base_ids.tolist() == [0, 1, -1]


@pytest.mark.parametrize("seed", range(5))
def test_reordered_rows_equal_indexing(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(40, 3, generator=generator)
    ids = torch.randint(-1, 45, (60,), generator=generator)
    ids[10:20] = torch.arange(5, 15)
    ids[30:33] = torch.tensor([-1, 0, 1])
    rows = ReorderedRows(CopiedBaseline(base), ids)
    expected = torch.stack([base[i] if 0 <= i < 40 else torch.full((3,), torch.nan) for i in ids.tolist()])
    for size in (1, 7, 60, 100):
        found = torch.cat([part for _, part in rows.chunks(size)])
        assert torch.equal(found.nan_to_num(9), expected.nan_to_num(9))
    assert torch.allclose(rows.norms, expected.norm(dim=1), equal_nan=True)
    assert (rows.rows, rows.width) == (60, 3)


def test_tokenizers_of_folders(tmp_path: Path, kit: Any) -> None:
    assert len(folder_tokenizer(kit.ASSETS)) == 8160
    assert folder_tokenizer(tmp_path) is None
    assert folder_tokenizer(kit.ASSETS / "model.safetensors") is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="its tokenizer cannot be loaded"):
        folder_tokenizer(tmp_path)


def test_table(tokenizer: Any) -> None:
    assert table_for(None, 4).live.tolist() == [True] * 4
    assert int(table_for(tokenizer, 8192).padded.sum()) == 32
    with pytest.raises(ValueError, match="does not fit"):
        table_for(tokenizer, 100)
