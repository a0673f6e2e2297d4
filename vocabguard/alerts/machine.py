"""Follows alert rules through the checks and evaluations of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from vocabguard.alerts.rules import FIRING, PREFIX, STATES, AlertRule, short_key, values_by_part
from vocabguard.alerts.states import WHOLE, News, Standing, as_dict, follow, from_dict
from vocabguard.alerts.text import message_of, worst_first
from vocabguard.results import Transition


class AlertMachine:
    """Holds the state of every rule from check to check. It decides; acting is `vocabguard.alerts.notify`.

    Rules about ``alerts/firing`` are followed last and count the other rules that fire after this very check.

    Transitions are reported in the rules' order. A ValueError if two rules have the same name.

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
        self._standings = {name: Standing() for name in names}

    @property
    def firing(self) -> tuple[str, ...]:
        """Names of the rules that fire, in the rules' order."""
        return tuple(rule.name for rule in self.rules if self._standings[rule.name].firing)

    def update(
        self, step: int, scalars: Mapping[str, float], *, evaluation: bool = False,
        rows: Mapping[str, int] | None = None,
    ) -> tuple[Transition, ...]:  # fmt: skip
        """Take in one check, or what an evaluation brought.

        Args:
            scalars: by logged key, with or without ``vocabguard/``. A rule whose key is missing or NaN stays as it is,
                unless it is about that.
            evaluation: follow the rules about an evaluation's keys, and only those; otherwise all others.
            rows: live rows of each script group; a group that is not named has enough. Where there is one group only, a
                rule over groups is quiet if a rule over all rows says the same.

        Returns:
            The rules that fire, have news or resolved, in the rules' order, those about ``alerts/firing`` last.
        """
        known = {short_key(key): value for key, value in scalars.items()}
        transitions = []
        for rule in sorted(self.rules, key=_about_alerts):
            if rule.at_evaluations != evaluation:
                continue
            values = self._values(rule, known, rows or {})
            before = self._standings[rule.name]
            after, news = follow(rule, before, step, values)
            self._standings[rule.name] = after
            if news is not None:
                transitions.append(_transition(rule, news, (before, after), step, values, rows or {}))
        return tuple(transitions)

    def scalars(self, *, evaluation: bool = False) -> dict[str, float]:
        """Logged keys: ``alerts/firing``, how many rules fire, and ``alerts/<rule>``: 0 ok, 0.5 pending, 1 firing.

        Those of the rules that evaluations move, or of all others.
        """
        moved = (rule.name for rule in self.rules if rule.at_evaluations == evaluation)
        levels = {f"{PREFIX}{STATES}{name}": self._standings[name].level for name in moved}
        return levels | {PREFIX + FIRING: float(len(self.firing))}

    def requests(self, transitions: Iterable[Transition]) -> tuple[str, ...]:
        """What rules that have just begun to fire ask of the trainer: ``checkpoint`` and ``stop``, in this order."""
        fired = {change.rule for change in transitions if change.state == "firing" and not change.again}
        asked = {action for rule in self.rules if rule.name in fired for action in rule.actions}
        return tuple(action for action in ("checkpoint", "stop") if action in asked)

    def state_dict(self) -> dict[str, Any]:
        """Every rule's state, as a dict that JSON can hold."""
        return {rule.name: as_dict(rule, self._standings[rule.name]) for rule in self.rules}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; a ValueError if a rule's is none of ``ok``, ``pending``, ``firing``.

        Rules that it does not know, or knows for another metric, start ok; unknown rules and fields are ignored.
        """
        self._standings = {rule.name: from_dict(rule, state.get(rule.name) or {}) for rule in self.rules}

    def _values(self, rule: AlertRule, scalars: Mapping[str, float], rows: Mapping[str, int]) -> dict[str, float]:
        if _about_alerts(rule):
            # Not these rules themselves: one that fires because it fires would never resolve.
            others = {other.name for other in self.rules if not _about_alerts(other)}
            return {WHOLE: float(len(others.intersection(self.firing)))}
        if len(rows) == 1 and any(map(rule.repeats, self.rules)):
            return {}
        if rule.by_part:
            values = values_by_part(rule.key, scalars)
            return {part: float(value) for part, value in values.items() if rows.get(part, math.inf) >= rule.min_rows}
        return {WHOLE: float(scalars.get(rule.short, math.nan))}


def _about_alerts(rule: AlertRule) -> bool:
    return rule.short == FIRING


def _transition(
    rule: AlertRule, news: News, standing: tuple[Standing, Standing], step: int, values: Mapping[str, float],
    rows: Mapping[str, int],
) -> Transition:  # fmt: skip
    before, after = standing
    message = message_of(rule, news, standing, values, rows)
    if news == "resolves":
        # Of the parts that are resolved now, the one that was worst.
        value = next(iter(worst_first(rule, before.firing, values).values()))
        return Transition(rule.name, "resolved", rule.level, rule.key, value, step, message, since=before.since)
    parts = worst_first(rule, after.firing, values)
    return Transition(
        rule.name, "firing", rule.level, rule.key, next(iter(parts.values())), step, message,
        since=after.since, again=news == "again", parts=parts if rule.by_part else {},
    )  # fmt: skip
