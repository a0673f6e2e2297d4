"""The report page's alerts: what became of each rule, in words, and over the steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from vocabguard.alerts.rules import LEVELS
from vocabguard.report.charts import Figure, Mark, Plot, Word, ticks
from vocabguard.report.data import PageData
from vocabguard.results import Transition

EARLIER = 20
"""Earlier news of a rule that its entry holds; the table of all changes has the others."""

_WIDE, _TRACK, _BAR, _NAME = 380.0, 36.0, 9.0, 46


@dataclass(frozen=True)
class Span:
    """A stretch of steps that a rule spent in one state; where that goes on, ``end`` is the last step that is known.

    ``pending``: the trouble had begun, and the rule did not fire yet.
    """

    state: Literal["pending", "firing"]
    start: int
    end: int
    over: bool


@dataclass(frozen=True)
class Told:
    """What became of one rule.

    Attributes:
        level: one of `LEVELS`.
        firing: whether it fires at the end.
        status: since when, or until when.
        newest: the latest news of its firing.
        earlier: those before, newest first, at most `EARLIER`.
        spans: in order.
        changes: all of it, in order.
    """

    rule: str
    level: str
    firing: bool
    status: str
    newest: Transition
    earlier: tuple[Transition, ...]
    spans: tuple[Span, ...]
    changes: tuple[Transition, ...]


def told_of(data: PageData) -> tuple[Told, ...]:
    """What became of each rule that fired: those that fire at the end first, the gravest of them first."""
    by_rule: dict[str, list[Transition]] = {}
    for change in data.alerts:
        by_rule.setdefault(change.rule, []).append(change)
    end = max([data.step or 0, *(change.step for change in data.alerts)])
    found = [one for changes in by_rule.values() if (one := _told(changes, end)) is not None]
    return tuple(sorted(found, key=lambda one: (not one.firing, -LEVELS.index(one.level), one.spans[0].start)))


def _told(changes: Sequence[Transition], end: int) -> Told | None:
    news = [change for change in reversed(changes) if change.state == "firing"]
    if not news:
        return None
    spans = spans_of(changes, end)
    fired = [span for span in spans if span.state == "firing"]
    firing = not fired[-1].over
    began, since = f"{fired[-1].start:,}", news[0].since
    if since is not None and since < fired[-1].start:
        began += f" (trouble since step {since:,})"
    status = f"fires since step {began}" if firing else f"fired at step {began}, resolved at step {fired[-1].end:,}"
    times = f"; {len(fired)} times in all" if len(fired) > 1 else ""
    level = news[0].level if news[0].level in LEVELS else "warning"
    earlier = tuple(news[1 : EARLIER + 1])
    return Told(changes[0].rule, level, firing, status + times, news[0], earlier, spans, tuple(changes))


def spans_of(changes: Iterable[Transition], end: int) -> tuple[Span, ...]:
    """The stretches in which one rule was pending, and fired.

    That a rule was pending is known from its firing, which says since when; trouble that went by before the rule fired
    is in no log.

    Args:
        changes: of one rule, in order.
        end: the last step that is known.
    """
    spans: list[Span] = []
    start: int | None = None
    for change in changes:
        if change.state == "resolved":
            if start is not None:
                spans.append(Span("firing", start, change.step, over=True))
            start = None
        elif start is None:
            # News of a rule that fires on, of whose beginning nothing is left: it fired ever since.
            start = change.step if change.since is None or not change.again else change.since
            if change.since is not None and change.since < start:
                spans.append(Span("pending", change.since, start, over=True))
    return tuple(spans if start is None else [*spans, Span("firing", start, max(start, end), over=False)])


def alert_timeline(data: PageData, told: Sequence[Told]) -> Figure | None:
    """One bar a rule over the steps of the run: pale while it was pending, full while it fired; None where none did."""
    if not told:
        return None
    steps = [step for one in told for span in one.spans for step in (span.start, span.end)]
    steps += [data.step or 0, data.end or 0, *(logged[0] for logged, _ in data.curves.values())]
    room = {"left": 12.0, "top": 4.0, "bottom": 30.0}
    plot = Plot(_WIDE, 34 + _TRACK * len(told), (min(steps), max(steps)), (0.0, float(len(told))), **room)
    marks: list[Mark] = []
    words = plot.x_labels(ticks(*plot.x), lambda value: f"{value:,.0f}")
    words.append(Word(plot.left + (plot.width - plot.left) / 2, plot.height - 2, "step"))
    for place, one in enumerate(told):
        top = plot.top + _TRACK * place
        words.append(Word(plot.left, top + 13, _short(f"{one.rule}, {one.level}"), "start", "tick name"))
        marks += _track(plot, one, top + 19)
    levels = [level for level in reversed(LEVELS) if any(one.level == level for one in told)]
    legend = [(f"fires {level}", f"fires, {level}") for level in levels]
    pending = any(span.state == "pending" for one in told for span in one.spans)
    legend += [("waits", "trouble has begun, not firing yet")] if pending else []
    text = "; ".join(f"{one.rule} ({one.level}) {one.status}" for one in told)
    return Figure("Alerts over the steps", text, plot.width, plot.height, tuple(marks), tuple(words), tuple(legend))


def _track(plot: Plot, one: Told, y: float) -> list[Mark]:
    middle, right = y + _BAR / 2, plot.width - plot.right
    marks = [Mark("line", "grid", plot.left, middle, right, middle)]
    for span in one.spans:
        # What begins with the last check is seen too.
        left = min(plot.at_x(span.start), right - 3)
        wide = round(max(plot.at_x(span.end) - left, 3), 1)
        until = f"to {span.end:,}" if span.over else "on, not resolved"
        title = f"{one.rule}: {span.state} from step {span.start:,} {until}"
        marks.append(Mark("rect", f"span {one.level} {span.state}", left, y, wide, _BAR, title=title))
    for change in one.changes:
        style = "mark resolved" if change.state == "resolved" else "mark" if change.again else ""
        if style:
            x = plot.at_x(change.step)
            marks.append(
                Mark("line", style, x, y - 2, x, y + _BAR + 2, title=f"step {change.step:,}: {change.message}")
            )
    return marks


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"
