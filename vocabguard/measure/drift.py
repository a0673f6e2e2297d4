"""How far every row has moved from its baseline: one pass over the rows, then arithmetic on (V,) vectors.

Before it, a sample of the unexposed rows tells their mean displacement s: a shift that all of them share, to which
softmax is blind and which the residual cosine leaves out. Nothing of the matrix's size is allocated.

The pass measures |w|^2 and |d|^2, d = w - w0. The inner product follows by 2 w.w0 = |w|^2 + |w0|^2 - |d|^2, which keeps
1 - cosine exact for rows that hardly moved. The arithmetic is numpy's: see `vocabguard.measure.kernels`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vocabguard.collective import Talk, together
from vocabguard.measure.compiled import Loop, finish_loop
from vocabguard.measure.kernels import Floats, MovedSum, RowReader, row_sums, rows_at_once, take_rows, worth_compiling
from vocabguard.results import DEGRADED, RowDrift, RowProducts
from vocabguard.rows.baselines import Baseline
from vocabguard.rows.sharding import Shard

Flags = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.int64]

# The second bar of the report that described the failure, beside `DEGRADED`.
_SEVERE = 0.90
# Norm ratio from which on an inner product is measured directly: the identity's rounding grows with the ratio.
_FAR = 4.0
# The same for |s|^2 / |w0|^2, where |w - s|^2 is what is left of far larger numbers.
_LONG_SQ = 2.0
# Rows gathered at a time: their arrays stay in the cache.
_FEW_ROWS = 64
# Rows of which vectors are worked on at a time: what is made on the way stays in the cache.
_BLOCK = 2**14


def measure_drift(
    matrix: RowReader, baseline: Baseline, unexposed: Tensor, chunk_rows: int = 1024, shift_rows: int = 8192,
    shard: Shard | None = None,
) -> RowDrift:  # fmt: skip
    """Measure every row against its baseline.

    Args:
        matrix: the rows now, of any floating dtype, on any device; the baseline comes to it chunk by chunk.
        unexposed: (V,) bool, rows whose mean displacement the residual cosine takes off.
        chunk_rows: rows read at a time; on the CPU, two float32 buffers of at most so many rows a thread are all that
            is allocated besides (V,) vectors.
        shift_rows: as many unexposed rows give that mean; see `mean_shift`.
        shard: the elements that this process has of a matrix that is spread over processes, which measure it together;
            where some rows are here in part, matrix and baseline give zeros in the place of the rest.

    Returns:
        (V,) vectors on the CPU. Cosines are within 1e-6 of float64. Without unexposed rows residual is cosine.

    Raises:
        ValueError: if the widths differ, or ``unexposed`` is not (V,) bool.

    Example:
        Both rows move by (0, 1), which softmax does not see: turned by 45 degrees, and not beyond the shift.

        >>> from vocabguard.rows.baselines import CopiedBaseline
        >>> before, now = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.ones(2, 2)
        >>> drift = measure_drift(CopiedBaseline(now), CopiedBaseline(before), torch.tensor([True, True]))
        >>> drift.cosine, drift.residual, drift.l2
        (tensor([0.7071, 0.7071]), tensor([1., 1.]), tensor([1., 1.]))
    """
    return together([measuring(matrix, baseline, unexposed, chunk_rows, shift_rows, shard)])[0]


def measuring(
    matrix: RowReader, baseline: Baseline, unexposed: Tensor, chunk_rows: int = 1024, shift_rows: int = 8192,
    shard: Shard | None = None,
) -> Talk[RowDrift]:  # fmt: skip
    """`measure_drift` as a work of all processes; see `vocabguard.collective.together`.

    Example:
        >>> from vocabguard.rows.baselines import CopiedBaseline
        >>> before, now = (CopiedBaseline(torch.tensor([row])) for row in ([1.0, 0.0], [0.0, 2.0]))
        >>> nobody = torch.tensor([False])
        >>> [found.cosine.tolist() for found in together([measuring(now, before, nobody), measuring(now, now, nobody)])]
        [[0.0], [1.0]]
    """
    shift = yield from _shifting(matrix, baseline, unexposed, chunk_rows, shift_rows, shard)
    return (yield from _beyond(shift, matrix, baseline, chunk_rows, shard=shard))[0]


def mean_shift(
    matrix: RowReader, baseline: Baseline, unexposed: Tensor, chunk_rows: int = 1024, shift_rows: int = 8192
) -> Tensor:
    """Mean displacement of the unexposed rows, without those that are not finite, overflow or have no baseline.

    Of more than ``shift_rows`` rows, so many evenly spaced ones are read. That spares a second pass over the matrix,
    and changes the mean by about the rows' spread over the root of ``shift_rows``: under 1 % of it.

    Returns (width,) float32 on the CPU, zero if there are no such rows; raises as `measure_drift` does.

    Example:
        >>> from vocabguard.rows.baselines import CopiedBaseline
        >>> before, now = torch.zeros(3, 2), torch.tensor([[1.0, 0.0], [3.0, 0.0], [9.0, 9.0]])
        >>> mean_shift(CopiedBaseline(now), CopiedBaseline(before), torch.tensor([True, True, False])).tolist()
        [2.0, 0.0]
    """
    return together([_shifting(matrix, baseline, unexposed, chunk_rows, shift_rows, None)])[0]


def _shifting(
    matrix: RowReader, baseline: Baseline, unexposed: Tensor, chunk_rows: int, shift_rows: int, shard: Shard | None
) -> Talk[Tensor]:
    _check(matrix, baseline)
    _check_mask("unexposed", unexposed, matrix.rows)
    chosen = evenly(np.flatnonzero(unexposed[: baseline.rows].numpy()), shift_rows)
    counted = slice(0, matrix.rows) if shard is None else shard.counted
    # Rows of which this process has the beginning, which it counts, and rows that another one counts.
    moved, others = MovedSum(matrix), MovedSum(matrix)
    size = rows_at_once(matrix, baseline, 8 * chunk_rows)
    for places, rows, base, first in _parts(matrix, baseline, chosen, size):
        own = (places >= counted.start - first) & (places < counted.stop - first)
        moved.add(rows, base, places[own])
        others.add(rows, base, places[~own])
    total, count = moved.total + others.total, moved.count
    if shard is not None:
        *sums, everyone = (yield shard.told(torch.from_numpy(np.append(total, count)))).tolist()
        total, count = np.array(sums), int(everyone)
    return torch.from_numpy((total / max(count, 1)).astype(np.float32))


def drift_beyond(
    shift: Tensor, matrix: RowReader, baseline: Baseline, chunk_rows: int = 1024, *, base_too: bool = False
) -> tuple[RowDrift, Tensor]:
    """The pass over all rows: their drift, and (V,) float32 squared lengths of the baseline's rows.

    Args:
        shift: (width,) float32 on the CPU, taken off for the residual cosine; see `mean_shift`.
        base_too: measure the baseline's norms in the same pass, instead of asking for ``baseline.norms``, which are
            another one if they are not known yet.

    Raises:
        ValueError: if the widths differ.

    Example:
        >>> from vocabguard.rows.baselines import CopiedBaseline
        >>> now, before = (CopiedBaseline(torch.tensor([row])) for row in ([3.0, 4.0], [3.0, 0.0]))
        >>> drift, base_sq = drift_beyond(torch.zeros(2), now, before)
        >>> drift.cosine, drift.l2, drift.norm_ratio, base_sq
        (tensor([0.6000]), tensor([4.]), tensor([1.6667]), tensor([9.]))
    """
    return together([_beyond(shift, matrix, baseline, chunk_rows, base_too=base_too)])[0]


def _beyond(
    shift: Tensor, matrix: RowReader, baseline: Baseline, chunk_rows: int, *, base_too: bool = False,
    shard: Shard | None = None,
) -> Talk[tuple[RowDrift, Tensor]]:  # fmt: skip
    _check(matrix, baseline)
    own = row_sums(matrix, baseline, shift, chunk_rows, base_too=base_too)
    base_sq = own.numpy()[4] if base_too else np.full(matrix.rows, np.nan, dtype=np.float32)
    if not base_too:
        kept = min(matrix.rows, baseline.rows)
        np.square(baseline.norms[:kept].numpy(), out=base_sq[:kept])
    passed = _Pass(matrix, baseline, shift.numpy(), chunk_rows, base_sq, own.numpy(), shard)
    if shard is not None:
        passed = yield from passed.of_all_processes(shard)
    # Processes measure the same rows with more care, so they all choose them by the same arithmetic.
    finish = finish_loop() if shard is None and worth_compiling(matrix) else None
    found = yield from passed.drift_of(None) if finish is None else passed.drift_by(finish)
    return RowDrift(*(torch.from_numpy(vector) for vector in found)), torch.from_numpy(base_sq)


@dataclass(frozen=True)
class _Pass:
    """What the pass over the rows found: w0.w0 of (V,) rows, and the (4, V) or (5, V) sums of `row_sums`.

    Where each process has worked out the residual cosine of its rows, the (2, V) first sums, and that.
    """

    matrix: RowReader
    baseline: Baseline
    shift: Floats
    chunk_rows: int
    base_sq: Floats
    sums: Floats
    shard: Shard | None
    residual: Floats | None = None

    def of_all_processes(self, shard: Shard) -> Talk[_Pass]:
        """The same with the sums of all processes.

        Inner products add up: that of a row that lies in several processes is the sum of those of its parts. Of whole
        rows each process works out the residual cosine by itself, and tells that one number instead of two.
        """
        sums = torch.from_numpy(self.sums)
        if not shard.apart:
            return replace(self, sums=(yield from shard.adding_up(sums)).numpy())
        told = sums[:2]
        if self.shift_sq > 0:
            ids, alone = np.arange(shard.part.start, shard.part.stop), replace(self, shard=None)
            residual = torch.zeros_like(sums[:1])
            residual[0, shard.part] = torch.from_numpy(together([alone.drift_of(ids)])[0][1])
            told = torch.cat([told, residual])
        found = (yield from shard.adding_up(told)).numpy()
        return replace(self, sums=found[:2], residual=found[2] if self.shift_sq > 0 else None)

    @cached_property
    def shift_sq(self) -> float:
        return float(np.square(self.shift, dtype=np.float64).sum())

    def drift_by(self, finish: Loop) -> Talk[list[npt.NDArray[Any]]]:
        """The vectors of `RowDrift`: the compiled loop leaves out rows that want more care, as a rule none or a few."""
        rows = len(self.base_sq)
        vectors: list[npt.NDArray[Any]] = [np.empty(rows, dtype=np.float32) for _ in range(4)]
        careful = np.empty(rows, dtype=np.bool_)
        limits = (np.float32(self.shift_sq), np.float32(_FAR**2), np.float32(_LONG_SQ))
        with _quiet():
            finish(self.base_sq, self.sums, *limits, *vectors, careful)
        vectors += [np.zeros(rows, dtype=np.bool_) for _ in range(2)]
        if len(ids := np.flatnonzero(careful)):
            for vector, found in zip(vectors, (yield from self.drift_of(ids)), strict=True):
                vector[ids] = found
        return vectors

    def drift_of(self, ids: Ids | None) -> Talk[list[npt.NDArray[Any]]]:
        """The vectors of `RowDrift`, of some rows; None: of all."""
        chosen = slice(None) if ids is None else ids
        base_sq, (now_sq, moved_sq) = self.base_sq[chosen], self.sums[:2, chosen]
        products = yield from self._products(ids, base_sq, now_sq, moved_sq, np.zeros_like(self.shift))
        bad, now_sq = products.bad.numpy(), products.now_sq.numpy()
        zero = ((base_sq == 0) | (now_sq == 0)) & ~bad
        cosine = residual = _cosine(products, zero)
        if self.residual is not None:
            residual = self.residual[chosen]
        elif self.shift_sq > 0:
            # The same of w - s, whose displacement is d - s.
            with _quiet():
                now_left, moved_left = self.sums[:2, chosen] + (self.shift_sq - 2.0 * self.sums[2:4, chosen])
            left = yield from self._products(ids, base_sq, now_left, moved_left, self.shift)
            residual = _cosine(left, zero)
        with _quiet():
            length = np.where(bad, np.float32(np.nan), np.sqrt(moved_sq))
            ratio = np.where(bad | zero, np.float32(np.nan), np.sqrt(now_sq / base_sq))
        return [cosine, residual, length, ratio, bad, zero]

    def _products(
        self, ids: Ids | None, base_sq: Floats, now_sq: Floats, moved_sq: Floats, shift: Floats
    ) -> Talk[RowProducts]:
        """Inner products of rows less a shift, with those measured anew for which the identities lose digits."""
        found = _products(base_sq, now_sq, moved_sq)
        dot, now_sq = found.dot.numpy(), found.now_sq.numpy()
        shift_sq, ratio_sq = float(np.square(shift, dtype=np.float64).sum()), _FAR**2
        with _quiet():
            # Rows whose norm changed so much, or whose shift is so long.
            far = (now_sq > ratio_sq * base_sq) | (base_sq > ratio_sq * now_sq) | (shift_sq > _LONG_SQ * base_sq)
        anew = np.flatnonzero(far & ~found.bad.numpy())
        if len(anew) == 0:
            return found
        direct, wanted = np.zeros((2, len(anew)), dtype=np.float32), anew if ids is None else ids[anew]
        for chosen, rows, base in _gathered(self.matrix, self.baseline, wanted, self.chunk_rows):
            places = np.searchsorted(wanted, chosen)
            with _quiet():
                rest = rows - _own_shift(shift, chosen, self.shard)
                direct[0, places], direct[1, places] = (rest * base).sum(axis=1), np.square(rest).sum(axis=1)
        if self.shard is not None:
            direct = (yield self.shard.told(torch.from_numpy(direct))).numpy()
        dot[anew], now_sq[anew] = direct
        return found


def summarise(drift: RowDrift, live: Tensor, parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Flat scalars of one matrix, over its live, finite, non-zero rows; a ValueError for a mask that is not (V,) bool.

    Keys: ``cosine_mean``, ``cosine_min``, ``cosine_p01``, ``residual_p01`` (1 % quantiles by linear interpolation),
    ``below_0.95``, ``below_0.90`` (shares in [0, 1] of rows with a cosine below); ``<part>/...`` the same for each part
    (groups, exposure classes) that has such rows; ``nonfinite_rows`` and ``zero_rows``, counts among the live rows.
    Without any such row there are only the counts.

    Example:
        >>> cosine, yes, no = torch.tensor([1.0, 0.9, 0.8]), torch.ones(3).bool(), torch.zeros(3).bool()
        >>> drift = RowDrift(cosine, cosine, 1 - cosine, cosine, bad=no, zero=no)
        >>> found = summarise(drift, live=yes, parts={"ja": torch.tensor([False, False, True])})
        >>> [round(found[key], 3) for key in ("cosine_mean", "cosine_min", "below_0.95", "ja/cosine_mean")]
        [0.9, 0.8, 0.667, 0.8]
    """
    for name, mask in {"live": live, **parts}.items():
        _check_mask(name, mask, drift.cosine.numel())
    bad, zero, lives = drift.bad.numpy(), drift.zero.numpy(), live.numpy()
    usable = lives & ~bad & ~zero
    scalars = _describe(drift, usable)
    for name, mask in parts.items():
        scalars |= {f"{name}/{key}": value for key, value in _describe(drift, usable & mask.numpy()).items()}
    scalars["nonfinite_rows"] = float(np.count_nonzero(lives & bad))
    scalars["zero_rows"] = float(np.count_nonzero(lives & zero))
    return scalars


def _describe(drift: RowDrift, chosen: Flags) -> dict[str, float]:
    cosine, residual = drift.cosine.numpy()[chosen], drift.residual.numpy()[chosen]
    if cosine.size == 0:
        return {}
    residual = residual[np.isfinite(residual)]
    return {
        "cosine_mean": float(cosine.mean(dtype=np.float64)),
        "cosine_min": float(cosine.min()),
        "cosine_p01": float(np.quantile(cosine, 0.01)),
        "residual_p01": float(np.quantile(residual, 0.01)) if residual.size else math.nan,
        "below_0.95": float(np.mean(cosine < DEGRADED)),
        "below_0.90": float(np.mean(cosine < _SEVERE)),
    }


def _gathered(matrix: RowReader, baseline: Baseline, ids: Ids, chunk_rows: int) -> Iterator[tuple[Ids, Floats, Floats]]:
    """A few of the ids at a time, their rows and their baseline rows in new float32 arrays.

    Only those rows are copied, so chunks may be larger here, which saves calls.
    """
    few = min(chunk_rows, _FEW_ROWS)
    for places, rows, base, first in _parts(matrix, baseline, ids, 8 * chunk_rows):
        for start in range(0, len(places), few):
            chosen = places[start : start + few]
            yield first + chosen, take_rows(rows, chosen), take_rows(base, chosen)


def _parts(matrix: RowReader, baseline: Baseline, ids: Ids, size: int) -> Iterator[tuple[Ids, Tensor, Tensor, int]]:
    """Blocks of rows that hold some of the ids: those ids' places in the block, rows, baseline rows, the first row."""
    if len(ids) == 0:
        return
    for part, rows in matrix.chunks(size):
        first, last = np.searchsorted(ids, (part.start, part.stop))
        if first < last:
            base = baseline.chunk(slice(part.start, min(part.stop, baseline.rows)))
            yield ids[first:last] - part.start, rows, base, part.start


def evenly(ids: Ids, count: int) -> Ids:
    """At most ``count`` of the ids, evenly spaced, in order.

    >>> evenly(np.arange(10, 20), 4)
    array([10, 12, 15, 17])
    """
    return ids if len(ids) <= count else ids[np.arange(count) * len(ids) // count]


def _quiet() -> Any:
    """What is not finite is told as such. Not around a `yield`: other work goes on there."""
    return np.errstate(all="ignore")


def _products(base_sq: Floats, now_sq: Floats, moved_sq: Floats) -> RowProducts:
    """Inner products from squared lengths; in float64 the rounding that dot and squares share cancels in a cosine."""
    dot, bad = np.empty_like(now_sq), np.empty(now_sq.shape, dtype=np.bool_)
    with _quiet():
        for part in _blocks(len(now_sq)):
            wide = np.add(base_sq[part], now_sq[part], dtype=np.float64)
            wide -= moved_sq[part]
            wide /= 2
            dot[part], bad[part] = wide, ~np.isfinite(wide)
    return RowProducts(*(torch.from_numpy(vector) for vector in (base_sq, dot, np.maximum(now_sq, 0), bad)))


def _own_shift(shift: Floats, ids: Ids, shard: Shard | None) -> Floats:
    """The shift of some rows: of one that lies here in part, as far as it does."""
    if shard is None or not shard.partial:
        return shift
    whole = torch.from_numpy(shift)[None]
    if shard.columns is not None:
        return shard.only(slice(0, 1), whole).numpy()
    return np.concatenate([shard.only(slice(one, one + 1), whole).numpy() for one in ids.tolist()])


def _cosine(products: RowProducts, zero: Flags) -> Floats:
    """(V,) float32 in [-1, 1]; NaN where bad, zero or without direction."""
    base_sq, now_sq, dot = products.base_sq.numpy(), products.now_sq.numpy(), products.dot.numpy()
    unknown = products.bad.numpy() | zero
    cosine = np.empty_like(dot)
    with _quiet():
        for part in _blocks(len(dot)):
            wide = np.multiply(base_sq[part], now_sq[part], dtype=np.float64)
            np.sqrt(wide, out=wide)
            unknown[part] |= wide == 0
            np.divide(dot[part], wide, out=wide)
            cosine[part] = np.clip(wide, -1, 1, out=wide)
    cosine[unknown] = np.nan
    return cosine


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, rows, _BLOCK))


def _check(matrix: RowReader, baseline: Baseline) -> None:
    if matrix.width != baseline.width:
        raise ValueError(f"baseline rows have {baseline.width} elements; the matrix's have {matrix.width}")


def _check_mask(name: str, mask: Tensor, rows: int) -> None:
    if mask.shape != (rows,) or mask.dtype is not torch.bool:
        raise ValueError(f"{name} is {tuple(mask.shape)} {mask.dtype}; allowed: ({rows},) torch.bool")
