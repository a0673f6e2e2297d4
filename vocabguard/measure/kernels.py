"""A few inner products of every row in one pass: what a drift check spends its time on.

On the CPU the arithmetic of large matrices is one compiled loop where numba is installed (`sums_loop`), and numpy's
otherwise, in a few threads of its own. A torch operation on a block that fits a cache is
split between all cores: each ends in a barrier, so that a check takes ten times as long once another process holds a
core, and rows wander between the cores' caches. A numpy call stays on its core and lets other threads run; every block
is taken, measured and dropped by one of them, and torch's thread settings are left alone. On an accelerator the
arithmetic is torch's.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vocabguard.measure.compiled import Loop, moved_loop, sums_loop
from vocabguard.rows.baselines import Baseline
from vocabguard.rows.streams import on_device

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
_Measure = Callable[[Tensor, Tensor, Floats], None]

_NUMPY_FLOATS = (torch.float16, torch.float32, torch.float64)
# Elements of a block: two float32 buffers of it, 2 MiB a thread, stay in the cache, and calls are few.
_BLOCK = 2**18
# The same where torch widens the rows, whose calls take longer.
_WIDENED_BLOCK = 2**19
# Elements of which a thread takes rows at a time: few calls matter, and that threads end together.
_TAKEN = 2**23
# Elements of a matrix from which on it pays to load the compiled loop, which takes about half a second.
_WORTH_COMPILING = 2**26
# Elements that were read without it, over all calls, from which on that would have taken less: smaller matrices of a
# run with many checks.
_WORTH_COMPILING_BY_NOW = 2**29
# Rows gathered at a time: their arrays stay in the cache.
_FEW_ROWS = 64
# A sum of displacements from which on some may have overflowed, or will when they are squared.
_HUGE = 1e15
# More threads than this wait for each other and for the memory.
_MOST_THREADS = 4


def _row_by_row(left: Floats, right: Floats, out: Floats | None = None) -> Floats:
    """`numpy.vecdot` for numpy < 2: by BLAS's inner product, whose partial sums keep the digits that einsum's lose."""
    products = np.matmul(left[..., None, :], right[..., :, None], out=None if out is None else out[..., None, None])
    return products[..., 0, 0]


_vecdot: Any = getattr(np, "vecdot", _row_by_row)


class RowReader(Protocol):
    """Rows that can be read in chunks: a `VocabMatrix`, or a `CopiedBaseline` around a plain tensor."""

    @property
    def rows(self) -> int:
        """V."""

    @property
    def width(self) -> int:
        """Elements a row."""

    def chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Slices of at most ``size`` rows and the rows themselves, in order."""


def row_sums(
    matrix: RowReader, baseline: Baseline, shift: Tensor, chunk_rows: int, *, base_too: bool = False
) -> Tensor:
    """Inner products of the rows w with themselves, of their displacements d = w - w0, and of both with a shift s.

    Args:
        matrix: the rows now, of any floating dtype, on any device; the baseline comes to it chunk by chunk.
        shift: (width,) float32.
        chunk_rows: rows read at a time, at most; on the CPU fewer, if they would not fit the cache.
        base_too: measure the baseline rows as well, for baselines whose norms are not known yet.

    Returns:
        (4, V) float32 on the CPU: w.w, d.d, w.s and d.s, accumulated in float32; (5, V) with w0.w0 last, if asked for.
        NaN where there is no baseline row.

    Example:
        >>> from vocabguard.rows.baselines import CopiedBaseline
        >>> now, before = (CopiedBaseline(torch.tensor([row])) for row in ([3.0, 4.0], [3.0, 0.0]))
        >>> row_sums(now, before, shift=torch.tensor([1.0, 1.0]), chunk_rows=1024, base_too=True).flatten().tolist()
        [25.0, 16.0, 7.0, 4.0, 9.0]
    """
    first, before = _first_rows(matrix, baseline)
    if first.device.type != "cpu":
        return sums_by_torch(matrix, baseline, shift.to(first.device), chunk_rows, base_too=base_too)
    if chunk_rows < 1:
        raise ValueError(f"chunk size is {chunk_rows}; allowed: at least 1")
    whole, one_thread = rows_at_once(matrix, baseline, chunk_rows), torch.get_num_threads() == 1
    size = whole if whole == matrix.rows and one_thread else _rows_of(_TAKEN, matrix, whole)
    if worth_compiling(matrix) and sums_loop(_kind(first, before)) is not None:
        return sums_by_numba(matrix, baseline, shift, size, base_too=base_too)
    _READ["elements"] += matrix.rows * matrix.width
    return sums_by_numpy(matrix, baseline, shift, size, base_too=base_too, most_rows=chunk_rows)


def rows_at_once(matrix: RowReader, baseline: Baseline, chunk_rows: int) -> int:
    """Rows to read at a time: all, where they and the baseline's lie in memory as they are, else the given number.

    Example:
        >>> from vocabguard.rows.baselines import CopiedBaseline
        >>> rows = CopiedBaseline(torch.zeros(5000, 4))
        >>> rows_at_once(rows, rows, 1024)
        5000
    """
    first, before = _first_rows(matrix, baseline)
    whole = first.device.type == "cpu" and _is_whole(first, matrix) and _is_whole(before, baseline)
    return matrix.rows if whole else chunk_rows


def _first_rows(matrix: RowReader, baseline: Baseline) -> tuple[Tensor, Tensor]:
    """One row and its baseline row: of a matrix that is spread over processes, this one's first."""
    part, first = next(matrix.chunks(1), (slice(0, 0), torch.empty(0)))
    return first, baseline.chunk(part) if part.start < baseline.rows else first


def _is_whole(some: Tensor, of: RowReader | Baseline) -> bool:
    if some.dtype not in (*_NUMPY_FLOATS, torch.bfloat16) or not some.is_contiguous():
        return False  # each read makes a copy
    return some.untyped_storage().nbytes() >= of.rows * of.width * some.itemsize


def _rows_of(elements: int, matrix: RowReader, most: int) -> int:
    return min(most, max(1, elements // matrix.width))


@torch.no_grad()
def take_rows(rows: Tensor, places: npt.NDArray[np.int64]) -> Floats:
    """Some rows, of any floating dtype on any device, as a new (n, width) float32 array.

    Example:
        >>> take_rows(torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.bfloat16), np.array([2, 0])).tolist()
        [[3.0], [1.0]]
    """
    if rows.device.type == "cpu":
        taken = _bits(rows)[places]
    else:
        taken = _bits(rows.index_select(0, torch.from_numpy(places).to(rows.device)).cpu())
    if taken.dtype == np.uint16:
        taken = np.left_shift(taken, 16, dtype=np.uint32).view(np.float32)
    return np.asarray(taken, dtype=np.float32)


class MovedSum:
    """The sum of the displacements w - w0 of some rows of a matrix, but those whose length is not finite.

    Attributes:
        total: (width,) float64.
        count: rows that are in it.

    Example:
        >>> from vocabguard.rows.baselines import CopiedBaseline
        >>> now, before = torch.tensor([[3.0, 4.0], [torch.nan, 0.0]]), torch.zeros(2, 2)
        >>> found = MovedSum(CopiedBaseline(now))
        >>> found.add(now, before, np.array([0, 1]))
        >>> found.total.tolist(), found.count
        ([3.0, 4.0], 1)
    """

    def __init__(self, matrix: RowReader) -> None:
        self.total, self.count = np.zeros(matrix.width), 0
        self._compiled = worth_compiling(matrix)

    @torch.no_grad()
    def add(self, now: Tensor, before: Tensor, places: npt.NDArray[np.int64]) -> None:
        """Add the rows at (k,) places of two blocks of rows, which may be of any floating dtype, on any device."""
        if self._compiled and _are_plain(now, before) and (loop := moved_loop(_kind(now, before))) is not None:
            self._add_quickly(loop, _as_kind(now, before), places)
            return
        for start in range(0, len(places), _FEW_ROWS):
            self._add_few(now, before, places[start : start + _FEW_ROWS])

    def _add_quickly(self, loop: Loop, both: tuple[Any, Any], places: npt.NDArray[np.int64]) -> None:
        """Four rows at a time, and those that are left over, or near one that is not finite, each four times."""
        whole = len(places) - len(places) % 4
        fours, buffer = places[:whole].reshape(-1, 4), np.empty_like(self.total, dtype=np.float32)
        finite = np.empty(len(fours), dtype=np.bool_)
        loop(*both, fours, buffer, self.total, finite)
        self.count += 4 * int(finite.sum())
        alone = np.concatenate([fours[~finite].ravel(), places[whole:]])
        if len(alone):
            total, finite = np.zeros_like(self.total), np.empty(len(alone), dtype=np.bool_)
            loop(*both, np.repeat(alone, 4).reshape(-1, 4), buffer, total, finite)
            self.total += total / 4
            self.count += int(finite.sum())

    def _add_few(self, now: Tensor, before: Tensor, places: npt.NDArray[np.int64]) -> None:
        rows, base = take_rows(now, places), take_rows(before, places)
        with np.errstate(all="ignore"):
            moved = np.subtract(rows, base, out=rows)
            found = moved.sum(axis=0, dtype=np.float64)
            if not (np.abs(found) < _HUGE).all():
                # A row whose length overflows float32 is as bad as one that is not finite.
                moved = moved[np.isfinite(np.square(moved).sum(axis=1))]
                found = moved.sum(axis=0, dtype=np.float64)
        self.total += found
        self.count += len(moved)


@torch.no_grad()
def sums_by_torch(
    matrix: RowReader, baseline: Baseline, shift: Tensor, chunk_rows: int, *, base_too: bool = False
) -> Tensor:
    """`row_sums` for an accelerator; the shift is on it.

    By one kernel where there is Triton; see `vocabguard.measure.fused`. Baseline rows on the host come ahead of their
    turn, if they are in pinned memory.

    Example:
        >>> from vocabguard.rows.baselines import CopiedBaseline
        >>> now, before = (CopiedBaseline(torch.tensor([row])) for row in ([3.0, 4.0], [3.0, 0.0]))
        >>> sums_by_torch(now, before, torch.tensor([1.0, 1.0]), chunk_rows=1).flatten().tolist()
        [25.0, 16.0, 7.0, 4.0]
    """
    from vocabguard.measure.fused import fused_sums  # Triton takes a second to load

    sums = torch.full((5, matrix.rows), math.nan, device=shift.device)
    kind, fused = shift.device.type, fused_sums(shift.device.type)
    plain = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    pairs = _pairs(matrix, baseline, chunk_rows)
    with plain:
        for (part, now), before in on_device((((part, now), before) for part, now, before in pairs), shift.device):
            if fused is not None and now.stride(1) == before.stride(1) == 1:
                try:
                    fused(now, before, shift, sums[:, part])
                    continue
                except Exception as error:  # no compiler on this machine, a dtype that Triton does not know
                    logger.debug("the fused kernel for the sums of rows fails: %s", error)
                    fused = None
            _sums_by_operations(now, before, shift, sums[:, part], base_too=base_too)
    return sums[: 4 + base_too].cpu()


def _sums_by_operations(now: Tensor, before: Tensor, shift: Tensor, out: Tensor, *, base_too: bool) -> None:
    """The same sums of one chunk into (5, n) float32."""
    rows, base = now.float(), before.float()
    moved = rows - base
    for place, values in enumerate((rows, moved)):
        torch.linalg.vector_norm(values, dim=-1, out=out[place])
        out[place].square_()
        torch.mv(values, shift, out=out[2 + place])
    if base_too:
        torch.linalg.vector_norm(base, dim=-1, out=out[4])
        out[4].square_()


def sums_by_numpy(
    matrix: RowReader, baseline: Baseline, shift: Tensor, chunk_rows: int, *, base_too: bool = False,
    most_rows: int | None = None,
) -> Tensor:  # fmt: skip
    """`row_sums` for rows on the CPU.

    Args:
        most_rows: rows that are worked on at a time, at most; of those fewer that fit the cache. None: all that are
            read.

    Example:
        >>> from vocabguard.rows.baselines import CopiedBaseline
        >>> now, before = (CopiedBaseline(torch.tensor([row])) for row in ([3.0, 4.0], [3.0, 0.0]))
        >>> sums_by_numpy(now, before, torch.tensor([1.0, 1.0]), chunk_rows=1).flatten().tolist()
        [25.0, 16.0, 7.0, 4.0]
    """
    size = min(chunk_rows, matrix.rows)
    return _summed(matrix, baseline, size, 4 + base_too, lambda: _BlockSums(most_rows, shift.numpy()))


def sums_by_numba(
    matrix: RowReader, baseline: Baseline, shift: Tensor, chunk_rows: int, *, base_too: bool = False
) -> Tensor:
    """`row_sums` for rows on the CPU where numba is installed."""
    size = min(chunk_rows, matrix.rows)
    return _summed(matrix, baseline, size, 5, lambda: _CompiledSums(shift.numpy()))[: 4 + base_too]


def _summed(matrix: RowReader, baseline: Baseline, size: int, kinds: int, make: Callable[[], _Measure]) -> Tensor:
    """The (kinds, V) sums that one measure a thread writes block by block."""
    sums, missing = np.empty((kinds, matrix.rows), dtype=np.float32), np.ones(matrix.rows, dtype=np.bool_)
    pairs, turn = _pairs(matrix, baseline, size), threading.Lock()

    def work() -> None:
        measure = make()
        with np.errstate(all="ignore"):
            while True:
                with turn:
                    pair = next(pairs, None)
                if pair is None:
                    return
                part, now, before = pair
                measure(now, before, sums[:, part])
                missing[part] = False

    threads = min(torch.get_num_threads(), _MOST_THREADS)
    if threads == 1:  # to start another one takes as long as to read some thousand rows
        work()
    else:
        with ThreadPoolExecutor(threads, thread_name_prefix="vocabguard") as pool:
            for done in [pool.submit(work) for _ in range(threads)]:
                done.result()
    sums[:, missing] = np.nan
    return torch.from_numpy(sums)


def _pairs(matrix: RowReader, baseline: Baseline, chunk_rows: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices, rows and baseline rows, as far as there are both."""
    for chunk, rows in matrix.chunks(chunk_rows):
        part = slice(chunk.start, min(chunk.stop, baseline.rows))
        if part.stop <= part.start:
            return
        yield part, rows[: part.stop - part.start], baseline.chunk(part)


class _BlockSums:
    """The sums of rows, a block of at most so many after another, in buffers of one thread."""

    def __init__(self, most_rows: int | None, shift: Floats) -> None:
        self.most_rows, self.buffers = most_rows, np.empty((2, 0), dtype=np.float32)
        self.whole = shift[None, None]
        # In the order of `_split_bfloat16`.
        self.halves = np.stack((shift[0::2], shift[1::2]))[:, None] if len(shift) % 2 == 0 else None

    def __call__(self, now: Tensor, before: Tensor, out: Floats) -> None:
        """Write the (4, n) or (5, n) sums of n rows; see `row_sums`."""
        convert, shift, block = _as_float32, self.whole, _BLOCK
        if now.dtype is before.dtype is torch.bfloat16:
            if torch.get_num_threads() == 1:
                convert, block = _widened, _WIDENED_BLOCK
            elif self.halves is not None:
                convert, shift = _split_bfloat16, self.halves
        width = now.shape[1]
        size = len(now) if self.most_rows is None else min(len(now), self.most_rows, max(1, block // width))
        if self.buffers.shape[1] < size * width:
            self.buffers = np.empty((2, size * width), dtype=np.float32)
        pairs = zip(torch.split(now, size), torch.split(before, size), strict=True)
        for place, (rows, base) in zip(range(0, len(now), size), pairs, strict=True):
            sums = out[:, place : place + len(rows)]
            self._block(convert(rows, self.buffers[0]), convert(base, self.buffers[1]), shift, sums)

    def _block(self, rows: Floats, base: Floats, shift: Floats, out: Floats) -> None:
        if len(out) > 4:
            _dots(base, base, out[4])
        moved = np.subtract(rows, base, out=self.buffers[1, : rows.size].reshape(rows.shape))
        pairs = ((rows, rows), (moved, moved), (rows, shift), (moved, shift))
        for place, (left, right) in enumerate(pairs):
            _dots(left, right, out[place])


def _dots(left: Floats, right: Floats, out: Floats) -> None:
    """Inner products of n rows in one part or in two, (parts, n, width), into (n,)."""
    if len(left) == 1:
        _vecdot(left[0], right[0], out=out)
    else:
        first, second = _vecdot(left, right)
        np.add(first, second, out=out)


def _widened(rows: Tensor, buffer: Floats) -> Floats:
    """(1, n, width) by torch's own conversion, in the fewest steps, but with a barrier where it has threads."""
    converted = buffer[: rows.numel()].reshape(1, *rows.shape)
    torch.from_numpy(converted[0]).copy_(rows)
    return converted


class _CompiledSums:
    """The sums of one block after another by the compiled loop."""

    def __init__(self, shift: Floats) -> None:
        self.shift = np.ascontiguousarray(shift)

    def __call__(self, now: Tensor, before: Tensor, out: Floats) -> None:
        """Write the (5, n) sums of n rows; see `row_sums`."""
        sums = sums_loop(_kind(now, before))
        assert sums is not None
        sums(*_as_kind(now, before), self.shift, out)


_READ = {"elements": 0}
"""Elements that were read without the compiled loops, in this process."""


def worth_compiling(matrix: RowReader) -> bool:
    """Whether a matrix is so large, or was read so often by now, that it pays to load the compiled loops.

    Example:
        >>> from vocabguard.rows.baselines import CopiedBaseline
        >>> worth_compiling(CopiedBaseline(torch.zeros(5000, 4)))
        False
    """
    return matrix.rows * matrix.width >= _WORTH_COMPILING or _READ["elements"] >= _WORTH_COMPILING_BY_NOW


def _kind(now: Tensor, before: Tensor) -> str:
    """As what the compiled loops take such rows."""
    return "bfloat16" if now.dtype is before.dtype is torch.bfloat16 else "float32"


def _are_plain(now: Tensor, before: Tensor) -> bool:
    """Whether the compiled loops can read both where they lie."""
    kinds = now.dtype is before.dtype and now.dtype in (torch.bfloat16, torch.float32)
    return kinds and now.device.type == "cpu" and now.is_contiguous() and before.is_contiguous()


def _as_kind(now: Tensor, before: Tensor) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    convert = _bits if _kind(now, before) == "bfloat16" else _new_float32
    return np.ascontiguousarray(convert(now)), np.ascontiguousarray(convert(before))


def _new_float32(rows: Tensor) -> Floats:
    """(n, width): the rows themselves if they are float32, else a new array."""
    bits = _bits(rows)
    return bits if bits.dtype == np.float32 else _as_float32(rows, np.empty(bits.size, np.float32))[0]


def _as_float32(rows: Tensor, buffer: Floats) -> Floats:
    """(1, n, width): the rows themselves if they are float32, else converted into the buffer."""
    bits = _bits(rows)
    if bits.dtype == np.float32:
        return bits[None]
    converted = buffer[: bits.size].reshape(1, *bits.shape)
    if bits.dtype == np.uint16:
        np.left_shift(bits, 16, out=converted.view(np.uint32)[0], dtype=np.uint32)
    else:
        np.copyto(converted[0], bits, casting="same_kind")
    return converted


def _bits(rows: Tensor) -> npt.NDArray[Any]:
    """CPU rows as an array: bfloat16, which numpy does not know, as uint16; other unknown types converted."""
    if rows.dtype is torch.bfloat16:
        return rows.view(torch.int16).numpy().view(np.uint16)
    return rows.numpy() if rows.dtype in _NUMPY_FLOATS else rows.float().numpy()


def _split_bfloat16(rows: Tensor, buffer: Floats) -> Floats:
    """(2, n, width / 2): the even and the odd elements of bfloat16 rows of even width.

    A bfloat16 is the upper half of a float32, so a word of two becomes two floats by a shift and a mask, in half the
    time of a conversion one by one. Inner products do not mind the order.
    """
    count, width = rows.shape
    halves = buffer[: rows.numel()].reshape(2, count, width // 2)
    words = _bits(rows.contiguous()).view(np.uint32)
    bits = halves.view(np.uint32)
    np.left_shift(words, np.uint32(16), out=bits[0])
    np.bitwise_and(words, np.uint32(0xFFFF0000), out=bits[1])
    return halves
