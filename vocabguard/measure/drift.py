"""How far every row has moved from its baseline: two passes over chunks of rows, then arithmetic on (V,) vectors.

The first pass measures norms and displacements and sums the displacements of the unexposed rows. Their mean is a shift
that all those rows share and to which softmax is blind; the second pass projects every row on it, so that the residual
cosine can leave it out. Nothing of the matrix's size is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vecdot, vector_norm

from vocabguard.results import RowDrift, RowProducts
from vocabguard.snapshot import Baseline

_DEGRADED, _SEVERE = 0.95, 0.90
# Norm ratio above which rounding in the polarisation identity is worth a direct inner product.
_FAR = 8.0


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
    """What the first pass finds.

    Attributes:
        products: inner products of every row with its baseline.
        moved_sq: (V,) float32, squared length of the displacement. Measured itself: taken from the products it would
            drown in their rounding.
        shift: (width,) float32, mean displacement of the unexposed rows; None if there are none.
    """

    products: RowProducts
    moved_sq: Tensor
    shift: Tensor | None


def measure_drift(matrix: Rows, baseline: Baseline, unexposed: Tensor, chunk_rows: int = 1024) -> RowDrift:
    """Measure every row against its baseline.

    Args:
        matrix: the rows now, of any floating dtype, on any device.
        baseline: the rows before; brought to the matrix's device chunk by chunk.
        unexposed: (V,) bool, rows whose mean displacement the residual cosine takes off.
        chunk_rows: rows read at a time; two float32 buffers of ``chunk_rows * width`` are all that is allocated
            besides (V,) vectors and one (width,) vector a chunk.

    Returns:
        (V,) vectors on the CPU. Cosines are within 1e-6 of float64.

    Raises:
        ValueError: if the widths differ, or ``unexposed`` is not (V,) bool.
    """
    first = row_products(matrix, baseline, unexposed, chunk_rows)
    if first.shift is None:
        return row_drift(first)
    return row_drift(first, shift_products(matrix, baseline, first.shift, chunk_rows))


@torch.no_grad()
def row_products(matrix: Rows, baseline: Baseline, unexposed: Tensor, chunk_rows: int = 1024) -> RowPass:
    """First pass: norms, displacements and the unexposed rows' mean displacement.

    The inner product follows from the three squared lengths (polarisation), which are cheaper to measure and leave
    1 - cosine exact for rows that hardly moved; rows whose norm changed more than eightfold get it directly.

    Args, raises: as `measure_drift`.
    """
    _check(matrix, baseline, unexposed)
    device = _device(matrix)
    now, moved = (torch.full((matrix.rows,), math.nan, device=device) for _ in range(2))
    weights = unexposed.to(device, torch.float32)
    sums = []
    with torch.autocast(device.type, enabled=False):
        for part, rows, base, spare in _pairs(matrix, baseline, chunk_rows):
            vector_norm(rows, dim=-1, out=now[part])
            difference = torch.sub(rows, base, out=spare)
            vector_norm(difference, dim=-1, out=moved[part])
            sums.append(torch.mv(difference.T, weights[part]))
    base_sq = _padded(baseline.norms, matrix.rows).square()
    now_sq, moved_sq = now.cpu().square(), moved.cpu().square()
    bad = ~(base_sq + now_sq + moved_sq).isfinite()
    dot = (base_sq.double() + now_sq.double() - moved_sq.double()).div_(2).float()
    _measure_far(matrix, baseline, dot, _far(base_sq, now_sq) & ~bad, chunk_rows)
    shift = _mean_shift(matrix, baseline, unexposed & ~bad, sums, chunk_rows)
    return RowPass(RowProducts(base_sq, dot, now_sq, bad), moved_sq, shift)


@torch.no_grad()
def shift_products(matrix: Rows, baseline: Baseline, shift: Tensor, chunk_rows: int = 1024) -> tuple[Tensor, Tensor]:
    """Second pass: inner products of the rows, and of their baselines, with the shift.

    Args:
        matrix: the rows now.
        baseline: the rows before.
        shift: (width,) float32.
        chunk_rows: rows read at a time.

    Returns:
        Two (V,) float32 vectors on the CPU; NaN where there is no baseline row.
    """
    device = _device(matrix)
    now, before = (torch.full((matrix.rows,), math.nan, device=device) for _ in range(2))
    shift = shift.to(device)
    with torch.autocast(device.type, enabled=False):
        for part, rows, base, _ in _pairs(matrix, baseline, chunk_rows):
            torch.mv(rows, shift, out=now[part])
            torch.mv(base, shift, out=before[part])
    return now.cpu(), before.cpu()


def row_drift(first: RowPass, along_shift: tuple[Tensor, Tensor] | None = None) -> RowDrift:
    """From inner products to cosines and lengths.

    Args:
        first: the first pass.
        along_shift: the second pass; None leaves the residual cosine equal to the cosine.

    Returns:
        cos(w, w0), cos(w - s, w0), |w - w0| and |w| / |w0| of every row.
    """
    products = first.products
    # In float64 the rounding that base_sq and now_sq share with the derived dot cancels.
    base_sq, dot, now_sq = (value.double() for value in (products.base_sq, products.dot, products.now_sq))
    zero = ((base_sq == 0) | (now_sq == 0)) & ~products.bad
    unusable = products.bad | zero
    cosine = _cosine(dot, base_sq, now_sq, unusable)
    residual = cosine
    if first.shift is not None and along_shift is not None:
        now_shift, base_shift = (value.double() for value in along_shift)
        rest_sq = now_sq - 2 * now_shift + first.shift.double().square().sum().cpu()
        residual = _cosine(dot - base_shift, base_sq, rest_sq, unusable)
    return RowDrift(
        cosine=cosine,
        residual=residual,
        l2=first.moved_sq.sqrt().masked_fill(products.bad, math.nan),
        norm_ratio=(now_sq / base_sq).sqrt().float().masked_fill(unusable, math.nan),
        bad=products.bad,
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


def _pairs(matrix: Rows, baseline: Baseline, chunk_rows: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Rows, their baseline in float32, and a buffer that may be written over (it may be where the baseline rows are).

    Float32 chunks are passed on as they are; others are converted into two buffers that stay in the cache.
    """
    shape, device = (min(chunk_rows, matrix.rows), matrix.width), _device(matrix)
    buffers = [torch.empty(shape, device=device) for _ in range(2)]
    for chunk, now in matrix.chunks(chunk_rows):
        stop = min(chunk.stop, baseline.rows)
        if stop <= chunk.start:
            return
        part = slice(chunk.start, stop)
        spares = [buffer[: stop - chunk.start] for buffer in buffers]
        base = baseline.chunk(part).to(device)
        yield part, _float32(now[: stop - chunk.start], spares[0]), _float32(base, spares[1]), spares[1]


def _float32(rows: Tensor, buffer: Tensor) -> Tensor:
    return rows if rows.dtype is torch.float32 else buffer.copy_(rows)


def _mean_shift(
    matrix: Rows, baseline: Baseline, counted: Tensor, sums: list[Tensor], chunk_rows: int
) -> Tensor | None:
    """Mean displacement of the counted rows, from each chunk's sum."""
    count = int(counted.sum())
    if count == 0:
        return None
    by_chunk = torch.stack(sums).cpu()
    broken = ~by_chunk.isfinite().all(dim=1)
    if broken.any():
        # A NaN row spoils its chunk's sum even at weight 0, so these few are summed again without it.
        for index, (part, rows, base, spare) in enumerate(_pairs(matrix, baseline, chunk_rows)):
            if broken[index]:
                left_out = ~counted[part].to(rows.device)
                difference = torch.sub(rows, base, out=spare).masked_fill_(left_out[:, None], 0.0)
                by_chunk[index] = difference.sum(dim=0).cpu()
    return (by_chunk.double().sum(dim=0) / count).float()


def _far(base_sq: Tensor, now_sq: Tensor) -> Tensor:
    ratio_sq = _FAR**2
    return (now_sq > ratio_sq * base_sq) | (base_sq > ratio_sq * now_sq)


def _measure_far(matrix: Rows, baseline: Baseline, dot: Tensor, far: Tensor, chunk_rows: int) -> None:
    """Overwrite ``dot`` in the chunks that hold far rows."""
    if not far.any():
        return
    for part, rows, base, _ in _pairs(matrix, baseline, chunk_rows):
        if far[part].any():
            dot[part] = torch.where(far[part], vecdot(rows, base).cpu(), dot[part])


def _cosine(dot: Tensor, base_sq: Tensor, now_sq: Tensor, unusable: Tensor) -> Tensor:
    """(V,) float32 in [-1, 1]; NaN where unusable or without direction."""
    cosine = (dot / (base_sq * now_sq.clamp_min(0)).sqrt()).clamp_(-1, 1).float()
    return cosine.masked_fill_(unusable | (now_sq <= 0), math.nan)


def _padded(norms: Tensor, rows: int) -> Tensor:
    """The baseline's norms for ``rows`` rows; NaN for rows that it does not have."""
    padded = torch.full((rows,), math.nan)
    kept = min(rows, norms.numel())
    padded[:kept] = norms[:kept]
    return padded


def _device(matrix: Rows) -> torch.device:
    return next((rows.device for _, rows in matrix.chunks(1)), torch.device("cpu"))


def _check(matrix: Rows, baseline: Baseline, unexposed: Tensor) -> None:
    if matrix.width != baseline.width:
        raise ValueError(f"baseline rows have {baseline.width} elements; the matrix's have {matrix.width}")
    _check_mask("unexposed", unexposed, matrix.rows)


def _check_mask(name: str, mask: Tensor, rows: int) -> None:
    if mask.shape != (rows,) or mask.dtype is not torch.bool:
        raise ValueError(f"{name} is {tuple(mask.shape)} {mask.dtype}; allowed: ({rows},) torch.bool")
