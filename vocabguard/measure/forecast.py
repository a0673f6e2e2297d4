"""What each row's cosine will be at the end of the run, if nothing is done: what is known of a row, and the forecast.

The angle between a row and its baseline row grows with the learning rates that are summed, slower than in proportion,
and how much slower differs between runs and rows. So a row's own past, the past of rows like it, what the data has yet
to ask of it and the rates to come are turned into scale-free numbers (`running_features`), and a small network fitted
on whole fine-tunes (`vocabguard.measure.forecast_networks`) gives quantiles of the angle at the end.
``tests/benchmarks/early_warning.py`` fits it, and compares it with simpler laws on fine-tunes that it never saw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vocabguard.measure.exposure import exposure_classes
from vocabguard.results import Forecast, RowDrift, Schedule

Floats = npt.NDArray[np.float32]

# How many pasts are kept, and how far back: by the ratio of the summed rates. `track` asks for halves, of which there
# are four in 16.
_KEPT, _REACH = 5, 16


@dataclass(frozen=True)
class Asked:
    """What the data asked of each row so far and what it will; pull, push and input_only as in `results.Exposure`.

    Attributes:
        targets: (V,) int64, targets so far, echo among them.
        inputs: (V,) int64, data inputs so far.
        last_target: (V,) int64, step at which it last was a target; -1 never.
        push_samples: steps at which push was read.
        prior: (V,) int64, targets counted beforehand over the data or a sample of it; None if there was no count.
        complete: whether that count is of all the data.
        per_step: targets of all rows a step, so far or, before step 1, as counted beforehand; NaN if unknown.
    """

    targets: Tensor
    inputs: Tensor
    last_target: Tensor
    pull: Tensor
    push: Tensor
    input_only: Tensor
    push_samples: int
    prior: Tensor | None
    complete: bool
    per_step: float


@dataclass(frozen=True)
class RowFacts:
    """What does not change of the rows.

    Attributes:
        norm: (V,) float32, length of the baseline row.
        group: (V,) uint8, script group.
        live: (V,) bool.
        tied: whether one matrix is input and output.
    """

    norm: Tensor
    group: Tensor
    live: Tensor
    width: int
    tied: bool


@dataclass(frozen=True)
class Past:
    """Where the rows were at a check.

    Attributes:
        rate_sum: learning rates up to it, summed.
        angle: (V,) float32 in [0, pi], between row and baseline row; NaN for bad rows.
        own_angle: (V,) float32 in [0, pi], the same without the shift that unexposed rows share.
        push: (V,) float32, summed up to it, see `results.Exposure`.
        push_samples: steps at which it was read.
    """

    step: int
    rate_sum: float
    angle: Floats
    own_angle: Floats
    push: Floats
    push_samples: int


def angles(drift: RowDrift, norm: Tensor) -> Floats:
    """(V,) float32 in [0, pi]: the angle between each row and its baseline row; NaN where bad or of zero length.

    It is taken from the displacement, since the cosine of a small angle has lost its digits: with the displacement d
    and the parts of it along and across the baseline row w0, in units of its length (`norm`),
    along = (|w|^2 - |w0|^2 - |d|^2) / (2 |w0|^2).

    Example:
        >>> one, no = torch.ones(1), torch.zeros(1, dtype=torch.bool)
        >>> drift = RowDrift(cosine=one, residual=one, l2=one, norm_ratio=2**0.5 * one, bad=no, zero=no)
        >>> np.degrees(angles(drift, norm=one)).round()  # from (1, 0) to (1, 1)
        array([45.], dtype=float32)
    """
    # In float64: what is left below is a small difference of numbers near 1.
    ratio = drift.norm_ratio.numpy().astype(np.float64)
    with np.errstate(all="ignore"):
        moved = np.square(drift.l2.numpy() / norm.numpy().astype(np.float64))
        along = (np.square(ratio) - 1 - moved) / 2
        angle = np.arctan2(np.sqrt(np.maximum(moved - np.square(along), 0)), 1 + along)
    found: Floats = angle.astype(np.float32)
    return found


def past_of(step: int, rate_sum: float, drift: RowDrift, norm: Tensor, push: Tensor, push_samples: int) -> Past:
    """Where the rows are at a check; see `Past` and `angles`.

    Example:
        >>> one, no = torch.ones(1), torch.zeros(1, dtype=torch.bool)
        >>> drift = RowDrift(cosine=0 * one, residual=0.5 * one, l2=2**0.5 * one, norm_ratio=one, bad=no, zero=no)
        >>> past = past_of(20, 0.02, drift, norm=one, push=one, push_samples=2)  # a right angle; beyond the shift 60
        >>> np.degrees(past.angle).round(), np.degrees(past.own_angle).round()
        (array([90.], dtype=float32), array([60.], dtype=float32))
    """
    own = torch.arccos(drift.residual.clamp(-1, 1)).numpy()
    return Past(step, rate_sum, angles(drift, norm), own, push.numpy(), push_samples)


def keep(pasts: Sequence[Past], new: Past) -> tuple[Past, ...]:
    """The pasts with a new, later one, thinned to a few that lie evenly on a logarithmic scale of summed rates.

    Example:
        >>> pasts, none = (), np.zeros(1, dtype=np.float32)
        >>> for step in range(1, 65):
        ...     pasts = keep(pasts, Past(step, step * 1e-3, none, none, none, 0))
        >>> [past.step for past in pasts]
        [7, 15, 31, 63, 64]
    """
    kept = [past for past in pasts if past.rate_sum > new.rate_sum / _REACH] + [new]
    if len(kept) == 1:
        kept = [*pasts[-1:], new]
    while len(kept) > _KEPT:
        gaps = [kept[i + 1].rate_sum / kept[i - 1].rate_sum for i in range(1, len(kept) - 1)]
        del kept[1 + int(np.argmin(gaps))]
    return tuple(kept)


def halfway(pasts: Sequence[Past], rate_sum: float) -> Past | None:
    """The past whose summed rates are nearest to half of the given, by ratio; None if there is none before it.

    Example:
        >>> none = np.zeros(1, dtype=np.float32)
        >>> halfway([Past(step, step * 1e-3, none, none, none, 0) for step in (10, 45, 60)], rate_sum=0.1).step
        45
    """
    before = [past for past in pasts if 0 < past.rate_sum < rate_sum]
    return min(before, key=lambda past: abs(math.log(2 * past.rate_sum / rate_sum)), default=None)


def track(pasts: Sequence[Past], now: Past) -> tuple[Past, Past, Past] | None:
    """Now, about half of the summed rates ago, and about a quarter; the earliest stands in where there is none earlier.

    Of what `keep` kept, with or without `now`; None if nothing is known from before.

    Example:
        >>> none = np.zeros(1, dtype=np.float32)
        >>> pasts = [Past(step, step * 1e-3, none, none, none, 0) for step in (10, 25, 50, 100)]
        >>> [past.step for past in track(pasts, now=pasts[-1])]
        [100, 50, 25]
    """
    half = halfway(pasts, now.rate_sum)
    return None if half is None else (now, half, halfway(pasts, half.rate_sum) or half)


def summarise_forecast(forecast: Forecast, live: Tensor, parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Flat scalars of a forecast, over live rows that have one.

    Keys: ``below_0.95`` (share in [0, 1] of rows that is expected to end below, the mean of their chances), ``rows``
    (how many that is), ``cosine_mean``; the first two also as ``<part>/...`` for each part that has such rows.

    Example:
        >>> cosine, chance = torch.tensor([0.98, 0.94]), torch.tensor([0.1, 0.7])
        >>> forecast = Forecast(step=10, total=100, cosine=cosine, low=cosine, high=cosine, chance=chance)
        >>> found = summarise_forecast(forecast, live=torch.tensor([True, True]), parts={})
        >>> {name: round(value, 3) for name, value in found.items()}
        {'below_0.95': 0.4, 'rows': 0.8, 'cosine_mean': 0.96}
    """
    usable = live & forecast.chance.isfinite()
    if not bool(usable.any()):
        return {}
    found = {**_risk(forecast, usable), "cosine_mean": float(forecast.cosine[usable].double().mean())}
    for name, mask in parts.items():
        if bool((usable & mask).any()):
            found |= {f"{name}/{key}": value for key, value in _risk(forecast, usable & mask).items()}
    return found


def _risk(forecast: Forecast, chosen: Tensor) -> dict[str, float]:
    expected = float(forecast.chance[chosen].double().sum())
    return {"below_0.95": expected / int(chosen.sum()), "rows": expected}


def as_tensor(values: Floats) -> Tensor:
    """A float32 tensor of an array.

    >>> as_tensor(np.array([[1.0, 2.0], [3.0, 4.0]])[:, 1])
    tensor([2., 4.])
    """
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


@dataclass(frozen=True)
class Moment:
    """All that a forecast in mid-run is made of, so that it can be made again for another end; see `running_features`.

    Attributes:
        norm_ratio: (V,) length of the rows over that of their baseline rows.
    """

    rows: RowFacts
    track: tuple[Past, Past, Past]
    asked: Asked
    schedule: Schedule
    norm_ratio: Floats

    def of(self, ids: npt.NDArray[np.int64]) -> Moment:
        """The same of some rows, in their order."""
        now, half, quarter = (_of_rows(past, ids) for past in self.track)
        rows, asked = _of_rows(self.rows, ids), _of_rows(self.asked, ids)
        return Moment(rows, (now, half, quarter), asked, self.schedule, self.norm_ratio[ids])

    def until(self, end: Past, square: float) -> Moment:
        """The same for a run that ends at a later check.

        Args:
            end: where the rows are then.
            square: squares of the learning rates up to then, summed.
        """
        known = self.schedule
        sum_left, square_left = end.rate_sum - known.sum_past, square - known.square_past
        ended = replace(known, total=end.step, sum_left=sum_left, square_left=square_left)
        return replace(self, schedule=ended)


_Part = TypeVar("_Part", RowFacts, Asked, Past)


def _of_rows(part: _Part, ids: npt.NDArray[np.int64]) -> _Part:
    """The same with some rows of its vectors, which come as tensors or as arrays."""
    chosen: Any = {name: value[ids] for name, value in vars(part).items() if isinstance(value, (Tensor, np.ndarray))}
    return replace(part, **chosen)


def class_medians(values: Floats, rows: RowFacts, asked: Asked) -> Floats:
    """(V,) the median over live rows of a row's exposure class; over all live rows where it has fewer than 5.

    Example:
        >>> counts, none = torch.tensor([0] * 5 + [9] * 5), torch.zeros(10)
        >>> asked = Asked(counts, counts, counts, none, none, none, 0, None, False, 1.0)
        >>> facts = RowFacts(torch.ones(10), counts.byte(), torch.ones(10).bool(), width=4, tied=False)
        >>> class_medians(np.arange(10, dtype=np.float32), facts, asked)
        array([2., 2., 2., 2., 2., 7., 7., 7., 7., 7.], dtype=float32)
    """
    return _medians(values, exposure_classes(asked.targets).numpy(), rows.live.numpy(), _FEW)


SMALLEST_ANGLE = 1e-4
"""Angles below count as so large: their logarithm is taken."""

_FEW = 5
_ENOUGH = 20


def running_features(
    rows: RowFacts, track: tuple[Past, Past, Past], asked: Asked, schedule: Schedule, norm_ratio: Floats
) -> tuple[Floats, Floats]:
    """Numbers of a run that is under way.

    Args:
        track: where the rows are and were, see `track`.
        norm_ratio: (V,) length of the rows over that of their baseline rows.

    Returns:
        (V, F) float32, and the (V,) float32 logarithm of the angle now, which quantiles are relative to.

    Example:
        >>> one, no = np.ones(2, dtype=np.float32), torch.zeros(2, dtype=torch.int64)
        >>> facts = RowFacts(torch.ones(2), no.byte(), torch.ones(2).bool(), width=4, tied=False)
        >>> half, now = (Past(step, step * 1e-3, step * one / 1000, one, one, step) for step in (50, 100))
        >>> asked = Asked(no, no, no - 1, no.float(), no.float(), no.float(), 100, None, False, 8.0)
        >>> schedule = Schedule(100, 200, 0.1, 1e-4, 0.1, 1e-4, "adam", memory=1000.0)
        >>> numbers, angle = running_features(facts, (now, half, half), asked, schedule, norm_ratio=one)
        >>> numbers.shape, np.exp(angle).round(3)
        ((2, 39), array([0.1, 0.1], dtype=float32))
    """
    now, half, quarter = track
    angle, live = _log(now.angle), rows.live.numpy()
    size = _relative_size(rows)
    classes = exposure_classes(asked.targets).numpy()
    never = live & (classes == 0)
    own = _log(now.own_angle, 1e-3)
    # How far a row went, had all rows the same length.
    moved = angle + size
    of_class = _medians(moved, classes, live, _FEW)
    of_group = _medians(moved, rows.group.numpy(), never if never.any() else live, _ENOUGH)
    growth = _growth(half, now)
    before = growth if quarter is half else _growth(quarter, half)
    of_growth, of_before = (_medians(one, classes, live, _FEW) for one in (growth, before))
    fading, usual_fading = _fading(half, asked, never)
    rates = _rates(schedule)
    span, _, _, memory = rates
    # The packaged networks were fitted on these numbers as they are scaled and cut off here: others need another fit.
    columns = [
        moved - of_class,
        size,
        of_group - of_class,
        growth - of_growth,
        before - of_before,
        own - angle,
        own - _log(half.own_angle, 1e-3) - of_growth,
        np.clip((norm_ratio - 1) / np.maximum(now.angle, 1e-3), -3, 3),
        *_asked(asked, schedule, never),
        of_class,
        of_growth,
        of_before,
        *rates,
        float(rows.tied),
        *_laws(of_class, of_growth, of_before, float(rows.tied), rates),
        fading,
        # Less is left to come where the second moment soon forgets how strong the push was.
        usual_fading,
        usual_fading * span,
        usual_fading * memory,
        # From here on for the range only.
        math.log(max(math.log(now.rate_sum / half.rate_sum), 1e-2)),
        _spreads(growth, classes, live, _FEW),
    ]
    return _stacked(columns, len(angle)), angle


def starting_features(rows: RowFacts, asked: Asked, schedule: Schedule) -> tuple[Floats, Floats]:
    """Numbers of a run that has not begun: what the data will ask, how long the rows are, the rates to come.

    Args:
        asked: with a count beforehand; only that is looked at.
        schedule: before step 1, of an optimizer whose steps have a known size (not ``sgd``).

    Returns:
        (V, F) float32, and the (V,) float32 logarithm of the largest angle that quantiles are relative to: that of a
        row whose every element moves by the learning rate, one way, in every step.

    Example:
        Rows of length 1 and 4 elements, rates of 0.05 in all: no further than 0.05 * 2 / 1.

        >>> no = torch.zeros(2, dtype=torch.int64)
        >>> facts = RowFacts(torch.ones(2), no.byte(), torch.ones(2).bool(), width=4, tied=False)
        >>> asked = Asked(no, no, no - 1, no.float(), no.float(), no.float(), 0, no + 1, True, 8.0)
        >>> schedule = Schedule(0, 100, 0.0, 0.0, 0.05, 2.5e-5, "adam", memory=1000.0)
        >>> numbers, largest = starting_features(facts, asked, schedule)
        >>> numbers.shape, np.exp(largest).round(3)
        ((2, 7), array([0.1, 0.1], dtype=float32))
    """
    assert asked.prior is not None
    largest = _log(schedule.sum_left * math.sqrt(rows.width) / np.maximum(rows.norm.numpy(), 1e-12))
    counts = asked.prior.numpy()
    spread = math.log(schedule.square_left * schedule.total / schedule.sum_left**2)
    columns = [
        largest,
        _relative_size(rows),
        counts == 0,
        np.log1p(10 * targets_to_come(asked, schedule)),
        spread,
        _memory(schedule, schedule.total),
        float(rows.tied),
    ]
    return _stacked(columns, len(largest)), largest


def _growth(before: Past, after: Past) -> Floats:
    """The power of the summed rates that a row's angle went with in between: 1 in proportion, 0.5 a random walk."""
    span = max(math.log(after.rate_sum / before.rate_sum), 0.1)
    found: Floats = np.clip((_log(after.angle) - _log(before.angle)) / span, -1, 3)
    return found


def _asked(asked: Asked, schedule: Schedule, never: npt.NDArray[np.bool_]) -> list[npt.ArrayLike]:
    """Targets so far and to come, and what the gradient did, beside that of rows that never were a target."""
    targets, step = asked.targets.numpy(), schedule.step
    samples = max(asked.push_samples, 1)
    push = _log(asked.push.numpy() / samples, 1e-12)
    usual = float(np.median(push[never])) if never.any() else 0.0
    pull = _log(asked.pull.numpy() / np.maximum(targets, 1), 1e-12)
    drawn = asked.input_only.numpy()
    last = asked.last_target.numpy()
    return [
        targets == 0,
        np.log1p(targets),
        np.log1p(10 * targets_to_come(asked, schedule)),
        0.0 if asked.prior is None else asked.prior.numpy() == 0,
        asked.prior is not None,
        np.where(last < 0, 1.0, (step - last) / max(step, 1)),
        np.clip(np.nan_to_num(push - usual), -8, 8) / 2,
        np.where(targets > 0, np.clip(np.nan_to_num(pull - usual), -8, 8) / 2, 0.0),
        np.where(drawn > 0, np.clip(np.nan_to_num(_log(drawn / samples, 1e-12) - usual), -8, 8) / 2, 0.0),
        0.3 * np.log1p(asked.inputs.numpy()),
    ]


def _fading(half: Past, asked: Asked, never: npt.NDArray[np.bool_]) -> tuple[Floats, float]:
    """Logarithm of a row's push since about half the summed rates over its push before: what pushes it dies out.

    (V,) float32 less the median of rows that never were a target, and that median; 0 where it is unknown.
    """
    since = asked.push_samples - half.push_samples
    with np.errstate(all="ignore"):
        late, early = (asked.push.numpy() - half.push) / since, half.push / half.push_samples
        ratio = np.log(late / early)
    ratio = np.where(np.isfinite(ratio), ratio, np.nan)
    known = ratio[never & np.isfinite(ratio)]
    usual = float(np.clip(np.median(known), -3, 3)) if len(known) else 0.0
    found: Floats = np.clip(np.nan_to_num(ratio - usual), -3, 3).astype(np.float32)
    return found, usual


def targets_to_come(asked: Asked, schedule: Schedule) -> npt.NDArray[np.float64]:
    """(V,) float64 >= 0: expected targets in the rest of the run, by a row's share of those counted beforehand.

    Without a count beforehand, by its share of those so far: 0 for a row that never was one.

    Example:
        Half of the run is done; two passes over data with 4 targets of token 0 and none of token 1 make 8.

        >>> counts, none = torch.tensor([4, 0]), torch.zeros(2)
        >>> asked = Asked(counts, counts, counts, none, none, none, 0, prior=counts, complete=True, per_step=0.08)
        >>> targets_to_come(asked, Schedule(50, 100, 0.1, 1e-4, 0.1, 1e-4, "adam", memory=1000.0))
        array([4., 0.])
    """
    targets = asked.targets.numpy().astype(np.float64)
    left = schedule.total - schedule.step
    if asked.prior is None:
        return targets * left / max(schedule.step, 1)
    prior = asked.prior.numpy().astype(np.float64)
    whole = prior * (asked.per_step * schedule.total / max(prior.sum(), 1))
    if np.isnan(asked.per_step):
        # One pass over what was counted.
        whole = prior
    # In whole passes over the data, what has been asked will not be asked again.
    found: npt.NDArray[np.float64]
    found = np.maximum(whole - targets, 0.0) if asked.complete else whole * left / schedule.total
    return found


def _rates(schedule: Schedule) -> list[float]:
    """Rates to come against those so far, and how far the second moment reaches."""
    past, left = schedule.sum_past, schedule.sum_left
    # Mean rates, weighted by themselves: a step twice as long counts twice.
    usual, coming = schedule.square_past / past, schedule.square_left / left if left > 0 else 0.0
    return [
        math.log((past + left) / past),
        math.log(max(coming / usual, 1e-3)),
        math.log(schedule.total / schedule.step),
        _memory(schedule, schedule.step),
    ]


def _laws(moved: Floats, growth: Floats, before: Floats, tied: float, rates: list[float]) -> list[npt.ArrayLike]:
    """What simple laws of growth would add, for the networks to weigh: products that they need not learn.

    The first is one power of the summed rates that goes on; the others say what may bend it. How far rows went for
    their rates is not among them: it tells one optimizer from another, and misleads on one that was never fitted on.
    """
    span, coming, _, memory = rates
    growth, before = np.clip(growth, -0.5, 2), np.clip(before, -0.5, 2)
    return [growth * span, before * span, coming * span, memory * span, tied * span, moved * span, growth * coming]


def _memory(schedule: Schedule, steps: int) -> float:
    if schedule.optimizer == "sgd":
        return 0.0
    return 0.3 * min(max(math.log(schedule.memory / max(steps, 1)), -7.0), 7.0)


def _relative_size(rows: RowFacts) -> Floats:
    """Logarithm of a baseline row's length over the median length."""
    found: Floats = _log(rows.norm.numpy(), 1e-12) - _usual_length(rows)
    return found


def _usual_length(rows: RowFacts) -> np.float32:
    """Logarithm of the median length of the live baseline rows, of all where none is live."""
    length, live = _log(rows.norm.numpy(), 1e-12), rows.live.numpy()
    usual: np.float32 = np.median(length[live] if live.any() else length)
    return usual


def _medians(values: Floats, parts: npt.NDArray[np.integer], chosen: npt.NDArray[np.bool_], least: int) -> Floats:
    """(V,) the median of a row's part, over the chosen rows; of all the chosen where the part has too few."""
    usable = chosen & np.isfinite(values)
    found = np.empty(len(values), dtype=np.float32)
    everywhere: float | None = None
    for part in np.flatnonzero(np.bincount(parts)):
        of_part = parts == part
        inside = values[of_part & usable]
        if len(inside) < least and everywhere is None:
            everywhere = float(np.median(values[usable])) if usable.any() else 0.0
        found[of_part] = np.median(inside) if len(inside) >= least else everywhere
    return found


def _spreads(values: Floats, parts: npt.NDArray[np.integer], chosen: npt.NDArray[np.bool_], least: int) -> Floats:
    """(V,) half the distance between the 10 % and 90 % quantiles of a row's part; as `_medians` else."""
    usable = chosen & np.isfinite(values)
    found = np.empty(len(values), dtype=np.float32)
    everywhere: float | None = None
    for part in np.flatnonzero(np.bincount(parts)):
        of_part = parts == part
        inside = values[of_part & usable]
        if len(inside) < least and everywhere is None:
            everywhere = float(_half_width(values[usable])) if usable.any() else 0.0
        found[of_part] = _half_width(inside) if len(inside) >= least else everywhere
    return found


def _half_width(values: Floats) -> float:
    low, high = np.quantile(values, (0.1, 0.9))
    return float(high - low) / 2


def _log(values: npt.ArrayLike, smallest: float = SMALLEST_ANGLE) -> Floats:
    found: Floats = np.log(np.maximum(np.asarray(values, dtype=np.float32), np.float32(smallest)))
    return found


def _stacked(columns: list[npt.ArrayLike], rows: int) -> Floats:
    # Each column in one piece: that is how they are written, and read.
    table = np.empty((len(columns), rows), dtype=np.float32)
    for place, column in enumerate(columns):
        table[place] = column
    return table.T
