"""How often to check and to probe: chosen once, from what they cost and what a step costs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vocabguard import collective
from vocabguard.config import GuardConfig
from vocabguard.guard.failures import Faults

_NICE = (1, 2, 5)
# Where the length of a protected run is not known, a check comes every 50 steps.
_STEPS_UNKNOWN = 50
_SAVED = ("every", "probe_every", "last_probe", "check_seconds", "probe_seconds")


TRAINING = 3.0
"""Forward passes that training on a token takes, forward and backward."""


def forward_tokens(budget: float, to_train: float) -> float:
    """Tokens that a forward pass may read twice in a run, at its base and at its end, within a share of its work.

    Args:
        budget: share in [0, 1].
        to_train: tokens that the run will train on; NaN where unknown.

    Example:
        >>> forward_tokens(0.005, 400_000)
        3000.0
    """
    return budget * to_train * TRAINING / 2


def round_up(steps: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ... that is at least `steps`.

    >>> [round_up(n) for n in (0.2, 3, 11, 201)]
    [1, 5, 20, 500]
    """
    power = 1
    while True:
        for base in _NICE:
            if base * power >= steps:
                return base * power
        power *= 10


def affordable(cost: float, step_seconds: float, budget: float) -> int:
    """Fewest steps between two pieces of work of `cost` seconds that keep their share within `budget`, rounded up.

    Args:
        budget: largest share of the time, in [0, 1]; 0 stands for one in a million.
    """
    share = max(budget, 1e-6)
    return round_up(min(cost / max(step_seconds * share, 1e-9), 1e9))


@dataclass
class Cadence:
    """When checks and probes are due.

    Attributes:
        every: optimizer steps between checks; None until chosen.
        probe_every: optimizer steps between probes; None until chosen.
        settle_steps: steps timed before choosing.
        budget: share of the time for checks.
        probe_budget: share of the time for probes.
        max_checks: most checks in `total` steps.
        last_probe: step of the last probe.
        check_seconds: cost of the last check, without its probe but with what was said of it.
        probe_seconds: cost of the last probe.
    """

    every: int | None
    probe_every: int | None
    settle_steps: int
    budget: float
    probe_budget: float
    max_checks: int
    total: int | None = None
    last_probe: int = 0
    # Of the clock: two runs with the same cadence differ in them.
    check_seconds: float = field(default=0.0, compare=False)
    probe_seconds: float = field(default=0.0, compare=False)

    @classmethod
    def of(cls, config: GuardConfig, total: int | None = None) -> Cadence:
        """The cadence that a configuration asks for, in a run of `total` optimizer steps if they are known."""
        return cls(
            config.drift.every_n_steps, config.probe.every_n_steps, config.cadence.settle_steps,
            config.cadence.budget, config.probe.budget, config.cadence.max_checks, total,
        )  # fmt: skip

    def fix(self) -> None:
        """Fill in what is not given by the planned steps alone, never by the clock.

        Echo and hold follow checks: for a run to be repeatable, checks must fall on the same steps each time.
        """
        # 20 checks and 4 probes a run, about as in the main example, where probes take 3 to 4 % of the work.
        self.every = self.every or round_up((self.total or 20 * _STEPS_UNKNOWN) / 20)
        self.probe_every = self.probe_every or self.every * 5

    def record(self, *, check: float, probe: float | None = None) -> None:
        """What a check took, in seconds without its probe, and what its probe took, if it had one."""
        self.check_seconds = check
        self.probe_seconds = self.probe_seconds if probe is None else probe

    def choose(self, step_seconds: float) -> None:
        """Fill in what is not given, by what was recorded, alike on all processes.

        Args:
            step_seconds: median of a training step without the guard's work.
        """
        every = self.every or max(
            affordable(self.check_seconds, step_seconds, self.budget), round_up((self.total or 0) / self.max_checks)
        )
        probe_every = self.probe_every
        if probe_every is None:
            wanted = affordable(self.probe_seconds, step_seconds, self.probe_budget)
            probe_every = every * math.ceil(wanted / every)
        self.every, self.probe_every = collective.agree((every, probe_every))

    @property
    def chosen(self) -> bool:
        """Whether both cadences are known."""
        return self.every is not None and self.probe_every is not None

    def due(self, step: int) -> bool:
        """Whether a check is due after `step`: every n-th, and the last planned one."""
        return (self.every is not None and step % self.every == 0) or step == self.total

    def probe_due(self, step: int) -> bool:
        """Whether the check after `step` carries a probe: when its time has come, and at the last planned step."""
        if step == self.total:
            return True
        return self.probe_every is not None and step - self.last_probe >= self.probe_every

    def take_probe(self, step: int, *, first: bool) -> bool:
        """Whether the check after `step` carries a probe; if so, the next one is counted from it."""
        due = first or self.probe_due(step)
        self.last_probe = step if due else self.last_probe
        return due

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {name: getattr(self, name) for name in _SAVED}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the cadence of an earlier run, and with its costs: that run may have stopped before it chose."""
        for name in _SAVED:
            setattr(self, name, state[name])


@dataclass
class StepTimer:
    """Times training steps apart from the guard's own work.

    Attributes:
        durations: seconds of the steps so far, without the guard's work; only the first ones are kept.
    """

    durations: list[float] = field(default_factory=list)
    _began: float = 0.0
    _ended: float = 0.0
    _worked: float = 0.0
    _worked_before: float = 0.0

    def start(self, faults: Faults) -> None:
        """Begin to time: what came before is not part of training."""
        self._began = self._ended = time.perf_counter()
        self._worked = self._worked_before = faults.seconds

    def step(self, faults: Faults) -> None:
        """A step has just ended."""
        now, work = time.perf_counter(), faults.seconds
        # The median is asked for once, after `settle_steps`: a run of a million steps keeps no more than it needs.
        if len(self.durations) < 1000:
            self.durations.append(max(0.0, now - self._ended - (work - self._worked)))
        self._ended, self._worked = now, work

    @property
    def steps(self) -> int:
        """Steps timed."""
        return len(self.durations)

    def median(self) -> float:
        """Seconds of a step, the median of those timed; NaN before the first."""
        return statistics.median(self.durations) if self.durations else math.nan

    def overhead(self, faults: Faults) -> float:
        """Share in [0, 1] of the time since `start` that the guard's work took; 0 before the first step."""
        elapsed = time.perf_counter() - self._began
        return min(1.0, (faults.seconds - self._worked_before) / elapsed) if self.durations else 0.0
