"""The report page's early warning: what was lost so far, and what each check forecast for the end, group by group."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vocabguard.transitions import Transition
from vocabguard.views.html_course import alert_lines, key_of
from vocabguard.views.html_data import PageData
from vocabguard.views.html_figures import (
    Figure,
    Mark,
    Plot,
    Series,
    courses,
    line_marks,
    thinned,
    tick_percent,
    ticks,
)
from vocabguard.views.html_findings import at_end, label_of
from vocabguard.views.wording import LARGE_GROUP, percent

SHOWN = 8
"""Groups that have a figure of their own."""

_WIDE, _HIGH = 380.0, 220.0
_EARLY = 0.1


def forecast_figures(data: PageData) -> tuple[Figure, ...]:
    """Rows below cosine 0.95 so far and by each check's forecast of the end: of all, then of the worst groups.

    Args:
        data: a run.

    Returns:
        Nothing where nothing was forecast. Groups are those with the highest share in the latest forecast; small ones,
        and those where no share was ever above 0, are left out.
    """
    latest = {name: share for name in data.names if (share := _latest_forecast(data, name)) is not None}
    large = [name for name in latest if data.sizes.get(name, LARGE_GROUP) >= LARGE_GROUP and _ever(data, name)]
    worst = sorted(large, key=lambda name: (-latest[name], name))[:SHOWN]
    return tuple(_figure(data, name) for name in ("all", *worst) if _latest_forecast(data, name) is not None)


def _latest_forecast(data: PageData, name: str) -> float | None:
    _, values = data.curves.get(key_of("forecast", name, "below_0.95"), ([], []))
    return next((value for value in reversed(values) if math.isfinite(value)), None)


def _ever(data: PageData, name: str) -> bool:
    curves = (data.curves.get(key_of(owner, name, "below_0.95"), ([], [])) for owner in ("head", "forecast"))
    return any(value > 0 for _, values in curves for value in values)


def _figure(data: PageData, name: str) -> Figure:
    """One group's figure: the past as a line, from its end on the way to the forecast end, and the forecasts so far."""
    lines = (("head", "so far", "s0"), ("forecast", "forecast of the end, check by check", "s1"))
    keys = [key_of(owner, name, "below_0.95") for owner, _, _ in lines]
    series = [
        Series(title, style, *thinned(*data.curves[key]))
        for key, (_, title, style) in zip(keys, lines, strict=True)
        if key in data.curves
    ]
    steps = [step for one in series for step in one.steps] + ([] if data.end is None else [data.end])
    top = max((value for one in series for value in one.values if math.isfinite(value)), default=0.0)
    plot = Plot(_WIDE, _HIGH, (min(steps), max(steps)), (0.0, min(1.0, 1.06 * top) or 0.01), left=52.0)
    marks, words = plot.grid(ticks(*plot.y), tick_percent)
    words += plot.step_labels()
    ahead = _ahead(plot, data, name)
    marks += alert_lines(plot, _alerts(data.alerts, name, keys)) + ahead
    for one in series:
        marks += line_marks(plot, one, percent)
    legend = [(one.style, one.name) for one in series] + ([("ahead", "from here to the end")] if ahead else [])
    size = f", {data.sizes[name]:,}" if name in data.sizes else ""
    note = _note(data, name)
    return Figure(
        f"{label_of(name)}{size}", f"{courses(series, percent)}. {note}", plot.width, plot.height,
        tuple(marks), tuple(words), tuple(legend), note,
    )  # fmt: skip


def _ahead(plot: Plot, data: PageData, name: str) -> list[Mark]:
    """From what is lost at the last check to what it forecast for the end."""
    now, then = data.scalars.get(key_of("head", name, "below_0.95")), at_end(data, name)
    if now is None or then is None or data.step is None or data.end is None:
        return []
    start, end = (plot.at_x(data.step), plot.at_y(now)), (plot.at_x(data.end), plot.at_y(then))
    title = f"forecast for the end, step {data.end:,}: {percent(then)}"
    return [Mark("line", "line ahead", *start, *end), Mark("dot", "point ahead", *end, title=title)]


def _note(data: PageData, name: str) -> str:
    """What is forecast of a run that goes on; of one that has ended, how it was told early on."""
    now = data.scalars.get(key_of("head", name, "below_0.95"))
    then = at_end(data, name)
    if then is not None:
        so_far = "" if now is None else f"{percent(now)} so far; "
        return f"{so_far}{percent(then)} at the end, if nothing changes."
    if now is None or data.end is None or data.step is None or data.step < data.end:
        return "The last check made no forecast."
    early = _first_forecast(data, name, _EARLY * data.end)
    if early is None:
        return f"{percent(now)} in the end."
    step, forecast = early
    past = dict(zip(*data.curves[key_of("head", name, "below_0.95")], strict=True))
    so_far = percent(past.get(step))
    return (
        f"{percent(now)} in the end; at step {step:,} of {data.end:,}: {so_far} so far, {percent(forecast)} forecast."
    )


def _first_forecast(data: PageData, name: str, least: float) -> tuple[int, float] | None:
    """The first forecast from a step on that came before the end: its step and what it said."""
    steps, values = data.curves[key_of("forecast", name, "below_0.95")]
    known = ((step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value))
    return next(((step, value) for step, value in known if least <= step < (data.end or 0)), None)


def _alerts(alerts: Sequence[Transition], name: str, keys: Sequence[str]) -> list[Transition]:
    """Changes of alerts about this group's keys, and the news that first names it of rules over groups."""
    found: list[Transition] = []
    naming: set[str] = set()
    for change in alerts:
        metric = change.metric.removeprefix("vocabguard/")
        if metric in keys and not change.again:
            found.append(change)
        elif metric in (key.replace(f"/{name}/", "/*/") for key in keys):
            named = name in change.parts
            if named and change.rule not in naming:
                found.append(change)
            (naming.add if named else naming.discard)(change.rule)
    return found
