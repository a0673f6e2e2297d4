"""Holding rows of the output matrix still, or moving them by their common mean only, around an optimizer's step.

The rows before the step are kept on the CPU and streamed back in chunks, so an accelerator holds no second matrix.
Put back after the step, a row is exactly what it was, whatever the optimizer did to it: weight decay, momentum, noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

HoldMode = Literal["freeze", "shared"]
HOLD_MODES: tuple[HoldMode, ...] = ("freeze", "shared")

_CHUNK, _CHUNK_ACCELERATOR = 2**17, 2**24


class RowKeeper:
    """The (V, D) rows before a step, on the CPU; the buffer is made once and used at every step."""

    def __init__(self) -> None:
        self._rows: Tensor | None = None

    def keep(self, weight: Tensor) -> None:
        """Copy the rows, from any device."""
        if self._rows is None or self._rows.shape != weight.shape or self._rows.dtype != weight.dtype:
            pinned = weight.device.type == "cuda"
            self._rows = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=pinned)
        self._rows.copy_(weight.detach())

    @property
    def rows(self) -> Tensor:
        """The rows; a RuntimeError before `keep`."""
        if self._rows is None:
            raise RuntimeError("no rows are kept; call keep() before the optimizer's step")
        return self._rows


@torch.no_grad()
def hold_rows(weight: Tensor, before: Tensor, held: Tensor, mode: HoldMode, state: Mapping[Any, Any]) -> None:
    """Undo a step for some rows, in place.

    ``freeze`` puts the held rows back and clears their optimizer moments. ``shared`` moves them by the mean of the
    displacements that the step gave them, and gives them the mean of their moments: softmax does not see a shift that
    all of them share, so they follow the body without losing their differences.

    Args:
        weight: (V, D) parameter after the step.
        before: (V, D) its rows before the step, on the CPU.
        held: (V,) bool on the weight's device.
        state: the optimizer's state of the parameter: tensors of V rows are moments by row, others are left alone, as
            are quantised ones.

    Example:
        >>> before, held = torch.zeros(3, 1), torch.tensor([True, True, False])
        >>> weight = torch.tensor([[1.0], [3.0], [5.0]])
        >>> hold_rows(weight, before, held, "shared", state={})
        >>> weight.flatten().tolist()
        [2.0, 2.0, 5.0]
    """
    if not bool(held.any()):
        return
    shift = _held_mean(weight, held, before) if mode == "shared" else None
    for part in _parts(weight):
        old = before[part].to(weight.device, non_blocking=True)
        put = old if shift is None else (old + shift).to(weight.dtype)
        torch.where(held[part, None], put, weight[part], out=weight[part])
    for moment in _moments(weight, state):
        rows = moment if moment.ndim > 1 else moment[:, None]
        put = _held_mean(rows, held).to(rows.dtype) if mode == "shared" else rows.new_zeros(())
        for part in _parts(rows):
            torch.where(held[part, None], put, rows[part], out=rows[part])


def rows_to_hold(
    last_data_target: Tensor, targets_now: Tensor, inputs_now: Tensor | None, step: int, window: int | None
) -> Tensor:
    """(V,) bool: the rows that keep still in a step.

    Args:
        last_data_target: (V,) int64, optimizer step in which the row last was a target of the data; -1 if never.
        targets_now: (V,) bool, targets of this step, data or echo, on any process.
        inputs_now: (V,) bool, inputs of this step, for tied weights: their input gradient stays. None where untied.
        step: number of this step.
        window: hold rows without a data target in so many steps; None holds those that never were one.

    Example:
        >>> last, now = torch.tensor([-1, 3, 90, -1]), torch.tensor([False, False, False, True])
        >>> rows_to_hold(last, now, None, step=100, window=50), rows_to_hold(last, now, None, step=100, window=None)
        (tensor([ True,  True, False, False]), tensor([ True, False, False, False]))
    """
    never = last_data_target < 0
    unasked = never if window is None else never | (last_data_target <= step - window)
    held = unasked & ~targets_now
    return held if inputs_now is None else held & ~inputs_now


def _held_mean(rows: Tensor, held: Tensor, before: Tensor | None = None) -> Tensor:
    """(D,) float32: the mean of the held rows, or of what they moved by since before."""
    total = torch.zeros(rows.shape[1], dtype=torch.float32, device=rows.device)
    for part in _parts(rows):
        values = rows[part].float()
        if before is not None:
            values = values - before[part].to(rows.device, non_blocking=True).float()
        # Rows that are not held may hold anything, NaN too.
        total += values.masked_fill(~held[part, None], 0).sum(dim=0)
    return total / held.sum()


def _moments(weight: Tensor, state: Mapping[Any, Any]) -> Iterator[Tensor]:
    """The tensors of the optimizer's state that have a value or a vector for each row.

    Of a quantised state, in tensors of a class of its own or in codes beside their scales, none: a code of 0 is no 0.
    """
    plain = [value for value in state.values() if type(value) is Tensor]
    if any(value.dtype == torch.uint8 and value.shape == weight.shape for value in plain):
        return
    for value in plain:
        if value.is_floating_point() and value.ndim in (1, 2) and value.shape[0] == weight.shape[0]:
            yield value


def _parts(matrix: Tensor) -> Iterator[slice]:
    """Chunks of rows that fit a CPU's cache; on an accelerator few launches matter more."""
    elements = _CHUNK if matrix.device.type == "cpu" else _CHUNK_ACCELERATOR
    size = max(1, elements // max(1, matrix.shape[1]))
    return (slice(begin, min(begin + size, len(matrix))) for begin in range(0, len(matrix), size))
