"""What is known of the learning rates of a run, and where its rows will end: frozen dataclasses, no arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

DEGRADED = 0.95
"""Cosine below which a row counts as degraded."""

AT_RISK = 0.5
"""Chance of ending degraded from which on a row counts as at risk."""


@dataclass(frozen=True)
class Schedule:
    """Learning rates of a run so far and to come.

    Attributes:
        step: optimizer steps done.
        total: planned optimizer steps.
        sum_past: learning rates of the steps done, summed.
        square_past: their squares, summed.
        sum_left: the same of the steps to come.
        square_left: the same of the steps to come.
        optimizer: ``adam`` for those that divide by the root of a second moment, ``sgd`` for those that do not.
        memory: steps over which the second moment is averaged, 1 / (1 - beta2); 0 for ``sgd``.
    """

    step: int
    total: int
    sum_past: float
    square_past: float
    sum_left: float
    square_left: float
    optimizer: str
    memory: float


@dataclass(frozen=True)
class Forecast:
    """Where the rows will be at the end of the run, if nothing is done. NaN for bad rows.

    Attributes:
        step: the optimizer step at which it was made; 0 is before the first.
        total: planned optimizer steps.
        cosine: (V,) float32 in [-1, 1], the median.
        low: (V,) float32, 5 % quantile.
        high: (V,) float32, 95 % quantile.
        chance: (V,) float32 in [0, 1], that the cosine ends below `DEGRADED`.
    """

    step: int
    total: int
    cosine: Tensor
    low: Tensor
    high: Tensor
    chance: Tensor

    @property
    def at_risk(self) -> Tensor:
        """(V,) bool, chance of at least `AT_RISK`."""
        return self.chance >= AT_RISK
