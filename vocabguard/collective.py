"""The only room that talks between processes.

Every function but `report_failure` must be called by all ranks together, and is the identity where torch.distributed is
missing, not initialised, or has a world of one.

The guard talks on a gloo group of its own. Before each piece of talk the ranks exchange a flag of health. A rank whose
guard fails sends its flag at once, without waiting: training, on its own group, goes on there; the others find the flag
where they next talk, whatever about, and raise `PeerFaultError`. So no rank waits for one that is silent for good.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vocabguard.results import Exposure, VocabGuardError

T = TypeVar("T")

PATIENCE = timedelta(minutes=10)
"""How long a rank waits for the others; then its guard disables itself."""


class PeerFaultError(VocabGuardError, RuntimeError):
    """The guard of another process, or this one's, has failed: there is nothing to talk about any more."""


@dataclass
class _Line:
    """The guard's own group.

    torch.distributed keeps the groups alive. A reference of ours would outlive `destroy_process_group`, and a group
    that dies with the interpreter aborts the process.

    Attributes:
        of_group: weak reference to the group, which is over gloo, whatever training uses.
        of_world: the same of the default group that it was made for.
        opened: whether a run goes on.
        failed: rank of the guard that failed, as far as known here.
        sent: this rank's message that it failed, which the others may not have read yet.
    """

    of_group: weakref.ref[Any]
    of_world: weakref.ref[Any]
    opened: bool = False
    failed: int | None = None
    sent: Any = None

    @property
    def group(self) -> Any:
        """The group itself."""
        return self.of_group()

    @property
    def stands(self) -> bool:
        """Whether the default group is still the one it was made for."""
        return self.group is not None and self.of_world() is dist.group.WORLD


_lines: list[_Line] = []  # at most one: of the default group as it is now


def world_size() -> int:
    """Number of processes that train together, at least 1."""
    return dist.get_world_size() if _initialised() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _initialised() else 0


def is_main() -> bool:
    """Whether this process is rank 0, the one that prints and writes."""
    return rank() == 0


def init_group() -> None:
    """Initialise the guard's process group: a run begins, and earlier faults are forgotten.

    Raises:
        RuntimeError: if the other processes do not open theirs within `PATIENCE`, or torch is built without gloo.
    """
    if world_size() == 1:
        return
    try:
        line = _line()
    except RuntimeError as error:
        raise RuntimeError(
            f"process {rank()} of {world_size()} did not reach the others' guards ({error}); each needs its own"
        ) from error
    line.opened, line.failed, line.sent = True, None, None


def shutdown_group() -> None:
    """The last talk of a run, so that none of its messages is left for the next one. Nothing if none is open."""
    if (line := _open()) is None:
        return
    if line.sent is not None:
        line.sent.wait()
    elif line.failed is None:
        dist.all_reduce(_flag(None), group=line.group)
    _shutdown()


def report_failure() -> None:
    """This rank's guard has failed: let the others know where they next talk. Does not wait, may be called at will."""
    if (line := _open()) is not None and line.failed is None:
        line.failed = rank()
        line.sent = dist.all_reduce(_flag(rank()), group=line.group, async_op=True)


def raise_if_peer_failed() -> None:
    """Raise `PeerFaultError` if the guard of any process has failed."""
    if world_size() == 1:
        return
    line = _line()
    if line.failed is None:
        flag = _flag(None)
        dist.all_reduce(flag, group=line.group)
        failed = flag.nonzero().flatten().tolist()
        line.failed = failed[0] if failed else None
    if line.failed is not None:
        raise PeerFaultError(f"the guard of process {line.failed} of {world_size()} has failed")


def meets() -> bool:
    """Whether the guard of any process has failed; for those that have failed to call too, all at the same place."""
    if (line := _open()) is None:
        return False
    try:
        if line.sent is not None:
            line.sent.wait()
            return True
        raise_if_peer_failed()
    except RuntimeError:  # a guard has failed, or its process has ended
        return True
    return False


def any_in_step(mask: Tensor) -> Tensor:
    """Where a bool mask is set on any rank, in the middle of a step and by the training's own process group.

    No flag of health comes before it: a rank whose guard has failed must call it too. Where that group reaches the
    mask's device, as NCCL does, the host does not wait.
    """
    if world_size() == 1:
        return mask
    return _in_step(mask, torch.uint8, dist.ReduceOp.MAX).to(mask.device) > 0


def sum_in_step(sums: Tensor) -> Tensor:
    """The sum over all ranks of a float tensor; see `any_in_step`."""
    if world_size() == 1:
        return sums
    result = _in_step(sums, sums.dtype, dist.ReduceOp.SUM)
    return result.to(sums.device)


def total(tensor: Tensor) -> Tensor:
    """Sum over all ranks of a tensor of any shape, of an integer or floating dtype, the same on every rank.

    Returns:
        A new tensor of the same shape, dtype and device, the same on every rank.

    Raises:
        TypeError: for a bool tensor, which has no sum.
    """
    if tensor.dtype == torch.bool:
        raise TypeError("tensor is of dtype torch.bool; allowed: integer and floating dtypes")
    return _reduced(tensor, "SUM")


def total_exposure(exposure: Exposure) -> Exposure:
    """The exposure of all ranks' data together.

    Gradients are averaged before they are read, so every rank has the whole, or, of a sharded matrix, its own rows and
    zeros: they are never summed.

    ``inputs``, ``data_target`` and ``echo_target`` are summed; of ``last_target``, ``pull``, ``push`` and
    ``input_only`` the largest are taken; the rest is as given.
    """
    if world_size() == 1:
        return exposure
    counts = torch.stack([exposure.inputs, exposure.data_target, exposure.echo_target])
    norms = [values.float() for values in (exposure.pull, exposure.push, exposure.input_only)]
    summed, (last_target, pull, push, input_only) = sum_and_largest(counts, [exposure.last_target, *norms])
    inputs, data_target, echo_target = summed.unbind()
    return replace(
        exposure, inputs=inputs, data_target=data_target, echo_target=echo_target, last_target=last_target,
        pull=pull, push=push, input_only=input_only,
    )  # fmt: skip


def sum_and_largest(summed: Tensor, largest: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The sum of some numbers over all ranks, and the largest of others, in two messages after one flag.

    Args:
        summed: as for `total`.
        largest: of one shape; int64 within 32 bits, or float32 that are not negative.

    Returns:
        New tensors of the same shapes, dtypes and devices. A NaN is larger than any number.
    """
    if world_size() == 1:
        return summed.detach().clone(), [one.detach().clone() for one in largest]
    raise_if_peer_failed()
    # The order of floats that are not negative is that of their bits.
    words = [one.view(torch.int32) if one.is_floating_point() else one.to(torch.int32) for one in largest]
    sums, most = _reduce(summed, "SUM"), _reduce(torch.stack(words), "MAX")
    found = [word.view(one.dtype) if one.is_floating_point() else word.to(one.dtype)
             for word, one in zip(most, largest, strict=True)]  # fmt: skip
    return sums, found


def any_bits(masks: Tensor) -> Tensor:
    """Bitwise or over all ranks of a uint8 tensor of any shape, in a new tensor."""
    return _reduced(masks, "BOR")


def any_of(mask: Tensor) -> Tensor:
    """Where a bool mask, of the same shape on every rank, is set on any; the mask itself in a world of one."""
    if world_size() == 1:
        return mask
    return _reduced(mask.to(torch.uint8), "MAX") > 0


def largest(tensor: Tensor) -> Tensor:
    """Element by element the largest value of all ranks; takes and returns what `total` does."""
    return _reduced(tensor, "MAX")


def agree(value: T) -> T:
    """Rank 0's value, small and picklable, on every rank; what the others pass is not looked at."""
    if world_size() == 1:
        return value
    raise_if_peer_failed()
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_line().group)
    return box[0]


def everyone(value: T) -> list[T]:
    """Every rank's value, small and picklable, in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [value]
    raise_if_peer_failed()
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value, group=_line().group)
    return found


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def _line() -> _Line:
    """The group of the guard's own, made at first use."""
    if not _lines or not _lines[0].stands:
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        _lines[:] = [_Line(weakref.ref(group), weakref.ref(dist.group.WORLD))]
    return _lines[0]


def _shutdown() -> None:
    """Leave the group, here only. Where it lasts until the interpreter ends, its threads may abort the process."""
    if _lines and _lines[0].stands and _initialised():
        dist.destroy_process_group(_lines[0].group)
    _lines.clear()


atexit.register(_shutdown)


def _open() -> _Line | None:
    """The line of the run that goes on, if there is one."""
    known = world_size() > 1 and bool(_lines) and _lines[0].stands
    return _lines[0] if known and _lines[0].opened else None


def _flag(failed: int | None) -> Tensor:
    """(world,) int32, nonzero at a failed rank."""
    flag = torch.zeros(world_size(), dtype=torch.int32)
    if failed is not None:
        flag[failed] = 1
    return flag


def _in_step(tensor: Tensor, dtype: torch.dtype, how: Any) -> Tensor:
    """By the training's own group, on a device that it reaches."""
    reached = [pair.partition(":")[0] for pair in dist.get_backend_config().split(",")]
    there = tensor.device if tensor.device.type in reached or not reached else torch.device(reached[0])
    result = tensor.detach().to(there, dtype, copy=True)
    work = dist.all_reduce(result, op=how, async_op=True)
    assert work is not None
    work.wait()
    return result


_How = Literal["SUM", "MAX", "BOR"]


def _reduced(tensor: Tensor, how: _How) -> Tensor:
    """A new tensor, element by element over all ranks."""
    if world_size() == 1:
        return tensor.detach().clone(memory_format=torch.contiguous_format)
    raise_if_peer_failed()
    return _reduce(tensor, how)


def _reduce(tensor: Tensor, how: _How) -> Tensor:
    """The same, where all ranks are known to take part."""
    result = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    # By name, since torch.distributed has no ReduceOp where it is not built.
    dist.all_reduce(result, op=getattr(dist.ReduceOp, how), group=_line().group)
    return result.to(tensor.device)
