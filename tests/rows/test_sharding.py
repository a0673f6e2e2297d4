"""Parts of a matrix, wherever it is cut: what processes find adds up to what one process finds."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vocabguard.measure.drift import measure_drift
from vocabguard.measure.kernels import row_sums
from vocabguard.results import NotApplicable
from vocabguard.rows import fingerprint as fingerprints
from vocabguard.rows.baselines import CopiedBaseline, save_baseline
from vocabguard.rows.engines import held_by_engine
from vocabguard.rows.fingerprint import fingerprint
from vocabguard.rows.matrices import VocabMatrix, find_matrices
from vocabguard.rows.sharding import OwnPart, Shard, ShardBaseline, shard_of

ROWS, WIDTH = 13, 5
# Elements at which a matrix of 65 is cut: by whole rows, within rows, within one row, with processes that have nothing.
CUTS = [(), (30,), (33,), (7, 8, 9), (32, 33), (0, 31, 65), (1, 2, 3, 4, 64)]


def shards(cuts: tuple[int, ...]) -> list[Shard]:
    ends = [0, *cuts, ROWS * WIDTH]
    return [Shard(ROWS, WIDTH, begin, end) for begin, end in pairwise(ends)]


COLUMNS = [Shard(ROWS, WIDTH, 0, ROWS * WIDTH, part) for part in (slice(0, 3), slice(3, 5))]


def own(matrix: torch.Tensor, shard: Shard) -> torch.Tensor:
    return matrix[:, shard.columns] if shard.columns is not None else matrix.flatten()[shard.start : shard.stop]


class Part:
    """The rows of one process, as a matrix is read."""

    def __init__(self, matrix: torch.Tensor, shard: Shard) -> None:
        self.rows, self.width, self._own, self._shard = *matrix.shape, own(matrix, shard), shard

    def chunks(self, size: int) -> Any:
        yield from ((piece, self._shard.take(self._own, piece)) for piece in self._shard.pieces(size))


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(ROWS, WIDTH, generator=generator)
    return base, base + 0.1 * torch.randn(ROWS, WIDTH, generator=generator)


@pytest.mark.parametrize("parts", [*map(shards, CUTS), COLUMNS], ids=[*map(str, CUTS), "columns"])
def test_every_element_is_read_once_and_sums_add_up(
    parts: list[Shard], pair: tuple[torch.Tensor, torch.Tensor]
) -> None:
    base, now = pair
    shift, rebuilt, counted = torch.randn(WIDTH), torch.zeros(ROWS, WIDTH), torch.zeros(ROWS)
    total = torch.zeros(5, ROWS)
    for shard in parts:
        assert shard.elements == own(now, shard).numel()
        counted[shard.counted] += 1
        for size in (1, 4, 100):
            pieces = list(shard.pieces(size))
            covered = [row for piece in pieces for row in range(piece.start, piece.stop)]
            assert covered == list(range(shard.part.start, shard.part.stop))
        for piece, rows in Part(now, shard).chunks(4):
            rebuilt[piece] += rows
            torch.testing.assert_close(shard.only(piece, now[piece].clone()), rows, rtol=0, atol=0)
        if shard.elements:
            baseline = ShardBaseline(own(base, shard).clone(), shard)
            found = row_sums(Part(now, shard), baseline, shift, 4, base_too=True)
            total[:, shard.part] += found[:, shard.part]
    assert torch.equal(rebuilt, now)
    assert torch.equal(counted, torch.ones(ROWS))
    whole = row_sums(CopiedBaseline(now), CopiedBaseline(base), shift, 4, base_too=True)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)


def test_whole_rows_are_views_and_parts_are_not_summed_here(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, now = pair
    shard = Shard(ROWS, WIDTH, 10, 40)
    flat = own(now, shard)
    assert shard.take(flat, slice(3, 5)).data_ptr() == flat[5:].data_ptr()
    assert not shard.partial
    assert Shard(ROWS, WIDTH, 11, 40).partial


def test_a_process_that_has_all_finds_what_an_unspread_matrix_gives(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    base, now = pair
    now[2], base[4] = torch.nan, 0
    now[5] *= 50  # far away: measured anew
    [shard] = shards(())
    unexposed = torch.arange(ROWS) % 2 == 0
    here = measure_drift(Part(now, shard), ShardBaseline(base.flatten(), shard), unexposed, 4, shard=shard)
    there = measure_drift(CopiedBaseline(now), CopiedBaseline(base), unexposed, 4)
    for name in ("cosine", "residual", "l2", "norm_ratio", "bad", "zero"):
        torch.testing.assert_close(getattr(here, name), getattr(there, name), rtol=0, atol=1e-6, equal_nan=True)


def test_a_resumed_baseline_reads_the_same_part_from_the_file(
    pair: tuple[torch.Tensor, torch.Tensor], tmp_path: Any
) -> None:
    base, _ = pair
    file = save_baseline(CopiedBaseline(base), tmp_path / "base.safetensors", "head")
    for shard in (*shards((33,)), *COLUMNS):
        copy, reopened = ShardBaseline(own(base, shard).clone(), shard), OwnPart(file, shard)
        for piece in shard.pieces(3):
            assert torch.equal(copy.chunk(piece), reopened.chunk(piece))
        assert torch.equal(copy.norms, reopened.norms), "to the last bit"
        assert reopened.reference() == file.reference()


def test_the_fingerprint_of_parts_is_that_of_the_whole(
    pair: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = pair
    whole = fingerprint(CopiedBaseline(base))
    for parts in (*map(shards, CUTS), COLUMNS):
        sent: list[torch.Tensor] = []
        # What the processes would add up, each after the other.
        monkeypatch.setattr(fingerprints.collective, "total", lambda rows, sent=sent: sent.append(rows) or sum(sent))
        found = [fingerprint(ShardBaseline(own(base, shard).clone(), shard)) for shard in parts]
        assert found[-1] == whole
        assert fingerprint(OwnPart(CopiedBaseline(base), parts[0])) == whole


def test_a_copy_refuses_rows_of_other_processes(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    first, _ = shards((33,))
    with pytest.raises(ValueError, match=r"rows 7:9 are not here; this process has 0:7"):
        ShardBaseline(own(pair[0], first), first).chunk(slice(7, 9))


# -- DTensor placements, by fakes of a mesh ----------------------------------------------------------------------------


class Mesh:
    def __init__(self, sizes: tuple[int, ...], place: tuple[int, ...]) -> None:
        self.sizes, self.place, self.ndim = sizes, place, len(sizes)

    def size(self, dim: int) -> int:
        return self.sizes[dim]

    def get_local_rank(self, dim: int) -> int:
        return self.place[dim]


def split(dim: int | None, strided: bool = False) -> Any:
    kind = type("Replicate" if dim is None else "_StridedShard" if strided else "Shard", (), {})()
    kind.dim = dim
    kind.is_replicate = lambda: dim is None
    return kind


def weight(mesh: Mesh, placements: list[Any], local: tuple[int, int]) -> Any:
    return SimpleNamespace(
        device_mesh=mesh, placements=placements, shape=(ROWS, WIDTH), to_local=lambda: torch.zeros(local)
    )


@pytest.mark.parametrize(("place", "rows"), [((0, 0), (0, 4)), ((1, 0), (4, 7)), ((0, 1), (7, 10)), ((1, 1), (10, 13))])
def test_fsdp_cuts_what_tensor_parallelism_has_left(place: tuple[int, int], rows: tuple[int, int]) -> None:
    """13 rows over 2 x 2 processes: tensor parallel first (7 and 6), each then over FSDP."""
    found = shard_of(weight(Mesh((2, 2), place), [split(0, True), split(0)], (rows[1] - rows[0], WIDTH)))
    assert isinstance(found, Shard)
    assert (found.part.start, found.part.stop) == rows


def test_what_is_followed_and_what_is_not() -> None:
    whole = weight(Mesh((2,), (0,)), [split(None)], (ROWS, WIDTH))
    assert shard_of(whole) is None
    by_columns = shard_of(weight(Mesh((2,), (1,)), [split(1)], (ROWS, 2)))
    assert isinstance(by_columns, Shard)
    assert by_columns.columns == slice(3, 5)
    replicated = shard_of(weight(Mesh((2, 2), (1, 0)), [split(None), split(0)], (7, WIDTH)))
    assert isinstance(replicated, Shard)
    assert not replicated.owner
    both = shard_of(weight(Mesh((2, 2), (0, 0)), [split(0), split(1)], (7, 3)))
    assert isinstance(both, NotApplicable)
    uneven = shard_of(weight(Mesh((2,), (0,)), [split(0)], (6, WIDTH)))
    assert isinstance(uneven, NotApplicable)
    assert "(6, 5)" in uneven.reason


# -- DeepSpeed ZeRO stage 3, by fakes of its parameter attributes ------------------------------------------------------


class Optimizer:
    def __init__(self, master: torch.Tensor) -> None:
        self.master = master

    def get_local_fp32_param(self, parameter: Any) -> torch.Tensor:
        return self.master


def zero3(matrix: torch.Tensor, place: int, processes: int, *, master: bool = False) -> nn.Parameter:
    """What a process has of a matrix: an equal run of it, the last one padded, and an empty parameter."""
    each = math.ceil(matrix.numel() / processes)
    padded = nn.functional.pad(matrix.flatten(), (0, each * processes - matrix.numel()))
    mine = padded[place * each : (place + 1) * each]
    parameter: Any = nn.Parameter(torch.empty(0, dtype=torch.bfloat16))
    parameter.ds_tensor, parameter.ds_shape, parameter.ds_numel = mine.bfloat16(), matrix.shape, matrix.numel()
    parameter.ds_zero_partition_rank = place
    if master:
        parameter._z3_optimizer = Optimizer(mine)
    return parameter  # type: ignore[no-any-return]


def model_with(head: nn.Parameter, embedding: nn.Parameter) -> nn.Module:
    model = nn.Module()
    model.out, model.words = nn.Module(), nn.Module()
    model.out.weight, model.words.weight = head, embedding
    return model


@pytest.mark.parametrize("master", [False, True])
def test_zero3_is_read_where_it_lies(master: bool, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, now = pair
    rebuilt = torch.zeros(ROWS, WIDTH)
    for place in range(2):
        head, embedding = zero3(now, place, 2, master=master), zero3(now, place, 2)
        matrix = find_matrices(model_with(head, embedding), "out", "words")["head"]
        assert isinstance(matrix, VocabMatrix), matrix
        assert (matrix.rows, matrix.width, matrix.tied) == (ROWS, WIDTH, False)
        assert matrix.dtype is (torch.float32 if master else torch.bfloat16), "the master is read where there is one"
        assert matrix.parameter_names() == ("out.weight",)
        for piece, rows in matrix.chunks(4):
            rebuilt[piece] += rows.float()
    expected = now if master else now.bfloat16().float()
    assert torch.equal(rebuilt, expected)
    tied = find_matrices(model_with(head, head), "out", "words")["head"]
    assert isinstance(tied, VocabMatrix)
    assert tied.tied


def test_a_shape_without_memory_is_never_read() -> None:
    """As FSDP's first version leaves parameters: reading them ends the process."""
    layer = nn.Linear(WIDTH, ROWS, bias=False)
    layer.weight.untyped_storage().resize_(0)
    model = nn.ModuleDict({"out": layer, "words": nn.Embedding(ROWS, WIDTH)})
    found = find_matrices(model, "out", "words")
    assert isinstance(found["head"], NotApplicable)
    assert "no memory" in found["head"].reason
    assert isinstance(held_by_engine(model, layer), NotApplicable)
