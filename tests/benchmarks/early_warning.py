"""How early the guard knows which rows a fine-tune will degrade, on fine-tunes that its forecast never saw.

    python tests/benchmarks/early_warning.py FOLDER [--fit] [--frontier] [--markdown FILE]

Fine-tunes the embedded base under the configurations of ``early_runs.py`` (about 40 s each; a stopped benchmark goes on
where it was), then holds the packaged forecast against what happened, on the configurations of a data set (Russian) and
an optimizer (Adafactor) that fitting never saw. ``--fit`` first fits it anew, on the others, and writes
``vocabguard/measure/forecast.safetensors``. ``--frontier`` also says how much could be known at all, see
``early_frontier.py``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from early_fit import fit_all
from early_frontier import frontier_figures
from early_laws import laws
from early_replay import Recorded
from early_runs import HELD_OUT, TUNING, run_all
from torchmetrics.functional.classification import binary_auroc

from vocabguard.alerts.machine import AlertMachine
from vocabguard.alerts.rules import AlertRule
from vocabguard.config import load_config
from vocabguard.guard.forecast import JUDGED_ROWS
from vocabguard.measure.drift import evenly
from vocabguard.measure.forecast import SMALLEST_ANGLE, Floats, Moment, summarise_forecast
from vocabguard.measure.forecast_networks import forecast_running, forecast_starting, growths
from vocabguard.measure.ranges import missed_by
from vocabguard.results import AT_RISK, DEGRADED, Forecast

MODEL = Path(__file__).parents[2] / "vocabguard" / "measure" / "forecast.safetensors"
DEGRADING = 0.02
CLEAN = 0.001

Figures = dict[str, float]


def share(run: Recorded) -> float:
    """Share of the live rows that ended degraded."""
    return float((run.end[run.live] < DEGRADED).mean())


def auroc(score: Floats, run: Recorded, chosen: np.ndarray) -> float:
    """How well a score ranks rows by whether they end degraded, among the chosen; NaN if all end alike."""
    ends = run.end[chosen] < DEGRADED
    if ends.all() or not ends.any():
        return math.nan
    # Ranks, since a score may be no probability.
    ranks = np.unique(score[chosen], return_inverse=True)[1] / len(ends)
    return float(binary_auroc(torch.from_numpy(ranks).float(), torch.from_numpy(ends.astype(np.int64))))


def simple_scores(run: Recorded, check: int, both: Callable[[Floats, Floats], Floats]) -> Mapping[str, Floats]:
    """What one could rank by without a forecast."""
    cosine = run.found["cosine"][check]
    never = (run.found["data_target"][check] == 0).astype(np.float32)
    return {"cosine so far": -cosine, "never a target so far": never, "both": both(cosine, never)}


def fitted_both(runs: Sequence[Recorded]) -> Callable[[Floats, Floats], Floats]:
    """Logistic regression on the drift so far and on never being a target, fitted on the given runs at 10 and 20 %."""
    inputs, ends = [], []
    for run in runs:
        for moment in (0.1, 0.2):
            check = run.at(moment)
            cosine, never = run.found["cosine"][check], run.found["data_target"][check] == 0
            inputs.append(np.stack([_drifted(cosine), never], 1)[run.live])
            ends.append(run.end[run.live] < DEGRADED)
    x = torch.from_numpy(np.concatenate(inputs)).float()
    y = torch.from_numpy(np.concatenate(ends)).float()
    weight = torch.zeros(2, requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(x @ weight + bias, y)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)
    a, b = weight.tolist()
    return lambda cosine, never: a * _drifted(cosine) + b * never


def _drifted(cosine: Floats) -> Floats:
    return np.log(np.maximum(1 - cosine, 1e-7)).astype(np.float32)


def forecast(run: Recorded, check: int) -> Forecast:
    """The guard's forecast at a check."""
    if not check:
        return forecast_starting(*run.starting())
    return forecast_running(Moment(*run.running(check)), own_sides(run, check))


def own_sides(run: Recorded, check: int) -> tuple[float, float]:
    """How much the guard's earlier forecast, from about half of the summed rates, missed by."""
    now = run.places[check]
    kept = [index for index in range(1, check) if any(run.places[index] is past for past in run.pasts(check))]
    kept = [index for index in kept if 1.15 < now.rate_sum / run.places[index].rate_sum < 8]
    then = min(kept, key=lambda index: abs(math.log(now.rate_sum / run.places[index].rate_sum / 2)), default=None)
    known = None if then is None or run.setup.optimizer == "sgd" else run.running(then, check)
    if known is None:
        return 1.0, 1.0
    ids = evenly(np.flatnonzero(run.live), JUDGED_ROWS)
    quantiles, _, before = growths(Moment(*known).of(ids))
    return missed_by(quantiles, np.log(np.maximum(now.angle[ids], SMALLEST_ANGLE)) - before)


def ranking(made: Forecast) -> Floats:
    """(V,) by chance, and by expected cosine where chances are all 0 or 1."""
    found: Floats = made.chance.numpy() + 1e-3 * (1 - made.cosine.numpy())
    return found


def figures(run: Recorded, moment: float, both: Callable[[Floats, Floats], Floats]) -> Figures:
    """What the forecast and the simple scores are worth at a share of the steps."""
    check = run.at(moment)
    made = forecast(run, check)
    live, degraded = run.live, run.end < DEGRADED
    never = live & (run.found["data_target"][check] == 0)
    score = ranking(made)
    simple = simple_scores(run, check, both)
    found = {name: auroc(one, run, live) for name, one in simple.items()}
    best, ours = max(found.values()), auroc(score, run, live)
    called = live & (made.chance.numpy() >= AT_RISK)
    right = float((called & degraded).sum())
    moved = live & (run.end < 0.98)
    inside = (run.end >= made.low.numpy()) & (run.end <= made.high.numpy())
    return found | {
        "ours": ours,
        "cut": 1 - (1 - ours) / (1 - best) if best < 1 else math.nan,
        "never: ours": auroc(score, run, never),
        "never: cosine": auroc(simple["cosine so far"], run, never),
        "precision": right / max(called.sum(), 1),
        "recall": right / max((degraded & live).sum(), 1),
        "error": _median(np.abs(made.cosine.numpy() - run.end)[moved]),
        "covered": float(inside[moved].mean()) if moved.any() else math.nan,
        "called": float(called[live].mean()),
    }


def first_alert(run: Recorded, rule: AlertRule) -> tuple[float, float]:
    """When the rule first fires, as a share of the steps, and the share of the finally degraded rows degraded by then.

    Both are NaN if it never fires.
    """
    machine = AlertMachine([rule])
    degraded = run.live & (run.end < DEGRADED)
    for check in range(run.last + 1):
        if check and (run.schedule(check).sum_past == 0 or len(run.pasts(check)) < 2):
            continue
        scalars = {f"vocabguard/forecast/{k}": v for k, v in _scalars(run, check).items()}
        if machine.update(int(run.found["step"][check]), scalars) and machine.firing:
            crossed = (run.found["cosine"][check] < DEGRADED) & degraded
            return run.found["step"][check] / run.found["step"][-1], float(crossed.sum() / max(degraded.sum(), 1))
    return math.nan, math.nan


def _scalars(run: Recorded, check: int) -> Mapping[str, float]:
    if not check and run.setup.optimizer == "sgd":
        return {}
    return summarise_forecast(forecast(run, check), torch.from_numpy(run.live), {})


def law_errors(run: Recorded, moment: float, tuning: Sequence[Recorded]) -> Figures:
    """Median absolute error of the end cosine, rows that end below 0.98, by law."""
    check, moved = run.at(moment), run.live & (run.end < 0.98)
    found = {}
    for name, law in laws(tuning).items():
        found[name] = _median(np.abs(np.cos(law(run, check)) - run.end)[moved])
    return found


def _median(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan


def medians(rows: Sequence[Figures]) -> Figures:
    """Of each figure over runs, NaN left out."""
    return {name: _median(np.array([row[name] for row in rows])) for name in rows[0]}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def report(runs: Sequence[Recorded], frontier: bool = False) -> str:
    """All tables, of the held-out runs.

    Args:
        runs: all of them.
        frontier: whether to tell what could be known at all.
    """
    tuning, held = [r for r in runs if not r.held_out], [r for r in runs if r.held_out]
    both = fitted_both(tuning)
    shares = np.array([share(run) for run in runs])
    within, clean = ((shares >= DEGRADING) & (shares <= 0.5)).sum(), (shares < CLEAN).sum()
    parts = [
        f"{len(runs)} fine-tunes, {within} end with 2 to 50 % of the live rows degraded, {clean} with under 0.1 %."
    ]
    degrading = [run for run in held if share(run) >= DEGRADING]
    for moment in (0.1, 0.2):
        rows = {run.setup.name: figures(run, moment, both) for run in degrading}
        parts.append(f"At {moment:.0%} of the steps, {len(degrading)} held-out fine-tunes that degrade:")
        parts.append(figures_table({**rows, "**median**": medians(list(rows.values()))}, degrading))
        if frontier:
            limits = {
                run.setup.name: frontier_figures(run, moment, ranking(forecast(run, run.at(moment))))
                for run in degrading
            }
            parts.append("What could be known then, from networks fitted on the other half of the very run's ends:")
            parts.append(figures_table({**limits, "**median**": medians(list(limits.values()))}, degrading))
    laws_at = {
        f"{moment:.0%}": medians([law_errors(run, moment, tuning) for run in degrading]) for moment in (0.1, 0.2)
    }
    ours_at = {
        key: medians([figures(run, float(key[:-1]) / 100, both) for run in degrading])["error"] for key in laws_at
    }
    names = list(laws_at["10%"])
    parts.append("Median absolute error of the end cosine (rows that end below 0.98):")
    law_rows = [[name, *(f"{at[name]:.4f}" for at in laws_at.values())] for name in names]
    parts.append(table(["law", *laws_at], [*law_rows, ["**fitted**", *(f"{one:.4f}" for one in ours_at.values())]]))
    parts.append(alerts_table(held))
    return "\n\n".join(parts)


def figures_table(rows: Mapping[str, Figures], runs: Sequence[Recorded]) -> str:
    """One row a run."""
    names = list(next(iter(rows.values())))
    ends = {run.setup.name: f"{share(run):.1%}" for run in runs}
    body = [[name, ends.get(name, ""), *(f"{row[key]:.3f}" for key in names)] for name, row in rows.items()]
    return table(["fine-tune", "degraded", *names], body)


def alerts_table(runs: Sequence[Recorded]) -> str:
    """When the default rule fires."""
    rule = default_rule()
    body, early, degrading, false = [], 0, 0, 0
    for run in runs:
        when, crossed = first_alert(run, rule)
        ends = share(run)
        degrading += ends >= DEGRADING
        early += ends >= DEGRADING and when <= 0.1 and crossed <= 0.1
        false += ends < CLEAN and not math.isnan(when)
        fired = "never" if math.isnan(when) else f"{when:.0%}"
        body.append([run.setup.name, f"{ends:.1%}", fired, "" if math.isnan(when) else f"{crossed:.1%}"])
    told = f"Early in {early} of {degrading} that degrade; false in {false} of those that end under 0.1 %."
    head = ["fine-tune", "degraded", "first alert at", "of those degraded by then"]
    return f"Rule {rule.name}: {rule.short} {rule.op} {rule.threshold:g}. {told}\n\n" + table(head, body)


def default_rule() -> AlertRule:
    """The early warning that comes with the guard."""
    rule = load_config().alerts["at_risk"]
    return AlertRule("at_risk", rule.metric, rule.op, rule.threshold, rule.for_checks)


def recorded(folder: Path) -> list[Recorded]:
    """All fine-tunes that are there."""
    paths = [folder / f"{setup.name}.npz" for setup in (*TUNING, *HELD_OUT)]
    return [Recorded.load(path) for path in paths if path.exists()]


def main() -> None:
    """Run, fit if asked for, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fit", action="store_true", help="fit anew on the configurations that are not held out")
    parser.add_argument("--frontier", action="store_true", help="tell what could be known at all, too (a minute)")
    parser.add_argument("--markdown", type=Path, help="write the tables there too")
    arguments = parser.parse_args()
    run_all(arguments.folder)
    runs = recorded(arguments.folder)
    if arguments.fit:
        fit_all([run for run in runs if not run.held_out], MODEL)
    told = report(runs, arguments.frontier)
    print(told)
    if arguments.markdown:
        arguments.markdown.write_text(told + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
