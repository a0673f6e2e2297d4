from __future__ import annotations

import math
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from vocabguard.measure import compiled, drift
from vocabguard.measure import kernels as rowwise
from vocabguard.measure.drift import mean_shift, measure_drift, summarise
from vocabguard.measure.kernels import row_sums, sums_by_numba, sums_by_numpy, sums_by_torch
from vocabguard.results import RowDrift
from vocabguard.rows.baselines import CopiedBaseline, copy_baseline
from vocabguard.rows.matrices import VocabMatrix, find_matrices

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def rows_pair(rows: int = 257, width: int = 48, moved: float = 0.3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Baseline rows, and rows that moved by noise and by one shift that all share."""
    generator = torch.Generator().manual_seed(rows + width)
    base = torch.randn(rows, width, generator=generator)
    shift = 0.7 * moved * torch.randn(width, generator=generator)
    now = base + moved * torch.randn(rows, width, generator=generator) + shift
    return [base.to(dtype), now.to(dtype)]


def some_rows(rows: int, share: float = 0.5) -> Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(3)) < share


def drift_of(base: Tensor, now: Tensor, unexposed: Tensor | None = None, **options: int) -> RowDrift:
    unexposed = some_rows(len(now)) if unexposed is None else unexposed
    return measure_drift(CopiedBaseline(now), CopiedBaseline(base), unexposed, **options)


def naive(base: Tensor, now: Tensor, unexposed: Tensor) -> dict[str, list[float]]:
    """The definitions, row by row in plain Python, for rows that are finite and not zero."""
    before, after = base.double().tolist(), now.double().tolist()
    chosen = unexposed.nonzero().flatten().tolist()
    width = len(before[0])
    shift = [math.fsum(after[v][d] - before[v][d] for v in chosen) / max(len(chosen), 1) for d in range(width)]

    def length(row: list[float]) -> float:
        return math.sqrt(math.fsum(x * x for x in row))

    def cosine(row: list[float], other: list[float]) -> float:
        return math.fsum(x * y for x, y in zip(row, other, strict=True)) / length(row) / length(other)

    pairs = list(zip(after, before, strict=True))
    return {
        "cosine": [cosine(w, w0) for w, w0 in pairs],
        "residual": [cosine([x - s for x, s in zip(w, shift, strict=True)], w0) for w, w0 in pairs],
        "l2": [length([x - y for x, y in zip(w, w0, strict=True)]) for w, w0 in pairs],
        "norm_ratio": [length(w) / length(w0) for w, w0 in pairs],
    }


def assert_as_defined(drift: RowDrift, expected: dict[str, list[float]]) -> None:
    for name, values in expected.items():
        found = getattr(drift, name)
        assert found.dtype is torch.float32
        assert found.device.type == "cpu"
        relative, absolute = (0.0, 1e-6) if name in ("cosine", "residual") else (2e-6, 0.0)
        reference = torch.tensor(values, dtype=torch.float64)
        torch.testing.assert_close(
            found.double(), reference, rtol=relative, atol=absolute, msg=lambda m, n=name: f"{n} {m}"
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moved", [0.001, 0.3, 5.0])
def test_as_defined(dtype: torch.dtype, moved: float) -> None:
    base, now = rows_pair(moved=moved, dtype=dtype)
    unexposed = some_rows(len(now))
    drift = drift_of(base, now, unexposed, chunk_rows=64)
    assert_as_defined(drift, naive(base, now, unexposed))
    assert not drift.bad.any()
    assert not drift.zero.any()


@pytest.mark.parametrize("chunk_rows", [1, 7, 256, 257, 100_000])
def test_chunks_do_not_matter(chunk_rows: int) -> None:
    base, now = rows_pair(dtype=torch.bfloat16)
    now[40, 3], base[200, 0] = math.nan, math.inf
    one, other = drift_of(base, now, chunk_rows=64), drift_of(base, now, chunk_rows=chunk_rows)
    for name in ("cosine", "residual", "l2", "norm_ratio", "bad", "zero"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-6, atol=2e-7, equal_nan=True)


def test_small_displacements_keep_their_length() -> None:
    """|w|^2 - 2 w.w0 + |w0|^2 in float32 would lose them: it does so here, by more than a tenth."""
    base, now = rows_pair(moved=1e-4)
    exact = (now.double() - base.double()).norm(dim=1)
    by_products = (now.square().sum(1) - 2 * (now * base).sum(1) + base.square().sum(1)).clamp_min(0).sqrt().double()
    assert ((by_products - exact) / exact).abs().max() > 0.1
    assert ((drift_of(base, now).l2.double() - exact) / exact).abs().max() < 1e-6


@pytest.mark.parametrize("factor", [1e-6, 0.05, 20.0, 1e6])
def test_rows_whose_norm_changed_much(factor: float) -> None:
    base, now = rows_pair(rows=33)
    now[5] *= factor
    now[20] = base[20] * factor
    unexposed = some_rows(33)
    assert_as_defined(drift_of(base, now, unexposed, chunk_rows=8), naive(base, now, unexposed))


def test_shared_shift_is_taken_off() -> None:
    base, _ = rows_pair()
    now = base + torch.linspace(0, 1, base.shape[1])
    drift = drift_of(base, now)
    assert drift.cosine.max() < 0.95
    assert drift.residual.min() > 1 - 1e-6


def test_without_unexposed_rows_residual_is_cosine() -> None:
    base, now = rows_pair()
    drift = drift_of(base, now, torch.zeros(len(now), dtype=torch.bool))
    torch.testing.assert_close(drift.residual, drift.cosine, rtol=0, atol=0)


def test_unmoved_rows() -> None:
    base, _ = rows_pair(dtype=torch.bfloat16)
    drift = drift_of(base, base.clone())
    assert drift.cosine.min() > 1 - 2e-7
    assert torch.equal(drift.residual, drift.cosine)
    assert (drift.l2 == 0).all()
    assert (drift.norm_ratio - 1).abs().max() < 1e-6


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["now", "base"])
def test_bad_rows_are_told_apart_and_spoil_no_other(value: float, where: str) -> None:
    base, now = rows_pair()
    good = torch.ones(len(now), dtype=torch.bool)
    good[[0, 100, 256]] = False
    unexposed = some_rows(len(now)) | ~good
    expected = naive(base[good], now[good], unexposed[good])
    for row in (~good).nonzero().flatten().tolist():
        {"now": now, "base": base}[where][row, row % 48] = value
    drift = drift_of(base, now, unexposed, chunk_rows=64)
    assert torch.equal(drift.bad, ~good)
    assert not drift.zero.any()
    for name, values in expected.items():
        found = getattr(drift, name)
        assert found[~good].isnan().all(), name
        torch.testing.assert_close(found[good].double(), torch.tensor(values).double(), rtol=2e-6, atol=1e-6)


def test_zero_rows() -> None:
    base, now = rows_pair()
    base[3], now[9], base[12], now[12] = 0, 0, 0, 0
    drift = drift_of(base, now)
    assert drift.zero.nonzero().flatten().tolist() == [3, 9, 12]
    assert not drift.bad.any()
    for name in ("cosine", "residual", "norm_ratio"):
        assert getattr(drift, name).isnan().nonzero().flatten().tolist() == [3, 9, 12], name
    torch.testing.assert_close(drift.l2, (now - base).norm(dim=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("chunk_rows", [50, 64, 1024])
def test_rows_without_a_baseline_are_bad(chunk_rows: int) -> None:
    base, now = rows_pair()
    unexposed = torch.ones(len(now), dtype=torch.bool)
    drift = drift_of(base[:200], now, unexposed, chunk_rows=chunk_rows)
    assert drift.bad.nonzero().flatten().tolist() == list(range(200, 257))
    expected = naive(base[:200], now[:200], unexposed[:200])
    torch.testing.assert_close(
        drift.residual[:200].double(), torch.tensor(expected["residual"]).double(), rtol=0, atol=1e-6
    )


def test_baseline_rows_beyond_the_matrix_are_left_out() -> None:
    base, now = rows_pair()
    unexposed = some_rows(len(now))[:200]
    assert_as_defined(drift_of(base, now[:200], unexposed, chunk_rows=64), naive(base[:200], now[:200], unexposed))


def test_a_sample_of_the_unexposed_rows_gives_nearly_their_mean() -> None:
    base, now = rows_pair(rows=20_000, width=32)
    unexposed = some_rows(len(now))
    matrix, baseline = CopiedBaseline(now), CopiedBaseline(base)
    exact = (now - base)[unexposed].double().mean(dim=0)
    every = mean_shift(matrix, baseline, unexposed, shift_rows=20_000)
    torch.testing.assert_close(every.double(), exact, rtol=0, atol=1e-7)
    ids = unexposed.nonzero().flatten()[torch.arange(2000) * int(unexposed.sum()) // 2000]
    sampled = mean_shift(matrix, baseline, unexposed, chunk_rows=100, shift_rows=2000)
    torch.testing.assert_close(sampled.double(), (now - base)[ids].double().mean(dim=0), rtol=0, atol=1e-7)
    # Noise of 0.3 a coordinate over 2,000 rows: 0.0067, of which 4.5 sigma in 32 coordinates.
    assert (sampled - exact).abs().max() < 0.03
    assert (sampled - exact).abs().max() > 0


def test_under_autocast_and_low_matmul_precision() -> None:
    base, now = rows_pair()
    expected = drift_of(base, now)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            drift = drift_of(base, now)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(drift.residual, expected.residual, rtol=0, atol=0)
    torch.testing.assert_close(drift.cosine, expected.cosine, rtol=0, atol=0)


NEEDS_NUMBA = pytest.mark.skipif(compiled.sums_loop("float32") is None, reason="numba is not installed")


@pytest.mark.parametrize("base_too", [False, True])
@pytest.mark.parametrize("by", [sums_by_numpy, sums_by_torch, row_sums, pytest.param(sums_by_numba, marks=NEEDS_NUMBA)])
@pytest.mark.parametrize("width", [48, 33, 1])
@pytest.mark.parametrize(
    ("now_dtype", "base_dtype"),
    [(dtype, dtype) for dtype in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
)
def test_row_sums(
    by: Callable[..., Tensor], width: int, now_dtype: torch.dtype, base_dtype: torch.dtype, base_too: bool
) -> None:
    base, now = rows_pair(width=width)
    base, now, shift = base.to(base_dtype), now.to(now_dtype), torch.linspace(-1, 1, width)
    found = by(CopiedBaseline(now), CopiedBaseline(base[:200]), shift, 64, base_too=base_too)
    assert found.dtype is torch.float32
    assert found[:, 200:].isnan().all()
    w, w0, s = now[:200].double(), base[:200].double(), shift.double()
    d = w - w0
    products = (w * w, d * d, w * s, d * s, w0 * w0)[: 4 + base_too]
    for sums, expected in zip(found[:, :200].double(), products, strict=True):
        error = (sums - expected.sum(dim=1)).abs() / expected.abs().sum(dim=1).clamp_min(1e-30)
        assert error.max() < 1e-6


@NEEDS_NUMBA
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_compiled_sums_give_the_same_drift(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Wide rows, rows that are not finite, and rows beyond the baseline's."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(300, 4096, generator=generator)
    now = (base + torch.logspace(-4, 1, 300)[:, None] * torch.randn(300, 4096, generator=generator)).to(dtype)
    base = base[:280].to(dtype)
    now[3], now[4, 7], base[5, 9], now[6] = 0, math.nan, math.inf, base[6]
    calls = []

    def watched(*args: Any, **options: Any) -> Tensor:
        calls.append(args)
        return sums_by_numba(*args, **options)

    unexposed = some_rows(300)
    expected = drift_of(base, now, unexposed)
    monkeypatch.setattr(rowwise, "_WORTH_COMPILING", 0)
    monkeypatch.setattr(rowwise, "sums_by_numba", watched)
    found = drift_of(base, now, unexposed)
    assert len(calls) == 1
    for name in ("cosine", "residual"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-6, equal_nan=True)
    for name in ("l2", "norm_ratio"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=0, equal_nan=True)
    assert torch.equal(found.bad, expected.bad)
    w, w0 = now[:280].double(), base.double()
    naive = torch.nn.functional.cosine_similarity(w, w0, dim=1)
    good = ~found.bad[:280] & ~found.zero[:280]
    assert (found.cosine[:280].double() - naive)[good].abs().max() < 1e-6


@NEEDS_NUMBA
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 11, 67])
def test_compiled_mean_of_any_number_of_rows(monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(rowwise, "_WORTH_COMPILING", 0)
    for bad in (None, 0, rows // 2, rows - 1):
        base, now = rows_pair(rows=rows, width=70, dtype=dtype)
        chosen = torch.ones(rows, dtype=torch.bool)
        if bad is not None:
            now[bad, 3] = math.inf if bad else 1e30  # of the latter the length overflows
            chosen[bad] = False
        found = mean_shift(CopiedBaseline(now), CopiedBaseline(base), torch.ones(rows, dtype=torch.bool))
        moved = (now.double() - base.double())[chosen]
        expected = moved.mean(dim=0) if len(moved) else torch.zeros(70).double()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-7)


@NEEDS_NUMBA
def test_the_compiled_end_of_a_check_is_numpys_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    base, now = rows_pair(rows=500, width=64)
    now[3], base[4], now[5, 1], now[6], now[7] = 0, 0, math.nan, base[6], 40 * base[7]
    monkeypatch.setattr(rowwise, "_WORTH_COMPILING", 0)
    found = drift_of(base, now)
    monkeypatch.setattr(drift, "finish_loop", lambda: None)
    expected = drift_of(base, now)
    for name in ("cosine", "residual", "l2", "norm_ratio", "bad", "zero"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True)
    assert found.zero[[3, 4]].all()
    assert found.bad[5]


@pytest.mark.parametrize("broken", ["missing", "unfit", "helpless"])
def test_without_a_numba_that_works_the_sums_are_numpys(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    class Helpless:
        @staticmethod
        def njit(*args: Any, **options: Any) -> Any:
            raise RuntimeError("cannot cache function: no locator available")

    def imported(name: str) -> Any:
        if broken == "helpless":
            return Helpless
        raise ImportError(name) if broken == "missing" else SystemError("built for another numpy")

    base, now = rows_pair()
    # What other tests have read must not make the compiled loops pay here.
    monkeypatch.setitem(rowwise._READ, "elements", 0)
    expected = drift_of(base, now)
    loops = (compiled.sums_loop, compiled.moved_loop, compiled.finish_loop)
    for loop in loops:
        loop.cache_clear()
    monkeypatch.setattr(compiled.importlib, "import_module", imported)
    monkeypatch.setattr(rowwise, "_WORTH_COMPILING", 0)
    try:
        torch.testing.assert_close(drift_of(base, now).cosine, expected.cosine, rtol=0, atol=0)
    finally:
        for loop in loops:
            loop.cache_clear()


@pytest.fixture
def many_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(16)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("many_threads")
def test_rows_in_an_odd_layout_and_more_threads_than_chunks() -> None:
    base, now = rows_pair(dtype=torch.bfloat16)
    turned = now.T.contiguous().T
    assert not turned.is_contiguous()
    expected = drift_of(base, now, chunk_rows=10)
    found = drift_of(base, turned, chunk_rows=100)
    torch.testing.assert_close(found.residual, expected.residual, rtol=0, atol=2e-7)


def test_a_fault_in_a_worker_is_raised() -> None:
    class Broken(CopiedBaseline):
        def chunk(self, part: slice) -> Tensor:
            if part.start >= 100:
                raise OSError("disk gone")
            return super().chunk(part)

    base, now = rows_pair()
    with pytest.raises(OSError, match="disk gone"):
        sums_by_numpy(CopiedBaseline(now), Broken(base), torch.zeros(48), 50)


def test_compiled_loops_pay_once_much_was_read_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    base, now = (CopiedBaseline(rows) for rows in rows_pair())
    monkeypatch.setitem(rowwise._READ, "elements", 0)
    monkeypatch.setattr(rowwise, "_WORTH_COMPILING_BY_NOW", 3 * now.rows * now.width)
    worth = []
    for _ in range(4):
        worth.append(rowwise.worth_compiling(now))
        row_sums(now, base, torch.zeros(48), 64)
    assert worth == [False, False, False, True]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("chunk_rows", [1, 64, 100, 257, 5000])
@pytest.mark.parametrize("width", [47, 48])
def test_bfloat16_in_blocks_of_any_size(
    monkeypatch: pytest.MonkeyPatch, width: int, chunk_rows: int, threads: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    base, now = rows_pair(width=width, dtype=torch.bfloat16)
    shift = torch.linspace(-1, 1, width)
    found = row_sums(CopiedBaseline(now), CopiedBaseline(base), shift, chunk_rows, base_too=True).double()
    w, w0 = now.double(), base.double()
    d = w - w0
    expected = torch.stack([w.square().sum(1), d.square().sum(1), w @ shift.double(), d @ shift.double()])
    torch.testing.assert_close(found[:4], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[4], w0.square().sum(1), rtol=1e-6, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_an_accelerator(dtype: torch.dtype) -> None:
    base, now = rows_pair(dtype=dtype)
    unexposed = some_rows(len(now))
    drift = measure_drift(CopiedBaseline(now.cuda()), CopiedBaseline(base), unexposed, chunk_rows=64)
    assert_as_defined(drift, naive(base, now, unexposed))


def test_on_a_model_agrees_with_cosine_similarity() -> None:
    model = AutoModelForCausalLM.from_pretrained(ASSETS)
    head = find_matrices(model)["head"]
    assert isinstance(head, VocabMatrix)
    baseline = copy_baseline(head)
    with torch.no_grad():
        head.weight.add_(0.02 * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0)))
    before = head.weight.detach().clone()
    drift = measure_drift(head, baseline, some_rows(head.rows), 1000)
    expected = cosine_similarity(before.double(), baseline.tensor.double(), dim=1)
    assert expected.min() < 0.999
    torch.testing.assert_close(drift.cosine.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(head.weight, before)
    assert head.weight.grad is None


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda base, now: drift_of(base[:, :40], now), "40 elements.*48"),
        (lambda base, now: drift_of(base, now, some_rows(256)), r"unexposed is \(256,\).*\(257,\)"),
        (lambda base, now: drift_of(base, now, torch.zeros(257)), "torch.float32.*torch.bool"),
        (lambda base, now: drift_of(base, now, chunk_rows=0), "chunk size is 0"),
        (lambda base, now: summarise(drift_of(base, now), some_rows(257), {"ja": some_rows(3)}), r"ja is \(3,\)"),
    ],
)
def test_refusals(call: Callable[[Tensor, Tensor], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(*rows_pair())


class PeakMemory(TorchDispatchMode):
    """Most bytes held at once by the storages that operations made, those of ``given`` tensors left out."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage()._cdata for tensor in given}
        self.held: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.hold(tensor.untyped_storage())
        self.peak = max(self.peak, sum(self.held.values()))
        return result

    def hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.held and key not in self.given:
            self.held[key] = storage.nbytes()
            weakref.finalize(storage, self.held.pop, key)


@pytest.mark.usefixtures("many_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extra_memory(dtype: torch.dtype) -> None:
    rows, width, limit = 262_144, 640, 64 * 2**20
    base, now = torch.ones(rows, width, dtype=dtype), torch.ones(rows, width, dtype=dtype)
    now[::2] += 0.5
    matrix, baseline, unexposed = CopiedBaseline(now), CopiedBaseline(base), torch.ones(rows, dtype=torch.bool)

    def peak(work: Callable[[], object]) -> int:
        tracemalloc.start()  # sees numpy's memory, but not torch's
        try:
            with PeakMemory(base, now) as memory:
                work()
            return memory.peak + tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(lambda: measure_drift(matrix, baseline, unexposed)) < limit
    assert peak(lambda: measure_drift(matrix, baseline, unexposed, chunk_rows=rows)) < 2 * limit
    # The measure can fail: it sees large chunks of numpy's and of torch's.
    assert peak(lambda: sums_by_numpy(matrix, baseline, torch.ones(width), rows // 8)) > limit
    assert peak(lambda: sums_by_torch(matrix, baseline, torch.ones(width), rows // 8)) > limit


def hand_made_drift(rows: int = 1000) -> RowDrift:
    base, now = rows_pair(rows=rows)
    now[7, 0] = math.nan
    now[8] = 0
    return drift_of(base, now)


def naive_summary(drift: RowDrift, chosen: list[int]) -> dict[str, float]:
    def percentile(values: list[float]) -> float:
        ordered = sorted(values)
        place = 0.01 * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    cosine = [drift.cosine[v].item() for v in chosen if drift.cosine[v].isfinite()]
    residual = [drift.residual[v].item() for v in chosen if drift.residual[v].isfinite()]
    return {
        "cosine_mean": sum(cosine) / len(cosine),
        "cosine_min": min(cosine),
        "cosine_p01": percentile(cosine),
        "residual_p01": percentile(residual),
        "below_0.95": sum(c < 0.95 for c in cosine) / len(cosine),
        "below_0.90": sum(c < 0.90 for c in cosine) / len(cosine),
    }


def test_summary_as_defined() -> None:
    drift = hand_made_drift()
    live, part = some_rows(1000, 0.8), some_rows(1000, 0.2)
    live[7], live[8], part[:20] = True, True, True
    found = summarise(drift, live, {"ja": part, "never": ~part})
    chosen = {"": live, "ja/": live & part, "never/": live & ~part}
    expected = {"nonfinite_rows": 1.0, "zero_rows": 1.0}
    for prefix, mask in chosen.items():
        ids = mask.nonzero().flatten().tolist()
        expected |= {prefix + key: value for key, value in naive_summary(drift, ids).items()}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-6), key
    assert 0 < found["below_0.90"] < found["below_0.95"] < 1


def test_summary_is_over_live_rows() -> None:
    drift = hand_made_drift()
    live = torch.zeros(1000, dtype=torch.bool)
    live[20] = True
    found = summarise(drift, live, {"ja": ~live, "ko": live})
    assert found["cosine_min"] == found["cosine_mean"] == found["ko/cosine_p01"] == drift.cosine[20].item()
    assert found["nonfinite_rows"] == found["zero_rows"] == 0
    assert not any(key.startswith("ja/") for key in found)


def test_summary_without_usable_rows_is_only_counts() -> None:
    drift = hand_made_drift()
    live = torch.zeros(1000, dtype=torch.bool)
    live[7] = True
    assert summarise(drift, live, {"ja": live}) == {"nonfinite_rows": 1.0, "zero_rows": 0.0}


@pytest.mark.parametrize("rows", [1, 2, 100, 101])
def test_percentile_is_that_of_torch(rows: int) -> None:
    drift = drift_of(*rows_pair(rows=rows))
    found = summarise(drift, torch.ones(rows, dtype=torch.bool), {})
    assert found["cosine_p01"] == pytest.approx(torch.quantile(drift.cosine, 0.01).item(), abs=1e-7)
