"""Nearest rows by chunk equal those of the whole cosine matrix; overlap and intruders by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vocabguard.measure import neighbors
from vocabguard.measure.neighbors import NearestRows, Neighborhoods, compare_neighbors, intruders, nearest_rows
from vocabguard.rows.baselines import CopiedBaseline, FileBaseline
from vocabguard.rows.matrices import VocabMatrix, find_matrices
from vocabguard.vocabulary.table import GROUPS, VocabTable, plain_table


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows of width 16 a chunk, so that every search merges many."""
    monkeypatch.setattr(neighbors, "_CHUNK", 7 * 16)


def rows_of(count: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)


def naive(
    rows: Tensor, ids: Tensor, k: int, exclude: Tensor | None = None
) -> tuple[list[list[int]], list[list[float]]]:
    """By the whole matrix in float64 and a sort in Python."""
    wide = rows.double()
    cosine = torch.nn.functional.cosine_similarity(wide[:, None], wide[None], dim=2)
    found, values = [], []
    for token in ids.tolist():
        others = [
            (-float(cosine[token, other]), other)
            for other in range(len(rows))
            if other != token and not (exclude is not None and exclude[other]) and bool(cosine[token, other].isfinite())
        ]
        best = sorted(others)[:k]
        found.append([other for _, other in best])
        values.append([-value for value, _ in best])
    return found, values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "k"), [(50, 5), (50, 1), (8, 7), (101, 20)])
def test_equal_to_the_whole_matrix(dtype: torch.dtype, count: int, k: int) -> None:
    rows, ids = rows_of(count, count, dtype), torch.tensor([0, 3, count - 1, 3])
    found = nearest_rows(CopiedBaseline(rows), ids, k)
    expected, values = naive(rows, ids, k)
    assert found.ids.tolist() == expected
    torch.testing.assert_close(found.cosine, torch.tensor(values), atol=1e-6, rtol=0)
    assert found.cosine.dtype is torch.float32


def test_excluded_broken_and_zero_rows_are_never_named() -> None:
    rows = rows_of(40, 1)
    rows[5] = torch.nan
    rows[6] = 0.0
    rows[7, 0] = torch.inf
    exclude = torch.zeros(40, dtype=torch.bool)
    exclude[10:30] = True
    ids = torch.tensor([0, 12, 5, 6, 7])
    found = nearest_rows(CopiedBaseline(rows), ids, 6, exclude)
    expected, _ = naive(rows[:, :], ids[:2], 6, exclude | ~rows.isfinite().all(1) | (rows == 0).all(1))
    assert found.ids[:2].tolist() == expected
    assert (found.ids[2:] == -1).all()
    assert found.cosine[2:].isnan().all()


def test_fewer_rows_than_asked_for() -> None:
    found = nearest_rows(CopiedBaseline(rows_of(4, 2)), torch.tensor([1]), 6)
    assert sorted(found.ids[0, :3].tolist()) == [0, 2, 3]
    assert found.ids[0, 3:].tolist() == [-1] * 3
    assert found.cosine[0, 3:].isnan().all()


def test_a_file_and_a_model_give_what_a_copy_gives(tmp_path: Path) -> None:
    rows, ids = rows_of(60, 3), torch.tensor([59, 0, 31])
    save_file({"w": rows}, tmp_path / "rows.safetensors")
    file = FileBaseline(tmp_path / "rows.safetensors", "w")
    model = torch.nn.Sequential(torch.nn.Linear(16, 60, bias=False))
    model[0].weight.data = rows.clone()
    matrix = find_matrices(model, head="0")["head"]
    assert isinstance(matrix, VocabMatrix)
    copied = nearest_rows(CopiedBaseline(rows), ids, 4)
    for found in (nearest_rows(file, ids, 4), nearest_rows(matrix, ids, 4)):
        assert torch.equal(found.ids, copied.ids)
        torch.testing.assert_close(found.cosine, copied.cosine, atol=1e-6, rtol=0)


def test_then_and_now() -> None:
    base = rows_of(50, 4)
    now = base.clone()
    now[3] = base[20] + 0.1 * rows_of(50, 5)[3]  # row 3 moves in with row 20
    found = compare_neighbors(CopiedBaseline(now), CopiedBaseline(base), torch.tensor([3, 40]), 4)
    assert found.then.ids.tolist() == naive(base, torch.tensor([3, 40]), 4)[0]
    assert found.now.ids.tolist() == naive(now, torch.tensor([3, 40]), 4)[0]
    assert found.now.ids[0, 0] == 20
    for row in range(2):
        before, after = set(found.then.ids[row].tolist()), set(found.now.ids[row].tolist())
        assert found.overlap[row] == len(before & after) / 4
    assert found.overlap[0] < 1.0


def test_rows_added_since_have_no_neighbours_then() -> None:
    now = rows_of(50, 6)
    exclude = torch.zeros(50, dtype=torch.bool)
    exclude[2] = True
    found = compare_neighbors(CopiedBaseline(now), CopiedBaseline(now[:40]), torch.tensor([45, 1]), 3, exclude)
    assert found.then.ids[0].tolist() == [-1] * 3
    assert found.overlap[0].isnan()
    assert found.then.ids[1].tolist() == naive(now[:40], torch.tensor([1]), 3, exclude[:40])[0][0]
    assert found.now.ids[0].tolist() == naive(now, torch.tensor([45]), 3, exclude)[0][0]


def test_overlap_counts_only_what_was_there() -> None:
    then = NearestRows(torch.tensor([[1, 2, -1, -1]]), torch.zeros(1, 4))
    now = NearestRows(torch.tensor([[2, 7, -1, -1]]), torch.zeros(1, 4))
    assert Neighborhoods(torch.tensor([0]), then, now).overlap.tolist() == [0.5]


def test_no_rows_asked_for() -> None:
    found = compare_neighbors(CopiedBaseline(rows_of(9, 7)), CopiedBaseline(rows_of(9, 8)), torch.empty(0), 3)
    assert found.now.ids.shape == found.then.cosine.shape == (0, 3)


def test_wrong_arguments() -> None:
    rows = CopiedBaseline(rows_of(9, 7))
    with pytest.raises(ValueError, match="k is 0; allowed: at least 1"):
        nearest_rows(rows, torch.tensor([1]), 0)
    with pytest.raises(ValueError, match=r"exclude has shape \(8,\); expected \(9,\)"):
        nearest_rows(rows, torch.tensor([1]), 1, torch.zeros(8, dtype=torch.bool))
    with pytest.raises(ValueError, match="ids are 1 to 9; allowed: 0 to 8"):
        compare_neighbors(rows, rows, torch.tensor([1, 9]), 1)


def table_of(*groups: str) -> VocabTable:
    group = torch.tensor([GROUPS.index(name) for name in groups], dtype=torch.uint8)
    return replace(plain_table(len(groups)), group=group)


@pytest.mark.parametrize("own", ["ja", "latin", "control", "bytes", "code"])
def test_intruders_by_group(own: str) -> None:
    table = table_of(own, *GROUPS)
    near = torch.tensor([[*range(1, len(GROUPS) + 1), -1]])
    found = intruders(table, torch.tensor([0]), near)[0].tolist()
    expected = [name != own and name not in ("digits_punctuation", "code") for name in GROUPS]
    assert found == [*expected, False]
