"""Rows of a matrix that is read chunk by chunk, wherever it lies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

Chunks = Callable[[], Iterable[tuple[slice, Tensor]]]
"""Reads a matrix anew at each call: (slice of rows, rows of any float dtype on any device), in order, without gaps."""


def read_rows(chunks: Chunks, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """The chunks in float32.

    Raises:
        ValueError: at the end, if they do not cover so many rows.

    Example:
        >>> matrix = torch.eye(3, dtype=torch.bfloat16)
        >>> [(where.stop, part.dtype) for where, part in read_rows(lambda: [(slice(0, 3), matrix)], 3)]
        [(3, torch.float32)]
    """
    end = 0
    for where, part in chunks():
        end = where.stop
        if end > rows:
            break
        yield where, part.detach().float()
    if end != rows:
        raise ValueError(f"the chunks end at row {end}; the masks have {rows} rows")


def by_chunk(chunks: Chunks, rows: int, measure: Callable[[slice, Tensor], Tensor]) -> Tensor:
    """One float32 number a row, (rows,) on the CPU; NaN where it is not finite.

    Example:
        >>> by_chunk(lambda: [(slice(0, 2), torch.tensor([[1.0], [-4.0]]))], 2, lambda _, part: part[:, 0].sqrt())
        tensor([1., nan])
    """
    found = torch.full((rows,), math.nan)
    for where, part in read_rows(chunks, rows):
        found[where] = measure(where, part).cpu()
    return torch.where(found.isfinite(), found, math.nan)
