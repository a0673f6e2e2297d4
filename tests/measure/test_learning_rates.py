import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim import lr_scheduler as schedulers
from transformers import get_scheduler

from vocabguard.measure.learning_rates import RateMeter, group_of, planned_rates, rates_by_epoch

STEPS = 40
MAKERS: dict[str, Callable[[Any], Any]] = {
    "linear": lambda o: schedulers.LambdaLR(o, lambda step: max(0.0, 1 - step / STEPS)),
    "constant": lambda o: schedulers.ConstantLR(o, 1.0, 0),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, STEPS),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 7, T_mult=2),
    "milestones": lambda o: schedulers.MultiStepLR(o, [5, 9, 30], 0.3),
    "one cycle": lambda o: schedulers.OneCycleLR(o, 0.5, total_steps=STEPS),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=False),
    "in sequence": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=5), schedulers.CosineAnnealingLR(o, 35)], [5]
    ),
    "chained": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, 4), schedulers.ExponentialLR(o, 0.9)], optimizer=o
    ),
}


def optimizer() -> torch.optim.Optimizer:
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    return SGD([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.3}], lr=0.2)


def really(made: Any, steps: int, group: int) -> list[float]:
    """The rates that the scheduler gives when it is stepped for real."""
    found = []
    for step in range(steps):
        found.append(float(made.optimizer.param_groups[group]["lr"]))
        made.optimizer.step()
        if step + 1 < steps:
            made.step()
    return found


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("name", list(MAKERS))
@pytest.mark.filterwarnings("ignore:.*(lr_scheduler.step|epoch parameter).*")
def test_planned_rates_are_those_of_the_real_scheduler(name: str, before: int) -> None:
    made = MAKERS[name](optimizer())
    for _ in range(before):
        made.optimizer.step()
        made.step()
    kept = copy.deepcopy({key: value for key, value in made.state_dict().items() if "lambda" not in key})
    groups = [{key: value for key, value in one.items() if key != "params"} for one in made.optimizer.param_groups]
    planned = [planned_rates(made, STEPS - before, group) for group in (0, 1)]
    assert {key: value for key, value in made.state_dict().items() if "lambda" not in key} == kept
    assert groups == [
        {key: value for key, value in one.items() if key != "params"} for one in made.optimizer.param_groups
    ]
    other = MAKERS[name](optimizer())
    for _ in range(before):
        other.optimizer.step()
        other.step()
    for group in (0, 1):
        found = planned[group]
        assert found is not None
    real = really(other, STEPS - before, 0)
    np.testing.assert_allclose(planned[0], real, rtol=1e-9)  # type: ignore[arg-type]


def made_by_transformers(name: str, steps: int) -> Any:
    weights = [torch.nn.Parameter(torch.ones(2))]
    specific = {"num_cycles": 5} if name == "cosine_with_restarts" else {}
    return get_scheduler(
        name, AdamW(weights, lr=1e-4), num_warmup_steps=steps // 50, num_training_steps=steps,
        scheduler_specific_kwargs=specific,
    )  # fmt: skip


USUAL = ["linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt"]


@pytest.mark.parametrize("name", USUAL)
@pytest.mark.parametrize("steps", [300, 150_000])
def test_rates_of_long_runs_add_up_to_those_of_every_step(name: str, steps: int) -> None:
    made = made_by_transformers(name, steps)
    factor, asked = made.lr_lambdas[0], []

    def counted(step: int) -> float:
        asked.append(step)
        return float(factor(step))

    made.lr_lambdas = [counted]
    found = planned_rates(made, steps)
    assert found is not None
    assert len(found) == steps
    exact = 1e-4 * np.array([factor(step) for step in range(steps)])
    # Fewer places where the run is long, and no step that is asked for twice.
    assert len(asked) == len(set(asked)) <= min(steps, 45_000)
    for begin in (0, steps // 2, steps * 9 // 10):
        assert found[begin:].sum() == pytest.approx(exact[begin:].sum(), rel=1e-6)
        assert np.square(found[begin:]).sum() == pytest.approx(np.square(exact[begin:]).sum(), rel=1e-6)
    np.testing.assert_allclose(found, exact, atol=2e-3 * 1e-4)


@pytest.mark.parametrize("period", [2, 7, 8, 30])
def test_no_period_of_a_schedule_is_overlooked(period: int) -> None:
    made = schedulers.LambdaLR(AdamW([torch.nn.Parameter(torch.ones(2))], lr=1.0), lambda step: 1 + step % period)
    found = planned_rates(made, 160_000)
    assert found is not None
    assert found.sum() == pytest.approx(sum(1 + step % period for step in range(160_000)), rel=0.02)


def test_a_lambda_goes_on_from_where_it_is() -> None:
    made = schedulers.LambdaLR(optimizer(), [lambda step: 1 / (1 + step), lambda step: 2.0**-step])
    for _ in range(3):
        made.optimizer.step()
        made.step()
    made.optimizer.param_groups[1]["lr"] = 0.5  # by hand: the next step is done with it
    np.testing.assert_allclose(planned_rates(made, 3, 0), [0.2 / 4, 0.2 / 5, 0.2 / 6])  # type: ignore[arg-type]
    np.testing.assert_allclose(planned_rates(made, 3, 1), [0.5, 0.3 / 16, 0.3 / 32])  # type: ignore[arg-type]
    assert planned_rates(made, 0) is not None
    made.lr_lambdas = [int, lambda step: (_ for _ in ()).throw(ValueError("past the end"))]
    assert planned_rates(made, 3, 1) is None


def test_a_scheduler_of_ones_own_is_stepped() -> None:
    class Halved(schedulers.LambdaLR):
        def get_lr(self) -> list[Any]:
            return [rate / 2 for rate in super().get_lr()]

    made = Halved(optimizer(), lambda step: 1.0)
    np.testing.assert_allclose(planned_rates(made, 3), [0.1, 0.1, 0.1])  # type: ignore[arg-type]


def test_a_plateau_and_a_foreign_scheduler_are_not_known() -> None:
    assert planned_rates(schedulers.ReduceLROnPlateau(optimizer()), 5) is None
    assert planned_rates(object(), 5) is None


def test_a_schedule_that_ends_before_the_run_is_not_known() -> None:
    made = schedulers.OneCycleLR(optimizer(), 0.5, total_steps=10)
    assert planned_rates(made, 30) is None


def test_a_wrapper_is_looked_into() -> None:
    class Wrapper:
        split_batches = True
        scheduler = MAKERS["linear"](optimizer())

    np.testing.assert_allclose(planned_rates(Wrapper(), 3), [0.2, 0.195, 0.19])  # type: ignore[arg-type]


def test_rates_that_move_once_an_epoch() -> None:
    made = schedulers.ExponentialLR(optimizer(), 0.5)
    np.testing.assert_allclose(rates_by_epoch(made, 7, 3, 0), [0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.05])  # type: ignore[arg-type]
    np.testing.assert_allclose(rates_by_epoch(made, 4, 3, 2), [0.2, 0.1, 0.1, 0.1])  # type: ignore[arg-type]


def test_the_meter_adds_up_and_looks_ahead() -> None:
    made = optimizer()
    meter = RateMeter(1, planned=np.array([0.3, 0.2, 0.1, 0.0]))
    for rate in (0.3, 0.2):
        made.param_groups[1]["lr"] = rate
        meter.add(made)
    assert meter.sum == pytest.approx(0.5)
    assert meter.square == pytest.approx(0.13)
    assert meter.left(2, 4) == pytest.approx((0.1, 0.01))
    later = RateMeter(1, planned=np.array([0.1, 0.0]), first=2)
    later.load_state_dict(meter.state_dict())
    assert (later.sum, later.left(2, 4)) == (meter.sum, pytest.approx((0.1, 0.01)))


def test_a_plan_that_is_left_is_given_up() -> None:
    made, meter = optimizer(), RateMeter(0, planned=np.full(20, 0.2))
    meter.add(made)
    made.param_groups[0]["lr"] = 0.1
    for _ in range(2):
        meter.add(made)
    assert meter.left(3, 20) is not None
    meter.add(made)
    assert meter.left(4, 20) is None


def test_the_group_of_a_weight_is_found() -> None:
    made = optimizer()
    weight = made.param_groups[1]["params"][0]
    other = AdamW([torch.nn.Parameter(torch.ones(1))])
    assert group_of([other, made], weight) == (made, 1)
    assert group_of([other], weight) is None
