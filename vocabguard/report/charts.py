"""The report page's figures: the rows, the course of the run, what was forecast."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vocabguard.report.data import PageData
from vocabguard.report.sentences import at_end
from vocabguard.results import DEGRADED, EXPOSURE_CLASSES, Transition
from vocabguard.text import LARGE_GROUP, number, percent
from vocabguard.vocabulary.labels import label_of

Label = Callable[[float], str]


@dataclass(frozen=True)
class Mark:
    """One shape; coordinates in SVG units from the top left.

    Attributes:
        kind: ``rect``, ``line``, ``path`` or ``dot``.
        style: CSS classes.
        x: left edge, first x or centre.
        y: top edge, first y or centre.
        x2: width, or second x.
        y2: height, or second y.
        title: what a pointer that rests on it is told.
    """

    kind: str
    style: str
    x: float = 0.0
    y: float = 0.0
    x2: float = 0.0
    y2: float = 0.0
    d: str = ""
    title: str = ""


@dataclass(frozen=True)
class Word:
    """A text in a figure: anchored ``start``, ``middle`` or ``end`` at (x, y)."""

    x: float
    y: float
    text: str
    anchor: str = "middle"
    style: str = "tick"


@dataclass(frozen=True)
class Figure:
    """A whole figure.

    Attributes:
        text: one sentence that says what it shows, for those who do not see it.
        marks: in drawing order.
        words: tick and other labels.
        legend: CSS class and name of each series.
        note: a line under it.
    """

    title: str
    text: str
    width: float
    height: float
    marks: tuple[Mark, ...] = ()
    words: tuple[Word, ...] = ()
    legend: tuple[tuple[str, str], ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """The plot area and its scales, both linear: lowest and highest values, and the room around the area."""

    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]
    left: float = 46.0
    right: float = 12.0
    top: float = 10.0
    bottom: float = 24.0

    def at_x(self, value: float) -> float:
        """Where a value lies on the horizontal axis, to 0.1 unit."""
        low, high = self.x
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.left + share * (self.width - self.left - self.right), 1)

    def at_y(self, value: float) -> float:
        """Where a value lies on the vertical axis, to 0.1 unit."""
        low, high = self.y
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.height - self.bottom - share * (self.height - self.top - self.bottom), 1)

    @property
    def base(self) -> float:
        """Where the area ends below."""
        return self.height - self.bottom

    def grid(self, values: Sequence[float], label: Label) -> tuple[list[Mark], list[Word]]:
        """Horizontal lines at values of the vertical axis, and their labels."""
        lines = [Mark("line", "grid", self.left, self.at_y(v), self.width - self.right, self.at_y(v)) for v in values]
        return lines, [Word(self.left - 6, self.at_y(v) + 4, label(v), "end") for v in values]

    def x_labels(self, values: Sequence[float], label: Label) -> list[Word]:
        """Labels under the horizontal axis; the outermost two stay inside the figure."""
        words = [Word(self.at_x(v), self.base + 16, label(v)) for v in values]
        if len(words) > 1 and words[-1].x > self.width - 24:
            words[-1] = replace(words[-1], anchor="end", x=self.width - 2)
        return words

    def step_labels(self) -> list[Word]:
        """Below the axis, optimizer steps."""
        labels = self.x_labels(ticks(*self.x), lambda value: f"{value:,.0f}")
        return [*labels, Word(self.left - 14, self.base + 16, "step", "end")]


@dataclass(frozen=True)
class Series:
    """One line of a figure: its CSS class, ascending steps, as many values; gaps where these are not finite."""

    name: str
    style: str
    steps: list[int]
    values: list[float]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within [low, high], at most `most` of them, evenly spaced.

    >>> ticks(0, 1), ticks(0.83, 1.0, 4), ticks(3, 3)
    ([0.0, 0.25, 0.5, 0.75, 1.0], [0.85, 0.9, 0.95, 1.0], [3])
    """
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power * factor for factor in (1, 2, 2.5, 5, 10, 20)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [round(place * step, 12) for place in range(first, last + 1)]


def polyline(plot: Plot, xs: Sequence[float], ys: Sequence[float]) -> str:
    """Path data through the points; a value that is not finite parts the line."""
    parts, pen_down = [], False
    for x, y in zip(xs, ys, strict=True):
        if not math.isfinite(y):
            pen_down = False
            continue
        parts.append(f"{'L' if pen_down else 'M'}{plot.at_x(x)} {plot.at_y(y)}")
        pen_down = True
    return "".join(parts)


def line_marks(plot: Plot, one: Series, label: Label) -> list[Mark]:
    """A line, and a point for each of its values, which says it."""
    marks = [Mark("path", f"line {one.style}", d=polyline(plot, one.steps, one.values))]
    for step, value in zip(one.steps, one.values, strict=True):
        if math.isfinite(value):
            title = f"{one.name}, step {step:,}: {label(value)}"
            marks.append(Mark("dot", f"point {one.style}", plot.at_x(step), plot.at_y(value), title=title))
    return marks


def courses(series: Sequence[Series], label: Label) -> str:
    """Lines in words: where each begins and where it ends."""
    return "; ".join(f"{one.name}: {_course(one, label)}" for one in series)


def _course(one: Series, label: Label) -> str:
    known = [(step, value) for step, value in zip(one.steps, one.values, strict=True) if math.isfinite(value)]
    if not known:
        return "no value"
    (began, start), (ended, end) = known[0], known[-1]
    return f"{label(start)} at step {began:,}, {label(end)} at step {ended:,}"


def tick_percent(share: float) -> str:
    """A share in [0, 1] as an axis has it.

    >>> tick_percent(0.025)
    '2.5 %'
    """
    return f"{100 * share:.3g} %"


def thinned(xs: Sequence[int], ys: Sequence[float], most: int = 240) -> tuple[list[int], list[float]]:
    """At most about `most` of the points, evenly spaced, first and last kept; a run may have thousands of checks."""
    if len(xs) <= most:
        return list(xs), list(ys)
    places = sorted({round(place * (len(xs) - 1) / (most - 1)) for place in range(most)})
    return [xs[place] for place in places], [ys[place] for place in places]


# Left edges of the bins of data targets, and their labels.
_TARGETS = (0, 1, 2, 5, 10, 20, 50, 100, 1000)
_TARGET_LABELS = ("0", "1", "2-4", "5-9", "10-19", "20-49", "50-99", "100-999", "1000+")
_PREFIX = "vocabguard/"
_WIDE, _HIGH = 380.0, 220.0

SHOWN = 8
"""Groups that have a figure of their forecast."""

# Share of a run from which on its forecast is judged.
_EARLY = 0.1


def histograms(first: PageData, second: PageData | None = None) -> tuple[Figure, ...]:
    """Histograms of the cosines: of all live rows, then of each group, in the table's order; one scale for all.

    The first run is drawn as bars, a second as an outline.
    """
    shown = [data for data in (first, second) if data is not None and _cosines(data).size]
    if not shown or shown[0] is not first:
        return ()
    # All but the lowest 0.2 %, and always far enough to show the bar at 0.95.
    low = min(_floor(min(float(np.quantile(_cosines(data), 0.002)), 0.94)) for data in shown)
    edges = _edges(low)
    labels = [row.label for row in first.table if row.kind != "class" and first.sizes.get(row.label)]
    tops = [max(float(_shares(_cosines(data, label), edges).max()) for data in shown) for label in labels]
    return tuple(_histogram(label, shown, edges, max(tops)) for label in labels)


def exposure_figure(first: PageData, second: PageData | None = None) -> Figure | None:
    """Cosine against the data targets so far: the middle half, the median and the lowest 1 % of each bin.

    None where the first run did not count targets or did not measure rows.
    """
    shown = [data for data in (first, second) if data is not None and _by_targets(data)]
    if not shown or shown[0] is not first:
        return None
    boxes = [_by_targets(data) for data in shown]
    low = min(min(box.p01 for box in of_one.values()) for of_one in boxes)
    plot = Plot(2 * _WIDE, _HIGH + 24, (-0.5, len(_TARGETS) - 0.5), (_floor(low), 1.0), bottom=52.0)
    marks, words = plot.grid(ticks(*plot.y), lambda value: f"{value:g}")
    words += plot.x_labels(range(len(_TARGETS)), lambda place: _TARGET_LABELS[round(place)])
    words.append(Word(plot.left + (plot.width - plot.left) / 2, plot.height - 2, "data targets so far (tokens below)"))
    for place, of_one in enumerate(boxes):
        shift, wide, name = (0.0, 0.28, "") if len(boxes) == 1 else ((-0.2, 0.2)[place], 0.17, f"run {'AB'[place]}, ")
        for bin_, box in of_one.items():
            marks += _box(plot, bin_ + shift, wide, box, f"b{place}", name)
    counts = boxes[0]
    words += [Word(plot.at_x(b), plot.base + 31, f"{box.count:,}", style="tick quiet") for b, box in counts.items()]
    marks.append(_bar_95(plot))
    legend = tuple((f"k{place}", f"run {'AB'[place]}") for place in range(2)) if len(boxes) == 2 else ()
    text = "; ".join(f"{_TARGET_LABELS[b]} targets: median cosine {number(box.p50)}" for b, box in counts.items())
    note = "Box: the middle half of the tokens; line across: median; whisker: down to the lowest 1 %."
    return Figure("Drift against exposure", text, plot.width, plot.height, tuple(marks), tuple(words), legend, note)


def length_figure(first: PageData, second: PageData | None = None) -> Figure | None:
    """Histogram of the lengths of the live rows' displacements, from 0 to the longest.

    Args:
        first: drawn as bars.
        second: a second one, drawn as an outline on the same scale.

    Returns:
        None where the first has no lengths.
    """
    shown = [lengths for data in (first, second) if data is not None and (lengths := _lengths(data)).size]
    if not shown or not _lengths(first).size:
        return None
    longest = max(float(lengths.max()) for lengths in shown) or 1.0
    edges = np.linspace(0.0, longest, 61)
    counted = [_shares(lengths, edges) for lengths in shown]
    top = max(float(shares.max()) for shares in counted)
    plot = Plot(2 * _WIDE, _HIGH, (0.0, longest), (0.0, math.sqrt(top)), left=10.0, right=10.0, bottom=36.0)
    marks = _bars(plot, counted, edges, shown[0].size, degraded=-math.inf)
    words = plot.x_labels(ticks(0.0, longest, 8), lambda value: f"{value:g}")
    words.append(Word(plot.width / 2, plot.height - 2, "L2 of row now minus base row"))
    middle, last = (float(value) for value in np.quantile(shown[0], (0.5, 0.99)))
    note = (
        f"Half of the rows moved less than {middle:.3g}, 99 % less than {last:.3g}, the farthest {shown[0].max():.3g}."
    )
    title = f"L2, {shown[0].size:,} live rows"
    return Figure(title, f"{title}: {note}", plot.width, plot.height, tuple(marks), tuple(words), note=note)


def _lengths(data: PageData) -> NDArray[np.float32]:
    """Finite lengths of the live rows' displacements."""
    rows = data.rows
    if rows is None or rows.l2 is None:
        return np.empty(0, np.float32)
    found: NDArray[np.float32] = rows.l2[rows.live & np.isfinite(rows.l2)]
    return found


def _cosines(data: PageData, label: str = "all") -> NDArray[np.float32]:
    """Finite cosines of the live rows, of all or of one group."""
    rows = data.rows
    if rows is None or rows.cosine is None:
        return np.empty(0, np.float32)
    chosen = rows.live & np.isfinite(rows.cosine)
    if label != "all":
        chosen &= rows.group == (data.names.index(label) if label in data.names else 255)
    found: NDArray[np.float32] = rows.cosine[chosen]
    return found


def _edges(low: float, most: int = 50) -> NDArray[np.float64]:
    """Edges of at most about `most` bins from `low` or a little lower up to 1, one of them exactly at 0.95."""
    width = next((width for width in (0.001, 0.0025, 0.005, 0.01, 0.025) if (1 - low) / width <= most), 0.05)
    bins = math.ceil(round((1 - low) / width, 6))
    return np.round(1.0 - width * np.arange(bins, -1, -1), 6)


def _floor(cosine: float) -> float:
    return max(-1.0, math.floor(cosine * 50) / 50)


def _histogram(label: str, shown: Sequence[PageData], edges: NDArray[np.float64], top: float) -> Figure:
    counted = [_shares(_cosines(data, label), edges) for data in shown]
    size, top = _cosines(shown[0], label).size, top or 1.0
    # Heights by the square root: most rows have hardly moved, and the few that have are what one looks for.
    plot = Plot(
        260.0, 120.0, (float(edges[0]), 1.0), (0.0, math.sqrt(top)), left=10.0, right=10.0, top=8.0, bottom=22.0
    )
    marks = _bars(plot, counted, edges, size)
    marks.append(Mark("line", "bar95", plot.at_x(DEGRADED), plot.top - 4, plot.at_x(DEGRADED), plot.base))
    words = [Word(plot.at_x(v), plot.base + 15, f"{v:g}") for v in ticks(float(edges[0]), 1.0, 4) if v != 1.0]
    words.append(Word(plot.width - 4, plot.base + 15, "1", "end"))
    lost = [f"{percent(_below(_cosines(data, label)))} below 0.95" for data in shown]
    note = lost[0] if len(lost) == 1 else f"A {lost[0]}, B {lost[1]}"
    title = f"{label_of(label)}, {size:,}"
    return Figure(title, f"{size:,} tokens: {note}", plot.width, plot.height, tuple(marks), tuple(words), note=note)


def _shares(cosines: NDArray[np.float32], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of the rows in each bin; what lies left of the first edge counts in the first bin."""
    counts, _ = np.histogram(np.clip(cosines, edges[0], edges[-1]), edges)
    return counts / max(1, cosines.size)


def _below(cosines: NDArray[np.float32]) -> float | None:
    return float(np.mean(cosines < DEGRADED)) if cosines.size else None


def _bars(
    plot: Plot, counted: Sequence[NDArray[np.float64]], edges: NDArray[np.float64], rows: int,
    degraded: float = DEGRADED,
) -> list[Mark]:  # fmt: skip
    """The first shares as bars, the second as an outline, and the axis."""
    marks = []
    for share, left, right in zip(counted[0].tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if share > 0:
            x, high = plot.at_x(left), max(1.0, plot.base - plot.at_y(math.sqrt(share)))
            style = "bar low" if (left + right) / 2 < degraded else "bar"
            title = f"{left:.3f} to {right:.3f}: {round(share * rows):,} tokens"
            wide = round(plot.at_x(right) - x - 0.5, 1)
            marks.append(Mark("rect", style, x, round(plot.base - high, 1), wide, round(high, 1), title=title))
    for shares in counted[1:]:
        steps = zip(shares.tolist(), edges[1:].tolist(), strict=True)
        line = "".join(f"V{plot.at_y(math.sqrt(share))}H{plot.at_x(right)}" for share, right in steps)
        marks.append(Mark("path", "outline", d=f"M{plot.at_x(edges[0])} {plot.base}{line}V{plot.base}"))
    return [*marks, Mark("line", "axis", plot.left, plot.base, plot.width - plot.right, plot.base)]


@dataclass(frozen=True)
class _Box:
    """Quantiles of the cosines in one bin."""

    count: int
    p01: float
    p25: float
    p50: float
    p75: float


def _by_targets(data: PageData) -> dict[int, _Box]:
    rows = data.rows
    if rows is None or rows.cosine is None or rows.targets is None:
        return {}
    chosen = rows.live & np.isfinite(rows.cosine)
    bins = np.searchsorted(_TARGETS, rows.targets[chosen], side="right") - 1
    cosine = rows.cosine[chosen]
    found = {}
    for place in np.unique(bins).tolist():
        within = cosine[bins == place]
        found[int(place)] = _Box(int(within.size), *np.quantile(within, (0.01, 0.25, 0.5, 0.75)).tolist())
    return found


def _box(plot: Plot, x: float, half: float, box: _Box, style: str, name: str) -> list[Mark]:
    left, right, middle = plot.at_x(x - half), plot.at_x(x + half), plot.at_x(x)
    top, bottom = plot.at_y(box.p75), plot.at_y(box.p25)
    title = f"{name}{box.count:,} tokens: median {number(box.p50)}, middle half {number(box.p25)} to {number(box.p75)}"
    title = f"{title}, lowest 1 % under {number(box.p01)}"
    return [
        Mark("line", f"whisker {style}", middle, bottom, middle, plot.at_y(box.p01)),
        Mark("rect", f"box {style}", left, top, round(right - left, 1), max(1.0, round(bottom - top, 1)), title=title),
        Mark("line", f"median {style}", left, plot.at_y(box.p50), right, plot.at_y(box.p50)),
    ]


def _bar_95(plot: Plot) -> Mark:
    y = plot.at_y(DEGRADED)
    return Mark("line", "bar95" if plot.y[0] <= DEGRADED else "hidden", plot.left, y, plot.width - plot.right, y)


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

    With a second run each figure has one line a run.
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
            "Retained, of what the base repeats",
            (*(key_of("probe", name, "retained") for name in ("all", *EXPOSURE_CLASSES)), "probe/watch"),
            (*(label_of(name) for name in ("all", *EXPOSURE_CLASSES)), "watched words"),
            percent,
        ),
        _Panel(
            "Reference text: rise of the mean loss over the base, nats a token",
            tuple(key_of("reference", name, "nll_rise") for name in ("all", *EXPOSURE_CLASSES)),
            tuple(map(label_of, ("all", *EXPOSURE_CLASSES))),
            _short,
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
        ("Retained, of what the base repeats", "probe/retained", percent),
        ("Reference text: rise of the mean loss, nats a token", "reference/nll_rise", _short),
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
    known = {step for one in series for step, value in zip(one.steps, one.values, strict=True) if math.isfinite(value)}
    # One look is a number, not a course; a share that was never above 0 neither.
    if len(known) < 2 or (panel.label is percent and not any(values)):
        return None
    steps = [step for one in series for step in one.steps]
    low, high = (0.0, 1.0) if panel.whole else _span(values, panel.label)
    plot = Plot(_WIDE, _HIGH, (min(steps), max(steps)), (low, high), left=52.0)
    marks, words = plot.grid(ticks(low, high), tick_percent if panel.label is percent else panel.label)
    words += plot.step_labels()
    if second is None:
        marks += alert_lines(plot, [one for one in first.alerts if one.metric.removeprefix(_PREFIX) in panel.keys])
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


def _span(values: Sequence[float], label: Label) -> tuple[float, float]:
    """Lowest and highest value of an axis that holds all values, with a little room; a share stays within [0, 1]."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.02 * abs(high) or 0.02
    if label is percent:
        return max(0.0, low - room), min(1.0, high + room) if high <= 1.0 else high + room
    return (0.0 if low >= 0 and low < 0.2 * high else low - room), high + room


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10 else f"{value:,.1f}"


def forecast_figures(data: PageData) -> tuple[Figure, ...]:
    """Rows below cosine 0.95 so far and by each check's forecast of the end: of all, then of the worst groups.

    Groups are those with the highest share in the latest forecast; small ones, and those where no share was ever above
    0, are left out. Nothing where nothing was forecast.
    """
    latest = {name: share for name in data.names if (share := _latest_forecast(data, name)) is not None}
    large = [name for name in latest if data.sizes.get(name, LARGE_GROUP) >= LARGE_GROUP and _ever(data, name)]
    worst = sorted(large, key=lambda name: (-latest[name], name))[:SHOWN]
    shown = [name for name in ("all", *worst) if _latest_forecast(data, name) is not None]
    tops = [value for name in shown for owner in ("head", "forecast")
            for value in data.curves.get(key_of(owner, name, "below_0.95"), ([], []))[1]
            if math.isfinite(value)]  # fmt: skip
    return tuple(_figure(data, name, max(tops, default=0.0)) for name in shown)


def _latest_forecast(data: PageData, name: str) -> float | None:
    _, values = data.curves.get(key_of("forecast", name, "below_0.95"), ([], []))
    return next((value for value in reversed(values) if math.isfinite(value)), None)


def _ever(data: PageData, name: str) -> bool:
    curves = (data.curves.get(key_of(owner, name, "below_0.95"), ([], [])) for owner in ("head", "forecast"))
    return any(value > 0 for _, values in curves for value in values)


def _figure(data: PageData, name: str, top: float) -> Figure:
    """One group's figure: the past as a line, from its end on the way to the forecast end, and the forecasts so far."""
    lines = (("head", "so far", "s0"), ("forecast", "forecast of the end, check by check", "s1"))
    keys = [key_of(owner, name, "below_0.95") for owner, _, _ in lines]
    series = [
        Series(title, style, *thinned(*data.curves[key]))
        for key, (_, title, style) in zip(keys, lines, strict=True)
        if key in data.curves
    ]
    steps = [step for one in series for step in one.steps] + ([] if data.end is None else [data.end])
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
        metric = change.metric.removeprefix(_PREFIX)
        if metric in keys and not change.again:
            found.append(change)
        elif metric in (key.replace(f"/{name}/", "/*/") for key in keys):
            named = name in change.parts
            if named and change.rule not in naming:
                found.append(change)
            (naming.add if named else naming.discard)(change.rule)
    return found
