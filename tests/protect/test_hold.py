"""Held rows against plain loops: put back to the bit, or moved by their mean alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vocabguard.protect import hold
from vocabguard.protect.hold import HoldMode, RowKeeper, hold_rows, rows_to_hold

V, D = 23, 5


class RowStatistics(torch.optim.Optimizer):
    """As Adafactor keeps them: second moments by row and by column, of which only those by row have V values."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            if not state:
                state |= {"step": torch.tensor(0.0), "rows": torch.zeros(V), "columns": torch.zeros(D)}
            square = param.grad.float() ** 2
            state["step"] += 1
            state["rows"].mul_(0.9).add_(square.mean(1))
            state["columns"].mul_(0.9).add_(square.mean(0))
            factor = state["rows"].rsqrt()[:, None] * state["columns"].rsqrt()
            param.sub_((0.1 * param.grad.float() * factor).to(param.dtype))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.3),
    "amsgrad": lambda params: torch.optim.AdamW(params, lr=0.1, amsgrad=True),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.3),
    "row_statistics": RowStatistics,
}


def stepped(name: str, dtype: torch.dtype, steps: int = 3) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Weight after and before the last of some steps, and the optimizer's state."""
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.randn(V, D, generator=generator).to(dtype))
    optimizer, keeper = OPTIMIZERS[name]([weight]), RowKeeper()
    for _ in range(steps):
        weight.grad = torch.randn(V, D, generator=generator).to(dtype)
        keeper.keep(weight)
        optimizer.step()
    return weight, keeper.rows.clone(), optimizer.state[weight]


def chosen(share: float = 0.6) -> Tensor:
    return torch.rand(V, generator=torch.Generator().manual_seed(2)) < share


def by_row(state: dict[str, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.ndim > 0 and len(v) == V}


def copied(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}


@pytest.fixture(params=[1, 17, 2**24], autouse=True)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row, a few rows, or all rows at a time."""
    monkeypatch.setattr(hold, "_CHUNK", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_frozen_rows_are_what_they_were_and_their_moments_are_cleared(
    name: str, dtype: torch.dtype, share: float
) -> None:
    weight, before, state = stepped(name, dtype)
    held, after, moments = chosen(share), weight.detach().clone(), copied(state)
    assert not torch.equal(after[held], before[held])
    hold_rows(weight, before, held, "freeze", state)
    assert torch.equal(weight[held], before[held])
    assert torch.equal(weight[~held], after[~held])
    assert by_row(state)
    for key, value in state.items():
        if key in by_row(state):
            assert not value[held].any()
            assert torch.equal(value[~held], moments[key][~held])
        elif isinstance(value, Tensor):
            assert torch.equal(value, moments[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_shared_rows_move_by_their_mean_and_share_their_moments(name: str, dtype: torch.dtype, share: float) -> None:
    weight, before, state = stepped(name, dtype)
    held, after, moments = chosen(share), weight.detach().clone(), copied(state)
    hold_rows(weight, before, held, "shared", state)
    ids = [row for row in range(V) if held[row]]
    shift = sum(after[row].double() - before[row].double() for row in ids) / len(ids)
    close = {"rtol": 0.0, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
    for row in range(V):
        if held[row]:
            torch.testing.assert_close(weight[row].double(), before[row].double() + shift, **close)
        else:
            assert torch.equal(weight[row], after[row])
    for key, value in by_row(state).items():
        mean = sum(moments[key][row].double() for row in ids) / len(ids)
        for row in range(V):
            if held[row]:
                torch.testing.assert_close(value[row].double(), mean, rtol=max(1e-5, close["rtol"]), atol=1e-7)
            else:
                assert torch.equal(value[row], moments[key][row])


def test_differences_between_shared_rows_stay() -> None:
    weight, before, state = stepped("adamw", torch.float32)
    held = chosen()
    hold_rows(weight, before, held, "shared", state)
    moved = weight.detach()[held] - before[held]
    assert moved.abs().max() > 1e-3
    torch.testing.assert_close(moved, moved[:1].expand_as(moved), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["freeze", "shared"])
def test_no_held_rows_leave_all_as_it_is(mode: HoldMode) -> None:
    weight, before, state = stepped("adamw", torch.float32)
    after, moments = weight.detach().clone(), copied(state)
    hold_rows(weight, before, torch.zeros(V, dtype=torch.bool), mode, state)
    assert torch.equal(weight, after)
    assert all(torch.equal(state[key], moments[key]) for key in by_row(state))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_row_that_is_not_held_stays_alone(bad: float) -> None:
    """Other rows' moments must not be reached by it through a sum over all rows."""
    weight, before, state = stepped("adamw", torch.float32)
    held = chosen()
    broken = int((~held).nonzero()[0])
    with torch.no_grad():
        weight[broken] = bad
        for moment in by_row(state).values():
            moment[broken] = bad
    hold_rows(weight, before, held, "shared", state)
    assert weight[held].isfinite().all()
    assert all(moment[held].isfinite().all() for moment in by_row(state).values())


def test_a_frozen_run_keeps_its_rows_through_all_steps() -> None:
    torch.manual_seed(0)
    weight, held = nn.Parameter(torch.randn(V, D)), chosen()
    start, keeper = weight.detach().clone(), RowKeeper()
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5)
    for _ in range(5):
        weight.grad = torch.randn(V, D)
        keeper.keep(weight)
        optimizer.step()
        hold_rows(weight, keeper.rows, held, "freeze", optimizer.state[weight])
    assert torch.equal(weight[held], start[held])
    assert not torch.isclose(weight[~held], start[~held]).all(1).any()


@pytest.mark.parametrize("on_host", [False, True])
def test_the_keeper_copies_and_follows_a_new_shape(on_host: bool) -> None:
    keeper, weight = RowKeeper(on_host), nn.Parameter(torch.randn(V, D))
    with pytest.raises(RuntimeError, match=r"call keep\(\) before"):
        _ = keeper.rows
    keeper.keep(weight)
    first = keeper.rows
    with torch.no_grad():
        weight += 1
    assert torch.equal(first + 1, weight)
    keeper.keep(weight)
    assert keeper.rows is first
    for other in (torch.randn(V + 1, D), torch.randn(V, D, dtype=torch.bfloat16)):
        keeper.keep(other)
        assert torch.equal(keeper.rows, other)
        assert keeper.rows.dtype == other.dtype


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("tied", [False, True])
def test_which_rows_are_held(window: int | None, tied: bool) -> None:
    step, rows = 10, range(-1, 11)
    cases = [(last, target, input_) for last in rows for target in (False, True) for input_ in (False, True)]
    last, targets, inputs = (torch.tensor(column) for column in zip(*cases, strict=True))
    found = rows_to_hold(last, targets, inputs if tied else None, step, window)
    for place, (seen, target, input_) in enumerate(cases):
        lately = seen >= 0 and (window is None or seen in range(step - window + 1, step + 1))
        assert bool(found[place]) == (not lately and not target and not (tied and input_)), cases[place]
