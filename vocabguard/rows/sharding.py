"""Matrices whose elements are spread over processes: which of them this process has, and how they are read.

Whatever an engine does, a process has a run of the flattened matrix (FSDP1, FSDP2, ZeRO, tensor parallel by rows), or
some columns (tensor parallel by columns). A row that lies here in part is read with zeros in the place of the rest:
inner products of rows add up over the parts, so sums of a few values a row are all that is put together, never rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vocabguard import collective
from vocabguard.results import NotApplicable


@dataclass(frozen=True)
class Shard:
    """The elements that this process has of a matrix.

    Attributes:
        rows: V.
        width: elements a row.
        start: first element of the flattened matrix; 0 where it has columns.
        stop: the element after the last one; all of them where it has columns.
        columns: which, of every row, where the matrix is split by columns; else None.
        owner: whether this process speaks for them: where other processes have the same ones, only one does.
        spans: first element and the one after the last of every process, where all of them have agreed on that and
            none has another's; else None.

    Example:
        >>> half = Shard(rows=3, width=4, start=6, stop=12)
        >>> half.part, half.counted, half.partial
        (slice(1, 3, None), slice(2, 3, None), True)
        >>> half.take(torch.arange(6.0, 12.0), slice(1, 2)).tolist()
        [[0.0, 0.0, 6.0, 7.0]]
    """

    rows: int
    width: int
    start: int
    stop: int
    columns: slice | None = None
    owner: bool = True
    spans: tuple[tuple[int, int], ...] | None = None

    @property
    def part(self) -> slice:
        """The rows of which it has anything; may be empty."""
        first = self.start // self.width
        return slice(first, max(first, math.ceil(self.stop / self.width)))

    @property
    def counted(self) -> slice:
        """The rows whose first element it has: where every process counts those, each row is counted once."""
        if self.columns is not None:
            return slice(0, self.rows if self.columns.start == 0 else 0)
        first = math.ceil(self.start / self.width)
        return slice(first, max(first, math.ceil(self.stop / self.width)))

    @property
    def partial(self) -> bool:
        """Whether it has some rows in part only."""
        return self.columns is not None or self.start % self.width != 0 or self.stop % self.width != 0

    @property
    def elements(self) -> int:
        """How many it has."""
        count = self.stop - self.start
        return count if self.columns is None else self.rows * (self.columns.stop - self.columns.start)

    def pieces(self, size: int) -> Iterator[slice]:
        """Its rows in order, at most `size` at a time; a row that it has in part comes alone."""
        part = self.part
        first, last = part.start, part.stop
        if self.columns is None:
            if self.start % self.width and first < last:
                yield slice(first, first + 1)
                first += 1
            last -= int(self.stop % self.width != 0 and first < last)
        for begin in range(first, last, size):
            yield slice(begin, min(begin + size, last))
        if last < part.stop and first <= last:
            yield slice(last, part.stop)

    def take(self, own: Tensor, part: slice) -> Tensor:
        """(n, width) some of its rows, with zeros where elements are elsewhere; a view where all of them are here.

        Args:
            own: this process's elements, flat, or (rows, columns) where it has columns.
            part: inside `part`.
        """
        if self.columns is not None:
            found = own.new_zeros(part.stop - part.start, self.width)
            found[:, self.columns] = own[part]
            return found
        begin, end = part.start * self.width, part.stop * self.width
        if begin >= self.start and end <= self.stop:
            return own[begin - self.start : end - self.start].view(-1, self.width)
        found = own.new_zeros(end - begin)
        first, last = max(begin, self.start), min(end, self.stop)
        found[first - begin : last - begin] = own[first - self.start : last - self.start]
        return found.view(-1, self.width)

    def only(self, part: slice, rows: Tensor) -> Tensor:
        """(n, width) whole rows `part`, with zeros in the place of the elements that are not here."""
        if self.columns is not None:
            found = torch.zeros_like(rows)
            found[:, self.columns] = rows[:, self.columns]
            return found
        begin, end = part.start * self.width, part.stop * self.width
        if begin >= self.start and end <= self.stop:
            return rows
        flat = rows.clone().view(-1)
        flat[: max(0, self.start - begin)] = 0
        flat[max(0, self.stop - begin) :] = 0
        return flat.view(-1, self.width)

    @property
    def apart(self) -> bool:
        """Whether each process has rows of its own and whole: all of them find the same."""
        if not self._followed:
            return False
        return all(start % self.width == 0 and stop % self.width == 0 for start, stop in self.spans or ())

    @property
    def edges(self) -> dict[int, bool]:
        """The rows that lie in several processes, as far as that is agreed on, and whether this one speaks for them.

        >>> Shard(rows=3, width=4, start=6, stop=12, spans=((0, 6), (6, 12))).edges
        {1: False}
        """
        if self.spans is None or not self._followed:
            return {}
        rows, counted = sorted({start // self.width for start, _ in self.spans if start % self.width}), self.counted
        return {row: counted.start <= row < counted.stop for row in rows}

    @property
    def _followed(self) -> bool:
        """Whether the spans are those of the matrix as it is: it may have been resized since."""
        return self.spans is not None and max(stop for _, stop in self.spans) == self.rows * self.width

    def adding_up(self, sums: Tensor) -> collective.Talk[Tensor]:
        """(..., V): each process's sums over its elements, added up; see `collective.together`.

        Args:
            sums: (..., V) floating; looked at in this process's rows only.
        """
        parts = [replace(self, start=start, stop=stop).part for start, stop in self.spans or ()]
        most = max((part.stop - part.start for part in parts), default=0)
        # A sum sends each value twice; what is gathered is sent once, to the length of the longest part.
        if not self._followed or most * len(parts) >= 2 * self.rows:
            own = torch.zeros_like(sums)
            if self.owner:
                own[..., self.part] = sums[..., self.part]
            return (yield collective.Telling(own))
        own = sums.new_zeros(*sums.shape[:-1], most)
        own[..., : self.part.stop - self.part.start] = sums[..., self.part]
        everyones = yield collective.Telling(own, gathered=True)
        found = torch.zeros_like(sums)
        for part, theirs in zip(parts, everyones, strict=True):
            found[..., part] += theirs[..., : part.stop - part.start]
        return found

    def add_up(self, sums: Tensor) -> Tensor:
        """The same by itself. All processes must call it together."""
        return collective.together([self.adding_up(sums)])[0]

    def told(self, sums: Tensor) -> collective.Telling:
        """Sums over each process's elements, to be added up."""
        return collective.Telling(sums if self.owner else torch.zeros_like(sums))


def shard_of(weight: Tensor) -> Shard | NotApplicable | None:
    """Which elements of a ``DTensor`` parameter this process has: FSDP2, tensor parallel by rows or columns, or both.

    Args:
        weight: (V, D) parameter.

    Returns:
        None where it has all of them; why not, where they are split in a way that this module does not follow.
    """
    mesh: Any = getattr(weight, "device_mesh", None)
    if mesh is None:
        return None
    placements: Any = weight.placements  # type: ignore[attr-defined]
    split = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    if not split:
        return None
    rows, width = weight.shape
    found = _split(mesh, placements, split, rows, width)
    here = tuple(local_rows(weight).shape)
    if found is None:
        return NotApplicable(f"it is spread over processes as {tuple(placements)}; followed: splits by rows or columns")
    part, columns = found
    expected = (part.stop - part.start, width if columns is None else columns.stop - columns.start)
    if here != expected and math.prod(here) != math.prod(expected):
        return NotApplicable(f"process {collective.rank()} has {here} of it where {expected} was expected")
    others = [mesh.get_local_rank(dim) for dim in range(mesh.ndim) if dim not in split]
    start, stop = (part.start * width, part.stop * width) if columns is None else (0, rows * width)
    return Shard(rows, width, start, stop, columns, owner=not any(others))


def _split(mesh: Any, placements: Any, split: list[int], rows: int, width: int) -> tuple[slice, slice | None] | None:
    """Rows and columns of this process; None for splits that are not followed."""
    by_rows = [dim for dim in split if _splits(placements[dim], 0)]
    by_columns = [dim for dim in split if _splits(placements[dim], 1)]
    if len(by_rows) + len(by_columns) != len(split) or (by_rows and by_columns) or len(by_columns) > 1:
        return None
    if by_columns:
        return slice(0, rows), _share(slice(0, width), mesh.size(by_columns[0]), mesh.get_local_rank(by_columns[0]))
    # A strided split was made after the plain ones to its right: FSDP2 cuts what tensor parallelism has left here.
    order = sorted(by_rows, key=lambda dim: type(placements[dim]).__name__ == "_StridedShard")
    part = slice(0, rows)
    for dim in order:
        part = _share(part, mesh.size(dim), mesh.get_local_rank(dim))
    return part, None


def _splits(placement: Any, dim: int) -> bool:
    return getattr(placement, "dim", None) == dim and type(placement).__name__ in ("Shard", "_StridedShard")


def _share(part: slice, count: int, place: int) -> slice:
    """One of `count` shares of a range, all but the last ones of one size, as `torch.chunk` cuts."""
    each = math.ceil((part.stop - part.start) / count)
    begin = min(part.start + place * each, part.stop)
    return slice(begin, min(begin + each, part.stop))


def local_rows(weight: Tensor) -> Tensor:
    """(n, D) the rows that this process has, a view of the parameter's memory; the tensor itself where it has all."""
    to_local = getattr(weight, "to_local", None)
    local = weight if to_local is None else to_local()
    assert isinstance(local, Tensor)
    return local


def reshard(model: nn.Module) -> None:
    """Give each process its own rows back: a forward pass without a backward pass leaves FSDP2's outermost gathered."""
    for module in model.modules():
        # To import FSDP2 for its class takes a second.
        if callable(again := getattr(module, "reshard", None)):
            again()


class ShardBaseline:
    """A copy of one process's elements on the CPU; see `vocabguard.rows.baselines.Baseline`.

    Args:
        own: as `Shard.take` wants them.
    """

    def __init__(self, own: Tensor, shard: Shard) -> None:
        self.tensor, self.shard = own, shard
        self.rows, self.width = shard.rows, shard.width
        self.saved: dict[str, str] = {}

    def chunk(self, part: slice) -> Tensor:
        """Rows ``part``: (n, width) on the CPU, with zeros where elements are elsewhere.

        Raises:
            ValueError: for rows of another process.
        """
        own = self.shard.part
        if part.start < own.start or part.stop > own.stop:
            raise ValueError(f"rows {part.start}:{part.stop} are not here; this process has {own.start}:{own.stop}")
        return self.shard.take(self.tensor, part)

    def chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Walk over the rows of all processes, which must do so together: each chunk is sent to all of them."""
        own = self.shard.part
        for start in range(0, self.rows, size):
            part = slice(start, min(start + size, self.rows))
            rows = self.tensor.new_zeros(part.stop - part.start, self.width)
            mine = slice(max(part.start, own.start), min(part.stop, own.stop))
            if self.shard.owner and mine.start < mine.stop:
                rows[mine.start - part.start : mine.stop - part.start] = self.chunk(mine)
            # As bytes, which any backend can add: all but one process's are 0.
            yield part, collective.total(rows.view(torch.uint8)).view(rows.dtype)

    def describe(self) -> str:
        """Where the rows are kept, in words."""
        own = self.shard.part
        megabytes = self.tensor.nbytes / 2**20
        if self.shard.columns is not None:
            columns = self.shard.columns
            return f"copy in memory (columns {columns.start:,} to {columns.stop:,} here, {megabytes:.0f} MiB)"
        return f"copy in memory (rows {own.start:,} to {own.stop:,} in this process, {megabytes:.0f} MiB)"

    def keep_reference(self, saved: dict[str, str]) -> None:
        """Remember where the rows of all processes have been saved."""
        self.saved = saved

    def reference(self) -> dict[str, str]:
        """Where the rows of all processes have been saved; empty before."""
        return self.saved

    @cached_property
    def norms(self) -> Tensor:
        """(rows,) float32 L2 norms of all rows. All processes must ask for them together, the first time."""
        return _norms(self, self.shard)


class OwnPart:
    """Of a baseline that lies whole in a file or in memory, what belongs to this process's elements."""

    def __init__(self, whole: Any, shard: Shard) -> None:
        self.whole, self.shard = whole, shard
        self.rows, self.width = int(whole.rows), int(whole.width)

    def chunk(self, part: slice) -> Tensor:
        """Rows ``part``: (n, width) on the CPU, with zeros where elements are elsewhere."""
        rows: Tensor = self.whole.chunk(part)
        return self.shard.only(part, rows)

    def chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Walk over all rows, whole."""
        yield from self.whole.chunks(size)

    def describe(self) -> str:
        """Where the rows are kept, in words."""
        return str(self.whole.describe())

    def reference(self) -> dict[str, str]:
        """Where the rows can be read again."""
        found: dict[str, str] = self.whole.reference()
        return found

    @cached_property
    def norms(self) -> Tensor:
        """See `ShardBaseline`: the same to the last bit, so that a resumed run goes on alike."""
        return _norms(self, self.shard)


def _norms(baseline: ShardBaseline | OwnPart, shard: Shard) -> Tensor:
    """(rows,) float32. In float64 a row that lies in one place keeps its norm to the last bit."""
    squares = torch.zeros(baseline.rows, dtype=torch.float64)
    for piece in shard.pieces(4096):
        part = slice(piece.start, min(piece.stop, baseline.rows))
        if part.start < part.stop:
            squares[part] = torch.linalg.vector_norm(baseline.chunk(part).float(), dim=-1).double().square()
    return shard.add_up(squares).sqrt().float()
