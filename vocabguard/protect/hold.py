"""Holding rows of the output matrix still, or moving them by their common mean only, around an optimizer's step.

Put back after the step, a row is exactly what it was, whatever the optimizer did to it: weight decay, momentum, noise.
The rows before the step are kept beside the weights, or on the host and streamed back in chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from vocabguard.rows.streams import on_device

HoldMode = Literal["freeze", "shared"]
HOLD_MODES: tuple[HoldMode, ...] = ("freeze", "shared")

_CHUNK, _CHUNK_ACCELERATOR = 2**19, 2**24


class RowKeeper:
    """The (V, D) rows before a step; the buffer is made once and used at every step.

    Args:
        on_host: keep them in the host's memory, where an accelerator has no room for a second matrix: each step then
            moves the matrix there and back.
    """

    def __init__(self, on_host: bool = False) -> None:
        self._on_host = on_host
        self._rows: Tensor | None = None

    def keep(self, weight: Tensor) -> None:
        """Copy the rows, from any device."""
        device = torch.device("cpu") if self._on_host else weight.device
        kept, wanted = self._rows, (weight.shape, weight.dtype, device)
        if kept is None or (kept.shape, kept.dtype, kept.device) != wanted:
            pinned = self._on_host and weight.device.type == "cuda"
            kept = torch.empty(weight.shape, dtype=weight.dtype, device=device, pin_memory=pinned)
        # From pinned memory the rows come back by the same stream, which has written them by then.
        self._rows = kept.copy_(weight.detach(), non_blocking=kept.is_pinned() if self._on_host else False)

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

    On an accelerator the host neither waits for it nor learns how many rows are held.

    Args:
        weight: (V, D) parameter after the step.
        before: (V, D) its rows before the step, on any device.
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
    if weight.device.type != "cpu":
        _hold_unseen(weight, before, held, mode, state)
        return
    free = (~held).nonzero().flatten()
    if len(free) == len(held):
        return
    old = _moved(before, weight.device)
    if mode == "freeze":
        _put(weight, held, free, old)
    else:
        shift = _held_mean(weight, held, lambda part: weight[part].float() - old(part))
        _put(weight, held, free, lambda part: (old(part) + shift).to(weight.dtype))
    for moment in _moments(weight, state):
        level = moment.new_zeros(moment.shape[1:])
        if mode == "shared":
            level = _held_mean(moment, held, _moved(moment, moment.device)).to(moment.dtype)
        _put(moment, held, free, _moved(level.expand_as(moment), moment.device))


def _hold_unseen(weight: Tensor, before: Tensor, held: Tensor, mode: HoldMode, state: Mapping[Any, Any]) -> None:
    """`hold_rows` in operations whose shapes do not depend on what is held.

    The rows before are read once: put back first and moved by their mean then, so that from the host they come once.
    """
    count = held.sum().clamp(min=1)
    moved = torch.zeros(weight.shape[1:], dtype=torch.float32, device=weight.device)
    for part, old in on_device(((part, before[part]) for part in _parts(weight)), weight.device):
        rows, mask = weight[part], held[part, None]
        if mode == "shared":
            # Rows that are not held may hold anything, NaN too.
            moved += torch.where(mask, rows.float() - old, 0.0).sum(dim=0)
        rows.copy_(torch.where(mask, old, rows))
    if mode == "shared":
        _replace(weight, held, lambda rows: (rows + moved / count).to(rows.dtype))
    for moment in _moments(weight, state):
        if mode == "freeze":
            _replace(moment, held, torch.zeros_like)
            continue
        level = torch.zeros(moment.shape[1:], dtype=torch.float32, device=moment.device)
        for part in _parts(moment):
            level += torch.where(_as_wide(held[part], moment), moment[part].float(), 0.0).sum(dim=0)
        level = (level / count).to(moment.dtype)
        _replace(moment, held, level.expand_as)


@torch.no_grad()
def hold_shard(
    weight: Tensor, before: Tensor, held: Tensor, mode: HoldMode, state: Mapping[Any, Any], count: Tensor,
    add_up: Callable[[Tensor], Tensor],
) -> None:  # fmt: skip
    """`hold_rows` for one process's rows of a matrix that is spread over several.

    Args:
        weight: (n, D) rows of this process after the step.
        before: (n, D) the same before it, on any device.
        held: (n,) bool of these rows, on the weight's device.
        state: the optimizer's, as `hold_rows` takes it, of this process's rows.
        count: () int64, held rows of all processes, at least 1.
        add_up: sums of width D over all processes. Called once with ``shared``, on all of them, whatever fails before:
            then nothing is put back anywhere. Not called with ``freeze``.

    Example:
        >>> weight, before, held = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1), torch.tensor([True, True])
        >>> theirs = torch.tensor([[5.0]])  # a row of another process has moved by 5
        >>> hold_shard(weight, before, held, "shared", {}, torch.tensor(3), lambda sums: sums + theirs)
        >>> weight.tolist()
        [[3.0], [3.0]]
    """
    moments = list(_moments(weight, state))
    if mode == "freeze":
        if len(weight):
            hold_rows(weight, before, held, mode, state)
        return
    sums = torch.zeros(1 + len(moments), weight.shape[1], dtype=torch.float32, device=weight.device)
    failed: Exception | None = None
    try:
        for part in _parts(weight):
            moved = weight[part].float() - before[part].to(weight.device).float()
            sums[0] += torch.where(held[part, None], moved, 0.0).sum(dim=0)
        for place, moment in enumerate(moments, start=1):
            for part in _parts(moment):
                wide = moment[part].float().view(-1, *moment.shape[1:] or (1,))
                total = torch.where(held[part, None], wide, 0.0).sum(dim=0)
                sums[place, : len(total)] += total
    except Exception as error:  # the others wait for this message
        failed = error
        sums.fill_(torch.nan)
    means = add_up(sums) / count
    if failed is not None:
        raise failed
    held = held & means.isfinite().all()
    for part, old in on_device(((part, before[part]) for part in _parts(weight)), weight.device):
        put = (old.float() + means[0]).to(weight.dtype)
        weight[part] = torch.where(held[part, None], put, weight[part])
    for mean, moment in zip(means[1:], moments, strict=True):
        level = (mean if moment.ndim > 1 else mean[0]).to(moment.dtype)
        _replace(moment, held, level.expand_as)


def _replace(rows: Tensor, held: Tensor, values: Callable[[Tensor], Tensor]) -> None:
    """Give the held rows what `values` makes of a chunk of rows."""
    for part in _parts(rows):
        rows[part] = torch.where(_as_wide(held[part], rows), values(rows[part]), rows[part])


def _as_wide(mask: Tensor, rows: Tensor) -> Tensor:
    return mask if rows.ndim == 1 else mask[:, None]


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


def _moved(rows: Tensor, device: torch.device) -> Callable[[slice], Tensor]:
    """Chunks of rows, on the device."""
    return lambda part: rows[part].to(device, non_blocking=True)


def _held_mean(rows: Tensor, held: Tensor, values: Callable[[slice], Tensor]) -> Tensor:
    """(D,) or () float32: the mean over the held rows of what `values` makes of a chunk.

    A product with the mask is three times as fast as a masked sum on a CPU; it needs all rows finite, and rows that are
    not held may hold anything.
    """
    total = torch.zeros(rows.shape[1:], dtype=torch.float32, device=rows.device)
    mask = held.float()
    for part in _parts(rows):
        total += mask[part] @ values(part).float()
    if not bool(total.isfinite().all()):
        total.zero_()
        for part in _parts(rows):
            total += values(part)[held[part]].float().sum(dim=0)
    return total / held.sum()


def _put(rows: Tensor, held: Tensor, free: Tensor, values: Callable[[slice], Tensor]) -> None:
    """Give the held rows the values, chunk by chunk; `free` are the others' numbers.

    Where few rows are free, writing all and putting those few back is faster than choosing for each value.
    """
    if 2 * len(free) < len(held):
        others = rows.index_select(0, free)
        for part in _parts(rows):
            rows[part] = values(part)
        rows.index_copy_(0, free, others)
        return
    for part in _parts(rows):
        mask = held[part] if rows.ndim == 1 else held[part, None]
        torch.where(mask, values(part), rows[part], out=rows[part])


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
    if len(matrix) == 0:
        return iter(())
    elements = _CHUNK if matrix.device.type == "cpu" else _CHUNK_ACCELERATOR
    size = max(1, elements // max(1, matrix[0].numel()))
    return (slice(begin, min(begin + size, len(matrix))) for begin in range(0, len(matrix), size))
