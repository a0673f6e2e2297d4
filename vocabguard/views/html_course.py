"""The report page's figures of a run's course: drift, what is still said, exposure, loss and echo over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vocabguard.results import EXPOSURE_CLASSES
from vocabguard.transitions import Transition
from vocabguard.views.html_data import PageData
from vocabguard.views.html_figures import (
    Figure,
    Label,
    Mark,
    Plot,
    Series,
    courses,
    line_marks,
    thinned,
    tick_percent,
    ticks,
)
from vocabguard.views.html_findings import label_of
from vocabguard.views.wording import percent

_WIDE, _HIGH = 380.0, 220.0


@dataclass(frozen=True)
class _Panel:
    """One figure of the run's course: keys, and how values read."""

    title: str
    keys: tuple[str, ...]
    names: tuple[str, ...]
    label: Label
    whole: bool = False


def timelines(first: PageData, second: PageData | None = None) -> tuple[Figure, ...]:
    """The course of the run: degraded rows, cosines, retained, exposure, loss, echo; as far as they were logged.

    Args:
        first: a run.
        second: a second run over the first; then each figure has one line a run.
    """
    panels = _panels(first) if second is None else _common_panels(first)
    drawn = (_timeline(panel, first, second) for panel in panels)
    return tuple(figure for figure in drawn if figure is not None)


def _panels(data: PageData) -> list[_Panel]:
    matrix = data.matrix or "head"
    worst = [row.label for row in data.table if row.kind == "group" and data.sizes.get(row.label, 20) >= 20][:3]
    degraded = ("all", *worst)
    cosines = ("cosine_mean", "cosine_p01", "cosine_min")
    return [
        _Panel(
            "Rows below cosine 0.95",
            tuple(key_of(matrix, name, "below_0.95") for name in degraded),
            tuple(map(label_of, degraded)),
            percent,
        ),
        _Panel(
            "Still said (retained)",
            (*(key_of("probe", name, "retained") for name in ("all", *EXPOSURE_CLASSES)), "probe/watch"),
            (*(label_of(name) for name in ("all", *EXPOSURE_CLASSES)), "watched tokens"),
            percent,
        ),
        _Panel(
            "Cosine to the base", tuple(f"{matrix}/{key}" for key in cosines), ("mean", "lowest 1 %", "lowest"), _short
        ),
        _Panel(
            "Live tokens by data targets so far",
            tuple(f"exposure/{name}" for name in EXPOSURE_CLASSES),
            tuple(map(label_of, EXPOSURE_CLASSES)),
            percent,
            whole=True,
        ),
        _Panel(
            "Answers with foreign script",
            ("confusion/foreign", *(f"confusion/{language}" for language in _most_confused(data))),
            ("mean of languages", *_most_confused(data)),
            percent,
        ),
        _Panel("Training loss, nats a target", ("loss/data", "loss/echo"), ("data", "echo"), _short),
        _Panel("Echo dose (echo targets a data target)", ("echo/dose",), ("dose",), _short),
        _Panel("Echo targets a live token", ("echo/targets_per_live_token",), ("targets",), _short),
    ]


def _most_confused(data: PageData, most: int = 4) -> list[str]:
    """Languages with the largest share of answers with foreign letters at the last evaluation, largest first."""
    shares = {key: data.scalars.get(key, 0.0) for key in data.curves if key.startswith("confusion/")}
    worst = sorted(shares, key=lambda key: -shares[key])
    return [key.removeprefix("confusion/") for key in worst if shares[key] > 0 and key != "confusion/foreign"][:most]


def _common_panels(data: PageData) -> list[_Panel]:
    """One key a panel, so that each run has one line."""
    matrix = data.matrix or "head"
    keys = (
        ("Rows below cosine 0.95", f"{matrix}/below_0.95", percent),
        ("Forecast of the end: rows below cosine 0.95", "forecast/below_0.95", percent),
        ("Still said (retained)", "probe/retained", percent),
        ("Mean cosine to the base", f"{matrix}/cosine_mean", _short),
        ("Never a target so far", "exposure/never", percent),
        ("Answers with foreign script", "confusion/foreign", percent),
        ("Training loss on data, nats a target", "loss/data", _short),
        ("Training loss on echo, nats a target", "loss/echo", _short),
        ("Echo dose (echo targets a data target)", "echo/dose", _short),
        ("Echo targets a live token", "echo/targets_per_live_token", _short),
    )
    return [_Panel(title, (key,), ("",), label) for title, key, label in keys]


def key_of(prefix: str, name: str, suffix: str) -> str:
    """A logged key of a group or class, or of ``all``, without ``vocabguard/``."""
    return f"{prefix}/{suffix}" if name == "all" else f"{prefix}/{name}/{suffix}"


def _series(panel: _Panel, first: PageData, second: PageData | None) -> list[Series]:
    """One line a key, or one line a run."""
    if second is None:
        lines = [(name, first, key) for key, name in zip(panel.keys, panel.names, strict=True)]
    else:
        lines = [("run A", first, panel.keys[0]), ("run B", second, panel.keys[0])]
    return [
        Series(name, f"s{place}", *thinned(*data.curves[key]))
        for place, (name, data, key) in enumerate(lines)
        if key in data.curves
    ]


def _timeline(panel: _Panel, first: PageData, second: PageData | None) -> Figure | None:
    series = _series(panel, first, second)
    values = [value for one in series for value in one.values if math.isfinite(value)]
    if not values:
        return None
    steps = [step for one in series for step in one.steps]
    low, high = (0.0, 1.0) if panel.whole else _span(values, panel.label)
    plot = Plot(_WIDE, _HIGH, (min(steps), max(steps)), (low, high), left=52.0)
    marks, words = plot.grid(ticks(low, high), tick_percent if panel.label is percent else panel.label)
    words += plot.step_labels()
    if second is None:
        marks += alert_lines(plot, [alert for alert in first.alerts if _ours(alert.metric, panel.keys)])
    for one in series:
        marks += line_marks(plot, one, panel.label)
    legend = tuple((one.style, one.name) for one in series) if len(series) > 1 or second is not None else ()
    text = courses(series, panel.label)
    return Figure(panel.title, text, plot.width, plot.height, tuple(marks), tuple(words), legend)


def alert_lines(plot: Plot, alerts: Sequence[Transition]) -> list[Mark]:
    """An upright line at each change of an alert."""
    return [
        Mark("line", f"alert {alert.state}", x, plot.top, x, plot.base, title=f"step {alert.step:,}: {alert.message}")
        for alert in alerts
        for x in (plot.at_x(min(max(alert.step, plot.x[0]), plot.x[1])),)
    ]


def _ours(metric: str, keys: Sequence[str]) -> bool:
    return metric.removeprefix("vocabguard/") in keys


def _span(values: Sequence[float], label: Label) -> tuple[float, float]:
    """Lowest and highest value of an axis that holds all values, with a little room; a share stays within [0, 1]."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.02 * abs(high) or 0.02
    if label is percent:
        return max(0.0, low - room), min(1.0, high + room) if high <= 1.0 else high + room
    return (0.0 if low >= 0 and low < 0.2 * high else low - room), high + room


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10 else f"{value:,.1f}"
