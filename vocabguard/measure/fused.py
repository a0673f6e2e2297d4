"""Inner products of rows on an accelerator in one kernel, which reads each element once and keeps nothing beside it.

By torch's own operations a chunk is read six times, and three copies of it in float32 are made. The kernel is Triton's,
which comes with torch for CUDA; where it is missing or fails, torch's operations do the work.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)

FusedSums = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""(n, width) rows now and before, of any float dtype, their elements side by side; (width,) float32 shift; (5, n)
float32 to fill, a view of larger sums."""

_MOST_COLUMNS = 4096
_KINDS = ("cuda", "xpu")


@functools.cache
def fused_sums(kind: str) -> FusedSums | None:
    """The kernel for a kind of device; None where there is none.

    It writes w.w, d.d, w.s, d.s and w0.w0 of n rows w and w0, with d = w - w0, accumulated in float32. It is compiled
    at its first call, in about a second, and kept by Triton in the user's cache folder.

    Args:
        kind: as ``torch.device.type`` has it.

    Example:
        >>> fused_sums("cpu") is None
        True
    """
    if kind not in _KINDS:
        return None
    try:
        return _compiled()
    except Exception as error:  # a Triton that does not fit this torch raises what it likes
        logger.debug("no fused kernel for the sums of rows: %s", error)
        return None


def _compiled() -> FusedSums:
    triton: Any = importlib.import_module("triton")
    kernel = triton.jit(_row_sums)

    def sums(now: Tensor, before: Tensor, shift: Tensor, out: Tensor) -> None:
        count, width = now.shape
        strides = (now.stride(0), before.stride(0), out.stride(0))
        columns = min(_MOST_COLUMNS, triton.next_power_of_2(width))
        kernel[(count,)](now, before, shift, out, *strides, width=width, columns=columns, num_warps=4)

    return sums


# Triton compiles it from its source, in which `tl` must be a name of this module.
try:
    tl: Any = importlib.import_module("triton.language")
except Exception:  # see `fused_sums`
    tl = None


def _row_sums(  # type: ignore[no-untyped-def]
    now, before, shift, out, now_stride, before_stride, out_stride, width: tl.constexpr, columns: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    now_sq = tl.zeros((columns,), tl.float32)
    moved_sq = tl.zeros((columns,), tl.float32)
    now_shift = tl.zeros((columns,), tl.float32)
    moved_shift = tl.zeros((columns,), tl.float32)
    before_sq = tl.zeros((columns,), tl.float32)
    for start in range(0, width, columns):
        places = start + tl.arange(0, columns)
        inside = places < width
        w = tl.load(now + row * now_stride + places, mask=inside, other=0.0).to(tl.float32)
        base = tl.load(before + row * before_stride + places, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(shift + places, mask=inside, other=0.0)
        moved = w - base
        now_sq += w * w
        moved_sq += moved * moved
        now_shift += w * s
        moved_shift += moved * s
        before_sq += base * base
    tl.store(out + row, tl.sum(now_sq, axis=0))
    tl.store(out + out_stride + row, tl.sum(moved_sq, axis=0))
    tl.store(out + 2 * out_stride + row, tl.sum(now_shift, axis=0))
    tl.store(out + 3 * out_stride + row, tl.sum(moved_shift, axis=0))
    tl.store(out + 4 * out_stride + row, tl.sum(before_sq, axis=0))
