"""Rules over groups, over changes, over what is missing or stands still, and over an evaluation's keys."""

import json
import math
import random

import pytest

from vocabguard.alerts.machine import AlertMachine
from vocabguard.alerts.rules import AlertRule, metric_range, part_of, require_parts, values_by_part

GROUPED = "head/*/below_0.95"


def by_group(**options):
    return AlertRule(**({"name": "groups", "metric": GROUPED, "op": ">", "threshold": 0.1} | options))


def shares(**values):
    return {f"vocabguard/head/{name}/below_0.95": value for name, value in values.items()}


def told(machine, *checks, rows=None):
    """(step, state, again, parts) of all that is told; checks at steps 10, 20, ..."""
    found = []
    for number, values in enumerate(checks, start=1):
        changes = machine.update(10 * number, shares(**values), rows=rows)
        found += [(one.step, one.state, one.again, list(one.parts)) for one in changes]
    return found


# -- groups ------------------------------------------------------------------------------------------------------------


def test_many_groups_are_one_alert_that_names_them_worst_first():
    [change] = AlertMachine([by_group()]).update(
        120, shares(ja=0.298, ko=0.21, latin=0.01, zh=0.1), rows={"ja": 1380, "ko": 380, "latin": 9, "zh": 50}
    )
    assert change.parts == {"ja": 0.298, "ko": 0.21}
    assert (change.value, change.metric, change.since) == (0.298, "vocabguard/head/*/below_0.95", 120)
    assert change.message == (
        "groups (warning): head/*/below_0.95 is over 0.1 in 2 groups: Japanese 29.8 % (411 rows), Korean 21.0 % (80 "
        "rows), since step 120."
    )


@pytest.mark.parametrize(
    ("options", "whole", "quiet"),
    [
        ({}, {}, True),
        ({"threshold": 0.05}, {"threshold": 0.05}, True),
        # The rule over all rows would tell less, later, more quietly or without an action.
        ({}, {"threshold": 0.2}, False),
        ({}, {"for_checks": 2}, False),
        ({"level": "critical"}, {}, False),
        ({"actions": ("log", "stop")}, {}, False),
        ({}, {"metric": "head/below_0.90"}, False),
        ({}, {"metric": "embedding/below_0.95"}, False),
    ],
)
def test_one_group_is_the_whole_which_another_rule_tells(options, whole, quiet):
    over_all = AlertRule(**({"name": "whole", "metric": "head/below_0.95", "op": ">", "threshold": 0.1} | whole))
    for rows, silent in ({"other": 8000}, quiet), ({"ja": 4000, "ko": 4000}, False), (None, False):
        machine = AlertMachine([over_all, by_group(**options)])
        parts = dict.fromkeys(rows or ["ja"], 0.3)
        found = machine.update(10, shares(**parts) | {"vocabguard/head/below_0.95": 0.3}, rows=rows)
        assert ("groups" not in [change.rule for change in found]) == silent


def test_a_group_that_joins_is_told_one_that_leaves_is_not():
    machine = AlertMachine([by_group()])
    checks = [
        {"ja": 0.2, "ko": 0.0},
        {"ja": 0.3, "ko": 0.0},
        {"ja": 0.3, "ko": 0.2},
        {"ja": 0.0, "ko": 0.2},
        {"ko": 0.05},
    ]
    assert told(machine, *checks) == [
        (10, "firing", False, ["ja"]),
        (30, "firing", True, ["ja", "ko"]),
        (50, "resolved", False, []),
    ]
    assert machine.firing == ()


def test_the_message_says_who_is_new_and_counts_the_rest():
    machine = AlertMachine([by_group()])
    machine.update(10, shares(**{f"g{number}": 0.2 + number / 100 for number in range(8)}))
    [change] = machine.update(20, shares(late=0.9))
    assert change.message == (
        "groups (warning) goes on: head/*/below_0.95 is over 0.1 in 9 groups: late 90.0 % (new), g0, g1, g2, g3, g4 "
        "and 3 more, since step 10."
    )


def test_joining_is_told_no_sooner_than_wished():
    checks = [{"ja": 0.2}, {"ja": 0.2, "ko": 0.2}, {"ja": 0.2, "ko": 0.2, "zh": 0.2}, {}, {"ja": 0.2}]
    assert told(AlertMachine([by_group(retell_steps=25)]), *checks) == [
        (10, "firing", False, ["ja"]),
        # At step 40 nothing was measured.
        (50, "firing", True, ["ja", "ko", "zh"]),
    ]


@pytest.mark.parametrize("metric", [GROUPED, "head/ja/below_0.95"])
def test_reminders(metric):
    rule = by_group(metric=metric, remind_steps=20)
    found = told(AlertMachine([rule]), *[{"ja": 0.2}] * 6, {"ja": 0.0})
    assert [(step, state, again) for step, state, again, _ in found] == [
        (10, "firing", False), (30, "firing", True), (50, "firing", True), (70, "resolved", False),
    ]  # fmt: skip


@pytest.mark.parametrize("metric", [GROUPED, "head/ja/below_0.95"])
def test_a_latched_rule_stays(metric):
    machine = AlertMachine([by_group(metric=metric, latch=True)])
    assert [one[:3] for one in told(machine, {"ja": 0.2}, {"ja": 0.0}, {}, {"ja": 0.3})] == [(10, "firing", False)]
    assert machine.firing == ("groups",)


def test_small_groups_and_exposure_classes_are_left_aside():
    rows = {"ja": 20, "thai": 19}
    machine = AlertMachine([by_group(min_rows=20)])
    checks = [{"thai": 0.9, "never": 0.9, "20+": 0.9}, {"ja": 0.5, "thai": 0.9}]
    assert told(machine, *checks, rows=rows) == [(20, "firing", False, ["ja"])]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"for_checks": 2},
        {"resolve_at": 0.05},
        {"cooldown_steps": 35, "for_checks": 2},
        {"op": "<", "threshold": 0.05},
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_a_grouped_rule_fires_while_any_of_its_groups_would(options, seed):
    """Against one plain rule a group."""
    chance, names = random.Random(seed), ("ja", "ko", "zh")
    plain = [by_group(**options, name=name, metric=f"head/{name}/below_0.95") for name in names]
    grouped, each = AlertMachine([by_group(**options)]), AlertMachine(plain)
    fired = 0
    for step in range(10, 1000, 10):
        values = {name: round(chance.uniform(0.0, 0.2), 3) for name in names if chance.random() < 0.9}
        if chance.random() < 0.1:
            values["ja"] = math.nan
        [*news], _ = grouped.update(step, shares(**values)), each.update(step, shares(**values))
        assert bool(grouped.firing) == bool(each.firing)
        assert sorted(set(news[-1].parts)) == sorted(each.firing) if news and news[-1].state == "firing" else True
        fired += len(news)
    assert fired > 3


# -- changes -----------------------------------------------------------------------------------------------------------


def naive(change, over, floor, values):
    """The change at each value; None where there are too few before it."""
    known, found = [], []
    for value in values:
        if value is None:
            found.append(None)
            continue
        known.append(max(value, floor))
        then = known[-1 - over] if len(known) > over else None
        found.append(None if then is None else known[-1] / then if change == "ratio" else known[-1] - then)
    return found


@pytest.mark.parametrize(("change", "threshold"), [("ratio", 1.5), ("difference", 0.1)])
@pytest.mark.parametrize("over", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_changes_against_a_naive_reference(change, threshold, over, seed):
    chance = random.Random(seed)
    values = [None if chance.random() < 0.1 else round(chance.uniform(0, 0.6) ** 2, 3) for _ in range(80)]
    rule = AlertRule("grows", "head/below_0.95", ">", threshold, change=change, over_checks=over, floor=0.05)
    machine, states = AlertMachine([rule]), []
    for number, value in enumerate(values):
        machine.update(number, {} if value is None else {"head/below_0.95": value})
        # A stop and a resume at every check.
        saved = json.loads(json.dumps(machine.state_dict(), allow_nan=False))
        machine = AlertMachine([rule])
        machine.load_state_dict(saved)
        states.append(bool(machine.firing))
    expected, now = [], False
    for found in naive(change, over, 0.05, values):
        now = now if found is None else found > threshold
        expected.append(now)
    assert states == expected
    assert 3 < sum(states) < 70


def test_next_to_nothing_is_no_alarm_and_doubling_is():
    rule = AlertRule("grows", "head/below_0.95", ">=", 2.0, change="ratio", floor=0.001)
    machine = AlertMachine([rule])
    found = [machine.update(step, {"head/below_0.95": value}) for step, value in enumerate([0.0, 1e-6, 0.0015, 0.004])]
    assert [len(one) for one in found] == [0, 0, 0, 1]
    assert found[-1][0].message == (
        "grows (warning): head/below_0.95 went from 0.0015 to 0.004 in 1 check: 2.67 times, at or over 2, since step 3."
    )
    [back] = machine.update(4, {"head/below_0.95": 0.004})
    assert back.message == (
        "grows (warning) has resolved: head/below_0.95 went from 0.004 to 0.004 in 1 check: 1 times, under 2, after "
        "trouble since step 3."
    )


def test_a_fall_over_several_checks():
    rule = AlertRule("falls", "head/cosine_mean", "<", -0.05, change="difference", over_checks=2)
    machine = AlertMachine([rule])
    found = [machine.update(step, {"head/cosine_mean": value}) for step, value in enumerate([0.99, 0.97, 0.93])]
    assert [len(one) for one in found] == [0, 0, 1]
    assert "went from 0.99 to 0.93 in 2 checks: by -0.06, under -0.05" in found[-1][0].message


def test_changes_by_group():
    rule = by_group(op=">", threshold=2, change="ratio", floor=0.01)
    machine = AlertMachine([rule])
    machine.update(1, shares(ja=0.05, ko=0.001))
    [change] = machine.update(2, shares(ja=0.15, ko=0.009))
    assert change.parts == {"ja": 0.15}
    assert "head/*/below_0.95 has a ratio over 2 to 1 check ago in 1 group: Japanese 15.0 %" in change.message


def test_infinite_values_are_not_remembered():
    rule = AlertRule("jumps", "loss/data", ">", 3.0, change="ratio", floor=0.1)
    machine = AlertMachine([rule])
    [change] = [change for value in (2.0, math.inf) for change in machine.update(1, {"loss/data": value})]
    assert change.state == "firing"
    json.dumps(machine.state_dict(), allow_nan=False)
    [back] = machine.update(3, {"loss/data": 2.0})
    assert back.state == "resolved"


# -- missing, unchanged ------------------------------------------------------------------------------------------------


def test_absent():
    machine = AlertMachine([AlertRule("gone", "probe/retained", "absent", for_checks=2)])
    values = [{}, {"probe/retained": 0.9}, {}, {"probe/retained": math.nan}, {}, {"probe/retained": 0.8}]
    found = [change for step, value in enumerate(values) for change in machine.update(step, value)]
    assert [(one.step, one.state, one.message) for one in found] == [
        (3, "firing", "gone (warning): probe/retained is missing, since step 2."),
        (5, "resolved", "gone (warning) has resolved: probe/retained is back at 0.8, after trouble since step 2."),
    ]
    assert math.isnan(found[0].value)


def test_unchanged():
    machine = AlertMachine([AlertRule("silent", "exposure/targets", "unchanged", for_checks=2)])
    values = [0, 0, None, 7, 7, 7, 8]
    found = []
    for step, value in enumerate(values):
        found += machine.update(step, {} if value is None else {"exposure/targets": float(value)})
    assert [(one.step, one.state) for one in found] == [(5, "firing"), (6, "resolved")]
    assert found[0].message == "silent (warning): exposure/targets stays at 7, since step 4."
    assert "exposure/targets moves again and is 8" in found[1].message


def test_a_group_that_is_no_longer_measured():
    machine = AlertMachine([by_group(op="absent", threshold=0.0)])
    assert told(machine, {"ja": 0.1}, {}, {"ja": 0.1}) == [(20, "firing", False, ["ja"]), (30, "resolved", False, [])]


# -- evaluations -------------------------------------------------------------------------------------------------------


def test_an_evaluation_touches_its_own_rules_only():
    rules = [
        AlertRule("answers", "confusion/*", ">", 0.1),
        AlertRule("head", "head/below_0.95", ">", 0.1),
        AlertRule("gone", "confusion/ja", "absent"),
        AlertRule("lost", "head/below_0.95", "absent", for_checks=2),
        AlertRule("many", "alerts/firing", ">", 0),
    ]
    machine = AlertMachine(rules)
    assert machine.update(10, {"vocabguard/head/below_0.95": 0.0}) == ()
    scalars = {"vocabguard/confusion/ja": 0.47, "vocabguard/confusion/ko": 0.0, "vocabguard/confusion/foreign": 0.9}
    [change] = machine.update(10, scalars, evaluation=True)
    assert change.parts == {"ja": 0.47}
    assert "confusion/* is over 0.1 in 1 language: ja 0.47, since step 10." in change.message
    assert machine.firing == ("answers",)
    assert [one.rule for one in machine.update(20, {"head/below_0.95": 0.5})] == ["head", "many"]
    assert [one.rule for one in machine.update(20, {"confusion/ko": 0.0}, evaluation=True)] == ["gone"]


# -- requests ----------------------------------------------------------------------------------------------------------


def test_the_trainer_is_asked_once_when_a_rule_begins_to_fire():
    rules = [by_group(actions=("stop", "log", "checkpoint"), remind_steps=5), by_group(name="other", threshold=0.5)]
    machine = AlertMachine(rules)
    asked = [
        machine.requests(machine.update(step, shares(ja=value))) for step, value in ((1, 0.2), (9, 0.2), (10, 0.0))
    ]
    assert asked == [("checkpoint", "stop"), (), ()]
    assert machine.requests(machine.update(20, shares(ja=0.9))) == ("checkpoint", "stop")


# -- states ------------------------------------------------------------------------------------------------------------


def test_states_of_other_versions_load():
    machine = AlertMachine([by_group(name="plain", metric="head/below_0.95", remind_steps=10), by_group()])
    old = {
        "plain": {"metric": "vocabguard/head/below_0.95", "state": "firing", "checks": 0, "since": 30, "resolved": None}
    }
    machine.load_state_dict(old)
    assert machine.firing == ("plain",)
    later = {"groups": {"metric": "vocabguard/head/*/below_0.95", "mood": 3, "told": ["ja"], "told_at": 7,
             "parts": {"ja": {"state": "firing", "since": 5, "colour": "red"}}}}  # fmt: skip
    machine.load_state_dict(later)
    assert machine.firing == ("groups",)
    assert machine.update(20, shares(ja=0.3)) == ()
    machine.load_state_dict(machine.state_dict())
    [change] = machine.update(30, shares(ja=0.0))
    assert (change.state, change.since) == ("resolved", 5)


# -- keys and what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "expected", "part"),
    [
        ("head/*/cosine_min", (-1.0, 1.0), "*"),
        ("forecast/below_0.95", (0.0, 1.0), None),
        ("vocabguard/forecast/ja/rows", (0.0, math.inf), "ja"),
        ("forecast/cosine_mean", (-1.0, 1.0), None),
        ("exposure/targets", (0.0, math.inf), None),
        ("probe/*/retained", (0.0, 1.0), "*"),
        ("confusion/ja", (0.0, 1.0), "ja"),
        ("confusion/*", (0.0, 1.0), "*"),
        ("confusion/*/line_pass", (0.0, 1.0), "*"),
        ("confusion/foreign", (0.0, 1.0), None),
        ("confusion/line_pass", (0.0, 1.0), None),
    ],
)
def test_keys(metric, expected, part):
    assert metric_range(metric) == expected
    assert part_of(metric) == part


def test_parts_of_a_key():
    scalars = {"probe/ja/retained": 0.5, "probe/retained": 0.6, "probe/never/retained": 0.1, "head/ja/below_0.95": 0.3}
    assert values_by_part("vocabguard/probe/*/retained", scalars) == {"ja": 0.5}
    answers = {"confusion/ja": 0.1, "confusion/foreign": 0.2, "confusion/ja/latin": 0.3, "confusion/line_pass": 0.4}
    assert values_by_part("confusion/*", answers) == {"ja": 0.1}
    assert values_by_part("confusion/*/latin", answers) == {"ja": 0.3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "firing"}, "name is 'firing'; allowed: another"),
        ({"metric": "head/*"}, "metric is 'head/\\*', which is never logged"),
        ({"metric": "confusion/jp"}, "metric is 'confusion/jp', which is never logged; did you mean"),
        ({"metric": "forecast/below_0.9"}, "did you mean 'forecast/below_0.95'"),
        ({"op": "absent"}, "threshold is 0.1; allowed: 0.0, since the rule is absent"),
        ({"op": "unchanged", "threshold": 0.0, "resolve_at": 0.1}, "resolve_at is 0.1; allowed: None"),
        ({"op": "absent", "threshold": 0.0, "change": "difference"}, "change is 'difference'; allowed: None"),
        ({"change": "doubled"}, r"change is 'doubled'; allowed: one of \['ratio', 'difference'\], or none"),
        ({"change": "ratio", "threshold": 2.0}, r"floor is None; allowed: \(0, 1\], the range of head/\*/below_0.95"),
        ({"change": "ratio", "threshold": 2.0, "floor": 0.0}, r"floor is 0.0; allowed: \(0, 1\]"),
        (
            {"change": "ratio", "threshold": 0.5, "floor": 0.1},
            "one that does not always fire; a ratio of .* nothing changes",
        ),
        ({"change": "difference", "threshold": -0.1}, "one that does not always fire"),
        ({"change": "difference", "threshold": 1.0}, "one that can fire"),
        (
            {"change": "difference", "threshold": 1.5},
            r"threshold is 1.5; allowed: \[-1, 1\], the range of a difference",
        ),
        (
            {"metric": "head/cosine_mean", "change": "ratio", "floor": 0.1},
            "'difference', since head/cosine_mean can be neg",
        ),
        ({"over_checks": 2}, "over_checks is 2; allowed: 1 where there is no change"),
        ({"floor": 0.1}, "floor is 0.1; allowed: none where there is no change"),
        ({"over_checks": 0, "change": "difference"}, "over_checks is 0; allowed: at least 1"),
        ({"latch": True, "resolve_at": 0.05}, "resolve_at is 0.05; allowed: none, since the rule is latched"),
        ({"min_rows": -1}, "min_rows is -1; allowed: at least 0"),
        ({"metric": "head/below_0.95", "min_rows": 5}, r"min_rows is 5; allowed: 0, since head/below_0.95 has no '\*'"),
        ({"metric": "head/ja/below_0.95", "retell_steps": 5}, "retell_steps is 5; allowed: 0"),
        (
            {"actions": ("halt",)},
            "actions is .*allowed: a tuple of 'log', 'echo', 'hold', 'checkpoint', 'stop' and call",
        ),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        by_group(**options)


@pytest.mark.parametrize("metric", ["loss/data", "echo/dose"])
def test_a_change_of_a_count_has_no_end(metric):
    assert AlertRule("rule", metric, ">", 100.0, change="difference").over(101.0)
    with pytest.raises(ValueError, match=r"allowed: \(-inf, inf\)"):
        AlertRule("rule", metric, ">", math.inf, change="difference")


def test_languages_must_be_asked_in():
    rules = [AlertRule("any", "confusion/*", ">", 0.1), AlertRule("one", "confusion/ja", ">", 0.1)]
    require_parts(rules, ["ja"], ["ja", "ko"])
    with pytest.raises(ValueError, match=r"'one': metric is 'confusion/ja'; no part 'ja'\. Allowed: ko, zh"):
        require_parts(rules, ["ja"], ["ko", "zh"])
    with pytest.raises(
        ValueError, match=r"'any': metric is .* no questions are asked; allowed with it: confusion\.enabled: true"
    ):
        require_parts(rules, ["ja"])
