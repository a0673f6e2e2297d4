"""Are two matrices the same rows? A hash of some rows, cheap enough for the start of a run, wherever the rows lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vocabguard import collective
from vocabguard.rows.baselines import Baseline
from vocabguard.rows.sharding import OwnPart, ShardBaseline

SAMPLED = 64
"""Rows that are hashed, evenly spaced over the matrix."""

# Rounded to bfloat16, a model loaded in one of these has the hash of the same model loaded in another.
_ROUNDED_ALIKE = ("float64", "float32", "bfloat16")


def fingerprint(rows: Baseline) -> dict[str, Any]:
    """What tells a matrix from another one; of rows that processes share, for all of them to call.

    A model that was loaded in float32 and in bfloat16 has the same fingerprint: it is of the rows rounded to bfloat16.

    Returns:
        ``rows``, ``width``, ``sampled`` rows, their ``dtype`` and the ``sha256`` of their rounded values; JSON-able.

    Example:
        >>> from vocabguard.rows.baselines import CopiedBaseline
        >>> rows = torch.arange(12.0).view(4, 3)
        >>> one, other = fingerprint(CopiedBaseline(rows)), fingerprint(CopiedBaseline(rows.bfloat16()))
        >>> one["sampled"], one["dtype"], one["sha256"] == other["sha256"]
        (4, 'float32', True)
        >>> differ(one, other), differ(one, fingerprint(CopiedBaseline(rows + 1)))
        (False, True)
    """
    count = min(SAMPLED, rows.rows)
    found = _rows_at(rows, [place * rows.rows // count for place in range(count)])
    rounded = found.to(torch.bfloat16).contiguous().view(torch.uint8)
    return {
        "rows": rows.rows, "width": rows.width, "sampled": count, "dtype": str(found.dtype).removeprefix("torch."),
        "sha256": hashlib.sha256(rounded.numpy().tobytes()).hexdigest(),
    }  # fmt: skip


def differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool | None:
    """Whether two fingerprints are of other rows; None where they cannot tell.

    They cannot where rows were added to one of them, or where only one was rounded to float16.
    """
    if any(one.get(key) != other.get(key) for key in ("rows", "width", "sampled")):
        return None
    kinds = {one.get("dtype"), other.get("dtype")}
    if len(kinds) > 1 and not kinds <= set(_ROUNDED_ALIKE):
        return None
    return bool(one.get("sha256") != other.get("sha256"))


def _rows_at(rows: Baseline, ids: list[int]) -> Tensor:
    """(n, width) of the rows, on the CPU, in the dtype in which they are kept."""
    if isinstance(rows, OwnPart):
        return _rows_at(rows.whole, ids)
    if not isinstance(rows, ShardBaseline):
        return torch.cat([rows.chunk(slice(row, row + 1)).detach().clone() for row in ids])
    found, own = rows.tensor.new_zeros(len(ids), rows.width), rows.shard.part
    for place, row in enumerate(ids):
        if rows.shard.owner and own.start <= row < own.stop:
            found[place] = rows.chunk(slice(row, row + 1))[0]
    # As bytes, which any backend can add: all but one process's are 0.
    return collective.total(found.view(torch.uint8)).view(found.dtype)
