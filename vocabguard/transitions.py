"""What alerts tell, as frozen dataclasses of plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal


@dataclass(frozen=True)
class AlertStory:
    """What a person needs to know about an alert, with numbers; a sentence that has nothing to say is empty.

    Attributes:
        what: what is happening.
        where: in which parts and how much of each, worst first.
        rows: live rows concerned; None where the alert is not about rows.
        share: the same as a share in [0, 1] of the live rows that the rule looks at; None as `rows`.
        tokens: the worst tokens by text, at most five, worst first.
        since: when it began.
        outlook: what the end of the run will bring if nothing is done.
        advice: what to do about it, a sentence each.
    """

    what: str = ""
    where: str = ""
    rows: int | None = None
    share: float | None = None
    tokens: tuple[str, ...] = ()
    since: str = ""
    outlook: str = ""
    advice: tuple[str, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        """All that is said, a line each."""
        worst = f"Worst: {'  '.join(self.tokens)}" if self.tokens else ""
        said = (self.what, self.where, worst, self.since, self.outlook)
        return tuple(line for line in (*said, *(f"To do: {advice}" for advice in self.advice)) if line)


@dataclass(frozen=True)
class Transition:
    """One change of an alert's state, or news of one that fires on.

    Attributes:
        rule: the rule's name.
        state: the state entered.
        level: ``info``, ``warning`` or ``critical``.
        metric: the logged key; of a rule over parts, with ``*`` in the part's place.
        value: what the rule compares: the key's value, its change, or that of the worst part; NaN where it is missing.
        step: the optimizer step.
        message: one sentence for a person.
        since: optimizer step at which the trouble began.
        again: whether the rule has fired before and is told once more: parts have joined, or a reminder was due.
        parts: of a rule over parts, the value of each part that fires, worst first.
        story: the whole of it for a person; None in runs of earlier versions and where a rule resolves.
    """

    rule: str
    state: Literal["firing", "resolved"]
    level: str
    metric: str
    value: float
    step: int
    message: str
    since: int | None = None
    again: bool = False
    parts: Mapping[str, float] = field(default_factory=dict)
    story: AlertStory | None = None


def as_transition(line: Mapping[str, Any]) -> Transition:
    """A line of a log as a transition; earlier versions wrote fewer fields, later ones may write more.

    Args:
        line: a JSON object of ``alerts.jsonl``; None stands for NaN.

    Raises:
        KeyError: without a ``value``.
        TypeError: without a field that has always been written.
    """
    values: dict[str, Any] = {spec.name: line[spec.name] for spec in fields(Transition) if spec.name in line}
    values["value"] = math.nan if line["value"] is None else line["value"]
    parts = line.get("parts") or {}
    values["parts"] = {part: math.nan if value is None else value for part, value in parts.items()}
    if told := line.get("story"):
        known = {spec.name: told[spec.name] for spec in fields(AlertStory) if spec.name in told}
        lists: dict[str, Any] = {key: tuple(known.pop(key)) for key in ("tokens", "advice") if key in known}
        values["story"] = AlertStory(**known, **lists)
    return Transition(**values)
