"""The fitted part of the forecast: a few small networks from a row's numbers to quantiles of its angle at the end.

They are fitted by ``tests/benchmarks/early_warning.py --fit`` on whole fine-tunes, by the pinball loss, each on other
fine-tunes; their mean is taken. Intervals are widened by what left-out fine-tunes called for. Plain gradient descent,
whose rows move with the size of their gradients, has networks of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources

import numpy as np
import safetensors.numpy

from vocabguard.measure.forecast import (
    SMALLEST_ANGLE,
    Asked,
    Floats,
    Moment,
    RowFacts,
    as_tensor,
    class_medians,
    running_features,
    starting_features,
)
from vocabguard.measure.ranges import LEVELS, Range, widened
from vocabguard.results import DEGRADED, Forecast, Schedule

KINDS = ("running-adam", "running-sgd", "starting")
"""Names of the networks."""

_MEDIAN = LEVELS.index(0.5)
# Rows at a time: what is made of them stays in the cache.
_CHUNK = 1024
_WITHIN = 4.0


@dataclass(frozen=True)
class QuantileNets:
    """K networks of two hidden layers over the same F inputs; their mean is taken.

    Attributes:
        mean: (F,) of the inputs.
        scale: (F,) of the inputs.
        weights: four arrays, (K, F, H), (K, H, H), (K, H, Q), and past the hidden layers (K, F, 1) to the median.
        biases: three arrays, (K, 1, H), (K, 1, H), (K, 1, Q).
        widen: what distances from the median are multiplied by, below and above.

    Example:
        >>> nets = packaged("starting")
        >>> quantiles = nets.quantiles(nets.mean[None])  # of a row that is usual in every number
        >>> quantiles.shape, bool((np.diff(quantiles) > 0).all())
        ((1, 7), True)
    """

    mean: Floats
    scale: Floats
    weights: tuple[Floats, Floats, Floats, Floats]
    biases: tuple[Floats, Floats, Floats]
    widen: tuple[float, float]

    def quantiles(self, inputs: Floats) -> Floats:
        """(V, Q), ascending in Q, of the first F columns of (V, F or more) inputs."""
        found = np.empty((len(inputs), len(LEVELS)), dtype=np.float32)
        for start in range(0, len(inputs), _CHUNK):
            part = slice(start, start + _CHUNK)
            # Beyond what was seen in fitting nothing is known: the edge stands for it.
            x = np.subtract(inputs[part, : len(self.mean)], self.mean, order="C")
            x /= self.scale
            np.clip(x, -_WITHIN, _WITHIN, out=x)
            np.copyto(x, 0, where=np.isnan(x))
            found[part] = self._mean_of_all(x)
        return widened(found, self.widen)

    def _mean_of_all(self, x: Floats) -> Floats:
        """(n, Q) of (n, F) inputs: quantiles are sums of what the networks give, so that is averaged first."""
        first, past = self._joined
        members, _, hidden = self.weights[0].shape
        x1 = _silu((x @ first).reshape(len(x), members, hidden) + self.biases[0][:, 0])
        x2 = _silu(np.matmul(x1.transpose(1, 0, 2), self.weights[1]) + self.biases[1])
        out = np.matmul(x2, self.weights[2]) + self.biases[2]
        middle = out[:, :, _MEDIAN].mean(axis=0) + (x @ past)[:, 0]
        return _around(middle, _steps(out).mean(axis=0))

    @cached_property
    def _joined(self) -> tuple[Floats, Floats]:
        """The first layers side by side, (F, K * H), and the mean of what goes past the layers, (F, 1)."""
        features = self.weights[0].shape[1]
        first = np.ascontiguousarray(self.weights[0].transpose(1, 0, 2)).reshape(features, -1)
        return first, self.weights[3].mean(axis=0)


def _silu(x: Floats) -> Floats:
    """x / (1 + exp(-x)), written into `x`."""
    rest = np.negative(x)
    with np.errstate(over="ignore"):
        np.exp(rest, out=rest)
    rest += 1
    return np.divide(x, rest, out=x)


def _steps(out: Floats) -> Floats:
    """log(1 + exp(out - 2)): positive steps between quantiles. numpy's own `logaddexp` takes ten times as long."""
    x = out - 2
    rest = np.exp(-np.abs(x))
    rest += 1
    np.log(rest, out=rest)
    rest += np.maximum(x, 0)
    return rest


def _around(middle: Floats, steps: Floats) -> Floats:
    """(n, Q) quantiles: a (n,) median, and (n, Q) steps away from it on either side; the middle one is none."""
    found = np.empty_like(steps)
    found[:, _MEDIAN] = middle
    for place in range(_MEDIAN - 1, -1, -1):
        np.subtract(found[:, place + 1], steps[:, place], out=found[:, place])
    for place in range(_MEDIAN + 1, steps.shape[1]):
        np.add(found[:, place - 1], steps[:, place], out=found[:, place])
    return found


def spread(out: Floats) -> Floats:
    """Quantiles from a network's output, both (V, Q): its median, and positive steps away from it on either side.

    Example:
        >>> spread(np.full((1, 7), 2, dtype=np.float32)).round(3)  # a median of 2, steps of log(1 + exp(0))
        array([[-0.079,  0.614,  1.307,  2.   ,  2.693,  3.386,  4.079]],
              dtype=float32)
    """
    # As in fitting, see ``tests/benchmarks/early_fit.py``.
    return _around(out[:, _MEDIAN], _steps(out))


@functools.cache
def packaged(name: str) -> QuantileNets:
    """The networks that come with the package, by a name of `KINDS`.

    Example:
        >>> nets = packaged("running-adam")
        >>> nets.mean.shape, len(nets.weights[0])
        ((37,), 4)
    """
    data = (resources.files("vocabguard.measure") / "forecast.safetensors").read_bytes()
    return nets_of(safetensors.numpy.load(data), name)


def nets_of(tensors: Mapping[str, Floats], name: str) -> QuantileNets:
    """The networks of a name, out of what a file holds.

    Args:
        tensors: ``<name>/mean``, ``scale``, ``widen``, ``weight0`` ... ``weight3``, ``bias0`` ... ``bias2``.

    Example:
        >>> tensors = {f"mine/{key}": np.zeros(2) for key in ("mean", "scale", "widen")}
        >>> tensors |= {f"mine/weight{layer}": np.zeros(1) for layer in range(4)}
        >>> nets_of(tensors | {f"mine/bias{layer}": np.zeros(1) for layer in range(3)}, "mine").widen
        (0.0, 0.0)
    """
    weights = tuple(tensors[f"{name}/weight{layer}"] for layer in range(4))
    biases = tuple(tensors[f"{name}/bias{layer}"] for layer in range(3))
    below, above = tensors[f"{name}/widen"].tolist()
    return QuantileNets(
        tensors[f"{name}/mean"],
        tensors[f"{name}/scale"],
        weights,  # type: ignore[arg-type]
        biases,  # type: ignore[arg-type]
        (below, above),
    )


def growths(moment: Moment) -> tuple[Floats, Floats, Floats]:
    """Quantiles of how the logarithm of each row's angle grows up to the end, (V, Q), of the range and of the networks.

    The third is the (V,) logarithm now.

    Networks that were fitted on one small model rank the rows; where they end, and how wide the range is, is read by
    `vocabguard.measure.ranges`, which was fitted on several models. Plain gradient descent has the networks only.

    Example:
        >>> import torch
        >>> from vocabguard.measure.forecast import Past
        >>> one, no = np.ones(2, dtype=np.float32), torch.zeros(2, dtype=torch.int64)
        >>> facts = RowFacts(torch.ones(2), no.byte(), torch.ones(2).bool(), width=4, tied=False)
        >>> half, now = (Past(step, step * 1e-3, step * one / 1000, one, one, step) for step in (50, 100))
        >>> asked = Asked(no, no, no - 1, no.float(), no.float(), no.float(), 100, None, False, 8.0)
        >>> half_way = Schedule(100, 200, 0.1, 1e-4, 0.1, 1e-4, "adam", memory=1000.0)
        >>> grown, of_networks, angle = growths(Moment(facts, (now, half, half), asked, half_way, norm_ratio=one))
        >>> grown.shape, of_networks.shape, np.exp(angle).round(3)
        ((2, 7), (2, 7), array([0.1, 0.1], dtype=float32))
    """
    inputs, now = running_features(moment.rows, moment.track, moment.asked, moment.schedule, moment.norm_ratio)
    networks = packaged(f"running-{moment.schedule.optimizer}").quantiles(inputs)
    if moment.schedule.optimizer == "sgd":
        return networks, networks, now
    of_class = class_medians(networks[:, _MEDIAN], moment.rows, moment.asked)
    return packaged_range().quantiles(inputs, networks, of_class), networks, now


@functools.cache
def packaged_range() -> Range:
    """The range that comes with the package.

    Example:
        >>> packaged_range().levels.shape
        (7,)
    """
    data = (resources.files("vocabguard.measure") / "forecast.safetensors").read_bytes()
    tensors = safetensors.numpy.load(data)
    return Range(*(tensors[f"range/{name}"].astype(np.float64) for name in ("median", "width", "levels")))


def forecast_running(moment: Moment, sides: tuple[float, float] = (1.0, 1.0)) -> Forecast:
    """The forecast in mid-run. Chances are the networks', which rank rows best on the model that they were fitted on.

    Args:
        moment: all that is known.
        sides: what distances from the median are multiplied by, below and above, in the angle; see `missed_by`.

    Example:
        >>> import torch
        >>> from vocabguard.measure.forecast import Past
        >>> one, no = np.ones(2, dtype=np.float32), torch.zeros(2, dtype=torch.int64)
        >>> facts = RowFacts(torch.ones(2), no.byte(), torch.ones(2).bool(), width=4, tied=False)
        >>> now = Past(100, 0.1, angle=np.array([0.1, 0.4], dtype=np.float32), own_angle=one, push=one, push_samples=1)
        >>> asked = Asked(no, no, no - 1, no.float(), no.float(), no.float(), 1, None, False, 8.0)
        >>> over = Schedule(100, 100, 0.1, 1e-4, sum_left=0.0, square_left=0.0, optimizer="adam", memory=1000.0)
        >>> forecast = forecast_running(Moment(facts, (now, now, now), asked, over, norm_ratio=one))
        >>> forecast.cosine, forecast.chance.round()  # nothing moves any more: cos(0.1) and cos(0.4)
        (tensor([0.9950, 0.9211]), tensor([0., 1.]))
    """
    angle = moment.track[0].angle
    if moment.schedule.sum_left <= 0:
        # Nothing moves any more.
        stays = np.log(np.maximum(angle, SMALLEST_ANGLE))
        return forecast_of(np.repeat(stays[:, None], len(LEVELS), axis=1), np.isnan(angle), moment.schedule)
    grown, networks, now = growths(moment)
    return forecast_of(widened(grown, sides) + now[:, None], np.isnan(angle), moment.schedule, networks + now[:, None])


def forecast_starting(rows: RowFacts, asked: Asked, schedule: Schedule) -> Forecast:
    """The forecast before step 1; see `starting_features` for what it takes.

    Example:
        >>> import torch
        >>> no = torch.zeros(2, dtype=torch.int64)
        >>> facts = RowFacts(torch.tensor([1.0, 0.0]), no.byte(), torch.ones(2).bool(), width=4, tied=False)
        >>> asked = Asked(no, no, no - 1, no.float(), no.float(), no.float(), 0, no, True, 8.0)
        >>> small = Schedule(0, 100, 0.0, 0.0, sum_left=1e-4, square_left=1e-10, optimizer="adam", memory=1000.0)
        >>> forecast_starting(facts, asked, small).cosine  # rates too small to turn a row; one of length 0
        tensor([1.0000,    nan])
    """
    inputs, largest = starting_features(rows, asked, schedule)
    bad = ~np.isfinite(rows.norm.numpy()) | (rows.norm.numpy() == 0)
    return forecast_of(packaged("starting").quantiles(inputs) + largest[:, None], bad, schedule)


def forecast_of(quantiles: Floats, bad: np.ndarray, schedule: Schedule, chances: Floats | None = None) -> Forecast:
    """From quantiles of the angle to cosines and a chance.

    Args:
        quantiles: (V, Q) of the logarithm of the angle, ascending.
        bad: (V,) bool, rows without a forecast.
        chances: (V, Q) quantiles that chances are read from; None: the same.

    Example:
        >>> around = np.log(np.arccos(DEGRADED)) + np.linspace(-0.3, 0.3, 7, dtype=np.float32)  # median cosine 0.95
        >>> schedule = Schedule(0, 100, 0.0, 0.0, 0.1, 1e-4, "adam", memory=1000.0)
        >>> forecast = forecast_of(around[None], np.array([False]), schedule)
        >>> forecast.low, forecast.cosine, forecast.high, forecast.chance
        (tensor([0.9095]), tensor([0.9500]), tensor([0.9725]), tensor([0.5000]))
    """
    middle, low, high = (
        np.cos(np.minimum(np.exp(quantiles[:, place]), np.float32(np.pi))) for place in (_MEDIAN, -1, 0)
    )
    chance = 1 - _reached(quantiles if chances is None else chances, float(np.log(np.arccos(DEGRADED))))
    for values in (middle, low, high, chance):
        values[bad] = np.nan
    return Forecast(schedule.step, schedule.total, *map(as_tensor, (middle, low, high, chance)))


def _reached(quantiles: Floats, limit: float) -> Floats:
    """(V,) the level at which a row's quantiles reach a limit, linear between them, and levelling off outside.

    Outside the outermost quantiles the tail falls by half with each distance between the two outermost.
    """
    levels = np.array(LEVELS, dtype=np.float32)
    place = np.zeros(len(quantiles), dtype=np.int64)
    for column in quantiles.T:
        place += column < limit
    left = np.clip(place - 1, 0, len(LEVELS) - 2)
    every = np.arange(len(quantiles))
    low, high = quantiles[every, left], quantiles[every, left + 1]
    step = np.maximum(high - low, 1e-6)
    inside = levels[left] + (limit - low) / step * (levels[left + 1] - levels[left])
    under = levels[0] * np.exp2(np.minimum((limit - quantiles[:, 0]) / step, 0))
    over = 1 - (1 - levels[-1]) * np.exp2(np.minimum((quantiles[:, -1] - limit) / step, 0))
    found: Floats = np.where(place == 0, under, np.where(place == len(LEVELS), over, inside)).astype(np.float32)
    return found
