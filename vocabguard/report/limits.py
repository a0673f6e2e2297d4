"""From where on the report counts a finding."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """From where on a finding counts.

    Attributes:
        degraded: share in [0, 1] of live rows below cosine 0.95 that is still fine.
        forgotten: share in [0, 1] of the tokens repeated at the base and lost that is still fine; more must be sure.
    """

    degraded: float = 0.01
    forgotten: float = 0.05
