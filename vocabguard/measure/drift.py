"""How far every row has moved from its baseline: one pass over the rows, then arithmetic on (V,) vectors.

Before it, a sample of the unexposed rows tells their mean displacement s: a shift that all of them share, to which
softmax is blind and which the residual cosine leaves out. Nothing of the matrix's size is allocated.

The pass measures |w|^2 and |d|^2, d = w - w0. The inner product follows by 2 w.w0 = |w|^2 + |w0|^2 - |d|^2, which keeps
1 - cosine exact for rows that hardly moved. The arithmetic is numpy's: see `vocabguard.measure.kernels`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vocabguard.measure.kernels import Floats, RowReader, row_sums, take_rows
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
# A sum of displacements from which on some may have overflowed, or will when they are squared.
_HUGE = 1e15
# Rows gathered at a time: their arrays stay in the cache.
_FEW_ROWS = 64


@dataclass(frozen=True)
class RowPass:
    """What the pass over the rows finds.

    Attributes:
        products: inner products of every row w with its baseline w0.
        moved_sq: (V,) float32, |w - w0|^2. Taken from the products it would drown in their rounding.
        rest: inner products of w - s with w0, for a shift s; None if there is no shift.
    """

    products: RowProducts
    moved_sq: Tensor
    rest: RowProducts | None


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
    shift = mean_shift(matrix, baseline, unexposed, chunk_rows, shift_rows, shard)
    return row_drift(row_products(matrix, baseline, shift, chunk_rows, shard=shard))


def mean_shift(
    matrix: RowReader, baseline: Baseline, unexposed: Tensor, chunk_rows: int = 1024, shift_rows: int = 8192,
    shard: Shard | None = None,
) -> Tensor:  # fmt: skip
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
    _check(matrix, baseline)
    _check_mask("unexposed", unexposed, matrix.rows)
    chosen = evenly(np.flatnonzero(unexposed[: baseline.rows].numpy()), shift_rows)
    total, count = np.zeros(matrix.width), 0
    counted = slice(0, matrix.rows) if shard is None else shard.counted
    for taken, rows, base in _gathered(matrix, baseline, chosen, chunk_rows):
        ids = taken
        with np.errstate(invalid="ignore"):
            moved = np.subtract(rows, base, out=rows)
            chunk_sum = moved.sum(axis=0, dtype=np.float64)
        if not (np.abs(chunk_sum) < _HUGE).all():
            # A row whose length overflows float32 is as bad as one that is not finite.
            with np.errstate(all="ignore"):
                fine = np.isfinite(np.square(moved).sum(axis=1))
            moved, ids = moved[fine], taken[fine]
            chunk_sum = moved.sum(axis=0, dtype=np.float64)
        total += chunk_sum
        count += int(np.count_nonzero((ids >= counted.start) & (ids < counted.stop)))
    if shard is not None:
        *sums, everyone = shard.total(torch.from_numpy(np.append(total, count))).tolist()
        total, count = np.array(sums), int(everyone)
    return torch.from_numpy((total / max(count, 1)).astype(np.float32))


def row_products(
    matrix: RowReader, baseline: Baseline, shift: Tensor, chunk_rows: int = 1024, *, base_too: bool = False,
    shard: Shard | None = None,
) -> RowPass:  # fmt: skip
    """The pass over all rows; a ValueError if the widths differ.

    Args:
        shift: (width,) float32 on the CPU, see `mean_shift`.
        base_too: measure the baseline's norms in the same pass, instead of asking for ``baseline.norms``, which are
            another one if they are not known yet.
        shard: see `measure_drift`; the products are those of all processes' elements then.

    Example:
        >>> from vocabguard.rows.baselines import CopiedBaseline
        >>> now, before = (CopiedBaseline(torch.tensor([row])) for row in ([3.0, 4.0], [3.0, 0.0]))
        >>> found = row_products(now, before, shift=torch.zeros(2))
        >>> found.products.now_sq, found.products.base_sq, found.products.dot, found.moved_sq
        (tensor([25.]), tensor([9.]), tensor([9.]), tensor([16.]))
    """
    _check(matrix, baseline)
    own = row_sums(matrix, baseline, shift, chunk_rows, base_too=base_too)
    # Inner products add up over processes: that of a row that lies in several is the sum of those of its parts.
    sums = (own if shard is None else shard.add_up(own)).numpy()
    now_sq, moved_sq, now_shift, moved_shift = sums[:4]
    base_sq = sums[4] if base_too else np.full_like(now_sq, np.nan)
    if not base_too:
        kept = min(matrix.rows, baseline.rows)
        base_sq[:kept] = np.square(baseline.norms[:kept].numpy())
    shift_sq = float(np.square(shift.numpy(), dtype=np.float64).sum())
    with np.errstate(all="ignore"):
        products = _products(base_sq, now_sq, moved_sq)
        # The same of w - s, whose displacement is d - s.
        rest = _products(base_sq, now_sq + (shift_sq - 2.0 * now_shift), moved_sq + (shift_sq - 2.0 * moved_shift))
        for found, taken_off in ((products, np.zeros_like(shift.numpy())), (rest, shift.numpy())):
            _measure_far(matrix, baseline, found, taken_off, chunk_rows, shard)
    return RowPass(products, torch.from_numpy(moved_sq), rest if shift_sq > 0 else None)


def row_drift(found: RowPass) -> RowDrift:
    """From inner products to cos(w, w0), cos(w - s, w0), |w - w0| and |w| / |w0| of every row.

    Example:
        >>> found = RowProducts(*map(torch.tensor, ([9.0], [9.0], [25.0], [False])))  # w = (3, 4), w0 = (3, 0)
        >>> drift = row_drift(RowPass(found, moved_sq=torch.tensor([16.0]), rest=None))
        >>> drift.cosine, drift.l2, drift.norm_ratio
        (tensor([0.6000]), tensor([4.]), tensor([1.6667]))
    """
    products = found.products
    base_sq, now_sq, bad = products.base_sq.numpy(), products.now_sq.numpy(), products.bad.numpy()
    zero = ((base_sq == 0) | (now_sq == 0)) & ~bad
    with np.errstate(all="ignore"):
        cosine = _cosine(products, zero)
        vectors = {
            "cosine": cosine,
            "residual": cosine if found.rest is None else _cosine(found.rest, zero),
            "l2": np.where(bad, np.float32(np.nan), np.sqrt(found.moved_sq.numpy())),
            "norm_ratio": np.where(bad | zero, np.float32(np.nan), np.sqrt(now_sq / base_sq)),
        }
    return RowDrift(
        **{name: torch.from_numpy(vector) for name, vector in vectors.items()},
        bad=products.bad,
        zero=torch.from_numpy(zero),
    )


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
    if len(ids) == 0:
        return
    few = min(chunk_rows, _FEW_ROWS)
    for part, rows in matrix.chunks(8 * chunk_rows):
        first, last = np.searchsorted(ids, (part.start, part.stop))
        if first == last:
            continue
        base = baseline.chunk(slice(part.start, min(part.stop, baseline.rows)))
        for start in range(first, last, few):
            chosen = ids[start : min(start + few, last)]
            places = chosen - part.start
            yield chosen, take_rows(rows, places), take_rows(base, places)


def evenly(ids: Ids, count: int) -> Ids:
    """At most ``count`` of the ids, evenly spaced, in order.

    >>> evenly(np.arange(10, 20), 4)
    array([10, 12, 15, 17])
    """
    return ids if len(ids) <= count else ids[np.arange(count) * len(ids) // count]


def _products(base_sq: Floats, now_sq: Floats, moved_sq: Floats) -> RowProducts:
    """Inner products from squared lengths; in float64 the rounding that dot and squares share cancels in a cosine."""
    dot = (np.add(base_sq, now_sq, dtype=np.float64) - moved_sq) / 2
    bad = ~np.isfinite(dot)
    vectors = (base_sq, dot.astype(np.float32), np.maximum(now_sq, 0), bad)
    return RowProducts(*(torch.from_numpy(vector) for vector in vectors))


def _measure_far(
    matrix: RowReader, baseline: Baseline, products: RowProducts, shift: Floats, chunk_rows: int, shard: Shard | None
) -> None:
    """Measure anew the rows whose norm changed so much, or whose shift is so long, that the identities lose digits."""
    base_sq, now_sq, ratio_sq = products.base_sq.numpy(), products.now_sq.numpy(), _FAR**2
    shift_sq = float(np.square(shift, dtype=np.float64).sum())
    far = (now_sq > ratio_sq * base_sq) | (base_sq > ratio_sq * now_sq) | (shift_sq > _LONG_SQ * base_sq)
    chosen = np.flatnonzero(far & ~products.bad.numpy())
    if len(chosen) == 0:
        return
    direct = np.zeros((2, len(chosen)), dtype=np.float32)
    for ids, rows, base in _gathered(matrix, baseline, chosen, chunk_rows):
        places = np.searchsorted(chosen, ids)
        rest = rows - _own_shift(shift, ids, shard)
        direct[0, places], direct[1, places] = (rest * base).sum(axis=1), np.square(rest).sum(axis=1)
    if shard is not None:
        direct = shard.total(torch.from_numpy(direct)).numpy()
    products.dot.numpy()[chosen], now_sq[chosen] = direct


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
    lengths = np.sqrt(np.multiply(products.base_sq.numpy(), products.now_sq.numpy(), dtype=np.float64))
    cosine: Floats = np.clip(products.dot.numpy() / lengths, -1, 1).astype(np.float32)
    cosine[products.bad.numpy() | zero | (lengths == 0)] = np.nan
    return cosine


def _check(matrix: RowReader, baseline: Baseline) -> None:
    if matrix.width != baseline.width:
        raise ValueError(f"baseline rows have {baseline.width} elements; the matrix's have {matrix.width}")


def _check_mask(name: str, mask: Tensor, rows: int) -> None:
    if mask.shape != (rows,) or mask.dtype is not torch.bool:
        raise ValueError(f"{name} is {tuple(mask.shape)} {mask.dtype}; allowed: ({rows},) torch.bool")
