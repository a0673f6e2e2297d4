"""Simple laws for how the angle of a row grows, to hold the fitted forecast against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from early_replay import Recorded

from vocabguard.measure.exposure import exposure_classes
from vocabguard.measure.forecast import Floats

Law = Callable[[Recorded, int], Floats]
"""Gives the (V,) angle at the end, from what was known at a check."""

TUNED_AT = (0.1, 0.2, 0.4)


def linear(run: Recorded, check: int) -> Floats:
    """In proportion to the summed learning rates."""
    return _power(run, check, 1.0)


def diffusion(run: Recorded, check: int) -> Floats:
    """As a random walk: with the root of the summed squares of the rates."""
    schedule = run.schedule(check)
    whole = schedule.square_past + schedule.square_left
    return run.angle[check] * np.sqrt(whole / schedule.square_past)


def own_power(run: Recorded, check: int) -> Floats:
    """A power of the summed rates that the run itself shows: by exposure class, between half of the sum and now."""
    rows, (now, before, _), asked, *_ = run.running(check)
    span = np.log(now.rate_sum / before.rate_sum)
    growth = (np.log(np.maximum(now.angle, 1e-4)) - np.log(np.maximum(before.angle, 1e-4))) / span
    classes = exposure_classes(asked.targets).numpy()
    exponent = np.ones(len(growth))
    for one in range(4):
        inside = (classes == one) & rows.live.numpy()
        exponent[classes == one] = np.median(growth[inside]) if inside.any() else 1.0
    return _power(run, check, np.clip(exponent, 0, 1.5))


def steady_and_wandering(run: Recorded, check: int) -> Floats:
    """A steady part and a random walk, d^2 = a S^2 + b Q, told apart by the class's growth since half of the sum."""
    rows, (now, before, _), asked, schedule, _ = run.running(check)
    _, squares = run._sums
    half_square = float(squares[before.step])
    classes = exposure_classes(asked.targets).numpy()
    found = now.angle.copy()
    whole_sum, whole_square = now.rate_sum + schedule.sum_left, schedule.square_past + schedule.square_left
    design = np.array([[before.rate_sum**2, half_square], [now.rate_sum**2, schedule.square_past]])
    for one in range(4):
        inside = (classes == one) & rows.live.numpy()
        if not inside.any():
            continue
        seen = np.array([np.median(past.angle[inside]) ** 2 for past in (before, now)])
        steady, wandering = np.maximum(np.linalg.lstsq(design, seen, rcond=None)[0], 0)
        grown = steady * whole_sum**2 + wandering * whole_square
        found[classes == one] *= np.sqrt(
            max(grown, 1e-12) / max(steady * design[1, 0] + wandering * design[1, 1], 1e-12)
        )
    return found


def tuned_power(runs: Sequence[Recorded]) -> Law:
    """One power of the summed rates, fitted on the given runs."""
    exponents = np.linspace(0.2, 1.2, 51)
    errors = [_error(runs, lambda run, check, p=p: _power(run, check, p)) for p in exponents]
    best = float(exponents[int(np.argmin(errors))])
    return lambda run, check: _power(run, check, best)


def tuned_saturation(runs: Sequence[Recorded]) -> Law:
    """An angle that levels off, 1 - exp(-S / s): the scale s, in units of the whole run's sum, fitted on the runs."""

    def law(scale: float) -> Law:
        def grown(run: Recorded, check: int) -> Floats:
            schedule = run.schedule(check)
            done = schedule.sum_past / (schedule.sum_past + schedule.sum_left)
            return run.angle[check] * np.float32((1 - np.exp(-1 / scale)) / (1 - np.exp(-done / scale)))

        return grown

    scales = np.geomspace(0.05, 5, 41)
    errors = [_error(runs, law(scale)) for scale in scales]
    return law(float(scales[int(np.argmin(errors))]))


def laws(runs: Sequence[Recorded]) -> dict[str, Law]:
    """All laws; those with a constant have it from the given runs."""
    return {
        "in proportion": linear,
        "random walk": diffusion,
        "one power": tuned_power(runs),
        "power by class, online": own_power,
        "steady + random walk, online": steady_and_wandering,
        "levelling off": tuned_saturation(runs),
    }


def _power(run: Recorded, check: int, exponent: float | np.ndarray) -> Floats:
    schedule = run.schedule(check)
    ratio = (schedule.sum_past + schedule.sum_left) / schedule.sum_past
    return np.minimum(run.angle[check] * np.power(ratio, exponent), np.pi).astype(np.float32)


def _error(runs: Sequence[Recorded], law: Law) -> float:
    """Median absolute error of the end cosine of rows that end below 0.98, the mean over runs and moments."""
    found = []
    for run in runs:
        moved = run.live & (run.end < 0.98)
        if moved.any():
            found += [np.median(np.abs(np.cos(law(run, run.at(share))) - run.end)[moved]) for share in TUNED_AT]
    return float(np.mean(found))
