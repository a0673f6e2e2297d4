"""The loops over rows that numba compiles, where it is installed (the extra ``fast``).

One loop reads rows and baseline rows once and takes all sums of a check on the way, at the speed at which the memory
gives them: bfloat16 is widened in the registers. A library of row kernels would read everything once for each sum.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

Loop = Callable[..., Any]

logger = logging.getLogger(__name__)

_ROWS = {"bfloat16": "uint16[:,::1]", "float32": "float32[:,::1]"}
# Sums may be taken in any order, which vector instructions need; NaN and Inf stay what they are.
_FAST = {"reassoc", "nsz", "contract"}
_UPPER_HALF, _INFINITE = np.uint32(16), np.float32(np.inf)


@functools.cache
def sums_loop(kind: str) -> Loop | None:
    """The compiled loop that takes the sums of rows of one kind; None where there is no numba, or it fails.

    It takes n rows w now and their baseline rows w0, the shift s, and (5, n) float32 to fill: w.w, d.d, w.s, d.s and
    w0.w0, with d = w - w0, accumulated in float32. Other threads run meanwhile. Compiling takes about a second, once:
    numba keeps the result beside this file or in the user's cache folder.

    Args:
        kind: ``bfloat16``, of which the loop takes the bits as uint16, or ``float32``.
    """
    return _compiled(_SUMS[kind], f"void({_ROWS[kind]}, {_ROWS[kind]}, float32[::1], float32[:,:])", _FAST)


@functools.cache
def moved_loop(kind: str) -> Loop | None:
    """The compiled loop that adds up the displacements of some rows; None as for `sums_loop`.

    It takes the rows now and their baseline rows as `sums_loop` does, and (n, 4) int64 places of rows, which it adds
    four at a time: they lie far apart, and to wait for the memory for four takes hardly longer than for one. It adds
    to (width,) float64, with a (width,) float32 buffer to write to, and tells in (n,) bool which fours it added: those
    in which all lengths are finite.
    """
    places = "int64[:,::1], float32[::1], float64[::1], boolean[::1]"
    return _compiled(_MOVED[kind], f"void({_ROWS[kind]}, {_ROWS[kind]}, {places})", _FAST)


@functools.cache
def finish_loop() -> Loop | None:
    """The compiled loop from sums to drift; None as for `sums_loop`.

    It takes w0.w0 of V rows, the sums that `sums_loop` fills, |s|^2, the ratio of two squared lengths and of |s|^2 to
    |w0|^2 up to which the sums have digits enough, four times (V,) float32 to fill with cosine, residual cosine, |d|
    and |w| / |w0|, and (V,) bool to tell which rows have to be measured with more care.
    """
    numbers, vectors = ", ".join(3 * ["float32"]), ", ".join(4 * ["float32[::1]"])
    return _compiled(_finish, f"void(float32[::1], float32[:,::1], {numbers}, {vectors}, boolean[::1])")


def _compiled(loop: Loop, signature: str, fastmath: set[str] | bool = False) -> Loop | None:
    try:
        numba: Any = importlib.import_module("numba")
    except Exception:  # a numba that does not fit this numpy raises other things than ImportError
        return None
    for cache in (True, False):
        try:
            options = {"nogil": True, "cache": cache, "fastmath": fastmath, "error_model": "numpy"}
            compiled: Loop = numba.njit(signature, **options)(loop)
        except Exception as error:  # no folder to write to, no compiler for this machine
            logger.debug("numba cannot compile a loop over rows (cache: %s): %s", cache, error)
        else:
            return compiled
    return None


# A bfloat16 is the upper half of a float32. Each kind has loops of its own: a call for each element would have to be
# compiled, and kept, apart.


def _sums_bfloat16(now: Any, base: Any, shift: Any, out: Any) -> None:
    rows, width = now.shape
    for row in range(rows):
        now_sq = moved_sq = now_shift = moved_shift = base_sq = np.float32(0)
        for place in range(width):
            one = np.uint32(np.uint32(now[row, place]) << _UPPER_HALF).view(np.float32)
            other = np.uint32(np.uint32(base[row, place]) << _UPPER_HALF).view(np.float32)
            moved = one - other
            now_sq += one * one
            moved_sq += moved * moved
            now_shift += one * shift[place]
            moved_shift += moved * shift[place]
            base_sq += other * other
        out[0, row], out[1, row], out[2, row] = now_sq, moved_sq, now_shift
        out[3, row], out[4, row] = moved_shift, base_sq


def _sums_float32(now: Any, base: Any, shift: Any, out: Any) -> None:
    rows, width = now.shape
    for row in range(rows):
        now_sq = moved_sq = now_shift = moved_shift = base_sq = np.float32(0)
        for place in range(width):
            moved = now[row, place] - base[row, place]
            now_sq += now[row, place] * now[row, place]
            moved_sq += moved * moved
            now_shift += now[row, place] * shift[place]
            moved_shift += moved * shift[place]
            base_sq += base[row, place] * base[row, place]
        out[0, row], out[1, row], out[2, row] = now_sq, moved_sq, now_shift
        out[3, row], out[4, row] = moved_shift, base_sq


def _moved_bfloat16(now: Any, base: Any, fours: Any, buffer: Any, total: Any, finite: Any) -> None:
    for four in range(len(fours)):
        i, j, k, m = fours[four]
        i_sq = j_sq = k_sq = m_sq = np.float32(0)
        for place in range(now.shape[1]):
            p = np.uint32(np.uint32(now[i, place]) << _UPPER_HALF).view(np.float32)
            p -= np.uint32(np.uint32(base[i, place]) << _UPPER_HALF).view(np.float32)
            q = np.uint32(np.uint32(now[j, place]) << _UPPER_HALF).view(np.float32)
            q -= np.uint32(np.uint32(base[j, place]) << _UPPER_HALF).view(np.float32)
            r = np.uint32(np.uint32(now[k, place]) << _UPPER_HALF).view(np.float32)
            r -= np.uint32(np.uint32(base[k, place]) << _UPPER_HALF).view(np.float32)
            s = np.uint32(np.uint32(now[m, place]) << _UPPER_HALF).view(np.float32)
            s -= np.uint32(np.uint32(base[m, place]) << _UPPER_HALF).view(np.float32)
            i_sq += p * p
            j_sq += q * q
            k_sq += r * r
            m_sq += s * s
            buffer[place] = p + q + r + s
        # `isfinite` is a difference that the freedom of order makes zero.
        finite[four] = i_sq < _INFINITE and j_sq < _INFINITE and k_sq < _INFINITE and m_sq < _INFINITE
        if finite[four]:
            for place in range(now.shape[1]):
                total[place] += buffer[place]


def _moved_float32(now: Any, base: Any, fours: Any, buffer: Any, total: Any, finite: Any) -> None:
    for four in range(len(fours)):
        i, j, k, m = fours[four]
        i_sq = j_sq = k_sq = m_sq = np.float32(0)
        for place in range(now.shape[1]):
            p = now[i, place] - base[i, place]
            q = now[j, place] - base[j, place]
            r = now[k, place] - base[k, place]
            s = now[m, place] - base[m, place]
            i_sq += p * p
            j_sq += q * q
            k_sq += r * r
            m_sq += s * s
            buffer[place] = p + q + r + s
        # `isfinite` is a difference that the freedom of order makes zero.
        finite[four] = i_sq < _INFINITE and j_sq < _INFINITE and k_sq < _INFINITE and m_sq < _INFINITE
        if finite[four]:
            for place in range(now.shape[1]):
                total[place] += buffer[place]


def _finish(
    base_sq: Any, sums: Any, shift_sq: Any, ratio_sq: Any, long_sq: Any, cosine: Any, residual: Any, length: Any,
    ratio: Any, careful: Any,
) -> None:  # fmt: skip
    two, one, half = np.float32(2), np.float64(1), np.float64(0.5)
    for row in range(len(base_sq)):
        before, now, moved = base_sq[row], sums[0, row], sums[1, row]
        rest, rest_moved = now + (shift_sq - two * sums[2, row]), moved + (shift_sq - two * sums[3, row])
        dot = (np.float64(before) + now - moved) * half
        rest_dot = (np.float64(before) + rest - rest_moved) * half
        cosine[row] = min(max(np.float32(dot) / np.sqrt(np.float64(before) * now), -one), one)
        residual[row] = min(max(np.float32(rest_dot) / np.sqrt(np.float64(before) * rest), -one), one)
        length[row], ratio[row] = np.sqrt(moved), np.sqrt(now / before)
        low, high = min(now, rest), max(now, rest)
        near = (high <= ratio_sq * before) & (before <= ratio_sq * low) & (shift_sq <= long_sq * before) & (low > 0)
        careful[row] = not (near & np.isfinite(dot) & np.isfinite(rest_dot))


_SUMS: dict[str, Loop] = {"bfloat16": _sums_bfloat16, "float32": _sums_float32}
_MOVED: dict[str, Loop] = {"bfloat16": _moved_bfloat16, "float32": _moved_float32}
