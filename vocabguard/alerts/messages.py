"""One sentence for each change of an alert. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping

from vocabguard.alerts.rules import ABSENT, UNCHANGED, AlertRule
from vocabguard.alerts.states import WHOLE, News, RuleState, Standing

NAMED = 6
"""Parts that a sentence names; more are counted."""

_OVER_WORDS = {">": "over", ">=": "at or over", "<": "under", "<=": "at or under"}
_SAFE_WORDS = {">": "at or under", ">=": "under", "<": "at or over", "<=": "over"}


def message_of(
    rule: AlertRule,
    news: News,
    standing: tuple[Standing, Standing],
    values: Mapping[str, float],
    rows: Mapping[str, int],
) -> str:
    """What has happened, in one sentence.

    Args:
        rule: the rule.
        news: what there is to tell.
        standing: before and after.
        values: of the parts that were measured.
        rows: live rows of each script group, where known.
    """
    before, after = standing
    head = f"{rule.name} ({rule.level})"
    if news == "resolves":
        trouble = f"after trouble since step {before.since}."
        if rule.by_part:
            return f"{head} has resolved: {rule.short} {_limit(rule)} in no {_noun(rule)} any more, {trouble}"
        return f"{head} has resolved: {_back(rule, before.parts[WHOLE], values.get(WHOLE, math.nan))}, {trouble}"
    goes_on = " goes on" if news == "again" else ""
    since = f"since step {after.since}."
    if not rule.by_part:
        state = before.parts.get(WHOLE, RuleState())
        return f"{head}{goes_on}: {_trouble(rule, state, values.get(WHOLE, math.nan))}, {since}"
    return f"{head}{goes_on}: {_parts(rule, news, (before, after), values, rows)}, {since}"


def worst_first(rule: AlertRule, names: tuple[str, ...], values: Mapping[str, float]) -> dict[str, float]:
    """Values of some parts, the worst first; NaN, for a part that was not measured, last."""
    found = {name: values.get(name, math.nan) for name in names}
    sign = -1.0 if rule.upward else 1.0
    return dict(sorted(found.items(), key=lambda item: (math.isnan(item[1]), sign * item[1], item[0])))


def _parts(
    rule: AlertRule,
    news: News,
    standing: tuple[Standing, Standing],
    values: Mapping[str, float],
    rows: Mapping[str, int],
) -> str:
    before, after = standing
    firing = worst_first(rule, after.firing, values)
    joined = set(after.firing) - set(before.told) if news == "again" else set()
    shown = [_part(rule, name, value, rows) + " (new)" * (name in joined) for name, value in firing.items()]
    more = f" and {len(shown) - NAMED} more" if len(shown) > NAMED else ""
    count = f"{len(shown)} {_noun(rule)}{'s' * (len(shown) != 1)}"
    return f"{rule.short} {_limit(rule)} in {count}: {', '.join(shown[:NAMED])}{more}"


def _part(rule: AlertRule, name: str, value: float, rows: Mapping[str, int]) -> str:
    if math.isnan(value):
        return name
    shown = f"{name} {_apart(value, rule.threshold)[0]}"
    # Only of shares of rows; a probe's or a set of answers' share is of something else.
    if name in rows and "/below_" in rule.short:
        count = round(value * rows[name])
        return f"{shown} ({count:,} row{'s' * (count != 1)})"
    return shown


def _noun(rule: AlertRule) -> str:
    return "language" if rule.at_evaluations else "group"


def _limit(rule: AlertRule) -> str:
    """What a part that fires does, as a verb and what follows it."""
    if rule.op in (ABSENT, UNCHANGED):
        return "is missing" if rule.op == ABSENT else "stays as it is"
    limit = f"{_OVER_WORDS[rule.op]} {_number(rule.threshold)}"
    return f"has a {rule.change} {limit} to {_checks(rule.over_checks)} ago" if rule.change else f"is {limit}"


def _trouble(rule: AlertRule, before: RuleState, value: float) -> str:
    """What is wrong, of a rule that is not over parts."""
    if rule.op == ABSENT:
        return f"{rule.short} is missing"
    if rule.op == UNCHANGED:
        return f"{rule.short} stays at {_short(value)}"
    if rule.change and before.history and not math.isnan(value):
        return _change(rule, before, value, f"{_OVER_WORDS[rule.op]} {_number(rule.threshold)}")
    shown, limit = _apart(value, rule.threshold)
    return f"{rule.short} is {shown}, {_OVER_WORDS[rule.op]} {limit}"


def _back(rule: AlertRule, before: RuleState, value: float) -> str:
    """What is right again."""
    if rule.op == ABSENT:
        return f"{rule.short} is back at {_short(value)}"
    if rule.op == UNCHANGED:
        return f"{rule.short} moves again and is {_short(value)}"
    if rule.resolve_at is None or rule.resolve_at == rule.threshold:
        bound, words = rule.threshold, _SAFE_WORDS[rule.op]
    else:
        bound, words = rule.resolve_at, "at or under" if rule.upward else "at or over"
    if rule.change and before.history:
        return _change(rule, before, value, f"{words} {_number(bound)}")
    shown, limit = _apart(value, bound)
    return f"{rule.short} is {shown}, {words} {limit}"


def _change(rule: AlertRule, before: RuleState, value: float, limit: str) -> str:
    reading = rule.reading(value, before.history)
    by = f"{_short(reading)} times" if rule.change == "ratio" else f"by {reading:+.3g}"
    then = before.history[-min(rule.over_checks, len(before.history))]
    return f"{rule.short} went from {_short(then)} to {_short(value)} in {_checks(rule.over_checks)}: {by}, {limit}"


def _checks(count: int) -> str:
    return f"{count} check{'s' * (count != 1)}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() or math.isinf(value) else f"{value:.3g}"


def _apart(value: float, limit: float) -> tuple[str, str]:
    """Both numbers as text, short, but with digits enough that different numbers look different."""
    if value.is_integer() or math.isinf(value):
        return f"{value:,.0f}", _number(limit)
    for digits in range(3, 17):
        shown = f"{value:.{digits}g}"
        if (float(shown) < limit) == (value < limit) and (float(shown) > limit) == (value > limit):
            return shown, _number(limit)
    return repr(value), _number(limit)


def _number(limit: float) -> str:
    return f"{limit:,.0f}" if float(limit).is_integer() else repr(limit)
