"""What each row's cosine will be at the end of the run, if nothing is done: what is known of a row, and the forecast.

The angle between a row and its baseline row grows with the learning rates that are summed, slower than in proportion,
and how much slower differs between runs and rows. So a row's own past, the past of rows like it, what the data has yet
to ask of it and the rates to come are turned into scale-free numbers (`vocabguard.measure.forecast_features`), and a
small network fitted on whole fine-tunes (`vocabguard.measure.forecast_model`) gives quantiles of the angle at the end.
``tests/benchmarks/early_warning.py`` fits it, and compares it with simpler laws on fine-tunes that it never saw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vocabguard.forecasts import Forecast
from vocabguard.results import RowDrift

Floats = npt.NDArray[np.float32]

# How many pasts are kept, and how far back: by the ratio of the summed rates.
_KEPT, _REACH = 5, 16


@dataclass(frozen=True)
class Asked:
    """What the data asked of each row so far and what it will.

    Attributes:
        targets: (V,) int64, targets so far, echo among them.
        inputs: (V,) int64, data inputs so far.
        last_target: (V,) int64, step at which it last was a target; -1 never.
        pull: (V,) float32, see `results.Exposure`.
        push: (V,) float32.
        input_only: (V,) float32.
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
class Rows:
    """What does not change.

    Attributes:
        norm: (V,) float32, length of the baseline row.
        group: (V,) uint8, script group.
        live: (V,) bool.
        width: elements a row.
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
        step: the optimizer step.
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
    """The angle between each row and its baseline row.

    It is taken from the displacement, since the cosine of a small angle has lost its digits: with the displacement d
    and the parts of it along and across the baseline row w0, in units of its length,
    along = (|w|^2 - |w0|^2 - |d|^2) / (2 |w0|^2).

    Args:
        drift: the rows' drift.
        norm: (V,) float32, length of the baseline rows.

    Returns:
        (V,) float32 in [0, pi]; NaN where the row is bad or of zero length.
    """
    ratio = drift.norm_ratio.numpy().astype(np.float64)
    with np.errstate(all="ignore"):
        moved = np.square(drift.l2.numpy() / norm.numpy().astype(np.float64))
        along = (np.square(ratio) - 1 - moved) / 2
        angle = np.arctan2(np.sqrt(np.maximum(moved - np.square(along), 0)), 1 + along)
    found: Floats = angle.astype(np.float32)
    return found


def past_of(step: int, rate_sum: float, drift: RowDrift, norm: Tensor, push: Tensor, push_samples: int) -> Past:
    """Where the rows are at a check.

    Args:
        step: the optimizer step.
        rate_sum: learning rates up to it, summed.
        drift: the rows' drift.
        norm: (V,) float32, length of the baseline rows.
        push: (V,) float32, summed so far.
        push_samples: steps at which it was read.
    """
    own = torch.arccos(drift.residual.clamp(-1, 1)).numpy()
    return Past(step, rate_sum, angles(drift, norm), own, push.numpy(), push_samples)


def keep(pasts: Sequence[Past], new: Past) -> tuple[Past, ...]:
    """The pasts with a new one, thinned to a few that lie evenly on a logarithmic scale of summed rates.

    Args:
        pasts: in order.
        new: later than all of them, with some rate summed.
    """
    kept = [past for past in pasts if past.rate_sum > new.rate_sum / _REACH] + [new]
    if len(kept) == 1:
        kept = [*pasts[-1:], new]
    while len(kept) > _KEPT:
        gaps = [kept[i + 1].rate_sum / kept[i - 1].rate_sum for i in range(1, len(kept) - 1)]
        del kept[1 + int(np.argmin(gaps))]
    return tuple(kept)


def halfway(pasts: Sequence[Past], rate_sum: float) -> Past | None:
    """The past whose summed rates are nearest to half of the given, by ratio; None if there is none before it."""
    before = [past for past in pasts if 0 < past.rate_sum < rate_sum]
    return min(before, key=lambda past: abs(math.log(2 * past.rate_sum / rate_sum)), default=None)


def track(pasts: Sequence[Past], now: Past) -> tuple[Past, Past, Past] | None:
    """Now, about half of the summed rates ago, and about a quarter; the earliest stands in where there is none earlier.

    Args:
        pasts: what `keep` kept, with or without `now`.
        now: the rows now.

    Returns:
        None if nothing is known from before.
    """
    half = halfway(pasts, now.rate_sum)
    return None if half is None else (now, half, halfway(pasts, half.rate_sum) or half)


def summarise_forecast(forecast: Forecast, live: Tensor, parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Flat scalars of a forecast, over live rows that have one.

    Keys: ``below_0.95`` (share in [0, 1] of rows that is expected to end below, the mean of their chances), ``rows``
    (how many that is), ``cosine_mean``; the first two also as ``<part>/...`` for each part that has such rows.

    Args:
        forecast: of V rows.
        live: (V,) bool.
        parts: (V,) bool masks by name, such as groups and exposure classes.
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
    """A float32 tensor of an array."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
