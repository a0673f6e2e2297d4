"""A small figure: marks in a plot area with two axes, as coordinates that the page's template draws as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
        d: a path's data.
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
        title: its heading.
        text: one sentence that says what it shows, for those who do not see it.
        width: of the view box.
        height: of the view box.
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
    """The plot area and its scales, both linear.

    Attributes:
        width: of the view box.
        height: of the view box.
        x: lowest and highest value of the horizontal axis.
        y: lowest and highest value of the vertical axis.
        left: room before the area.
        right: room after it.
        top: room above it.
        bottom: room below it.
    """

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
        if len(words) > 1:
            words[-1] = (
                replace(words[-1], anchor="end", x=self.width - 2) if words[-1].x > self.width - 24 else words[-1]
            )
        return words

    def step_labels(self) -> list[Word]:
        """Below the axis, optimizer steps."""
        labels = self.x_labels(ticks(*self.x), lambda value: f"{value:,.0f}")
        return [*labels, Word(self.left - 14, self.base + 16, "step", "end")]


@dataclass(frozen=True)
class Series:
    """One line of a figure.

    Attributes:
        name: what it shows.
        style: its CSS class.
        steps: optimizer steps, ascending.
        values: as many; what is not finite is not drawn.
    """

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
