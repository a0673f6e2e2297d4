"""Engines that take parameters apart: FSDP's first version and DeepSpeed's ZeRO stage 3.

Under them a module's ``weight`` has no rows outside of a forward pass, or not even memory. Where its elements are is
asked of the engine's own tables; neither library is imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, distributed, nn

from vocabguard.results import NotApplicable
from vocabguard.rows.sharding import Shard

_LOST = (
    "the parameter has a shape and no memory, as inside an engine that this process does not see from here; pass the "
    "wrapped model, as it is trained"
)


@dataclass(frozen=True)
class Held:
    """A matrix whose elements an engine keeps.

    Attributes:
        engine: its name, in words.
        rows: V.
        width: elements a row.
        trainable: whether its rows can move.
        shard: the elements of this process.
        key: which memory they are in: two modules with one key are tied.
        read: gives the (n,) elements as they are now, a view of the engine's memory.
        stepped: the parameter that the optimizer steps; None where nobody can tell.
        gradient: gives the (n,) elements of its gradient, or None.
    """

    engine: str
    rows: int
    width: int
    trainable: bool
    shard: Shard
    key: tuple[int, int]
    read: Callable[[], Tensor]
    stepped: Tensor | None = None
    gradient: Callable[[], Tensor | None] = lambda: None


def held_by_engine(root: nn.Module, module: nn.Module) -> Held | NotApplicable | None:
    """How an engine holds a module's ``weight``; None where the parameter itself has it.

    Args:
        root: the model as it is trained, with its wrappers.
        module: a descendant with a ``weight``.
    """
    while isinstance(inner := getattr(module, "_fsdp_wrapped_module", None), nn.Module):
        module = inner
    weight = getattr(module, "weight", None)
    if hasattr(weight, "ds_tensor"):
        return _zero3(weight)
    if _is_whole(weight) and not (distributed.is_available() and distributed.is_initialized()):
        return None  # nothing is taken apart where there is one process; to look through the model takes long
    for unit in _fsdp1_units(root):
        if (found := _fsdp1(unit, module)) is not None:
            return found
    if isinstance(weight, Tensor) and not has_memory(weight):
        return NotApplicable(_LOST)
    return None


def _is_whole(weight: object) -> bool:
    return isinstance(weight, nn.Parameter) and weight.dim() == 2 and has_memory(weight)


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor's elements can be read: some engines free the storage and leave the shape.

    Example:
        >>> import torch
        >>> freed = torch.ones(2)
        >>> _ = freed.untyped_storage().resize_(0)
        >>> has_memory(freed), has_memory(torch.ones(2))
        (False, True)
    """
    # Of tensors of a class of their own (DTensor, quantised ones) the memory is elsewhere.
    if tensor.device.type == "meta" or type(tensor) not in (Tensor, nn.Parameter):
        return True
    return tensor.numel() == 0 or tensor.untyped_storage().nbytes() > 0


def _fsdp1_units(root: nn.Module) -> Iterator[nn.Module]:
    """The parts that FSDP's first version has wrapped."""
    fsdp = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    if fsdp is not None:
        kind: Any = fsdp.FullyShardedDataParallel
        yield from (module for module in root.modules() if isinstance(module, kind))


def _fsdp1(unit: Any, module: nn.Module) -> Held | NotApplicable | None:
    """By FSDP's own table of which elements of which parameter are in this process's part."""
    handle = getattr(unit, "_handle", None)
    if handle is None:
        return None
    flat = handle.flat_param
    owner, name = module, "weight"
    for shared in flat._shared_param_infos:
        if shared.module is module and shared.param_name == "weight":
            owner, name = shared.prim_module, shared.prim_param_name
    known = [info.module is owner and info.param_name == name for info in flat._param_infos]
    if not any(known):
        return None
    place = known.index(True)
    shape, here = flat._shapes[place], flat._shard_param_infos[place]
    if len(shape) != 2:
        return None
    rows, width = shape
    original = None if flat._params is None else flat._params[place]
    trainable = bool(flat.requires_grad if original is None else original.requires_grad)
    start = here.intra_param_start_idx if here.in_shard else 0
    count = here.numel_in_shard if here.in_shard else 0

    def read() -> Tensor:
        local: Tensor = getattr(flat, "_local_shard", flat)
        return local.detach()[here.offset_in_shard : here.offset_in_shard + count] if count else local.detach()[:0]

    def gradient() -> Tensor | None:
        if count == 0:
            return read()  # nothing, and that is all there is here
        if original is not None:
            return None if original.grad is None else original.grad.detach().flatten()
        return None if flat.grad is None else flat.grad.detach()[here.offset_in_shard :][:count]

    shard, stepped = Shard(rows, width, start, start + count), flat if original is None else original
    return Held("FSDP1", rows, width, trainable, shard, (id(flat), place), read, stepped, gradient)


def _zero3(weight: Any) -> Held | NotApplicable:
    """By the attributes that ZeRO gives a parameter: each process has an equal run, the last ones padded."""
    shape = tuple(weight.ds_shape)
    if len(shape) != 2:
        return NotApplicable(f"a parameter of shape {shape} has no rows")
    rows, width = shape
    kept = weight.ds_tensor
    if getattr(kept, "numel", lambda: 0)() == 0:
        return NotApplicable("DeepSpeed keeps it on a disk (NVMe offload), where its rows are not read")
    each = int(kept.numel())
    start = min(each * int(weight.ds_zero_partition_rank), rows * width)
    stop = min(start + each, rows * width)

    def read() -> Tensor:
        optimizer = getattr(weight, "_z3_optimizer", None)
        # The fp32 master, where there is one: the training's own copy rounds away small moves.
        master = optimizer.get_local_fp32_param(weight) if optimizer is not None and weight.requires_grad else None
        own: Tensor = (weight.ds_tensor if master is None else master).detach()
        return own.flatten()[: stop - start]

    return Held("ZeRO stage 3", rows, width, bool(weight.requires_grad), Shard(rows, width, start, stop),
                (id(weight), 0), read)  # fmt: skip
