"""Matrices whose rows are spread over processes: FSDP2 and other ``DTensor`` parameters split by rows.

Every process measures the rows it has; what is put together are vectors of a value a row, never the rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vocabguard import collective
from vocabguard.results import NotApplicable


@dataclass(frozen=True)
class Shard:
    """The rows that this process has of a matrix.

    Attributes:
        part: which rows, without a step; may be empty.
        owner: whether this process speaks for them: where other processes have the same ones, only one does.
    """

    part: slice
    owner: bool

    def join(self, values: Tensor) -> Tensor:
        """What each process knows of its own rows, put together. All processes must call it together.

        Args:
            values: (..., V) floating; looked at in this process's rows only.

        Returns:
            (..., V), the same on every process.
        """
        own = torch.zeros_like(values)
        if self.owner:
            own[..., self.part] = values[..., self.part]
        return collective.total(own)

    def total(self, sums: Tensor) -> Tensor:
        """Sums over each process's rows, added up. All processes must call it together."""
        return collective.total(sums if self.owner else torch.zeros_like(sums))


def shard_of(weight: Tensor) -> Shard | NotApplicable | None:
    """Which rows of a parameter this process has.

    Args:
        weight: (V, D) parameter.

    Returns:
        None where it has all of them; why not, where rows are split in a way that this module does not follow.
    """
    mesh: Any = getattr(weight, "device_mesh", None)
    if mesh is None:
        return None
    placements: Any = weight.placements  # type: ignore[attr-defined]
    split = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    if not split:
        return None
    if len(split) > 1 or not placements[split[0]].is_shard(0):
        return NotApplicable(f"its rows are spread over processes as {tuple(placements)}; followed: one split by rows")
    place, parts = mesh.get_local_rank(split[0]), mesh.size(split[0])
    each = math.ceil(weight.shape[0] / parts)
    part = slice(min(place * each, weight.shape[0]), min((place + 1) * each, weight.shape[0]))
    rows = len(local_rows(weight))
    if rows != part.stop - part.start:
        return NotApplicable(
            f"process {place} of {parts} has {rows} of its {weight.shape[0]} rows; followed: even splits"
        )
    others = [mesh.get_local_rank(dim) for dim in range(mesh.ndim) if dim != split[0]]
    return Shard(part, owner=not any(others))


def local_rows(weight: Tensor) -> Tensor:
    """(n, D) the rows that this process has, a view of the parameter's memory; the tensor itself where it has all."""
    to_local = getattr(weight, "to_local", None)
    local = weight if to_local is None else to_local()
    assert isinstance(local, Tensor)
    return local


def reshard(model: nn.Module) -> None:
    """Give each process its own rows back: a forward pass without a backward pass leaves FSDP2's outermost gathered."""
    for module in model.modules():
        # To import FSDP2 for its class takes a second.
        if callable(again := getattr(module, "reshard", None)):
            again()


class ShardBaseline:
    """A copy of one process's (n, width) rows on the CPU, of V; see `vocabguard.rows.baselines.Baseline`."""

    def __init__(self, tensor: Tensor, shard: Shard, rows: int) -> None:
        self.tensor, self.shard = tensor, shard
        self.rows, self.width = rows, tensor.shape[1]
        self.saved: dict[str, str] = {}

    def chunk(self, part: slice) -> Tensor:
        """Rows ``part``: (n, width) view on the CPU.

        Raises:
            ValueError: for rows of another process.
        """
        own = self.shard.part
        if part.start < own.start or part.stop > own.stop:
            raise ValueError(f"rows {part.start}:{part.stop} are not here; this process has {own.start}:{own.stop}")
        return self.tensor[part.start - own.start : part.stop - own.start]

    def chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Walk over the rows of all processes, which must do so together: each chunk is sent to all of them."""
        own = self.shard.part
        for start in range(0, self.rows, size):
            part = slice(start, min(start + size, self.rows))
            rows = self.tensor.new_zeros(part.stop - part.start, self.width)
            mine = slice(max(part.start, own.start), min(part.stop, own.stop))
            if self.shard.owner and mine.start < mine.stop:
                rows[mine.start - part.start : mine.stop - part.start] = self.chunk(mine)
            # As bytes, which any backend can add: all but one process's are 0.
            yield part, collective.total(rows.view(torch.uint8)).view(rows.dtype)

    def describe(self) -> str:
        """Where the rows are kept, in words."""
        own = self.shard.part
        megabytes = self.tensor.nbytes / 2**20
        return f"copy in memory (rows {own.start:,} to {own.stop:,} in this process, {megabytes:.0f} MiB)"

    def keep_reference(self, saved: dict[str, str]) -> None:
        """Remember where the rows of all processes have been saved."""
        self.saved = saved

    def reference(self) -> dict[str, str]:
        """Where the rows of all processes have been saved; empty before."""
        return self.saved

    @cached_property
    def norms(self) -> Tensor:
        """(rows,) float32 L2 norms, NaN for rows of other processes."""
        norms = torch.full((self.rows,), math.nan)
        norms[self.shard.part] = torch.linalg.vector_norm(self.tensor.float(), dim=-1)
        return norms
