"""How far every row has moved from its baseline: one pass over chunks of rows, then arithmetic on (V,) vectors.

Before it, a sample of the unexposed rows tells their mean displacement: a shift that all of them share and to which
softmax is blind and which the residual cosine leaves out. Nothing of the matrix's size is allocated.

The pass measures lengths only: |w|, |w - w0|, and both once more without the shift. Inner products follow from them by
the polarisation identity 2 w.w0 = |w|^2 + |w0|^2 - |w - w0|^2, so that 1 - cosine stays exact for rows that hardly
moved. Lengths also run on all cores, and on each core over rows that it has in its cache, where a matrix-vector product
would not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vector_norm

from vocabguard.results import RowDrift, RowProducts
from vocabguard.snapshot import Baseline

_DEGRADED, _SEVERE = 0.95, 0.90
# Norm ratio from which on an inner product is measured directly: the identity's rounding grows with the ratio.
_FAR = 4.0


class Rows(Protocol):
    """Rows that can be read in chunks: a `VocabMatrix`, or a `CopiedBaseline` around a plain tensor."""

    @property
    def rows(self) -> int:
        """V."""

    @property
    def width(self) -> int:
        """Elements a row."""

    def chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Slices of at most ``size`` rows and the rows themselves, in order."""


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
    matrix: Rows, baseline: Baseline, unexposed: Tensor, chunk_rows: int = 1024, shift_rows: int = 8192
) -> RowDrift:
    """Measure every row against its baseline.

    Args:
        matrix: the rows now, of any floating dtype, on any device.
        baseline: the rows before; brought to the matrix's device chunk by chunk.
        unexposed: (V,) bool, rows whose mean displacement the residual cosine takes off.
        chunk_rows: rows read at a time; two float32 buffers of ``chunk_rows * width`` are all that is allocated
            besides (V,) vectors.
        shift_rows: as many unexposed rows give that mean; see `mean_shift`.

    Returns:
        (V,) vectors on the CPU. Cosines are within 1e-6 of float64. Without unexposed rows residual is cosine.

    Raises:
        ValueError: if the widths differ, or ``unexposed`` is not (V,) bool.
    """
    shift = mean_shift(matrix, baseline, unexposed, chunk_rows, shift_rows)
    return row_drift(row_products(matrix, baseline, shift, chunk_rows))


@torch.no_grad()
def mean_shift(
    matrix: Rows, baseline: Baseline, unexposed: Tensor, chunk_rows: int = 1024, shift_rows: int = 8192
) -> Tensor:
    """Mean displacement of the unexposed rows, without those that are not finite or have no baseline.

    Of more than ``shift_rows`` rows, so many evenly spaced ones are read. That spares a second pass over the matrix,
    and changes the mean by about the rows' spread over the root of ``shift_rows``: under 1 % of it.

    Args:
        matrix: the rows now.
        baseline: the rows before.
        unexposed: (V,) bool.
        chunk_rows: rows read at a time.
        shift_rows: most rows to use.

    Returns:
        (width,) float32 on the CPU; zero if there are no such rows.

    Raises:
        ValueError: if the widths differ, or ``unexposed`` is not (V,) bool.
    """
    _check(matrix, baseline)
    _check_mask("unexposed", unexposed, matrix.rows)
    chosen = _evenly(unexposed[: baseline.rows].nonzero().flatten(), shift_rows)
    total, count = torch.zeros(matrix.width, dtype=torch.float64), 0
    # Only the chosen rows are copied, so chunks may be larger here, which saves calls.
    for part, rows in matrix.chunks(8 * chunk_rows):
        first, last = torch.searchsorted(chosen, torch.tensor([part.start, part.stop])).tolist()
        if first == last:
            continue
        ids = chosen[first:last] - part.start
        base = baseline.chunk(slice(part.start, min(part.stop, baseline.rows))).index_select(0, ids)
        moved = rows.index_select(0, ids.to(rows.device)).cpu().float().sub_(base.float())
        chunk_sum = moved.sum(dim=0)
        if not chunk_sum.isfinite().all():
            moved = moved[moved.isfinite().all(dim=1)]
            chunk_sum = moved.sum(dim=0)
        total += chunk_sum
        count += len(moved)
    return (total / max(count, 1)).float()


@torch.no_grad()
def row_products(matrix: Rows, baseline: Baseline, shift: Tensor, chunk_rows: int = 1024) -> RowPass:
    """The pass over all rows.

    Args:
        matrix: the rows now.
        baseline: the rows before.
        shift: (width,) float32, see `mean_shift`; zero spares half of the work.
        chunk_rows: rows read at a time.

    Raises:
        ValueError: if the widths differ.
    """
    _check(matrix, baseline)
    device = _device(matrix)
    shifts = [torch.zeros_like(shift)] + ([shift] if shift.any() else [])
    now, moved = torch.full((2, len(shifts), matrix.rows), math.nan, device=device)
    direction = shift.to(device)
    for part, rows, base, spare, other in _pairs(matrix, baseline, chunk_rows):
        difference = torch.sub(rows, base, out=other)
        vector_norm(difference, dim=-1, out=moved[0, part])
        vector_norm(rows, dim=-1, out=now[0, part])
        if len(shifts) == 2:
            vector_norm(difference.sub_(direction), dim=-1, out=moved[1, part])
            vector_norm(torch.sub(rows, direction, out=spare), dim=-1, out=now[1, part])
    base_sq = _padded(baseline.norms, matrix.rows).square()
    now_sq, moved_sq = now.cpu().square(), moved.cpu().square()
    products = [_products(base_sq, *squares) for squares in zip(now_sq, moved_sq, strict=True)]
    for found, taken_off in zip(products, shifts, strict=True):
        _measure_far(matrix, baseline, found, taken_off, chunk_rows)
    return RowPass(products[0], moved_sq[0], products[1] if len(products) == 2 else None)


def row_drift(found: RowPass) -> RowDrift:
    """From inner products to cosines and lengths.

    Args:
        found: what the pass over the rows found.

    Returns:
        cos(w, w0), cos(w - s, w0), |w - w0| and |w| / |w0| of every row.
    """
    products = found.products
    bad = products.bad
    zero = ((products.base_sq == 0) | (products.now_sq == 0)) & ~bad
    cosine = _cosine(products).masked_fill(zero, math.nan)
    return RowDrift(
        cosine=cosine,
        residual=cosine if found.rest is None else _cosine(found.rest).masked_fill(zero, math.nan),
        l2=found.moved_sq.sqrt().masked_fill(bad, math.nan),
        norm_ratio=(products.now_sq / products.base_sq).sqrt().masked_fill(bad | zero, math.nan),
        bad=bad,
        zero=zero,
    )


def summarise(drift: RowDrift, live: Tensor, parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Flat scalars of one matrix, over its live, finite, non-zero rows.

    Keys: ``cosine_mean``, ``cosine_min``, ``cosine_p01``, ``residual_p01`` (1 % quantiles by linear interpolation),
    ``below_0.95``, ``below_0.90`` (shares in [0, 1] of rows with a cosine below); ``<part>/...`` the same for each part
    that has such rows; ``nonfinite_rows`` and ``zero_rows``, counts among the live rows. Without any such row there are
    only the counts.

    Args:
        drift: of V rows.
        live: (V,) bool.
        parts: (V,) bool masks by name, such as groups and exposure classes.

    Raises:
        ValueError: for a mask that is not (V,) bool.
    """
    for name, mask in {"live": live, **parts}.items():
        _check_mask(name, mask, drift.cosine.numel())
    usable = live & ~drift.bad & ~drift.zero
    scalars = _describe(drift, usable)
    for name, mask in parts.items():
        scalars |= {f"{name}/{key}": value for key, value in _describe(drift, usable & mask).items()}
    scalars["nonfinite_rows"] = float((live & drift.bad).sum())
    scalars["zero_rows"] = float((live & drift.zero).sum())
    return scalars


def _describe(drift: RowDrift, chosen: Tensor) -> dict[str, float]:
    cosine, residual = drift.cosine[chosen], drift.residual[chosen]
    if cosine.numel() == 0:
        return {}
    return {
        "cosine_mean": float(cosine.double().mean()),
        "cosine_min": float(cosine.min()),
        "cosine_p01": _percentile(cosine),
        "residual_p01": _percentile(residual[residual.isfinite()]),
        "below_0.95": float((cosine < _DEGRADED).double().mean()),
        "below_0.90": float((cosine < _SEVERE).double().mean()),
    }


def _percentile(values: Tensor) -> float:
    """1 % quantile; by partition, many times faster than the sort in ``torch.quantile``."""
    return float(np.quantile(values.numpy(), 0.01)) if values.numel() else math.nan


def _pairs(matrix: Rows, baseline: Baseline, chunk_rows: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """Slice, rows and baseline rows in float32, and for each of the two a buffer that may be written over.

    Float32 chunks are passed on as they are; others are converted into the buffers, which stay in the cache.
    """
    shape, device = (min(chunk_rows, matrix.rows), matrix.width), _device(matrix)
    buffers = [torch.empty(shape, device=device) for _ in range(2)]
    for chunk, now in matrix.chunks(chunk_rows):
        stop = min(chunk.stop, baseline.rows)
        if stop <= chunk.start:
            return
        part = slice(chunk.start, stop)
        spare, other = (buffer[: stop - chunk.start] for buffer in buffers)
        base = baseline.chunk(part).to(device)
        yield part, _float32(now[: stop - chunk.start], spare), _float32(base, other), spare, other


def _float32(rows: Tensor, buffer: Tensor) -> Tensor:
    return rows if rows.dtype is torch.float32 else buffer.copy_(rows)


def _evenly(ids: Tensor, count: int) -> Tensor:
    """At most ``count`` of the ids, evenly spaced, in order."""
    if len(ids) <= count:
        return ids
    return ids[torch.arange(count) * len(ids) // count]


def _products(base_sq: Tensor, now_sq: Tensor, moved_sq: Tensor) -> RowProducts:
    """Inner products from squared lengths; in float64 the rounding that dot and squares share cancels in a cosine."""
    dot = (base_sq.double() + now_sq.double() - moved_sq.double()).div_(2).float()
    return RowProducts(base_sq, dot, now_sq, bad=~(base_sq + now_sq + moved_sq).isfinite())


def _measure_far(matrix: Rows, baseline: Baseline, products: RowProducts, shift: Tensor, chunk_rows: int) -> None:
    """Measure the inner products of rows whose norm changed so much that the identity loses digits."""
    base_sq, now_sq, ratio_sq = products.base_sq, products.now_sq, _FAR**2
    far = ((now_sq > ratio_sq * base_sq) | (base_sq > ratio_sq * now_sq)) & ~products.bad
    if not far.any():
        return
    for part, rows, base, *_ in _pairs(matrix, baseline, chunk_rows):
        if far[part].any():
            direct = ((rows - shift.to(rows.device)) * base).sum(dim=-1).cpu()
            products.dot[part] = torch.where(far[part], direct, products.dot[part])


def _cosine(products: RowProducts) -> Tensor:
    """(V,) float32 in [-1, 1]; NaN where bad or without direction."""
    lengths = (products.base_sq.double() * products.now_sq.double()).sqrt_()
    return (products.dot / lengths).clamp_(-1, 1).float().masked_fill_(products.bad | (lengths == 0), math.nan)


def _padded(norms: Tensor, rows: int) -> Tensor:
    """The baseline's norms for ``rows`` rows; NaN for rows that it does not have."""
    padded = torch.full((rows,), math.nan)
    kept = min(rows, norms.numel())
    padded[:kept] = norms[:kept]
    return padded


def _device(matrix: Rows) -> torch.device:
    return next((rows.device for _, rows in matrix.chunks(1)), torch.device("cpu"))


def _check(matrix: Rows, baseline: Baseline) -> None:
    if matrix.width != baseline.width:
        raise ValueError(f"baseline rows have {baseline.width} elements; the matrix's have {matrix.width}")


def _check_mask(name: str, mask: Tensor, rows: int) -> None:
    if mask.shape != (rows,) or mask.dtype is not torch.bool:
        raise ValueError(f"{name} is {tuple(mask.shape)} {mask.dtype}; allowed: ({rows},) torch.bool")
