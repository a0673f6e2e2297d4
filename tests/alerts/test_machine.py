import json
import math
import random

import pytest

from vocabguard.alerts.machine import AlertMachine
from vocabguard.alerts.rules import AlertRule

KEY = "vocabguard/head/below_0.95"


def rule(**changes):
    return AlertRule(**({"name": "head_degraded", "metric": "head/below_0.95", "op": ">", "threshold": 0.5} | changes))


def play(machine, values, steps=None):
    """(step, state) of every transition of a machine with rules over one key."""
    out = []
    for step, value in zip(steps or range(10, 10 * len(values) + 1, 10), values, strict=True):
        scalars = {} if value is None else {KEY: value}
        out += [(alert.step, alert.state) for alert in machine.update(step, scalars)]
    return out


def walk(seed, length=200):
    """A random walk over [0, 1] that hovers around 0.5, with holes and NaN."""
    chance = random.Random(seed)
    value, values = 0.5, []
    for _ in range(length):
        value = min(1.0, max(0.0, round(value + chance.uniform(-0.12, 0.12) + 0.1 * (0.5 - value), 2)))
        values.append(chance.choice([None, math.nan]) if chance.random() < 0.1 else value)
    return values


RULES = [
    {},
    {"for_checks": 3},
    {"resolve_at": 0.4},
    {"cooldown_steps": 45},
    {"for_checks": 2, "resolve_at": 0.35, "cooldown_steps": 70},
    {"op": "<", "for_checks": 2, "resolve_at": 0.6, "cooldown_steps": 30},
    {"op": ">=", "resolve_at": 0.45},
    {"op": "<=", "cooldown_steps": 20},
]


@pytest.mark.parametrize(
    ("changes", "values", "expected"),
    [
        ({}, [0.5, 0.51, 0.6, 0.5], [(20, "firing"), (40, "resolved")]),
        ({"op": ">="}, [0.4, 0.5, 0.49], [(20, "firing"), (30, "resolved")]),
        ({"op": "<"}, [0.5, 0.4, 0.5], [(20, "firing"), (30, "resolved")]),
        ({"op": "<="}, [0.6, 0.5, 0.51], [(20, "firing"), (30, "resolved")]),
        ({"for_checks": 3}, [0.6, 0.6, 0.4, 0.6, 0.6, 0.6], [(60, "firing")]),
        ({"for_checks": 2}, [0.6, None, 0.6], [(30, "firing")]),
        ({"for_checks": 2}, [0.6, math.nan, math.nan], []),
        ({}, [0.6, None, math.nan, 0.6], [(10, "firing")]),
        ({"resolve_at": 0.3}, [0.6, 0.4, 0.31, 0.6, 0.3], [(10, "firing"), (50, "resolved")]),
        ({"cooldown_steps": 20}, [0.6, 0.4, 0.6, 0.6], [(10, "firing"), (20, "resolved"), (40, "firing")]),
        ({"cooldown_steps": 21}, [0.6, 0.4, 0.6, 0.6], [(10, "firing"), (20, "resolved")]),
        ({"cooldown_steps": 20}, [0.6, 0.4, 0.6, 0.4, 0.4], [(10, "firing"), (20, "resolved")]),
        ({}, [math.inf], [(10, "firing")]),
    ],
)
def test_transitions_by_hand(changes, values, expected):
    assert play(AlertMachine([rule(**changes)]), values) == expected


@pytest.mark.parametrize("changes", RULES)
@pytest.mark.parametrize("seed", range(5))
def test_transitions_alternate_and_are_earned(changes, seed):
    values, one = walk(seed), rule(**changes)
    steps = list(range(10, 2001, 10))
    alerts = play(AlertMachine([one]), values, steps)
    assert len(alerts) >= 2, "the walk must exercise the rule"
    assert [state for _, state in alerts] == (["firing", "resolved"] * len(alerts))[: len(alerts)]
    known = [
        (step, value) for step, value in zip(steps, values, strict=True) if value is not None and not math.isnan(value)
    ]
    for index, (step, state) in enumerate(alerts):
        if state == "firing":
            row = [value for at, value in known if at <= step][-one.for_checks :]
            assert len(row) == one.for_checks
            assert all(one.over(value) for value in row)
            assert index == 0 or step - alerts[index - 1][0] >= one.cooldown_steps
        else:
            value = dict(known)[step]
            border = one.threshold if one.resolve_at is None else one.resolve_at
            assert value <= border if one.op in (">", ">=") else value >= border


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("start", ["over", "under"])
def test_no_flapping_between_resolve_at_and_threshold(seed, start):
    chance = random.Random(seed)
    machine = AlertMachine([rule(resolve_at=0.3)])
    play(machine, [0.9 if start == "over" else 0.1])
    before = machine.firing
    assert play(machine, [chance.uniform(0.301, 0.5) for _ in range(100)]) == []
    assert machine.firing == before == (("head_degraded",) if start == "over" else ())


@pytest.mark.parametrize("changes", RULES)
def test_resume_at_any_check_equals_an_uninterrupted_run(changes):
    values, steps = walk(7, 80), list(range(10, 801, 10))
    whole = AlertMachine([rule(**changes)])
    expected, cut_states = [], set()
    for step, value in zip(steps, values, strict=True):
        expected.append(whole.update(step, {} if value is None else {KEY: value}))
    for cut in range(len(values) + 1):
        machine = AlertMachine([rule(**changes)])
        for part, begin in ((values[:cut], 0), (values[cut:], cut)):
            if begin == cut:
                saved = json.loads(json.dumps(machine.state_dict(), allow_nan=False))
                cut_states.add(saved["head_degraded"]["state"])
                machine = AlertMachine([rule(**changes)])
                machine.load_state_dict(saved)
            for index, value in enumerate(part, begin):
                got = machine.update(steps[index], {} if value is None else {KEY: value})
                # repr, since NaN differs from itself.
                assert repr(got) == repr(expected[index])
        assert machine.state_dict() == whole.state_dict()
    assert {"ok", "firing"} <= cut_states
    assert ("pending" in cut_states) == (changes.get("for_checks", 1) > 1 or changes.get("cooldown_steps", 0) > 10)


def test_a_loaded_state_may_know_other_rules():
    old = AlertMachine([rule(), rule(name="gone"), rule(name="changed")])
    play(old, [0.9])
    new = AlertMachine([rule(), rule(name="new"), rule(name="changed", metric="head/below_0.90")])
    new.load_state_dict(old.state_dict())
    assert new.firing == ("head_degraded",)
    assert set(new.state_dict()) == {"head_degraded", "new", "changed"}
    new.load_state_dict({})
    assert new.firing == ()


def test_a_broken_state_is_refused_and_changes_nothing():
    machine = AlertMachine([rule()])
    play(machine, [0.9])
    broken = {"head_degraded": machine.state_dict()["head_degraded"] | {"state": "burning"}}
    with pytest.raises(ValueError, match=r"'head_degraded': state is 'burning'; allowed: .*'pending'"):
        machine.load_state_dict(broken)
    assert machine.firing == ("head_degraded",)


def test_duplicate_names_are_refused():
    with pytest.raises(ValueError, match=r"\['head_degraded'\] are given more than once"):
        AlertMachine([rule(), rule(name="other"), rule(threshold=0.9)])


def test_a_transition_carries_the_logged_key_whatever_the_spelling():
    machine = AlertMachine([rule(), rule(name="full", metric=KEY, level="critical")])
    for scalars in ({"head/below_0.95": 0.7}, {KEY: 0.1}):
        alerts = machine.update(10, scalars)
        assert [(alert.rule, alert.metric, alert.value, alert.level) for alert in alerts] == [
            ("head_degraded", KEY, *scalars.values(), "warning"),
            ("full", KEY, *scalars.values(), "critical"),
        ]


@pytest.mark.parametrize(
    ("changes", "values", "message"),
    [
        (
            {"threshold": 0.01, "resolve_at": 0.008},
            [0.0, 0.034123],
            "head_degraded (warning): head/below_0.95 is 0.0341, over 0.01, since step 20.",
        ),
        (
            {"threshold": 0.01, "for_checks": 3, "level": "critical"},
            [0.02, 0.02, 0.02],
            "head_degraded (critical): head/below_0.95 is 0.02, over 0.01, since step 10.",
        ),
        # Three digits would read "is 0.95, under 0.95".
        (
            {"op": "<", "threshold": 0.95},
            [0.949983],
            "head_degraded (warning): head/below_0.95 is 0.94998, under 0.95, since step 10.",
        ),
        (
            {"threshold": 0.01, "resolve_at": 0.008},
            [0.5, 0.009, 0.0071],
            "head_degraded (warning) has resolved: head/below_0.95 is 0.0071, at or under 0.008, after trouble since "
            "step 10.",
        ),
        (
            {"op": ">=", "threshold": 1},
            [1.0, 0.9996],
            "head_degraded (warning) has resolved: head/below_0.95 is 0.9996, under 1, after trouble since step 10.",
        ),
    ],
)
def test_messages(changes, values, message):
    machine = AlertMachine([rule(**changes)])
    alerts = [machine.update(10 * (index + 1), {KEY: value}) for index, value in enumerate(values)]
    assert alerts[-1][0].message == message


def test_counts_are_shown_as_counts():
    machine = AlertMachine([rule(metric="head/nonfinite_rows", threshold=0)])
    (alert,) = machine.update(5, {"vocabguard/head/nonfinite_rows": 12345.0})
    assert alert.message == "head_degraded (warning): head/nonfinite_rows is 12,345, over 0, since step 5."


def test_a_rule_about_alerts_counts_the_others_of_this_check():
    many = rule(name="many", metric="alerts/firing", threshold=0)
    machine = AlertMachine([many, rule(name="one"), rule(name="two")])
    # What an earlier check logged under the key is not this check's.
    assert [alert.rule for alert in machine.update(1, {KEY: 0.9, "vocabguard/alerts/firing": 0.0})] == [
        "one",
        "two",
        "many",
    ]
    assert machine.firing == ("many", "one", "two")
    assert [(alert.rule, alert.state) for alert in machine.update(2, {KEY: 0.1})][-1] == ("many", "resolved")


def test_where_each_rule_stands_is_logged_as_a_number():
    machine = AlertMachine(
        [
            AlertRule("at_once", "head/below_0.95", ">", 0.1),
            AlertRule("twice", "head/below_0.95", ">", 0.1, for_checks=2),
            AlertRule("groups", "head/*/below_0.95", ">", 0.1, for_checks=2),
            AlertRule("answers", "confusion/foreign", ">", 0.1),
        ]
    )

    def standings(evaluation=False):
        found = machine.scalars(evaluation=evaluation)
        return {key.removeprefix("vocabguard/alerts/"): value for key, value in found.items()}

    assert standings() == {"at_once": 0.0, "twice": 0.0, "groups": 0.0, "firing": 0.0}
    checks = [
        ({"": 0.3, "ja/": 0.3, "ko/": 0.0}, {"at_once": 1.0, "twice": 0.5, "groups": 0.5, "firing": 1.0}),
        ({"": 0.3, "ja/": 0.3, "ko/": 0.3}, {"at_once": 1.0, "twice": 1.0, "groups": 1.0, "firing": 3.0}),
        ({"": 0.0, "ja/": 0.0, "ko/": 0.05}, {"at_once": 0.0, "twice": 0.0, "groups": 0.0, "firing": 0.0}),
    ]
    for step, (values, expected) in enumerate(checks, start=1):
        machine.update(step, {f"vocabguard/head/{part}below_0.95": value for part, value in values.items()})
        assert standings() == expected
    assert standings(evaluation=True) == {"answers": 0.0, "firing": 0.0}
    machine.update(4, {"vocabguard/confusion/foreign": 0.5}, evaluation=True)
    assert standings(evaluation=True) == {"answers": 1.0, "firing": 1.0}
    assert "answers" not in standings()
