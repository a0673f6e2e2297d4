"""When checks and probes fall, and how often they are chosen to."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch

from vocabguard import VocabGuard, load_config
from vocabguard.guard.cadence import Cadence, StepTimer, affordable, round_up
from vocabguard.guard.failures import Faults

BUDGETS: dict[str, Any] = {"cadence": {"budget": 0.01, "max_checks": 200}, "probe": {"budget": 0.04}}


def fake(guard: VocabGuard, steps: int) -> tuple[list[int], list[int]]:
    """Steps with a check and steps with a probe, in a run of steps that do nothing."""
    checks, probes = [], []
    for step in range(1, steps + 1):
        result = guard.step(step)
        if result is not None:
            assert result.step == step
            checks.append(step)
            probes += [step] if result.probe is not None else []
    return checks, probes


def attached(kit: Any, tokenizer: Any, total: int | None, **options: Any) -> VocabGuard:
    guard = VocabGuard(tokenizer=tokenizer, **{"probe": {"sample": 4}} | options, **kit.QUIET)
    guard.attach(kit.llama(kit.TOKENIZER_ROWS), total_steps=total)
    assert guard.last.step == 0
    assert guard.last.probe is not None
    return guard


@pytest.mark.parametrize("steps", [0, 0.3, 1, 1.5, 2, 4.9, 5, 6, 19, 20, 51, 1001])
def test_round_up_gives_the_next_nice_number(steps: float) -> None:
    nice = [base * 10**power for power in range(6) for base in (1, 2, 5)]
    assert round_up(steps) == next(number for number in nice if number >= steps)


@pytest.mark.parametrize("budget", [0.01, 0.04, 0.25, 1.0])
@pytest.mark.parametrize("cost", [0.0, 0.02, 0.7, 30.0])
def test_affordable_keeps_within_the_budget(cost: float, budget: float) -> None:
    steps = affordable(cost, 0.1, budget)
    assert cost / (steps * 0.1) <= budget * (1 + 1e-9)
    assert steps == 1 or steps <= 2.5 * cost / (0.1 * budget)


def test_affordable_without_a_budget_is_practically_never() -> None:
    assert affordable(1.0, 1.0, 0.0) == 1_000_000
    assert affordable(1.0, 0.0, 1.0) < math.inf


def test_explicit_cadence(kit: Any, tokenizer: Any) -> None:
    probe = {"sample": 4, "every_n_steps": 5}
    guard = attached(kit, tokenizer, 14, drift={"every_n_steps": 3}, probe=probe)
    # A probe falls on the first check after its time has come, and on the last step.
    assert fake(guard, 14) == ([3, 6, 9, 12, 14], [6, 12, 14])


def test_probe_cadence_alone_is_explicit(kit: Any, tokenizer: Any) -> None:
    options = {"probe": {"sample": 4, "every_n_steps": 2}, "cadence": {"settle_steps": 3, "budget": 1.0}}
    guard = attached(kit, tokenizer, 100, **options)
    assert fake(guard, 2) == ([], [])
    guard.step(3)
    assert guard._cadence.probe_every == 2
    assert guard._cadence.every is not None


@pytest.mark.parametrize("total", [4, 30])
def test_the_last_planned_step_is_checked_and_probed(kit: Any, tokenizer: Any, total: int) -> None:
    """In a run shorter than settle_steps, and where the cadence is longer than the run."""
    guard = attached(kit, tokenizer, total, cadence={"budget": 0.0}, probe={"sample": 4, "budget": 0.0})
    checks, probes = fake(guard, total)
    assert checks == probes == [total]
    assert guard._cadence.chosen == (total >= 20)
    assert guard.finish() is None
    assert guard.last.step == total
    assert guard.last.probe is not None


def test_without_a_plan_finish_checks_the_last_step(kit: Any, tokenizer: Any) -> None:
    guard = attached(kit, tokenizer, None, drift={"every_n_steps": 4})
    assert fake(guard, 6) == ([4], [])
    guard.finish()
    assert guard.last.step == 6


def test_check_at_will_is_not_repeated(kit: Any, tokenizer: Any) -> None:
    guard = attached(kit, tokenizer, 10, drift={"every_n_steps": 100})
    first = guard.check()
    assert first.step == 0
    guard.step(1)
    again = guard.check()
    assert again.step == 1
    assert guard.check() is again


class Clock:
    """A clock that stands still unless told otherwise."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    stopped = Clock()
    monkeypatch.setattr(time, "perf_counter", stopped)
    return stopped


def test_chosen_after_settling_within_the_budget(kit: Any, clock: Clock) -> None:
    guard = VocabGuard(cadence={"settle_steps": 5, "budget": 0.5}, **kit.QUIET)
    guard.attach(kit.llama(), total_steps=1000)
    guard._cadence.record(check=9.0)
    for step in range(1, 5):
        clock.now += 50.0 if step == 1 else 2.0
        guard.step(step)
        assert guard._cadence.every is None
    clock.now += 2.0
    assert guard.step(5) is None
    # The median step takes 2 s, so 9 s in 9 steps are half of the time.
    assert guard._cadence.every == 10
    assert guard._cadence.probe_every == 10, "a probe that costs nothing comes with every check"


@pytest.mark.parametrize(
    ("seconds", "total", "expected"),
    [
        ((1.0, 0.02, 0.5), None, (2, 20)),  # 2 % of 1 s is 2 steps at 1 %; 0.5 s at 4 % is 12.5
        ((1.0, 0.0, 0.0), 10_000, (50, 50)),  # never more than 200 checks
        ((1.0, 0.05, 0.21), None, (5, 10)),  # 5.25 steps round up to 10
        ((0.1, 0.015, 1.0), None, (20, 500)),
    ],
)
def test_choose(seconds: tuple[float, float, float], total: int | None, expected: tuple[int, int]) -> None:
    cadence, (step, check, probe) = Cadence.of(load_config(BUDGETS), total), seconds
    cadence.record(check=check, probe=probe)
    cadence.choose(step)
    assert (cadence.every, cadence.probe_every) == expected
    assert cadence.probe_every % cadence.every == 0


def test_choose_leaves_what_is_given() -> None:
    cadence = Cadence.of(load_config(BUDGETS | {"drift": {"every_n_steps": 7}}))
    cadence.record(check=100.0, probe=0.4)
    cadence.choose(1.0)
    assert (cadence.every, cadence.probe_every) == (7, 14)


def test_the_timer_leaves_out_the_guards_own_work(clock: Clock) -> None:
    faults, timer = Faults("raise"), StepTimer()
    with faults.contain("before"):
        clock.now += 500.0
    timer.start(faults)
    assert timer.overhead(faults) == 0.0
    for _ in range(3):
        clock.now += 3.0
        with faults.contain("outer"):
            clock.now += 0.5
            with faults.contain("inner"):
                clock.now += 0.5
        timer.step(faults)
    assert timer.durations == [3.0, 3.0, 3.0]
    assert timer.overhead(faults) == 0.25


def test_attaching_is_not_booked_on_the_first_steps(kit: Any, clock: Clock) -> None:
    def slow(rows: Any) -> Any:
        clock.now += 1.0
        return torch.utils.data.default_collate(rows)

    rows = [{"labels": torch.tensor([1, 2])} for _ in range(6)]
    guard = VocabGuard(**kit.QUIET)
    watch = guard.attach(kit.llama(), dataloader=torch.utils.data.DataLoader(rows, collate_fn=slow))
    assert watch.preflight.seconds == 6.0
    for step in range(1, 4):
        clock.now += 2.0
        guard.step(step)
    assert guard._timer.durations == [2.0, 2.0, 2.0]
    assert guard._timer.overhead(guard._faults) == 0.0
