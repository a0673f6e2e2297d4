"""What holds for alert rules over any run of values, against the run's history instead of a machine's state."""

from __future__ import annotations

import json
import math
from itertools import accumulate

from hypothesis import given, settings
from hypothesis import strategies as st

from vocabguard.alerts.machine import AlertMachine
from vocabguard.alerts.rules import AlertRule

STABLE = settings(max_examples=100, deadline=None, derandomize=True)
KEY = "vocabguard/head/below_0.95"
# Few values, so that thresholds are often met exactly; None is a check without the metric.
GRID = [step / 8 for step in range(9)]
VALUES = st.one_of(st.sampled_from(GRID), st.sampled_from(GRID), st.floats(0, 1), st.sampled_from([None, math.nan]))


@st.composite
def rules(draw: st.DrawFn, name: str = "rule") -> AlertRule:
    op = draw(st.sampled_from([">", ">=", "<", "<="]))
    place = draw(st.integers(1, 7))
    behind = GRID[: place + 1] if op in (">", ">=") else GRID[place:]
    return AlertRule(
        name, KEY, op, GRID[place],
        for_checks=draw(st.integers(1, 4)), resolve_at=draw(st.none() | st.sampled_from(behind)),
        cooldown_steps=draw(st.sampled_from([0, 1, 5, 20, 60])),
    )  # fmt: skip


@st.composite
def checks(draw: st.DrawFn) -> list[tuple[int, float | None]]:
    values = draw(st.lists(VALUES, max_size=40))
    gaps = draw(st.lists(st.integers(1, 15), min_size=len(values), max_size=len(values)))
    return list(zip(accumulate(gaps), values, strict=True))


def scalars(value: float | None) -> dict[str, float]:
    return {} if value is None else {KEY: value}


@STABLE
@given(rules(), checks())
def test_a_rule_fires_exactly_where_the_history_says(rule: AlertRule, run: list[tuple[int, float | None]]) -> None:
    machine, known, changes = AlertMachine([rule]), [], []
    for step, value in run:
        before = bool(machine.firing)
        found = machine.update(step, scalars(value))
        assert len(found) <= 1
        if value is None or math.isnan(value):
            assert not found
            continue
        known.append(value)
        resolved = [at for at, state in changes if state == "resolved"]
        row = known[-rule.for_checks :]
        earned = len(row) == rule.for_checks and all(rule.over(one) for one in row)
        cooling = bool(resolved) and step - resolved[-1] < rule.cooldown_steps
        expected = not rule.safe(value) if before else earned and not cooling
        assert bool(machine.firing) is expected
        turned = [] if expected is before else ["firing" if expected else "resolved"]
        assert [alert.state for alert in found] == turned
        changes += [(alert.step, alert.state) for alert in found]
    assert [state for _, state in changes] == (["firing", "resolved"] * len(changes))[: len(changes)]


@STABLE
@given(rules(), checks(), st.lists(st.floats(0, 1, exclude_min=True, exclude_max=True), max_size=20))
def test_it_never_flaps_inside_the_band(
    rule: AlertRule, run: list[tuple[int, float | None]], shares: list[float]
) -> None:
    machine = AlertMachine([rule])
    for step, value in run:
        machine.update(step, scalars(value))
    edge = rule.threshold if rule.resolve_at is None else rule.resolve_at
    band = [edge + share * (rule.threshold - edge) for share in shares]
    band = [value for value in band if not rule.over(value) and not rule.safe(value)]
    before, begin = machine.firing, run[-1][0] if run else 0
    for step, value in enumerate(band, start=begin + 1):
        assert machine.update(step, scalars(value)) == ()
        assert machine.firing == before


@STABLE
@given(rules("one"), rules("two"), checks(), st.sets(st.integers(0, 39)))
def test_saved_and_loaded_anywhere_is_uninterrupted(
    one: AlertRule, two: AlertRule, run: list[tuple[int, float | None]], cuts: set[int]
) -> None:
    every = [AlertRule("many", "alerts/firing", ">", 1, for_checks=2, cooldown_steps=20), one, two]
    whole, parts = AlertMachine(every), AlertMachine(every)
    for place, (step, value) in enumerate(run):
        if place in cuts:
            saved = json.dumps(parts.state_dict(), allow_nan=False)
            parts = AlertMachine(every)
            parts.load_state_dict(json.loads(saved))
        assert repr(parts.update(step, scalars(value))) == repr(whole.update(step, scalars(value)))
        assert parts.state_dict() == whole.state_dict()
    assert parts.firing == whole.firing
