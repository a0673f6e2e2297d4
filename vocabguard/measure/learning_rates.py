"""Learning rates: those that steps were done with, and those that the schedule has yet to give."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from vocabguard import collective

Rates = npt.NDArray[np.float64]

_NESTED = "_schedulers"
# A rate that differs from the planned one by more is another plan. The first steps may be those that a scaler skips.
_TOLERANCE = 0.02
_PATIENCE = 3
# Rates that may wait on an accelerator, where no check asks for them.
_MOST_THERE = 1000
# So many steps are looked at one by one; of a longer run, so many places, and all steps where rates move more between
# two of them than this share of the largest.
_PLACES = 20_000
_MOVE = 1e-3
# What schedulers raise past their end, or where one of a user's own wants more than a stand-in has.
_REFUSALS = (ValueError, TypeError, AttributeError)


def planned_rates(scheduler: Any, steps: int, group: int = 0) -> Rates | None:
    """The learning rates of the next steps, without moving the scheduler or its optimizer.

    The functions of a `LambdaLR`, which all schedulers of transformers are but for plateaus, are asked at each step, or
    at 20,000 places of a longer run: rates between two of them lie on a line then, but where they differ by more than a
    thousandth of the largest rate every step is asked for. Sums over the usual schedules are within 1e-6 of those over
    every step, but for the last thousandth of the run. Of any other scheduler a copy is stepped to the end, beside a
    stand-in for the optimizer which holds the groups' settings and no parameters: 0.3 s for 100,000 steps.

    Args:
        scheduler: of torch, or accelerate's wrapper of one, stepped once an optimizer step.

    Returns:
        (steps,) float64, or None where it cannot be told: a plateau scheduler waits for losses, a foreign one is not
        looked into, and some refuse to go as far.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> planned_rates(LambdaLR(optimizer, lambda step: 1 - step / 4), steps=4)
        array([1.  , 0.75, 0.5 , 0.25])
    """
    calls = _calls_a_step(scheduler)
    scheduler = getattr(scheduler, "scheduler", scheduler)
    if isinstance(scheduler, ReduceLROnPlateau) or not isinstance(scheduler, LRScheduler):
        return None
    if isinstance(scheduler, LambdaLR) and _as_torch_made_it(scheduler):
        return _lambda_rates(scheduler, steps, group, calls)
    groups = scheduler.optimizer.param_groups
    stand = SimpleNamespace(param_groups=[{**one, "params": []} for one in groups], _opt_called=True, step=None)
    stand.defaults = dict(scheduler.optimizer.defaults)
    for one in stand.param_groups:
        # Rates that are tensors are filled in place.
        one.update({name: value.clone() for name, value in one.items() if isinstance(value, Tensor)})
    moved = _beside(scheduler, stand)
    found = np.empty(steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(steps):
            found[step] = float(stand.param_groups[group]["lr"])
            try:
                for _ in range(calls):
                    moved.step()
            except _REFUSALS:
                return None if step + 1 < steps else found
    return found


def _as_torch_made_it(scheduler: LambdaLR) -> bool:
    """Whether its rates are a function of the step and nothing else; a subclass may do anything."""
    kind = type(scheduler)
    return kind.step is LambdaLR.step and kind.get_lr is LambdaLR.get_lr


def _lambda_rates(scheduler: LambdaLR, steps: int, group: int, calls: int) -> Rates | None:
    base, factor = float(scheduler.base_lrs[group]), scheduler.lr_lambdas[group]

    def rate(step: int) -> float:
        return base * float(factor(scheduler.last_epoch + calls * step))

    try:
        found = _filled(rate, steps)
    except _REFUSALS:
        return None
    # What the next step is done with stands already, whoever has set it.
    found[:1] = float(scheduler.optimizer.param_groups[group]["lr"])
    return found


def _filled(rate: Callable[[int], float], steps: int) -> Rates:
    """(steps,) the rate of each step; see `planned_rates`."""
    if steps <= _PLACES:
        return np.array([rate(step) for step in range(steps)], dtype=np.float64)
    # Not evenly: a schedule that repeats itself as often as places do would look constant.
    edges = np.linspace(0, steps, _PLACES + 1).astype(np.int64)
    places = np.random.default_rng(0).integers(edges[:-1], edges[1:])
    places = np.unique([0, *places, steps - 1])
    values = np.array([rate(int(place)) for place in places])
    found: Rates = np.interp(np.arange(steps), places, values)
    for index in np.flatnonzero(np.abs(np.diff(values)) > _MOVE * np.abs(values).max()):
        inner = range(int(places[index]) + 1, int(places[index + 1]))
        found[inner.start : inner.stop] = [rate(step) for step in inner]
    return found


def rates_by_epoch(scheduler: Any, steps: int, in_epoch: int, done: int) -> Rates | None:
    """`planned_rates` of a scheduler that is stepped once an epoch of `in_epoch` steps, `done` of which are done.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> rates_by_epoch(LambdaLR(optimizer, lambda epoch: 0.5**epoch), steps=5, in_epoch=3, done=1)
        array([1. , 1. , 0.5, 0.5, 0.5])
    """
    into = done % in_epoch
    rates = planned_rates(scheduler, -(-(steps + into) // in_epoch))
    return None if rates is None else np.repeat(rates, in_epoch)[into : into + steps]


def _beside(scheduler: Any, stand: Any) -> Any:
    """A copy of the scheduler that moves the stand-in."""
    moved = copy.copy(scheduler)
    moved.optimizer = stand
    # Not its first step: that one looks whether the optimizer has been stepped.
    moved._step_count = max(2, getattr(scheduler, "_step_count", 2))
    for name, value in vars(scheduler).items():
        if isinstance(value, list) and name != _NESTED:
            setattr(moved, name, list(value))
    if hasattr(scheduler, _NESTED):
        moved._schedulers = [_beside(inner, stand) for inner in scheduler._schedulers]
    return moved


def _calls_a_step(scheduler: Any) -> int:
    """Accelerate steps a scheduler once a process, unless batches are split between them."""
    if not hasattr(scheduler, "scheduler") or getattr(scheduler, "split_batches", True):
        return 1
    return collective.world_size() if getattr(scheduler, "step_with_optimizer", False) else 1


def group_of(optimizers: Iterable[torch.optim.Optimizer], weight: Tensor) -> tuple[torch.optim.Optimizer, int] | None:
    """The optimizer that holds a parameter, and the index of its group there.

    >>> first, second = torch.zeros(1), torch.zeros(1)
    >>> optimizer = SimpleNamespace(param_groups=[{"params": [first]}, {"params": [second]}])
    >>> group_of([optimizer], second) == (optimizer, 1)
    True
    """
    for optimizer in optimizers:
        inner = getattr(optimizer, "optimizer", optimizer)
        for index, group in enumerate(inner.param_groups):
            if any(weight is parameter for parameter in group["params"]):
                return inner, index
    return None


@dataclass
class RateMeter:
    """Adds up the learning rates of the matrix's steps, and holds them against the plan.

    Attributes:
        group: index of the optimizer's parameter group that has the matrix.
        planned: rates of the steps from `first` on; None if unknown.
        first: steps done when the plan was made.
        sum: learning rates so far, summed.
        square: their squares, summed.

    Example:
        >>> optimizer = SimpleNamespace(param_groups=[{"lr": 0.5}])
        >>> meter = RateMeter(planned=np.array([0.5, 0.25, 0.25]))
        >>> meter.add(optimizer)
        >>> meter.sum, meter.square, meter.left(step=1, total=3)
        (0.5, 0.25, (0.5, 0.125))
    """

    group: int = 0
    planned: Rates | None = None
    first: int = 0
    steps: int = 0
    sum: float = 0.0
    square: float = 0.0
    _strayed: int = field(default=0, repr=False)
    _there: list[Tensor] = field(default_factory=list, repr=False)

    def add(self, optimizer: torch.optim.Optimizer) -> None:
        """A step has been done with this optimizer."""
        rate = optimizer.param_groups[self.group]["lr"]
        if isinstance(rate, Tensor) and rate.device.type != "cpu":
            # As capturable optimizers have it: to read it in each step, the host would wait.
            self._there.append(rate.detach().clone())
            if len(self._there) == _MOST_THERE:
                self.settle()
        else:
            self._add(float(rate))

    def settle(self) -> None:
        """Add the rates that are on an accelerator still."""
        rates, self._there = self._there, []
        for rate in torch.stack(rates).cpu().double().tolist() if rates else ():
            self._add(rate)

    def _add(self, rate: float) -> None:
        if self.planned is not None:
            self._compare(rate)
        self.steps += 1
        self.sum += rate
        self.square += rate * rate

    def left(self, step: int, total: int) -> tuple[float, float] | None:
        """Sums of the rates to come and of their squares, after `step` of `total` steps; None if they are unknown."""
        self.settle()
        if self.planned is None:
            return None
        rest = self.planned[max(0, step - self.first) : max(0, total - self.first)]
        return float(rest.sum()), float(np.square(rest).sum())

    def leave(self) -> None:
        """Give the plan up: another optimizer does the steps now."""
        self.settle()
        self.planned = None

    def _compare(self, rate: float) -> None:
        """Give the plan up once the rates are others: somebody sets them by hand."""
        assert self.planned is not None
        place = self.steps - self.first
        wanted = float(self.planned[place]) if 0 <= place < len(self.planned) else float("nan")
        scale = float(np.abs(self.planned).max())
        self._strayed = 0 if abs(rate - wanted) <= _TOLERANCE * scale else self._strayed + 1
        if self._strayed >= _PATIENCE:
            self.planned = None

    def state_dict(self) -> dict[str, float]:
        """Plain numbers."""
        self.settle()
        return {"steps": self.steps, "sum": self.sum, "square": self.square}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from `state_dict`; the plan is made anew from the scheduler that was loaded."""
        self.steps, self.sum, self.square = int(state["steps"]), float(state["sum"]), float(state["square"])
        self.first = self.steps
