"""Which processes work on the same data: the ranks of a tensor, pipeline, context or sequence parallel group.

The world is not the number of data-parallel replicas: counts are taken once a replica, and echo rows are made by the
replica's number. Meshes are read where engines keep them: in ``DTensor`` parameters, in accelerate's
``ParallelismConfig``, in DeepSpeed's groups.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vocabguard import collective
from vocabguard.results import NotApplicable

_SAME = {"tp", "tensor", "tensor_parallel", "mp", "model_parallel", "pp", "pipe", "pipeline", "pipeline_parallel"}
"""Names of mesh dimensions whose processes see the very same batches."""
_PARTS = {"cp", "context", "context_parallel", "sp", "seq", "sequence", "sequence_parallel", "ulysses"}
"""Of those whose processes see parts of the same rows of data."""
_ULYSSES = {"sp", "seq", "sequence", "sequence_parallel", "ulysses"}
"""Of those whose attention wants its part of each sequence, in every forward pass."""


@dataclass(frozen=True)
class Layout:
    """What one process knows of its place.

    Attributes:
        copies: ranks that see the very same batches, this one included, in order.
        replica: ranks that work on the same rows of data, which includes `copies`.
        split: ``context`` or ``sequence``, where these see parts of each sequence; else None.
    """

    copies: tuple[int, ...]
    replica: tuple[int, ...]
    split: str | None = None


@dataclass(frozen=True)
class Replicas:
    """What all processes have agreed on.

    Attributes:
        number: of this process's replica, from 0.
        count: of replicas.
        speaks: whether this process's counts are added up; of those with the same batches, one's are.
        split: see `Layout`.
        refused: why nothing can be counted; None where it can.
    """

    number: int = 0
    count: int = 1
    speaks: bool = True
    split: str | None = None
    refused: NotApplicable | None = None


def layout_of(model: nn.Module) -> Layout:
    """This process's place by all that can be read here, before anything is agreed on."""
    me = collective.rank()
    copies, replica, split = {me}, {me}, set()
    for mesh, names in _meshes(model):
        same = [place for place, name in enumerate(names) if name in _SAME]
        parts = [place for place, name in enumerate(names) if name in _PARTS]
        copies |= _peers(mesh, same)
        replica |= _peers(mesh, same + parts)
        split |= {_kind(names[place]) for place in parts if mesh.size(place) > 1}
        # A flattened dimension: who shares a sequence is not told, but that it is shared.
        split |= {"context" for name in names if name not in _PARTS and not _PARTS.isdisjoint(name.split("_"))}
    for ranks, kind in _deepspeed_groups():
        replica |= ranks
        copies |= ranks if kind is None else set()
        split |= {kind} if kind is not None and len(ranks) > 1 else set()
    size = _accelerate_sequence()
    if size > 1:
        first = me - me % size
        replica |= set(range(first, first + size))
        split.add("sequence")
    kinds = sorted(split, reverse=True)
    return Layout(tuple(sorted(copies)), tuple(sorted(replica | copies)), kinds[0] if kinds else None)


def replicas_of(layouts: Sequence[Layout], rank: int) -> Replicas:
    """What all processes' layouts make of one of them.

    Args:
        layouts: in the order of the ranks.

    Example:
        >>> layouts = [Layout((0, 1), (0, 1)), Layout((0, 1), (0, 1)), Layout((2, 3), (2, 3)), Layout((2, 3), (2, 3))]
        >>> replicas_of(layouts, rank=3)
        Replicas(number=1, count=2, speaks=False, split=None, refused=None)
    """
    for place, layout in enumerate(layouts):
        for peer in (*layout.copies, *layout.replica):
            if not 0 <= peer < len(layouts):
                continue
            other = layouts[peer]
            if (place in layout.copies and peer in layout.copies and other.copies != layout.copies) or (
                peer in layout.replica and other.replica != layout.replica
            ):
                reason = f"processes {place} and {peer} disagree on which of them see the same batches"
                return Replicas(0, 1, rank == 0, layout.split, NotApplicable(reason))
    groups = sorted({layout.replica for layout in layouts})
    mine = layouts[rank]
    split = next((layout.split for layout in layouts if layout.split is not None), None)
    return Replicas(groups.index(mine.replica), len(groups), rank == mine.copies[0], split)


def _kind(name: str) -> str:
    return "sequence" if name in _ULYSSES else "context"


def _peers(mesh: Any, dims: Collection[int]) -> set[int]:
    """Ranks that differ from this one in these dimensions of a mesh only."""
    place = mesh.get_coordinate()
    if place is None or not dims:
        return set()
    index = tuple(slice(None) if dim in dims else place[dim] for dim in range(mesh.ndim))
    return set(mesh.mesh[index].flatten().tolist())


def _meshes(model: nn.Module) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Meshes and what each dimension is for."""
    if (mesh := _accelerate_mesh()) is not None and mesh.mesh_dim_names:
        yield mesh, tuple(mesh.mesh_dim_names)
    found = {id(mesh): mesh for p in model.parameters() if (mesh := getattr(p, "device_mesh", None)) is not None}
    for mesh in found.values():
        names = mesh.mesh_dim_names
        # Without names: what FSDP2 has not spread is spread by tensor parallelism.
        yield mesh, tuple(names or ("data" if _is_fsdp2(model) else "tp",) * mesh.ndim)


def _is_fsdp2(model: nn.Module) -> bool:
    return any(callable(getattr(module, "set_requires_gradient_sync", None)) for module in model.modules())


def _accelerate_state() -> dict[str, Any]:
    state = sys.modules.get("accelerate.state")
    return {} if state is None else dict(state.AcceleratorState._shared_state)


def _accelerate_mesh() -> Any:
    return _accelerate_state().get("device_mesh")


def _accelerate_sequence() -> int:
    """Processes that share a sequence where DeepSpeed splits it for accelerate; 1 without."""
    config = _accelerate_state().get("parallelism_config")
    return int(getattr(config, "sp_size", None) or 1)


def _deepspeed_groups() -> Iterator[tuple[set[int], str | None]]:
    """Groups of DeepSpeed's: ranks, and how they share a sequence; None where they see the same batches."""
    groups: Any = sys.modules.get("deepspeed.utils.groups")
    if groups is None or collective.world_size() == 1:
        return
    import torch.distributed as dist

    asked = (
        (groups._get_sequence_parallel_world_size, groups._get_sequence_parallel_group, "sequence"),
        (groups._get_model_parallel_world_size, groups.get_model_parallel_group, None),
        (groups.get_tensor_model_parallel_world_size, groups.get_tensor_model_parallel_group, None),
    )
    for size, group, kind in asked:
        try:
            if size() > 1:
                yield set(dist.get_process_group_ranks(group())), kind
        except (AssertionError, AttributeError, KeyError, RuntimeError, ValueError):  # not set up
            continue
