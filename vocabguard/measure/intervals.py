"""Confidence intervals that stay honest when a run is looked at again and again. Plain numbers, no tensors."""

from __future__ import annotations

import math
from statistics import NormalDist

ALPHA = 0.05
"""Chance, over all looks at a run together, that an interval misses the truth."""


def look_alpha(look: int) -> float:
    """Error that the k-th look may make: ``0.05 / (k * (k + 1))``.

    The sum over all looks is 0.05, however many there are, so an alert that fires as soon as an interval leaves 0 is
    wrong in at most 5 % of the runs in which nothing changes (by Bonferroni's inequality).

    Args:
        look: number of the look, from 1.

    Raises:
        ValueError: if `look` is less than 1.

    Example:
        >>> [round(look_alpha(look), 4) for look in (1, 2, 10)]
        [0.025, 0.0083, 0.0005]
        >>> round(sum(look_alpha(look) for look in range(1, 10_000)), 4)
        0.05
    """
    if look < 1:
        raise ValueError(f"look is {look}; allowed: 1 or more")
    return ALPHA / (look * (look + 1))


def z_of_look(look: int) -> float:
    """Half width of the two-sided interval of the k-th look, in standard errors; see `look_alpha`.

    Raises:
        ValueError: if `look` is less than 1.

    Example:
        >>> [round(z_of_look(look), 2) for look in (1, 2, 10, 100)]
        [2.24, 2.64, 3.51, 4.57]
    """
    return NormalDist().inv_cdf(1 - look_alpha(look) / 2)


def wilson(count: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share, in [0, 1], corrected for continuity; ``(0, 1)`` of nothing.

    It does not shrink to a point at 0 or 1, as the plain normal interval does. Formula: E. B. Wilson, "Probable
    inference, the law of succession, and statistical inference", 1927.

    Args:
        count: how many have it.
        total: out of how many.
        z: half width in standard errors; 1.96 for 95 %, `z_of_look` for repeated looks.

    Raises:
        ValueError: if `count` is not between 0 and `total`.

    Example:
        >>> [round(end, 3) for end in wilson(96, 96)], [round(end, 3) for end in wilson(6, 7)]
        ([0.952, 1.0], [0.42, 0.992])
    """
    if not 0 <= count <= total:
        raise ValueError(f"count is {count} of {total}; allowed: 0 to {total}")
    return (0.0, 1.0) if total == 0 else wilson_share(count / total, total, z)


def wilson_share(share: float, total: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share in [0, 1] of a sample that need not be a whole number, such as an effective one.

    With the correction for continuity (R. G. Newcombe, "Two-sided confidence intervals for the single proportion",
    1998, method 4): without it, one token of hundreds is taken for proof that there are some.

    Raises:
        ValueError: if `share` is outside [0, 1], or `total` is not above 0.

    Example:
        >>> [round(end, 3) for end in wilson_share(1.0, 96)]
        [0.952, 1.0]
    """
    if not 0 <= share <= 1 or not total > 0:
        raise ValueError(f"share is {share} of {total}; allowed: 0 to 1, of more than 0")
    return _lower(share, total, z), 1 - _lower(1 - share, total, z)


def paired_change(better: int, worse: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Interval of the change of a share whose members are the same before and after, in [-1, 1].

    From the intervals (`wilson`) of the two shares that changed, whose half widths are squared and added (G. Y. Zou
    and A. Donner, "Construction of confidence limits about effect measures", 2008): it does not shrink to a point
    where nothing changed.

    Args:
        better: members that have it only after.
        worse: members that have it only before.
        total: all members; ``(-1, 1)`` of nothing.
        z: half width in standard errors.

    Raises:
        ValueError: if there are more changes than members.

    Example:
        >>> [round(end, 3) for end in paired_change(40, 2, 100)]
        [0.269, 0.484]
    """
    if min(better, worse) < 0 or better + worse > total:
        raise ValueError(f"{better} better and {worse} worse of {total}; allowed: together at most all of them")
    if total == 0:
        return -1.0, 1.0
    up, down = better / total, worse / total
    (up_low, up_high), (down_low, down_high) = wilson(better, total, z), wilson(worse, total, z)
    return up - down - math.hypot(up - up_low, down_high - down), up - down + math.hypot(up_high - up, down - down_low)


def _lower(share: float, total: float, z: float) -> float:
    if share * total < 0.5:
        return 0.0
    inner = z * z - 2 - 1 / total + 4 * share * (total * (1 - share) + 1)
    found = (2 * total * share + z * z - 1 - z * math.sqrt(max(0.0, inner))) / (2 * (total + z * z))
    return min(1.0, max(0.0, found))
