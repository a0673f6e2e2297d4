"""The forecast of a guarded run: what it remembers from check to check, and what it knows of the schedule."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vocabguard.guard.watched import Watched
from vocabguard.measure.drift import evenly
from vocabguard.measure.forecast import (
    SMALLEST_ANGLE,
    Asked,
    Floats,
    Moment,
    Past,
    RowFacts,
    keep,
    past_of,
    track,
)
from vocabguard.measure.forecast_networks import forecast_running, forecast_starting, growths
from vocabguard.measure.learning_rates import RateMeter, Rates, group_of, planned_rates
from vocabguard.measure.ranges import missed_by
from vocabguard.results import Exposure, Forecast, NotApplicable, Preflight, RowDrift, Schedule
from vocabguard.rows.matrices import VocabMatrix
from vocabguard.vocabulary.table import fit_rows

logger = logging.getLogger("vocabguard")

FITTED_WIDTH = 256
"""Widest rows for which the forecast speaks. Its ranges held 87 to 98 % of the rows on each of seven small models that
were never fitted, widths 48 to 320, but 58 % on Gemma 3 270M, most of whose rows hardly move at first and then faster
and faster. ``tests/benchmarks/early_travel.py`` measures it."""
JUDGED_ROWS = 2048
"""Rows by which an earlier forecast is judged."""
_WIDE = "rows of width {} are wider than 256, where the forecast's ranges did not hold on a model that was never fitted"
# How long ago an earlier forecast that is judged was made: the ratio of the summed rates, best and allowed.
_AGO, _LEAST_AGO, _MOST_AGO = 2.0, 1.15, 8.0
_NO_TOTAL = NotApplicable("the forecast needs the planned number of optimizer steps")
_NO_PLAN = NotApplicable("the forecast needs the learning rates to come: no schedule is known, or it was left")
_NO_COUNTS = NotApplicable("the forecast needs counts of targets")
_NO_PAST = NotApplicable("the forecast needs two checks with a learning rate above 0")
_FIRST_MOVES = NotApplicable(
    "the forecast before step 1 needs a count of the data to come, and an optimizer whose steps have a known size"
)


@dataclass(frozen=True)
class Nature:
    """What the forecast must know of an optimizer.

    Attributes:
        kind: ``adam`` or ``sgd``, see `forecasts.Schedule`.
        beta2: of the second moment; None where it grows with the steps, as Adafactor's, or there is none.
        decay: exponent d of Adafactor's beta2 = 1 - step^d; 0 for others.
    """

    kind: str
    beta2: float | None = None
    decay: float = 0.0

    def memory(self, step: int) -> float:
        """Steps over which the second moment is averaged at a step; 0 for ``sgd``."""
        if self.kind == "sgd":
            return 0.0
        if self.beta2 is None:
            return math.pow(max(step, 1), -self.decay)
        return 1.0 / max(1.0 - self.beta2, 1e-9)


def nature_of(optimizer: torch.optim.Optimizer, group: int) -> Nature | None:
    """What kind an optimizer is, by the settings of a parameter group; None for one that is not known.

    Args:
        optimizer: the inner one, if it is wrapped.
        group: index of the parameter group.
    """
    settings = optimizer.param_groups[group]
    if "betas" in settings:
        return Nature("adam", beta2=float(settings["betas"][-1]))
    if "decay_rate" in settings or "beta2_decay" in settings:
        exponent = float(settings.get("decay_rate") or settings.get("beta2_decay") or -0.8)
        return Nature("adam", decay=-abs(exponent))
    if "alpha" in settings and "centered" in settings:
        return Nature("adam", beta2=float(settings["alpha"]))
    return Nature("sgd") if "dampening" in settings else None


@dataclass
class Forecaster:
    """Makes the forecast of each check.

    Attributes:
        flight: what was counted before step 1.
        batches: micro-batches of all processes in an optimizer step.
        schedule: a torch scheduler, or rates of the steps to come, or None.
        meter: learning rates so far and to come; None before `hook`, or where no optimizer has the head's rows.
        pasts: where the rows were.
        moments: of some rows, what earlier forecasts were made of, to be judged by where the rows are now.
    """

    watched: Watched
    flight: Preflight | NotApplicable
    total: int | None
    batches: int
    schedule: Any = None
    meter: RateMeter | None = None
    nature: Nature | None = None
    pasts: tuple[Past, ...] = ()
    moments: tuple[Moment, ...] = ()
    _saved: Mapping[str, Any] = field(default_factory=dict, repr=False)
    _norm: Tensor | None = field(default=None, repr=False)

    def hook(self, optimizers: Iterable[torch.optim.Optimizer], steps_done: int) -> RateMeter | None:
        """Look at the optimizer of the head's rows, and ahead on its schedule.

        Returns:
            What must be told of each of its steps; None where there is nothing to forecast.
        """
        matrix = self.watched.matrices["head"]
        followed = isinstance(matrix, VocabMatrix) and matrix.held is None
        found = group_of(optimizers, matrix.weight) if followed and isinstance(matrix, VocabMatrix) else None
        if found is None:
            return None
        optimizer, group = found
        self.nature = nature_of(optimizer, group)
        self.meter = RateMeter(group, self._planned(group, steps_done), steps_done, steps_done)
        if self._saved:
            self.meter.load_state_dict({**self._saved, "steps": steps_done})
        return self.meter

    def _planned(self, group: int, steps_done: int) -> Rates | None:
        if self.schedule is None or self.total is None:
            return None
        ahead = max(0, self.total - steps_done)
        if isinstance(self.schedule, (Sequence, np.ndarray)):
            rates = np.asarray(self.schedule, dtype=np.float64)[:ahead]
            return rates if len(rates) == ahead else None
        return planned_rates(self.schedule, ahead, group)

    def at(
        self, step: int, drift: RowDrift | NotApplicable, exposure: Exposure | NotApplicable
    ) -> Forecast | NotApplicable:
        """The forecast of a check, or why there is none."""
        if isinstance(drift, NotApplicable):
            return drift
        if isinstance(exposure, NotApplicable):
            return _NO_COUNTS
        known = self._schedule(step)
        if isinstance(known, NotApplicable):
            return known
        rows, asked = self._rows(), self._asked(exposure, step)
        if known.sum_past <= 0:
            first = asked.prior is not None and known.optimizer != "sgd" and known.sum_left > 0
            return forecast_starting(rows, asked, known) if first else _FIRST_MOVES
        now = past_of(step, known.sum_past, drift, rows.norm, asked.push.float(), asked.push_samples)
        known_from = track(self.pasts, now)
        if not self.pasts or self.pasts[-1].rate_sum < now.rate_sum:
            self.pasts = keep(self.pasts, now)
        if known_from is None:
            return _NO_PAST
        moment = Moment(rows, known_from, asked, known, drift.norm_ratio.numpy())
        return forecast_running(moment, self._judged(moment))

    def _judged(self, moment: Moment) -> tuple[float, float]:
        """How much an earlier forecast of this run missed by, below and above; see `missed_by`."""
        now, known = moment.track[0], moment.schedule
        if known.optimizer == "sgd":
            return 1.0, 1.0
        ids = evenly(np.flatnonzero(moment.rows.live.numpy()), JUDGED_ROWS)
        here = moment.of(ids)
        ago = [(now.rate_sum / one.schedule.sum_past, one) for one in self.moments if len(one.norm_ratio) == len(ids)]
        usable = [(ratio, one) for ratio, one in ago if _LEAST_AGO < ratio < _MOST_AGO]
        if not self.moments or self.moments[-1].schedule.sum_past < known.sum_past:
            kept = {past.step for past in self.pasts}
            self.moments = (*(one for one in self.moments if one.schedule.step in kept), here)
        if not usable:
            return 1.0, 1.0
        _, then = min(usable, key=lambda pair: abs(math.log(pair[0] / _AGO)))
        quantiles, _, before = growths(then.until(here.track[0], known.square_past))
        return missed_by(quantiles, np.log(np.maximum(here.track[0].angle, SMALLEST_ANGLE)) - before)

    def _schedule(self, step: int) -> Schedule | NotApplicable:
        meter, nature, width = self.meter, self.nature, self.watched.baseline_of("head").width
        if width > FITTED_WIDTH:
            return NotApplicable(_WIDE.format(width))
        if self.total is None:
            return _NO_TOTAL
        if meter is None:
            return _NO_PLAN
        if nature is None:
            return NotApplicable(
                "the forecast knows optimizers that divide by a second moment, and plain gradient descent"
            )
        left = meter.left(step, self.total)
        if left is None:
            return _NO_PLAN
        return Schedule(
            step, self.total, meter.sum, meter.square, *left, nature.kind, nature.memory(step or self.total)
        )

    def _rows(self) -> RowFacts:
        table, rows, baseline = self.watched.table, self.watched.rows, self.watched.baseline_of("head")
        if self._norm is None:
            self._norm = baseline.norms.float()
        return RowFacts(
            fit_rows(self._norm, rows, math.nan), table.group, table.live, baseline.width, self.watched.tied
        )

    def _asked(self, exposure: Exposure, step: int) -> Asked:
        targets = exposure.data_target + exposure.echo_target
        prior, complete, per_step = None, False, math.nan
        if isinstance(self.flight, Preflight) and bool(self.flight.data_target.any()):
            prior, complete = fit_rows(self.flight.data_target, len(targets)), self.flight.complete
            if self.flight.batches:
                per_step = float(prior.sum()) / self.flight.batches * self.batches
        if step and exposure.steps:
            per_step = float(targets.sum()) / exposure.steps
        return Asked(
            targets, exposure.inputs, exposure.last_target, exposure.pull, exposure.push, exposure.input_only,
            exposure.push_samples, prior, complete, per_step,
        )  # fmt: skip

    def resize(self) -> None:
        """The matrix has other rows now: new ones have no past."""
        rows = self.watched.rows
        self.pasts = tuple(
            replace(
                past,
                angle=_longer(past.angle, rows),
                own_angle=_longer(past.own_angle, rows),
                push=_longer(past.push, rows),
            )
            for past in self.pasts
        )
        # Their rows were drawn from another vocabulary.
        self.moments = ()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and a few V-sized vectors; loads with ``weights_only=True``."""
        meter = {} if self.meter is None else self.meter.state_dict()
        moments = [_moment_state(moment) for moment in self.moments]
        return {"meter": meter, "pasts": [_state(past) for past in self.pasts], "moments": moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; call it before `hook`. States of earlier versions have no moments."""
        self._saved = state["meter"]
        self.pasts = tuple(_past(past) for past in state["pasts"])
        self.moments = tuple(_moment(moment) for moment in state.get("moments", ()))


def _state(part: Any) -> dict[str, Any]:
    return {name: _storable(value) for name, value in vars(part).items()}


def _past(state: Mapping[str, Any]) -> Past:
    vectors = {name: value.numpy() for name, value in state.items() if isinstance(value, Tensor)}
    return Past(**{**state, **vectors})


def _moment_state(moment: Moment) -> dict[str, Any]:
    parts = {name: _state(getattr(moment, name)) for name in ("rows", "asked", "schedule")}
    track = [_state(past) for past in moment.track]
    return {**parts, "track": track, "norm_ratio": torch.from_numpy(moment.norm_ratio)}


def _moment(state: Mapping[str, Any]) -> Moment:
    now, half, quarter = (_past(past) for past in state["track"])
    return Moment(
        RowFacts(**state["rows"]), (now, half, quarter), Asked(**state["asked"]), Schedule(**state["schedule"]),
        state["norm_ratio"].numpy(),
    )  # fmt: skip


def _storable(value: Any) -> Any:
    """Tensors survive ``torch.load(weights_only=True)``, arrays do not."""
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _longer(vector: Floats, rows: int) -> Floats:
    found: Floats = fit_rows(torch.from_numpy(vector), rows, math.nan).numpy()
    return found
