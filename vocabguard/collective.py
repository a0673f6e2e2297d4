"""The only room that talks between processes.

Every function must be called by all ranks together, and is the identity where torch.distributed is missing, not
initialised, or has a world of one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vocabguard.results import Exposure

T = TypeVar("T")


def world_size() -> int:
    """Number of processes that train together, at least 1."""
    return dist.get_world_size() if _initialised() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _initialised() else 0


def is_main() -> bool:
    """Whether this process is rank 0, the one that prints and writes."""
    return rank() == 0


def total(tensor: Tensor) -> Tensor:
    """Sum over all ranks.

    Args:
        tensor: any shape, an integer or floating dtype; the same shape and dtype on every rank.

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

    Gradients are averaged before they are read, so every rank has the whole: they are never summed. They stay as this
    rank booked them, under pull or push by its own targets.

    Args:
        exposure: of this rank; the same V on every rank.

    Returns:
        ``inputs``, ``data_target`` and ``echo_target`` summed, the latest ``last_target``, the rest as given.
    """
    if world_size() == 1:
        return exposure
    counts = total(torch.stack([exposure.inputs, exposure.data_target, exposure.echo_target]))
    inputs, data_target, echo_target = counts.unbind()
    last_target = _reduced(exposure.last_target, "MAX")
    return replace(exposure, inputs=inputs, data_target=data_target, echo_target=echo_target, last_target=last_target)


def any_of(mask: Tensor) -> Tensor:
    """Where a mask is set on any rank.

    Args:
        mask: bool, of any shape, the same on every rank.

    Returns:
        A bool tensor of the same shape and device; the mask itself in a world of one.
    """
    if world_size() == 1:
        return mask
    return _reduced(mask.to(torch.uint8), "MAX") > 0


def largest(tensor: Tensor) -> Tensor:
    """Element by element the largest value of all ranks.

    Args:
        tensor: of any shape, an integer or floating dtype; the same shape and dtype on every rank.

    Returns:
        A new tensor of the same shape, dtype and device, the same on every rank.
    """
    return _reduced(tensor, "MAX")


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return bool(total(torch.tensor(int(flag), dtype=torch.int32)) > 0)


def agree(value: T) -> T:
    """Rank 0's value, on every rank.

    Args:
        value: small and picklable; what the other ranks pass is not looked at.

    Returns:
        The value itself on rank 0 or in a world of one, a copy of it elsewhere.
    """
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def _reduced(tensor: Tensor, how: Literal["SUM", "MAX"]) -> Tensor:
    """A new tensor, element by element over all ranks."""
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    if world_size() == 1:
        return result
    result = result.to(_reachable(result.device))
    # By name, since torch.distributed has no ReduceOp where it is not built.
    dist.all_reduce(result, op=getattr(dist.ReduceOp, how))
    return result.to(tensor.device)


def _reachable(device: torch.device) -> torch.device:
    """The device itself if the backend takes its tensors, else one that it takes: the CPU, or the current device."""
    # E.g. "cpu:gloo,cuda:gloo", or "cuda:nccl", which takes no CPU tensors.
    kinds = [pair.partition(":")[0] for pair in dist.get_backend_config().split(",")]
    if device.type in kinds:
        return device
    if "cpu" in kinds:
        return torch.device("cpu")
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())
