"""Intervals: against the equation that defines them, and their promise over many looks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vocabguard.measure.intervals import ALPHA, look_alpha, paired_change, wilson, z_of_look


def test_all_looks_together_miss_at_most_alpha() -> None:
    assert math.fsum(look_alpha(look) for look in range(1, 100_000)) < ALPHA
    widths = [z_of_look(look) for look in range(1, 200)]
    assert widths == sorted(widths)


@pytest.mark.parametrize("look", [1, 3, 20])
def test_half_width_is_the_normal_quantile(look: int) -> None:
    tail = 1 - torch.special.ndtr(torch.tensor(z_of_look(look), dtype=torch.float64)).item()
    assert 2 * tail == pytest.approx(look_alpha(look), rel=1e-6)


def test_intervals_that_leave_0_are_rare_where_nothing_changes() -> None:
    """1,000 null runs of 20 looks each, with normal noise: the share of those that ever alarm."""
    noise = torch.randn(1000, 20, generator=torch.Generator().manual_seed(0)).abs()
    widths = torch.tensor([z_of_look(look) for look in range(1, 21)])
    assert (noise > widths).any(1).float().mean() < ALPHA + 0.02
    assert (noise > 1.96).any(1).float().mean() > 0.5, "without the allowance most runs would alarm"


@given(st.integers(1, 500).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))), st.floats(0.5, 5))
def test_ends_are_where_the_share_is_z_errors_away(of: tuple[int, int], z: float) -> None:
    count, total = of
    low, high = wilson(count, total, z)
    assert 0 <= low <= count / total <= high <= 1
    # With the correction for continuity: half a count nearer.
    for end, apart in ((low, count / total - low), (high, high - count / total)):
        if 0 < end < 1:
            away = apart - 1 / (2 * total)
            assert away**2 == pytest.approx(z * z * end * (1 - end) / total, rel=1e-6, abs=1e-12)


def test_of_nothing_nothing_is_known() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="look is 0; allowed: 1 or more"):
        look_alpha(0)
    with pytest.raises(ValueError, match="count is 3 of 2; allowed: 0 to 2"):
        wilson(3, 2)


@pytest.mark.parametrize(("better", "worse", "total"), [(0.3, 0.02, 80), (0.02, 0.02, 200), (0.0, 0.05, 40)])
def test_a_paired_change_is_held_as_often_as_promised(better: float, worse: float, total: int) -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(2000, total, generator=generator)
    ups, downs = (draws < better).sum(1).tolist(), (draws > 1 - worse).sum(1).tolist()
    held = [
        low <= better - worse <= high
        for low, high in (paired_change(a, b, total) for a, b in zip(ups, downs, strict=True))
    ]
    assert sum(held) / len(held) > 0.94


def test_a_paired_change_has_ends() -> None:
    assert paired_change(0, 0, 0) == (-1.0, 1.0)
    low, high = paired_change(0, 0, 50)
    assert low < 0 < high, "nothing changed in the sample is no proof that nothing changes"
    with pytest.raises(ValueError, match="together at most"):
        paired_change(3, 3, 5)
