"""Follows alert rules through the checks of a run: ok -> pending -> firing -> ok."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from vocabguard.alerts.rules import FIRING, AlertRule
from vocabguard.transitions import Transition

State = Literal["ok", "pending", "firing"]

_OVER_WORDS = {">": "over", ">=": "at or over", "<": "under", "<=": "at or under"}
_SAFE_WORDS = {">": "at or under", ">=": "under", "<": "at or over", "<=": "over"}


@dataclass(frozen=True)
class RuleState:
    """Where one rule stands.

    Attributes:
        state: ``ok``, ``pending`` (over the threshold, but not yet often enough or still cooling down) or ``firing``.
        checks: checks in a row over the threshold, while pending.
        since: step of the first of them, while pending or firing.
        resolved: step at which it last resolved.
    """

    state: State = "ok"
    checks: int = 0
    since: int | None = None
    resolved: int | None = None


def advance(rule: AlertRule, now: RuleState, step: int, value: float) -> RuleState:
    """The state after one check.

    Args:
        rule: the rule.
        now: its state before the check.
        step: the optimizer step of the check.
        value: the metric's value; NaN, which says nothing, leaves the state as it is.

    Returns:
        The new state.
    """
    if math.isnan(value):
        return now
    if now.state == "firing":
        return RuleState(resolved=step) if rule.safe(value) else now
    if not rule.over(value):
        return RuleState(resolved=now.resolved)
    checks, since = now.checks + 1, step if now.since is None else now.since
    cooling = now.resolved is not None and step < now.resolved + rule.cooldown_steps
    if checks < rule.for_checks or cooling:
        return replace(now, state="pending", checks=checks, since=since)
    return RuleState("firing", since=since, resolved=now.resolved)


class AlertMachine:
    """Holds the state of every rule from check to check. It decides; acting is `vocabguard.alerts.sinks`.

    Rules about ``alerts/firing`` are followed last and count the other rules that fire after this very check.

    Args:
        rules: the rules, in the order in which their transitions are reported.

    Raises:
        ValueError: if two rules have the same name.

    Example:
        >>> machine = AlertMachine([AlertRule("head_degraded", "head/below_0.95", ">", 0.01)])
        >>> [alert.message for alert in machine.update(120, {"vocabguard/head/below_0.95": 0.034})]
        ['head_degraded (warning): head/below_0.95 is 0.034, over 0.01, since step 120.']
        >>> machine.firing
        ('head_degraded',)
    """

    def __init__(self, rules: Iterable[AlertRule]) -> None:
        rules = tuple(rules)
        names = [rule.name for rule in rules]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"alert rules {twice} are given more than once; allowed: one rule a name")
        self.rules: tuple[AlertRule, ...] = rules
        self._states = {name: RuleState() for name in names}

    @property
    def firing(self) -> tuple[str, ...]:
        """Names of the rules that fire, in the rules' order."""
        return tuple(rule.name for rule in self.rules if self._states[rule.name].state == "firing")

    def update(self, step: int, scalars: Mapping[str, float]) -> tuple[Transition, ...]:
        """Take in one check.

        Args:
            step: the optimizer step.
            scalars: logged keys, with or without ``vocabguard/``, and their values. A rule whose key is missing or NaN
                stays as it is.

        Returns:
            The rules that began to fire or resolved, in the rules' order, those about ``alerts/firing`` last.
        """
        transitions = []
        for rule in sorted(self.rules, key=_about_alerts):
            value = self._value(rule, scalars)
            before = self._states[rule.name]
            after = self._states[rule.name] = advance(rule, before, step, value)
            if (before.state == "firing") != (after.state == "firing"):
                transitions.append(_transition(rule, before, after, step, value))
        return tuple(transitions)

    def state_dict(self) -> dict[str, Any]:
        """Every rule's state, as a dict that JSON can hold."""
        return {rule.name: {"metric": rule.key, **asdict(self._states[rule.name])} for rule in self.rules}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Rules that the state does not know, or knows for another metric, start ok; unknown rules in it are ignored.

        Args:
            state: from `state_dict`.

        Raises:
            ValueError: if a rule's saved state is none of ``ok``, ``pending``, ``firing``.
        """
        states = {}
        for rule in self.rules:
            saved = dict(state.get(rule.name) or {})
            same = saved.pop("metric", None) == rule.key
            states[rule.name] = RuleState(**saved) if same else RuleState()
            if states[rule.name].state not in get_args(State):
                raise ValueError(f"alert rule {rule.name!r}: state is {saved['state']!r}; allowed: {get_args(State)}")
        self._states = states

    def _value(self, rule: AlertRule, scalars: Mapping[str, float]) -> float:
        if _about_alerts(rule):
            # Not these rules themselves: one that fires because it fires would never resolve.
            others = {other.name for other in self.rules if not _about_alerts(other)}
            return float(len(others.intersection(self.firing)))
        return float(scalars.get(rule.key, scalars.get(rule.short, math.nan)))


def _about_alerts(rule: AlertRule) -> bool:
    return rule.short == FIRING


def _transition(rule: AlertRule, before: RuleState, after: RuleState, step: int, value: float) -> Transition:
    fires = after.state == "firing"
    message = _firing_message(rule, after, value) if fires else _resolved_message(rule, before, value)
    return Transition(rule.name, "firing" if fires else "resolved", rule.level, rule.key, value, step, message)


def _firing_message(rule: AlertRule, now: RuleState, value: float) -> str:
    shown, limit = _apart(value, rule.threshold)
    where = f"{rule.short} is {shown}, {_OVER_WORDS[rule.op]} {limit}"
    return f"{rule.name} ({rule.level}): {where}, since step {now.since}."


def _resolved_message(rule: AlertRule, before: RuleState, value: float) -> str:
    if rule.resolve_at is None or rule.resolve_at == rule.threshold:
        limit, words = rule.threshold, _SAFE_WORDS[rule.op]
    else:
        limit, words = rule.resolve_at, "at or under" if rule.upward else "at or over"
    shown, bound = _apart(value, limit)
    where = f"{rule.short} is {shown}, {words} {bound}"
    return f"{rule.name} ({rule.level}) has resolved: {where}, after trouble since step {before.since}."


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
