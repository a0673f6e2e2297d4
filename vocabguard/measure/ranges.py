"""Where a row's angle ends and in what range: the part of the forecast that is fitted on several models.

Networks that were fitted on fine-tunes of one small model rank rows well on other models too, but put them too far and
their ranges too narrow. So the median is read by a few numbers that mean the same on any model, the growth of the
row's exposure class above all, and only a row's distance from its class is the networks'. The width comes from how far
models that were left out of the fit were missed. ``tests/benchmarks/early_travel.py`` fits both and holds them against
models that were never fitted.

A run also shows by itself how far it can be trusted: `missed_by` holds an earlier forecast against where rows are now.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vocabguard.measure.forecast import Floats

Doubles = npt.NDArray[np.float64]

LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
"""Quantiles that a forecast has."""

_MEDIAN = LEVELS.index(0.5)
_WIDEST = 5.0
# Rows at a time: what is made of them stays in the cache.
_ROWS = 2048
# Columns of `running_features`, whose order the packaged weights rely on.
_FROM_CLASS, _OWN_GROWTH, _NEVER, _CLASS, _GROWTH, _BEFORE, _SPAN, _COMING, _MEMORY, _TIED = (
    0, 3, 8, 18, 19, 20, 21, 22, 24, 25,
)  # fmt: skip
_FADING_SPAN, _SEEN, _SPREAD = 35, 37, 38


@dataclass(frozen=True)
class Range:
    """Weights of the median and of the width, and quantiles in units of the width.

    Attributes:
        median: (M,) of `level_numbers`.
        width: (S,) of `width_numbers`, for the logarithm of the width.
        levels: (Q,) quantiles, ascending, of the error of the median over the width.
    """

    median: Doubles
    width: Doubles
    levels: Doubles

    def quantiles(self, inputs: Floats, networks: Floats, of_class: Floats) -> Floats:
        """(V, Q), ascending in Q: how the logarithm of each row's angle grows up to the end.

        Args:
            inputs: (V, F), as `running_features` gives them.
            networks: (V, Q), what the networks make of them.
            of_class: (V,) the median of the networks' medians over a row's exposure class.
        """
        found = np.empty((len(inputs), len(self.levels)), dtype=np.float32)
        for start in range(0, len(inputs), _ROWS):
            part = slice(start, start + _ROWS)
            middle = self.median @ _level_columns(inputs[part], networks[part, _MEDIAN], of_class[part])
            width = np.exp(np.clip(self.width @ _width_columns(inputs[part], networks[part]), -7, 2))
            found[part] = middle[:, None] + width[:, None] * self.levels
        return found


def level_numbers(inputs: Floats, middle: Floats, of_class: Floats) -> Doubles:
    """(V, M) float64: what the median is a weighted sum of. All but the last four vanish with the rates to come.

    Args:
        inputs: (V, F), as `running_features` gives them.
        middle: (V,) medians of the networks.
        of_class: (V,) their median over a row's exposure class.

    Example:
        >>> nothing_left, none = np.zeros((2, 39), dtype=np.float32), np.zeros(2, dtype=np.float32)
        >>> bool(level_numbers(nothing_left, none, none).any())
        False
    """
    return _level_columns(inputs, middle, of_class).T


def _level_columns(inputs: Floats, middle: Floats, of_class: Floats) -> Doubles:
    """(M, V), see `level_numbers`."""
    column = _columns(
        inputs, _FROM_CLASS, _OWN_GROWTH, _NEVER, _CLASS, _GROWTH, _BEFORE, _SPAN, _COMING, _MEMORY, _TIED
    )
    column |= _columns(inputs, _FADING_SPAN)
    span, memory, coming, never = column[_SPAN], column[_MEMORY], column[_COMING], column[_NEVER]
    level, growth, before = (
        np.clip(column[name], low, high)
        for name, low, high in ((_CLASS, -6, 0.5), (_GROWTH, -0.5, 1.5), (_BEFORE, -0.5, 1.5))
    )
    levelling, own = span / (1 + span), middle - of_class
    found: Doubles = np.stack(
        [
            growth * span, growth * levelling, before * span, span, levelling, span * coming, span * levelling,
            span * memory, span * level, span * column[_TIED], never * span, never * levelling,
            (growth - before) * span, column[_OWN_GROWTH] * span, column[_FROM_CLASS] * span, column[_FADING_SPAN],
            growth * coming * span, growth * growth * span, (growth == before) * growth * levelling,
            growth * levelling * level, never * growth * levelling, growth * span * memory,
            own, own * (1 - never), of_class, of_class * levelling,
        ]
    )  # fmt: skip
    return found


def _columns(inputs: Floats, *places: int) -> dict[int, Doubles]:
    return {place: inputs[:, place].astype(np.float64) for place in places}


def width_numbers(inputs: Floats, networks: Floats) -> Doubles:
    """(V, S) float64: what the logarithm of the width is a weighted sum of.

    Args:
        inputs: (V, F), as `running_features` gives them.
        networks: (V, Q), what the networks make of them.

    Example:
        >>> inputs, networks = np.ones((2, 39), dtype=np.float32), np.zeros((2, 7), dtype=np.float32)
        >>> width_numbers(inputs, networks).shape
        (2, 11)
    """
    return _width_columns(inputs, networks).T


def _width_columns(inputs: Floats, networks: Floats) -> Doubles:
    """(S, V), see `width_numbers`."""
    column = _columns(inputs, _NEVER, _GROWTH, _BEFORE, _SPAN, _COMING, _MEMORY, _SEEN, _SPREAD)
    span, one = np.maximum(column[_SPAN], 1e-3), np.ones(len(inputs))
    theirs = np.log(np.maximum(networks[:, -1] - networks[:, 0], 1e-3))
    growth, before = (np.clip(column[name], -0.5, 1.5) for name in (_GROWTH, _BEFORE))
    found: Doubles = np.stack(
        [
            one, np.log(span), theirs, np.log(np.maximum(column[_SPREAD], 0.02)), np.abs(growth - before),
            column[_NEVER], column[_SEEN], column[_MEMORY], column[_COMING], span / (1 + span), np.log(span) ** 2,
        ]
    )  # fmt: skip
    return found


def widened(quantiles: Floats, sides: tuple[float, float]) -> Floats:
    """Quantiles, (V, Q), whose distances from the median are multiplied, below and above it.

    >>> widened(np.arange(7, dtype=np.float32)[None], (2.0, 1.0))
    array([[-3., -1.,  1.,  3.,  4.,  5.,  6.]], dtype=float32)
    """
    below, above = sides
    middle = quantiles[:, _MEDIAN : _MEDIAN + 1]
    found: Floats = quantiles - middle
    found[:, :_MEDIAN] *= np.float32(below)
    found[:, _MEDIAN + 1 :] *= np.float32(above)
    found += middle
    return found.astype(np.float32, copy=False)


def missed_by(quantiles: Floats, grown: Floats) -> tuple[float, float]:
    """How much wider an earlier forecast should have been, below and above its median, to miss 5 % on each side.

    Args:
        quantiles: (n, Q), how rows were to grow.
        grown: (n,) how they grew; NaN is left out.

    Returns:
        Each at least 1, since a forecast that held so far may still fail, and at most 5.

    Example:
        >>> told = np.repeat(np.linspace(-3, 3, 7, dtype=np.float32)[None], 100, axis=0)
        >>> missed_by(told, np.linspace(-2, 6, 100, dtype=np.float32))[1] > 1.8
        True
    """
    known = np.isfinite(grown)
    if not known.any():
        return 1.0, 1.0
    quantiles, grown = quantiles[known], grown[known]
    middle = quantiles[:, _MEDIAN]
    low = np.quantile((middle - grown) / np.maximum(middle - quantiles[:, 0], 1e-6), LEVELS[-1])
    high = np.quantile((grown - middle) / np.maximum(quantiles[:, -1] - middle, 1e-6), LEVELS[-1])
    return float(np.clip(low, 1, _WIDEST)), float(np.clip(high, 1, _WIDEST))
