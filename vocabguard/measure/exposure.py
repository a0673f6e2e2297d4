"""What the data asks for, and what the gradient does to each row of the output matrix: functions of tensors.

`vocabguard.measure.counter` adds them up over a run.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vocabguard.results import EXPOSURE_CLASSES, Exposure

CLASS_STARTS = (1, 5, 20)
"""Data targets at which the second and later classes of `results.EXPOSURE_CLASSES` begin."""

_NORM_ELEMENTS = 2**20
_NORM_ELEMENTS_ACCELERATOR = 2**24


def targets_of(labels: Tensor, shift: bool) -> Tensor:
    """What the model is asked for.

    Args:
        labels: (B, T) int; -100 where the loss ignores the position.
        shift: whether the model predicts ``labels[:, 1:]``, as causal language models do.

    Returns:
        (B, T) or, shifted, (B, T - 1), of the labels' dtype; -100 is still in it.
    """
    return labels[:, 1:] if shift else labels


def add_counts(counts: Tensor, ids: Tensor, *, row: int | Tensor = 0, keep: Tensor | None = None) -> None:
    """Count ids into a matrix of counters, in place and without data-dependent shapes.

    Args:
        counts: (K, V) int64, contiguous.
        ids: int of any shape; ids outside [0, V), -100 among them, are ignored.
        row: row of `counts` that gets them, or one row for each id, int64, broadcast to the shape of `ids`.
        keep: False where an id is not counted, bool, broadcast to the shape of `ids`.
    """
    rows = counts.shape[1]
    inside = ids.clamp(0, rows - 1).to(counts.device, torch.int64)
    counted = inside == ids.to(counts.device)
    if keep is not None:
        counted = counted & keep.to(counts.device, torch.bool)
    index = inside + (row.to(counts.device) if isinstance(row, Tensor) else row) * rows
    # Ignored ids add 0 somewhere: a boolean index would break a compiled graph and wait for the device.
    counts.view(-1).scatter_add_(0, index.reshape(-1), counted.to(torch.int64).reshape(-1))


def count_targets(labels: Tensor, shift: bool, rows: int) -> Tensor:
    """How often each token is asked for in one batch.

    Args:
        labels: (B, T) int; -100 and ids outside [0, rows) are ignored.
        shift: see `targets_of`.
        rows: V.

    Returns:
        (V,) int64 on the labels' device.

    Example:
        >>> count_targets(torch.tensor([[3, 1, 1, -100]]), shift=True, rows=4)
        tensor([0, 2, 0, 0])
    """
    counts = torch.zeros(1, rows, dtype=torch.int64, device=labels.device)
    add_counts(counts, targets_of(labels, shift))
    return counts[0]


def row_norms(matrix: Tensor, rows: Tensor | None = None) -> Tensor:
    """L2 norm of the rows of a matrix, read in chunks, so that no second matrix is made.

    Args:
        matrix: (V, D), any float dtype.
        rows: (n,) int64, the rows wanted; None takes all.

    Returns:
        (n,) or (V,) float32. A row with NaN or Inf gives 0, so that one bad step does not spoil a sum.
    """
    count = matrix.shape[0] if rows is None else len(rows)
    norms = torch.empty(count, dtype=torch.float32, device=matrix.device)
    # Chunks that fit a CPU's cache; on an accelerator few launches matter more.
    elements = _NORM_ELEMENTS if matrix.device.type == "cpu" else _NORM_ELEMENTS_ACCELERATOR
    chunk = max(1, elements // max(1, matrix.shape[1]))
    for begin in range(0, count, chunk):
        part = slice(begin, begin + chunk)
        read = matrix[part] if rows is None else matrix.index_select(0, rows[part])
        norms[part] = torch.linalg.vector_norm(read, dim=1, dtype=torch.promote_types(read.dtype, torch.float32))
    return norms.nan_to_num_(nan=0.0, posinf=0.0)


def exposure_classes(data_target: Tensor) -> Tensor:
    """The exposure class of each token by its data targets so far.

    Args:
        data_target: (V,) int64.

    Returns:
        (V,) uint8, index into `results.EXPOSURE_CLASSES`.

    Example:
        >>> exposure_classes(torch.tensor([0, 1, 4, 5, 19, 20])).tolist()
        [0, 1, 1, 2, 2, 3]
    """
    starts = torch.tensor(CLASS_STARTS, device=data_target.device)
    return torch.bucketize(data_target, starts, right=True).to(torch.uint8)


def steps_since_target(exposure: Exposure, step: int | None = None) -> Tensor:
    """Optimizer steps since each token last was a target, data or echo.

    Args:
        exposure: the counts so far.
        step: number of the last step; None takes `Exposure.steps`, which is right where every step was observed.

    Returns:
        (V,) int64: 0 if it was one in the last step, -1 if it never was.
    """
    now = exposure.steps if step is None else step
    return torch.where(exposure.last_target < 0, -1, (now - exposure.last_target).clamp(min=0))


def summarise_exposure(exposure: Exposure, classes: Tensor, live: Tensor) -> dict[str, float]:
    """Exposure as a few numbers.

    Args:
        exposure: the counts so far.
        classes: (V,) uint8, as `exposure_classes` gives them.
        live: (V,) bool, the tokens that shares are over.

    Returns:
        ``never``, ``1-4``, ``5-19``, ``20+``: share in [0, 1] of the live tokens in the class (0 if none is live); and
        ``push_share`` in [0, 1], left out before the first sample.
    """
    of_live = torch.bincount(classes[live].long(), minlength=len(EXPOSURE_CLASSES)).tolist()
    total = max(1, sum(of_live))
    shares = {name: count / total for name, count in zip(EXPOSURE_CLASSES, of_live, strict=True)}
    if not math.isnan(exposure.push_share):
        shares["push_share"] = exposure.push_share
    return shares
