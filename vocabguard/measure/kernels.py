"""A few inner products of every row in one pass: what a drift check spends its time on.

On the CPU the arithmetic of large matrices is one compiled loop where numba is installed (`kernel`),
and numpy's otherwise, in a few threads of its own. A torch operation on a block that fits a cache is
split between all cores: each ends in a barrier, so that a check takes ten times as long once another process holds a
core, and rows wander between the cores' caches. A numpy call stays on its core and lets other threads run; every block
is taken, measured and dropped by one of them, and torch's thread settings are left alone. On an accelerator the
arithmetic is torch's.
"""

from __future__ import annotations

import functools
import importlib
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

from vocabguard.rows.baselines import Baseline
from vocabguard.rows.streams import on_device

Sums = Callable[[Any, Any, Any, Any], None]
"""Rows now, baseline rows (both (n, width) uint16 of bfloat16, or both float32), shift, (5, n) float32 to fill."""

logger = logging.getLogger(__name__)

_ROWS = {"bfloat16": "uint16[:,::1]", "float32": "float32[:,::1]"}
# Sums may be taken in any order, which vector instructions need; NaN and Inf stay what they are.
_FAST = {"reassoc", "nsz", "contract"}


@functools.cache
def kernel(kind: str) -> Sums | None:
    """The compiled loop for rows of one kind; None where there is no numba, or it fails.

    Compiling takes about a second, once: numba keeps the result beside this file or in the user's cache folder. The
    loop lets other threads run. It writes w.w, d.d, w.s, d.s and w0.w0 of n rows w and w0, with d = w - w0, accumulated
    in float32.

    Args:
        kind: ``bfloat16`` or ``float32``.
    """
    signature = f"void({_ROWS[kind]}, {_ROWS[kind]}, float32[::1], float32[:,:])"
    try:
        numba: Any = importlib.import_module("numba")
    except Exception:  # a numba that does not fit this numpy raises other things than ImportError
        return None
    for cache in (True, False):
        try:
            compiled: Sums = numba.njit(signature, nogil=True, cache=cache, fastmath=_FAST)(_LOOPS[kind])
        except Exception as error:  # no folder to write to, no compiler for this machine
            logger.debug("numba cannot compile the sums of rows (cache: %s): %s", cache, error)
        else:
            return compiled
    return None


def _bfloat16(
    now: npt.NDArray[np.uint16], base: npt.NDArray[np.uint16], shift: npt.NDArray[np.float32], out: Any
) -> None:
    rows, width = now.shape
    # A bfloat16 is the upper half of a float32.
    words = np.empty((2, width), np.uint32)
    wide = words.view(np.float32)
    for row in range(rows):
        for place in range(width):
            words[0, place] = np.uint32(now[row, place]) << np.uint32(16)
            words[1, place] = np.uint32(base[row, place]) << np.uint32(16)
        now_sq = moved_sq = now_shift = moved_shift = base_sq = np.float32(0)
        for place in range(width):
            moved = wide[0, place] - wide[1, place]
            now_sq += wide[0, place] * wide[0, place]
            moved_sq += moved * moved
            now_shift += wide[0, place] * shift[place]
            moved_shift += moved * shift[place]
            base_sq += wide[1, place] * wide[1, place]
        out[0, row], out[1, row], out[2, row] = now_sq, moved_sq, now_shift
        out[3, row], out[4, row] = moved_shift, base_sq


def _float32(
    now: npt.NDArray[np.float32], base: npt.NDArray[np.float32], shift: npt.NDArray[np.float32], out: Any
) -> None:
    for row in range(now.shape[0]):
        now_sq = moved_sq = now_shift = moved_shift = base_sq = np.float32(0)
        for place in range(now.shape[1]):
            moved = now[row, place] - base[row, place]
            now_sq += now[row, place] * now[row, place]
            moved_sq += moved * moved
            now_shift += now[row, place] * shift[place]
            moved_shift += moved * shift[place]
            base_sq += base[row, place] * base[row, place]
        out[0, row], out[1, row], out[2, row] = now_sq, moved_sq, now_shift
        out[3, row], out[4, row] = moved_shift, base_sq


_LOOPS: dict[str, Callable[..., None]] = {"bfloat16": _bfloat16, "float32": _float32}


Floats = npt.NDArray[np.float32]
_Measure = Callable[[Tensor, Tensor, Floats], None]

_NUMPY_FLOATS = (torch.float16, torch.float32, torch.float64)
# Elements of a block: two float32 buffers of it, 4 MiB a thread, stay in the cache, and calls are few.
_BLOCK = 2**19
# Elements of a block for the compiled loop, which has no buffers: few calls matter more.
_COMPILED_BLOCK = 2**20
# Elements of a matrix from which on it pays to load the compiled loop, which takes about half a second.
_WORTH_COMPILING = 2**26
# More threads than this wait for each other and for the memory.
_MOST_THREADS = 4
# numpy < 2 has no vecdot, which takes half the time.
_vecdot: Any = getattr(np, "vecdot", None) or (lambda left, right: np.einsum("...i,...i->...", left, right))


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
    # Of a matrix that is spread over processes, this one's first row.
    part, first = next(matrix.chunks(1), (slice(0, 0), torch.empty(0)))
    if first.device.type != "cpu":
        return sums_by_torch(matrix, baseline, shift.to(first.device), chunk_rows, base_too=base_too)
    before = baseline.chunk(part) if part.start < baseline.rows else first
    both = first.dtype is before.dtype is torch.bfloat16
    by, block = sums_by_numpy, _BLOCK
    if matrix.rows * matrix.width >= _WORTH_COMPILING and kernel("bfloat16" if both else "float32") is not None:
        by, block = sums_by_numba, _COMPILED_BLOCK
    return by(matrix, baseline, shift, min(chunk_rows, max(1, block // matrix.width)), base_too=base_too)


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
    matrix: RowReader, baseline: Baseline, shift: Tensor, chunk_rows: int, *, base_too: bool = False
) -> Tensor:
    """`row_sums` for rows on the CPU.

    Example:
        >>> from vocabguard.rows.baselines import CopiedBaseline
        >>> now, before = (CopiedBaseline(torch.tensor([row])) for row in ([3.0, 4.0], [3.0, 0.0]))
        >>> sums_by_numpy(now, before, torch.tensor([1.0, 1.0]), chunk_rows=1).flatten().tolist()
        [25.0, 16.0, 7.0, 4.0]
    """
    size = min(chunk_rows, matrix.rows)
    return _summed(matrix, baseline, size, 4 + base_too, lambda: _BlockSums(size, shift.numpy()))


def sums_by_numba(
    matrix: RowReader, baseline: Baseline, shift: Tensor, chunk_rows: int, *, base_too: bool = False
) -> Tensor:
    """`row_sums` for rows on the CPU where numba is installed."""
    size = min(chunk_rows, matrix.rows)
    return _summed(matrix, baseline, size, 5, lambda: _CompiledSums(shift.numpy()))[: 4 + base_too]


def _summed(matrix: RowReader, baseline: Baseline, size: int, kinds: int, make: Callable[[], _Measure]) -> Tensor:
    """The (kinds, V) sums that one measure a thread writes block by block."""
    sums = np.full((kinds, matrix.rows), np.nan, dtype=np.float32)
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

    threads = min(torch.get_num_threads(), _MOST_THREADS)
    with ThreadPoolExecutor(threads, thread_name_prefix="vocabguard") as pool:
        for done in [pool.submit(work) for _ in range(threads)]:
            done.result()
    return torch.from_numpy(sums)


def _pairs(matrix: RowReader, baseline: Baseline, chunk_rows: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices, rows and baseline rows, as far as there are both."""
    for chunk, rows in matrix.chunks(chunk_rows):
        part = slice(chunk.start, min(chunk.stop, baseline.rows))
        if part.stop <= part.start:
            return
        yield part, rows[: part.stop - part.start], baseline.chunk(part)


class _BlockSums:
    """The sums of one block after another of at most so many rows, in buffers of one thread."""

    def __init__(self, most_rows: int, shift: Floats) -> None:
        self.buffers = np.empty((2, most_rows * len(shift)), dtype=np.float32)
        self.whole = shift[None, None]
        # In the order of `_split_bfloat16`.
        self.halves = np.stack((shift[0::2], shift[1::2]))[:, None] if len(shift) % 2 == 0 else None

    def __call__(self, now: Tensor, before: Tensor, out: Floats) -> None:
        """Write the (4, n) or (5, n) sums of n rows; see `row_sums`."""
        split = self.halves is not None and now.dtype is before.dtype is torch.bfloat16
        convert, shift = (_split_bfloat16, self.halves) if split else (_as_float32, self.whole)
        rows, base = convert(now, self.buffers[0]), convert(before, self.buffers[1])
        if len(out) > 4:
            np.add.reduce(_vecdot(base, base), axis=0, out=out[4])
        moved = np.subtract(rows, base, out=self.buffers[1, : rows.size].reshape(rows.shape))
        pairs = ((rows, rows), (moved, moved), (rows, shift), (moved, shift))
        for place, (left, right) in enumerate(pairs):
            np.add.reduce(_vecdot(left, right), axis=0, out=out[place])


class _CompiledSums:
    """The sums of one block after another by the compiled loop."""

    def __init__(self, shift: Floats) -> None:
        self.shift = np.ascontiguousarray(shift)

    def __call__(self, now: Tensor, before: Tensor, out: Floats) -> None:
        """Write the (5, n) sums of n rows; see `row_sums`."""
        both = now.dtype is before.dtype is torch.bfloat16
        sums: Sums | None = kernel("bfloat16" if both else "float32")
        assert sums is not None
        convert = _bits if both else _new_float32
        rows, base = (np.ascontiguousarray(convert(of)) for of in (now, before))
        sums(rows, base, self.shift, out)


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
