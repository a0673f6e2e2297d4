"""Where a rule stands, and how a check moves it: ok -> pending -> firing -> ok. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from vocabguard.alerts.rules import ABSENT, AlertRule

State = Literal["ok", "pending", "firing"]
News = Literal["fires", "again", "resolves"]

_LEVELS: Mapping[State, float] = {"ok": 0.0, "pending": 0.5, "firing": 1.0}

WHOLE = ""
"""The one part of a rule that is not over parts."""


@dataclass(frozen=True)
class RuleState:
    """Where one part of a rule stands.

    Attributes:
        state: ``ok``, ``pending`` (over the threshold, but not yet often enough or still cooling down) or ``firing``.
        checks: checks in a row over the threshold, while pending.
        since: step of the first of them, while pending or firing.
        resolved: step at which it last resolved.
        history: the latest finite values, oldest first, as many as the rule looks back at.
    """

    state: State = "ok"
    checks: int = 0
    since: int | None = None
    resolved: int | None = None
    history: tuple[float, ...] = ()


@dataclass(frozen=True)
class Standing:
    """Where a rule stands.

    Attributes:
        parts: state of each part seen so far; of a rule that is not over parts, of `WHOLE` alone.
        told: firing parts that were told.
        told_at: step at which that was.
    """

    parts: Mapping[str, RuleState] = field(default_factory=dict)
    told: tuple[str, ...] = ()
    told_at: int | None = None

    @property
    def firing(self) -> tuple[str, ...]:
        """Parts that fire."""
        return tuple(name for name, part in self.parts.items() if part.state == "firing")

    @property
    def level(self) -> float:
        """Where the rule stands as a number: 1 while a part fires, else 0.5 while one is pending, else 0."""
        return max((_LEVELS[part.state] for part in self.parts.values()), default=0.0)

    @property
    def since(self) -> int | None:
        """Step at which the trouble of the parts that fire began."""
        return min((since for name in self.firing if (since := self.parts[name].since) is not None), default=None)


def advance(rule: AlertRule, now: RuleState, step: int, value: float) -> RuleState:
    """The state of one part after one check; NaN, which says nothing, leaves it as it is (but for ``absent`` rules).

    Example:
        >>> rule = AlertRule("degraded", "head/below_0.95", ">", 0.01, for_checks=2)
        >>> pending = advance(rule, RuleState(), step=10, value=0.03)
        >>> pending.state, advance(rule, pending, step=20, value=0.04).state, advance(rule, pending, 20, 0.0).state
        ('pending', 'firing', 'ok')
    """
    after = _turned(rule, now, step, rule.reading(value, now.history))
    if not rule.memory or not math.isfinite(value):
        return replace(after, history=now.history)
    return replace(after, history=(*now.history, value)[-rule.memory :])


def _turned(rule: AlertRule, now: RuleState, step: int, reading: float) -> RuleState:
    if math.isnan(reading):
        return now
    if now.state == "firing":
        return RuleState(resolved=step) if rule.safe(reading) else now
    if not rule.over(reading):
        return RuleState(resolved=now.resolved)
    checks, since = now.checks + 1, step if now.since is None else now.since
    cooling = now.resolved is not None and step < now.resolved + rule.cooldown_steps
    if checks < rule.for_checks or cooling:
        return replace(now, state="pending", checks=checks, since=since)
    return RuleState("firing", since=since, resolved=now.resolved)


def follow(rule: AlertRule, before: Standing, step: int, values: Mapping[str, float]) -> tuple[Standing, News | None]:
    """A rule after one check, and whether there is something to tell.

    ``fires`` and ``resolves`` at the first and after the last part that fires, ``again`` where parts have joined or a
    reminder is due. A part seen before whose value is missing counts as NaN.

    Example:
        >>> rule = AlertRule("groups", "head/*/below_0.95", ">", 0.1)
        >>> first, news = follow(rule, Standing(), step=10, values={"ja": 0.3, "ko": 0.0})
        >>> news, first.firing, follow(rule, first, step=20, values={"ja": 0.3, "ko": 0.2})[1]
        ('fires', ('ja',), 'again')
    """
    known = {name: before.parts.get(name, RuleState()) for name in (*before.parts, *values)}
    parts = {name: advance(rule, state, step, values.get(name, math.nan)) for name, state in known.items()}
    after = replace(before, parts=parts, told=tuple(name for name in before.told if parts[name].state == "firing"))
    measured = rule.op == ABSENT or not all(map(math.isnan, values.values()))
    news = _news(rule, before, after, step) if measured else None
    if news is None:
        return after, None
    return replace(after, told=after.firing, told_at=step if after.firing else None), news


def _news(rule: AlertRule, before: Standing, after: Standing, step: int) -> News | None:
    if not after.firing:
        return "resolves" if before.firing else None
    if not before.firing:
        return "fires"
    # A state that an earlier version saved does not say when it was told.
    quiet = step - after.told_at if after.told_at is not None else step - (before.since or 0)
    joined = rule.by_part and set(after.firing) > set(after.told) and quiet >= rule.retell_steps
    return "again" if joined or (rule.remind_steps and quiet >= rule.remind_steps) else None


def as_dict(rule: AlertRule, standing: Standing) -> dict[str, Any]:
    """A standing as a dict that JSON can hold."""
    told: dict[str, Any] = {"told": list(standing.told), "told_at": standing.told_at}
    if rule.by_part:
        return {"metric": rule.key, "parts": {name: _plain(part) for name, part in standing.parts.items()}, **told}
    return {"metric": rule.key, **_plain(standing.parts.get(WHOLE, RuleState())), **told}


def from_dict(rule: AlertRule, saved: Mapping[str, Any]) -> Standing:
    """A standing from `as_dict`, of any version; another metric's is a new one, an unknown state a ValueError."""
    if saved.get("metric") != rule.key:
        return Standing()
    parts = saved.get("parts", {}) if rule.by_part else {WHOLE: saved}
    states = {name: _state(rule, part) for name, part in parts.items()}
    firing = [name for name, part in states.items() if part.state == "firing"]
    told = tuple(name for name in saved.get("told", firing) if name in firing)
    return Standing(states, told, saved.get("told_at"))


def _plain(state: RuleState) -> dict[str, Any]:
    return {**asdict(state), "history": list(state.history)}


def _state(rule: AlertRule, saved: Mapping[str, Any]) -> RuleState:
    known = {spec.name: saved[spec.name] for spec in fields(RuleState) if spec.name in saved}
    history = tuple(float(value) for value in known.pop("history", ()))
    state = RuleState(**known, history=history[-rule.memory :] if rule.memory else ())
    if state.state not in get_args(State):
        raise ValueError(f"alert rule {rule.name!r}: state is {state.state!r}; allowed: {get_args(State)}")
    return state
