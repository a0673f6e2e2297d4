"""The sums of `vocabguard.measure.rowwise` in one loop over each row, compiled by numba where it is installed.

numpy takes eight walks through the cache for what one loop does while the next row comes from memory. numba is not
required: without it, or where it cannot compile, `kernel` gives None and the same sums are numpy's, two to three times
as slow.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Sums = Callable[[Any, Any, Any, Any], None]
"""Rows now, baseline rows (both (n, width) uint16 of bfloat16, or both float32), shift, (5, n) float32 to fill."""

logger = logging.getLogger(__name__)

_ROWS = {"bfloat16": "uint16[:,::1]", "float32": "float32[:,::1]"}
# Sums may be taken in any order, which vector instructions need; NaN and Inf stay what they are.
_FAST = {"reassoc", "nsz", "contract"}


@functools.cache
def kernel(kind: str) -> Sums | None:
    """The compiled loop for rows of one kind; None where there is no numba, or it fails.

    Compiling takes about a second, once: numba keeps the result beside this file or in the user's cache folder.

    Args:
        kind: ``bfloat16`` or ``float32``.

    Returns:
        A function that lets other threads run. It writes w.w, d.d, w.s, d.s and w0.w0 of n rows w and w0, with
        d = w - w0, accumulated in float32.
    """
    signature = f"void({_ROWS[kind]}, {_ROWS[kind]}, float32[::1], float32[:,:])"
    try:
        numba: Any = importlib.import_module("numba")
    except Exception:  # a numba that does not fit this numpy raises other things than ImportError
        return None
    for cache in (True, False):
        try:
            compiled: Sums = numba.njit(signature, nogil=True, cache=cache, fastmath=_FAST)(_LOOPS[kind])
        except Exception as error:  # no folder to write to, no compiler for this machine
            logger.debug("numba cannot compile the sums of rows (cache: %s): %s", cache, error)
        else:
            return compiled
    return None


def _bfloat16(
    now: npt.NDArray[np.uint16], base: npt.NDArray[np.uint16], shift: npt.NDArray[np.float32], out: Any
) -> None:
    rows, width = now.shape
    # A bfloat16 is the upper half of a float32.
    words = np.empty((2, width), np.uint32)
    wide = words.view(np.float32)
    for row in range(rows):
        for place in range(width):
            words[0, place] = np.uint32(now[row, place]) << np.uint32(16)
            words[1, place] = np.uint32(base[row, place]) << np.uint32(16)
        now_sq = moved_sq = now_shift = moved_shift = base_sq = np.float32(0)
        for place in range(width):
            moved = wide[0, place] - wide[1, place]
            now_sq += wide[0, place] * wide[0, place]
            moved_sq += moved * moved
            now_shift += wide[0, place] * shift[place]
            moved_shift += moved * shift[place]
            base_sq += wide[1, place] * wide[1, place]
        out[0, row], out[1, row], out[2, row] = now_sq, moved_sq, now_shift
        out[3, row], out[4, row] = moved_shift, base_sq


def _float32(
    now: npt.NDArray[np.float32], base: npt.NDArray[np.float32], shift: npt.NDArray[np.float32], out: Any
) -> None:
    for row in range(now.shape[0]):
        now_sq = moved_sq = now_shift = moved_shift = base_sq = np.float32(0)
        for place in range(now.shape[1]):
            moved = now[row, place] - base[row, place]
            now_sq += now[row, place] * now[row, place]
            moved_sq += moved * moved
            now_shift += now[row, place] * shift[place]
            moved_shift += moved * shift[place]
            base_sq += base[row, place] * base[row, place]
        out[0, row], out[1, row], out[2, row] = now_sq, moved_sq, now_shift
        out[3, row], out[4, row] = moved_shift, base_sq


_LOOPS: dict[str, Callable[..., None]] = {"bfloat16": _bfloat16, "float32": _float32}
