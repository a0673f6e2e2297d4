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

_CHUNK = 2**24


class RowKeeper:
    """The rows before a step, on the CPU; the buffer is made once and used at every step."""

    def __init__(self) -> None:
        self._rows: Tensor | None = None

    def keep(self, weight: Tensor) -> None:
        """Copy the rows.

        Args:
            weight: (V, D), on any device.
        """
        if self._rows is None or self._rows.shape != weight.shape or self._rows.dtype != weight.dtype:
            pinned = weight.device.type == "cuda"
            self._rows = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=pinned)
        self._rows.copy_(weight.detach())

    @property
    def rows(self) -> Tensor:
        """(V, D) on the CPU.

        Raises:
            RuntimeError: before `keep`.
        """
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
        mode: ``freeze`` or ``shared``.
        state: the optimizer's state of the parameter: tensors of V rows are moments by row, others are left alone.
    """
    if not bool(held.any()):
        return
    shift = _mean_shift(weight, before, held) if mode == "shared" else None
    for part in _parts(weight):
        rows = held[part].nonzero().squeeze(1)
        old = before[part].to(weight.device, non_blocking=True).index_select(0, rows)
        weight[part].index_copy_(0, rows, old if shift is None else (old + shift).to(weight.dtype))
    for moment in _moments(weight, state):
        for part in _parts(moment):
            rows = held[part].nonzero().squeeze(1)
            if mode == "freeze":
                moment[part].index_fill_(0, rows, 0)
        if mode == "shared":
            _level(moment, held)


def rows_to_hold(
    last_data_target: Tensor, targets_now: Tensor, inputs_now: Tensor | None, step: int, window: int | None
) -> Tensor:
    """Which rows keep still in a step.

    Args:
        last_data_target: (V,) int64, optimizer step in which the row last was a target of the data; -1 if never.
        targets_now: (V,) bool, targets of this step, data or echo, on any process.
        inputs_now: (V,) bool, inputs of this step, for tied weights: their input gradient stays. None where untied.
        step: number of this step.
        window: hold rows without a data target in so many steps; None holds those that never were one.

    Returns:
        (V,) bool.
    """
    never = last_data_target < 0
    unasked = never if window is None else never | (last_data_target <= step - window)
    held = unasked & ~targets_now
    return held if inputs_now is None else held & ~inputs_now


def _mean_shift(weight: Tensor, before: Tensor, held: Tensor) -> Tensor:
    """(D,) float32: the mean displacement of the held rows."""
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=_wide(weight))
    for part in _parts(weight):
        rows = held[part].nonzero().squeeze(1)
        moved = weight[part].index_select(0, rows).float()
        moved -= before[part].to(weight.device, non_blocking=True).index_select(0, rows).float()
        total += moved.sum(dim=0, dtype=torch.float32).to(total.device, torch.float64)
    return (total / held.sum().to(total.device)).to(weight.device, torch.float32)


def _wide(weight: Tensor) -> torch.device:
    """Where float64 sums can be made: some accelerators have none."""
    return torch.device("cpu") if weight.device.type == "mps" else weight.device


def _level(moment: Tensor, held: Tensor) -> None:
    """Give the held rows of a moment their mean."""
    total = torch.zeros(moment.shape[1:], dtype=torch.float32, device=moment.device)
    # The held rows alone: times a share of zero, a broken row elsewhere would still break the sum.
    for part in _parts(moment):
        rows = held[part].nonzero().squeeze(1)
        total += moment[part].index_select(0, rows).sum(dim=0, dtype=torch.float32)
    mean = (total / held.sum()).to(moment.dtype)
    for part in _parts(moment):
        rows = held[part].nonzero().squeeze(1)
        moment[part].index_copy_(0, rows, mean.expand(len(rows), *moment.shape[1:]))


def _moments(weight: Tensor, state: Mapping[Any, Any]) -> Iterator[Tensor]:
    """The tensors of the optimizer's state that have a value or a vector for each row."""
    for value in state.values():
        if isinstance(value, Tensor) and value.ndim in (1, 2) and value.shape[0] == weight.shape[0]:
            yield value


def _parts(matrix: Tensor) -> Iterator[slice]:
    """Chunks of rows: of some 64 MB in float32."""
    width = matrix.shape[1] if matrix.ndim > 1 else 1
    size = max(1, _CHUNK // max(1, width))
    return (slice(begin, min(begin + size, len(matrix))) for begin in range(0, len(matrix), size))
