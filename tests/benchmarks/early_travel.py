"""Does the forecast travel? Its range is fitted on all models but one, and judged on that one.

    python tests/benchmarks/early_travel.py FOLDER [--record] [--cache CACHE] [--fit] [--json FILE]

FOLDER holds the recordings of ``early_warning.py`` and ``early_real.py``; ``--record`` makes those of the small bases
of other shapes that are not there yet (2 to 10 s each on an idle core), and with ``--cache`` those of the real models.
``--fit`` fits the packaged range anew, on all models, and writes it into ``vocabguard/measure/forecast.safetensors``
beside the networks, which stay as they are. The fine-tunes that ``early_warning.py`` holds out are never fitted on.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import early_real
import early_runs
import numpy as np
import safetensors.numpy
import torch
from early_replay import PRIORS, Recorded
from torchmetrics.functional.classification import binary_auroc

from vocabguard.alerts.rules import AlertRule
from vocabguard.config import load_config
from vocabguard.measure.forecast import SMALLEST_ANGLE, Floats, Moment, class_medians, running_features
from vocabguard.measure.forecast_networks import forecast_of, packaged
from vocabguard.measure.ranges import LEVELS, Range, level_numbers, missed_by, widened, width_numbers
from vocabguard.results import DEGRADED

MODEL = Path(__file__).parents[2] / "vocabguard" / "measure" / "forecast.safetensors"
MOMENTS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.85)
PAIRS, ROWS, JUDGED, TAUGHT = 16, 500, 1000, 120
_MEDIAN, _SPAN, _GROWTH = LEVELS.index(0.5), 21, 19
_NETWORKS = packaged("running-adam")
Figures = dict[str, float]


@dataclass(frozen=True)
class Seen:
    """Some rows of a run at a moment, and how far they went.

    Attributes:
        inputs: (n, F) numbers of the rows.
        networks: (n, Q) what the packaged networks make of them.
        of_class: (n,) their median over a row's class.
        grown: (n,) growth of the logarithm of the angle.
        now: (n,) that logarithm at the moment.
        earlier: the same rows from about half of the summed rates until now; None where there were too few checks.
    """

    inputs: Floats
    networks: Floats
    of_class: Floats
    grown: Floats
    now: Floats
    earlier: Seen | None = None

    @property
    def span(self) -> float:
        """Logarithm of the sum of all rates over the sum so far."""
        return float(self.inputs[0, _SPAN])

    def first(self, rows: int) -> Seen:
        """The first rows only."""
        return Seen(*(one[:rows] for one in (self.inputs, self.networks, self.of_class, self.grown, self.now)))

    @cached_property
    def numbers(self) -> tuple[np.ndarray, np.ndarray]:
        """What median and width are made of."""
        level = level_numbers(self.inputs, self.networks[:, _MEDIAN], self.of_class)
        return level, width_numbers(self.inputs, self.networks)


def seen_at(run: Recorded, check: int, end: int, ids: np.ndarray, **how: Any) -> Seen | None:
    """Rows of a run at a check, for a run that ends at another; see `Recorded.running`."""
    known = run.running(check, end, **how)
    if known is None:
        return None
    inputs, now = running_features(*known)
    moment = Moment(*known).of(ids)
    networks = _NETWORKS.quantiles(inputs[ids])
    of_class = class_medians(networks[:, _MEDIAN], moment.rows, moment.asked)
    grown = np.log(np.maximum(run.angle[end], SMALLEST_ANGLE))[ids] - now[ids]
    return Seen(inputs[ids], networks, of_class, grown, now[ids])


def lessons(run: Recorded) -> list[Seen]:
    """Random moments up to random later ones; the guard may have made fewer checks, and have read no gradients."""
    rng = np.random.default_rng(zlib.crc32(run.setup.name.encode()))
    live, found, last = np.flatnonzero(run.live), [], run.last
    for _ in range(3 * PAIRS):
        share = rng.choice((1.0, 1.0, 0.5, 0.2)) if last > 12 else 1.0
        seen = {index for index in range(last + 1) if rng.random() < share}
        check = min(run.at(rng.uniform(0.06, 0.85)), last - 1)
        end = last if rng.random() < 0.5 else int(rng.integers(check + 1, last + 1))
        how = {"prior": PRIORS[rng.choice(3, p=(0.5, 0.3, 0.2))], "seed": int(rng.integers(2**31)), "seen": seen}
        ids = rng.choice(live, min(ROWS, len(live)), replace=False)
        one = seen_at(run, check, end, ids, **how, blind=rng.random() < 0.35)
        if one is not None:
            found.append(one.first(TAUGHT))
        if len(found) == PAIRS:
            break
    return found


def looks(run: Recorded) -> dict[float, Seen]:
    """The run at each of `MOMENTS` at which it had a check and one before."""
    rng = np.random.default_rng(zlib.crc32(run.setup.name.encode()))
    live, sums, steps, found = np.flatnonzero(run.live), [one.rate_sum for one in run.places], run.found["step"], {}
    ids = rng.choice(live, min(JUDGED, len(live)), replace=False)
    for moment in MOMENTS:
        check = run.at(moment)
        if not 0 < check < run.last or abs(steps[check] / steps[-1] - moment) > 0.03:
            continue
        one = seen_at(run, check, run.last, ids)
        if one is None:
            continue
        before = [index for index in range(1, check) if 1.15 < sums[check] / max(sums[index], 1e-30) < 8]
        nearest = min(before, key=lambda index: abs(math.log(sums[check] / sums[index] / 2)), default=None)
        earlier = None if nearest is None else seen_at(run, nearest, check, ids)
        found[moment] = Seen(one.inputs, one.networks, one.of_class, one.grown, one.now, earlier)
    return found


@dataclass(frozen=True)
class Told:
    """A run with its lessons and its looks."""

    run: Recorded
    lessons: list[Seen]
    looks: dict[float, Seen]

    @property
    def model(self) -> str:
        """The base's name."""
        return self.run.setup.base


def _ridge(inputs: np.ndarray, wanted: np.ndarray, weight: np.ndarray, penalty: float) -> np.ndarray:
    scale = np.maximum(np.sqrt(np.square(inputs).mean(0)), 1e-6)
    scaled = inputs / scale
    gram = (scaled * weight[:, None]).T @ scaled
    gram += penalty * np.trace(gram) / len(gram) * np.eye(len(gram))
    found: np.ndarray = np.linalg.solve(gram, (scaled * weight[:, None]).T @ wanted) / scale
    return found


def fit_median(told: Sequence[Told]) -> np.ndarray:
    """Least absolute deviations with a little ridge; a moment with much to come counts less, as it must miss more."""
    count = {one.model: sum(other.model == one.model for other in told) for one in told}
    parts = [(one.model, seen) for one in told for seen in one.lessons]
    inputs = np.concatenate([seen.numbers[0] for _, seen in parts])
    grown = np.concatenate([seen.grown for _, seen in parts]).astype(np.float64)
    weight = np.concatenate(
        [np.full(len(seen.grown), count[model] ** -0.5 / max(seen.span, 0.05) ** 1.5) for model, seen in parts]
    )
    known = np.isfinite(grown)
    inputs, grown, weight = inputs[known], grown[known], weight[known]
    found = _ridge(inputs, grown, weight, 1e-3)
    for _ in range(4):
        found = _ridge(inputs, grown, weight / np.maximum(np.abs(grown - inputs @ found), 0.02), 1e-3)
    return found


def fit(told: Sequence[Told]) -> Range:
    """Median on all models; width and levels by how far each model is missed by a median fitted on the others."""
    others = {model: fit_median([one for one in told if one.model != model]) for model in {one.model for one in told}}
    parts = [(others[one.model], seen) for one in told for seen in one.lessons]
    missed = np.concatenate([seen.grown - seen.numbers[0] @ median for median, seen in parts])
    numbers = np.concatenate([seen.numbers[1] for _, seen in parts])
    weight = np.concatenate([np.full(len(seen.grown), max(seen.span, 0.05) ** 0.5) for _, seen in parts])
    known = np.isfinite(missed)
    missed, numbers, weight = missed[known], numbers[known], weight[known]
    width = _ridge(numbers, np.log(np.abs(missed) + 0.003), weight, 1e-2)
    units = missed / np.exp(np.clip(numbers @ width, -7, 2))
    order = np.argsort(units)
    levels = np.interp(LEVELS, np.cumsum(weight[order]) / weight.sum(), units[order])
    return Range(fit_median(told), width, levels)


def laws() -> dict[str, Callable[[Seen], np.ndarray]]:
    """Growth by simple laws."""

    def power(exponent: float) -> Callable[[Seen], np.ndarray]:
        return lambda seen: np.full(len(seen.grown), exponent * seen.span)

    def own(share: float) -> Callable[[Seen], np.ndarray]:
        return lambda seen: share * np.clip(seen.inputs[:, _GROWTH], 0, 1.5) * seen.span

    found = {"stays as it is": power(0.0), "in proportion": power(1.0)}
    found |= {f"power {exponent}": power(exponent) for exponent in (0.4, 0.5, 0.6, 0.7)}
    return found | {"its class's growth": own(1.0), "0.8 of its class's growth": own(0.8)}


def band(told: Sequence[Told], law: Callable[[Seen], np.ndarray]) -> np.ndarray:
    """5 and 95 % quantiles of what a law misses, in units of the span."""
    units = [(seen.grown - law(seen)) / max(seen.span, 1e-3) for one in told for seen in one.lessons]
    found: np.ndarray = np.nanquantile(np.concatenate(units), (0.05, 0.95))
    return found


def interval_score(seen: Seen, low: np.ndarray, high: np.ndarray) -> float:
    """Mean interval score of the cosine at the end, 90 % (Gneiting and Raftery 2007); less is better."""
    end, upper, lower = (_cosine(seen.now + grown) for grown in (seen.grown, low, high))
    return float(np.nanmean(upper - lower + 20 * np.maximum(lower - end, 0) + 20 * np.maximum(end - upper, 0)))


def _cosine(angle: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.cos(np.minimum(np.exp(angle.astype(np.float64)), np.pi))
    return found


def figures(seen: Seen, made: Range, bands: dict[str, np.ndarray]) -> Figures:
    """What the range, the networks alone and the laws are worth at a look."""
    grown = seen.grown
    plain = made.quantiles(seen.inputs, seen.networks, seen.of_class)
    sides = (1.0, 1.0)
    if seen.earlier is not None:
        then = seen.earlier
        sides = missed_by(made.quantiles(then.inputs, then.networks, then.of_class), then.grown)
    found = {"span": seen.span, "sides": max(sides)}
    for name, quantiles in (("range", widened(plain, sides)), ("plain", plain), ("networks", seen.networks)):
        low, high = quantiles[:, 0], quantiles[:, -1]
        found |= {
            f"{name}: covered": float(np.mean((grown >= low) & (grown <= high))),
            f"{name}: score": interval_score(seen, low, high),
            f"{name}: error": float(np.nanmedian(np.abs(grown - quantiles[:, _MEDIAN]))),
            f"{name}: auroc": _auroc(quantiles + seen.now[:, None], _cosine(seen.now + grown)),
        }
    for name, law in laws().items():
        off = law(seen)
        found[f"law: {name}"] = interval_score(seen, off + bands[name][0] * seen.span, off + bands[name][1] * seen.span)
    found["point: stays as it is"] = interval_score(seen, 0 * grown, 0 * grown)
    expected = forecast_of(widened(plain, sides) + seen.now[:, None], np.isnan(seen.now), _SCHEDULE)
    theirs = forecast_of(seen.networks + seen.now[:, None], np.isnan(seen.now), _SCHEDULE)
    below = {"below": expected, "networks below": theirs}
    return found | {name: float(np.nanmean(made.chance.numpy())) for name, made in below.items()}


def _auroc(quantiles: np.ndarray, end: np.ndarray) -> float:
    """How well chances rank rows by whether they end below 0.95; NaN where all end alike."""
    degraded = end < DEGRADED
    if not 0.01 <= degraded.mean() <= 0.9:
        return math.nan
    made = forecast_of(quantiles.astype(np.float32), np.isnan(quantiles[:, 0]), _SCHEDULE)
    score = made.chance.numpy() + 1e-3 * (1 - made.cosine.numpy())
    ranks = np.unique(score, return_inverse=True)[1] / len(score)
    return float(binary_auroc(torch.from_numpy(ranks).float(), torch.from_numpy(degraded.astype(np.int64))))


def _schedule() -> Any:
    from vocabguard.results import Schedule

    return Schedule(1, 2, 1.0, 1.0, 1.0, 1.0, "adam", 1000.0)


_SCHEDULE = _schedule()


def judged(told: Sequence[Told], model: str) -> Iterator[dict[str, Any]]:
    """A line for each look at a model's runs, by what was fitted on the others."""
    taught = [one for one in told if one.model != model and not one.run.held_out]
    made, bands = fit(taught), {name: band(taught, law) for name, law in laws().items()}
    for one in told:
        # The networks were fitted on the embedded base's other runs.
        if one.model == model and (model != "embedded" or one.run.held_out):
            ends = float((one.run.end[one.run.live] < DEGRADED).mean())
            for moment, seen in one.looks.items():
                about = {"model": model, "run": one.run.setup.name, "moment": moment, "degraded": ends}
                yield about | figures(seen, made, bands)


def summary(lines: Sequence[dict[str, Any]], rule: AlertRule) -> dict[str, Any]:
    """Of some looks: mean coverage, its spread over runs, scores as geometric means of ratios, errors, false alarms."""

    def mean(name: str) -> float:
        return float(np.nanmean([line[name] for line in lines]))

    def ratio(name: str) -> float:
        return float(np.exp(np.mean([math.log(line["range: score"] / line[name]) for line in lines])))

    best = min((name for name in lines[0] if name.startswith("law: ")), key=lambda name: -ratio(name))
    runs: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        runs.setdefault(line["run"], []).append(line)
    of_run = [np.mean([line["range: covered"] for line in part]) for part in runs.values()]
    clean = [part for part in runs.values() if part[0]["degraded"] < 0.001]
    false, theirs = (
        sum(any(line[name] > rule.threshold for line in part) for part in clean) for name in ("below", "networks below")
    )
    alike = [line for line in lines if not math.isnan(line["range: auroc"])]
    return {
        "runs": len(runs), "looks": len(lines), "covered": mean("range: covered"),
        "covered, worst and best run": [float(min(of_run)), float(max(of_run))],
        "covered without own check": mean("plain: covered"), "networks covered": mean("networks: covered"),
        "score over networks": ratio("networks: score"), "score over stays as it is": ratio("point: stays as it is"),
        "best law": best.removeprefix("law: "), "score over best law": ratio(best),
        "error": mean("range: error"), "networks error": mean("networks: error"),
        "auroc": float(np.mean([line["range: auroc"] for line in alike])) if alike else None,
        "networks auroc": float(np.mean([line["networks: auroc"] for line in alike])) if alike else None,
        "runs with rows below 0.95 under 0.1 %": len(clean), "at_risk would be false in": false,
        "by the networks' chances": theirs,
    }  # fmt: skip


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def all_told(folder: Path) -> list[Told]:
    """Every recording of the folder that has a forecast of an Adam-like optimizer."""
    runs = [Recorded.load(path) for path in sorted(folder.glob("*.npz"))]
    return [Told(run, lessons(run), looks(run)) for run in runs if run.setup.optimizer != "sgd"]


def main() -> None:
    """Record, judge, fit and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--cache", type=Path, help="folder of real_models.py")
    parser.add_argument("--models", default="", help="judge these only")
    parser.add_argument("--fit", action="store_true", help="fit the packaged range on all models")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.record:
        for setup in early_runs.SHAPED:
            early_runs.run(setup, asked.folder)
        if asked.cache:
            early_real.record_all(asked.folder, asked.cache)
    told = all_told(asked.folder)
    rule = load_config().alerts["at_risk"]
    rule = AlertRule("at_risk", rule.metric, rule.op, rule.threshold, rule.for_checks)
    found: dict[str, Any] = {"fitted on": sorted({one.run.setup.name for one in told if not one.run.held_out})}
    every: list[dict[str, Any]] = []
    for model in asked.models.split(",") if asked.models else sorted({one.model for one in told}):
        lines = list(judged(told, model))
        every += lines
        found[model] = summary(lines, rule)
        print(model, json.dumps(found[model]), flush=True)
    found["all models"] = summary(every, rule)
    found["by moment"] = {
        f"{moment:.0%}": summary(part, rule)
        for moment in MOMENTS
        if (part := [line for line in every if line["moment"] == moment])
    }
    kept = ("run", "moment", "degraded", "below", "range: covered", "range: score")
    found["every look"] = [{name: _short(line[name]) for name in kept} for line in every]
    print("all", json.dumps(found["all models"]))
    if asked.fit:
        made = fit([one for one in told if not one.run.held_out])
        tensors = safetensors.numpy.load(MODEL.read_bytes())
        tensors |= {f"range/{name}": np.asarray(value) for name, value in vars(made).items()}
        MODEL.write_bytes(safetensors.numpy.save(tensors))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
