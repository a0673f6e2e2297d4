"""What holds for the drift of any rows, against float64 and under changes that must not matter."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vocabguard.measure.drift import measure_drift
from vocabguard.results import RowDrift
from vocabguard.rows.baselines import CopiedBaseline

STABLE = settings(max_examples=60, deadline=None, derandomize=True)
VECTORS = ("cosine", "residual", "l2", "norm_ratio")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@st.composite
def pairs(draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES) -> tuple[Tensor, Tensor, Tensor]:
    """Rows before, rows after, and which are unexposed: every row has a length and a displacement of its own."""
    rows, width = draw(st.integers(1, 40)), draw(st.integers(1, 33))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    length = 10 ** torch.empty(rows, 1).uniform_(-1.5, 1.5, generator=generator)
    moved = 10 ** torch.empty(rows, 1).uniform_(-5, 1, generator=generator)
    base = length * torch.randn(rows, width, generator=generator)
    shift = draw(st.sampled_from([0.0, 0.01, 1.0, 30.0])) * torch.randn(width, generator=generator)
    now = base + length * moved * torch.randn(rows, width, generator=generator) + shift
    unexposed = torch.rand(rows, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    dtype = draw(dtypes)
    return base.to(dtype), now.to(dtype), unexposed


def drift_of(base: Tensor, now: Tensor, unexposed: Tensor, chunk_rows: int = 1024) -> RowDrift:
    return measure_drift(CopiedBaseline(now), CopiedBaseline(base), unexposed, chunk_rows=chunk_rows)


def exact(base: Tensor, now: Tensor, unexposed: Tensor) -> dict[str, Tensor]:
    """The definitions on whole float64 matrices."""
    w0, w = base.double(), now.double()
    shift = (w - w0)[unexposed].sum(dim=0) / max(1, int(unexposed.sum()))
    return {
        "cosine": cosine_similarity(w, w0, dim=1, eps=0),
        "residual": cosine_similarity(w - shift, w0, dim=1, eps=0),
        "l2": (w - w0).norm(dim=1),
        "norm_ratio": w.norm(dim=1) / w0.norm(dim=1),
    }


def assert_alike(one: Tensor, other: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


@STABLE
@given(pairs())
def test_equal_to_float64_and_within_bounds(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    base, now, unexposed = pair
    found, expected = drift_of(*pair), exact(*pair)
    # Where w - s all but vanishes it has no direction that float32 could tell.
    w, w0 = now.double(), base.double()
    rest = w - (w - w0)[unexposed].sum(dim=0) / max(1, int(unexposed.sum()))
    firm = rest.norm(dim=1) > 0.01 * torch.maximum(w.norm(dim=1), w0.norm(dim=1))
    for name in VECTORS:
        told = firm if name == "residual" else torch.ones_like(firm)
        assert_alike(getattr(found, name)[told], expected[name][told], 3e-6 if name == "norm_ratio" else 1e-6)
    for name in ("cosine", "residual"):
        values = getattr(found, name)[firm]
        assert bool(((values >= -1) & (values <= 1)).all())
    assert not found.bad.any()


@STABLE
@given(pairs(), st.lists(st.integers(0, 39), min_size=1))
def test_rows_that_did_not_move_have_cosine_one(pair: tuple[Tensor, Tensor, Tensor], still: list[int]) -> None:
    base, now, unexposed = pair
    chosen = torch.tensor(sorted({row % len(base) for row in still}))
    now[chosen] = base[chosen]
    found = drift_of(base, now, unexposed)
    assert bool((found.l2[chosen] == 0).all())
    # The two lengths are summed in different orders.
    for name in ("cosine", "norm_ratio"):
        assert_alike(getattr(found, name)[chosen], torch.ones(len(chosen)), 3e-7)


@STABLE
@given(pairs(st.just(torch.float32)), st.integers(0, 39), st.floats(1e-5, 1e5))
def test_scaling_a_row_leaves_its_cosine(pair: tuple[Tensor, Tensor, Tensor], row: int, factor: float) -> None:
    base, now, unexposed = pair
    row %= len(base)
    scaled = now.clone()
    scaled[row] *= factor
    before, after = drift_of(base, now, unexposed), drift_of(base, scaled, unexposed)
    assert_alike(after.cosine, before.cosine)
    assert math.isclose(after.norm_ratio[row], before.norm_ratio[row] * factor, rel_tol=3e-6)
    power = 2.0 ** round(math.log2(factor))  # another factor would round the displacement
    both = drift_of(base * power, now * power, unexposed)
    assert_alike(both.cosine, before.cosine)
    assert_alike(both.l2 / power, before.l2)


@STABLE
@given(
    pairs(st.sampled_from([torch.float32, torch.bfloat16])),
    st.lists(
        st.tuples(st.integers(0, 39), st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -3e38]), st.booleans()),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 50),
)
def test_broken_rows_spoil_no_other(
    pair: tuple[Tensor, Tensor, Tensor], faults: list[tuple[int, float, bool]], chunk_rows: int
) -> None:
    base, now, unexposed = pair
    broken = torch.zeros(len(base), dtype=torch.bool)
    hurt_base, hurt_now = base.clone(), now.clone()
    for row, value, before in faults:
        (hurt_base if before else hurt_now)[row % len(base), 0] = value
        broken[row % len(base)] = True
    whole = drift_of(base, now, unexposed & ~broken)
    hurt = drift_of(hurt_base, hurt_now, unexposed, chunk_rows)
    assert torch.equal(hurt.bad, broken)
    for name in VECTORS:
        assert bool(getattr(hurt, name)[broken].isnan().all())
        assert_alike(getattr(hurt, name)[~broken], getattr(whole, name)[~broken])


@STABLE
@given(pairs(), st.integers(1, 50), st.integers(1, 50))
def test_the_size_of_a_chunk_does_not_matter(pair: tuple[Tensor, Tensor, Tensor], one: int, other: int) -> None:
    left, right = drift_of(*pair, chunk_rows=one), drift_of(*pair, chunk_rows=other)
    for name in (*VECTORS, "bad", "zero"):
        assert_alike(getattr(left, name), getattr(right, name))


@STABLE
@given(pairs(st.just(torch.float32)), st.floats(0, 50), st.integers(0, 2**32))
def test_a_shift_that_all_unexposed_rows_share_leaves_their_residual_at_one(
    pair: tuple[Tensor, Tensor, Tensor], length: float, seed: int
) -> None:
    base, now, unexposed = pair
    base = base / base.norm(dim=1, keepdim=True)
    shift = torch.randn(base.shape[1], generator=torch.Generator().manual_seed(seed))
    shift *= length / shift.norm()
    now[unexposed] = base[unexposed] + shift
    residual = drift_of(base, now, unexposed).residual[unexposed]
    # The rows themselves are rounded to 24 bits after the shift is added; the angle that leaves is squared in 1 - cos.
    rounding = 1e-6 + (length * 2e-7) ** 2 * base.shape[1]
    assert bool((residual >= 1 - rounding).all())
