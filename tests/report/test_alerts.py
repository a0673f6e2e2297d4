"""Alerts on the report page: their stories, and the stretches in which they fired, against a count step by step."""

from __future__ import annotations

import json
import random

import pytest
from parsed_page import Page

from vocabguard.alerts import AlertMachine, AlertRule
from vocabguard.files import read_lines
from vocabguard.report.alerts import EARLIER, Span, alert_timeline, spans_of, told_of
from vocabguard.report.data import PageData, rules_of, run_data
from vocabguard.report.first import firing_advice
from vocabguard.report.page import render
from vocabguard.results import AlertStory, Transition
from vocabguard.runlog import RunLog


def news(rule, step, state="firing", since=None, again=False, level="warning", story=None):
    return Transition(
        rule, state, level, "vocabguard/head/below_0.95", 0.1, step, f"{rule} at {step}", since, again, story=story
    )


def page_of(alerts, step=100, end=None, **fields) -> PageData:
    return PageData("run", "run", step, (), ("latin",), "head", 10, (), alerts=tuple(alerts), end=end, **fields)


@pytest.mark.parametrize("seed", range(40))
def test_spans_are_the_states_that_the_machine_went_through(seed):
    chance = random.Random(seed)
    rule = AlertRule(
        "r", "head/below_0.95", ">", 0.5, for_checks=chance.choice((1, 2, 3)), resolve_at=0.4,
        cooldown_steps=chance.choice((0, 25)), remind_steps=chance.choice((0, 30)),
    )  # fmt: skip
    machine, changes, states = AlertMachine([rule]), [], {}
    for step in range(0, 400, 10):
        changes += machine.update(step, {"head/below_0.95": chance.random() ** 0.7})
        states[step] = machine.state_dict()["r"]["state"]
    spans = spans_of(changes, 390)
    firing = {step for step, state in states.items() if state == "firing"}
    inside = {
        s for s in states for span in spans if span.state == "firing" and span.start <= s < span.end + (not span.over)
    }
    assert inside == firing
    # Pending checks right before it fires, and no others: those that came to nothing are in no log.
    waited = set()
    for step in firing:
        before = step - 10
        while step - 10 not in firing and states.get(before) == "pending":
            waited.add(before)
            before -= 10
    assert {s for s in states for span in spans if span.state == "pending" and span.start <= s < span.end} == waited


def test_a_rule_whose_beginning_is_not_in_the_log_fired_since_its_trouble_began():
    assert spans_of([news("a", 50, since=20, again=True)], 90) == (Span("firing", 20, 90, over=False),)
    assert spans_of([news("a", 50, "resolved", since=20)], 90) == ()


def test_rules_that_fire_come_first_then_the_gravest():
    told = told_of(
        page_of(
            [
                news("over", 5, level="critical"), news("mild", 10), news("over", 20, "resolved", level="critical"),
                news("grave", 30, level="critical", since=20), news("odd", 35, level="shout"),
                news("mild", 90, again=True),
            ]
        )
    )  # fmt: skip
    assert [(one.rule, one.level, one.firing) for one in told] == [
        ("grave", "critical", True), ("mild", "warning", True), ("odd", "warning", True), ("over", "critical", False),
    ]  # fmt: skip
    assert [one.status for one in told] == [
        "fires since step 30 (trouble since step 20)", "fires since step 10", "fires since step 35",
        "fired at step 5, resolved at step 20",
    ]  # fmt: skip
    assert (told[1].newest.step, [change.step for change in told[1].earlier]) == (90, [10])


def test_a_rule_that_comes_back_says_how_often():
    steps = [(10, "firing"), (20, "resolved"), (40, "firing"), (60, "resolved")]
    (told,) = told_of(page_of([news("a", step, state) for step, state in steps]))
    assert told.status == "fired at step 40, resolved at step 60; 2 times in all"


def test_reminders_beyond_number_do_not_fill_the_page():
    (told,) = told_of(page_of([news("a", step, again=step > 0) for step in range(0, 5000, 10)]))
    assert [change.step for change in told.earlier] == list(range(4980, 4980 - 10 * EARLIER, -10))


def test_the_timeline_has_a_bar_for_each_stretch():
    data = page_of(
        [news("a", 40, since=20), news("a", 60, again=True), news("b", 70), news("a", 80, "resolved")], 100, 200
    )
    figure = alert_timeline(data, told_of(data))
    assert figure is not None
    bars = {mark.title: mark for mark in figure.marks if mark.kind == "rect"}
    assert set(bars) == {
        "b: firing from step 70 on, not resolved", "a: pending from step 20 to 40", "a: firing from step 40 to 80",
    }  # fmt: skip
    # 20 steps are as wide as 20 steps, on an axis that goes on to the planned end.
    wide = (figure.width - 24) / 180
    assert bars["a: pending from step 20 to 40"].x == pytest.approx(12, abs=0.1)
    for title, steps in (("a: pending from step 20 to 40", 20), ("a: firing from step 40 to 80", 40),
                         ("b: firing from step 70 on, not resolved", 30)):  # fmt: skip
        assert bars[title].x2 == pytest.approx(steps * wide, abs=0.2)
    assert [mark.title for mark in figure.marks if mark.style.startswith("mark")] == [
        "step 60: a at 60", "step 80: a at 80",
    ]  # fmt: skip
    assert "a (warning) fired at step 40, resolved at step 80" in figure.text
    assert alert_timeline(page_of([]), ()) is None


def test_what_begins_with_the_last_check_is_seen(make_run):
    data = run_data(make_run())
    figure = alert_timeline(data, told_of(data))
    assert figure is not None
    (bar,) = (mark for mark in figure.marks if mark.kind == "rect")
    assert bar.x2 >= 3
    assert bar.x + bar.x2 <= figure.width


def test_the_whole_story_is_on_the_page(make_run):
    log = make_run(told=True)
    page = Page(render(run_data(log)))
    story = log.alerts()[0].story
    assert story is not None
    for said in (story.what, story.where, story.since, story.outlook):
        assert " ".join(said.split()) in page.text
    items = [" ".join(text.lower().split()) for text in page.texts["li"]]
    assert [items.count(" ".join(said.lower().split())) for said in story.advice] == [1] * len(story.advice)
    at = page.texts["bdi"].index("bad")
    assert page.texts["bdi"][at : at + len(story.tokens) + 1] == ["bad", *story.tokens[:4], "\\u202eevil\\u2066"]
    assert "Fires since step 20 (trouble since step 10)." in page.text
    assert "<u>lost</u>: 語." in page.text


def test_nothing_of_a_story_becomes_markup(make_run):
    plain = [f"plain {number}" for number in range(12)]
    hostile = Page(render(run_data(make_run(told=True))))
    clean = Page(render(run_data(make_run("clean", told=True, texts=plain), text=lambda token: f"plain {token}")))
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in clean.elements]
    assert not {name for _, attributes in hostile.elements for name in attributes if name.startswith("on")}
    assert "49" not in hostile.texts["bdi"]


def test_news_without_a_story_says_its_message(make_run):
    page = Page(render(run_data(make_run())))
    assert "Fires since step 20. Reported at step 20: <u>lost</u>: 語." in page.text
    assert firing_advice(run_data(RunLog.open(make_run("other").folder))) == ()


def test_an_empty_story_leaves_no_headings():
    data = page_of([news("a", 10, story=AlertStory())])
    page = Page(render(data))
    assert not page.of("dt") or "where" not in page.texts["dt"]
    assert "a at 10" in page.text


def test_a_folder_of_an_earlier_version_opens(make_run):
    log = make_run(told=True, end=40)
    for name, new in (("alerts.jsonl", ("since", "again", "parts", "story")), ("checks.jsonl", ("forecast",))):
        lines = read_lines(log.folder / name)
        old = [json.dumps({key: line[key] for key in line if key not in new}) for line in lines]
        (log.folder / name).write_text("\n".join(old) + "\n", "utf-8")
    data = run_data(RunLog.open(log.folder))
    assert [(alert.story, alert.since) for alert in data.alerts] == [(None, None)]
    assert data.end is None
    assert "Reported at step 20: <u>lost</u>: 語." in Page(render(data)).text


@pytest.mark.parametrize("story", [5, ["what"], {"share": "much"}, {"tokens": 5}, {"rows": [1]}])
def test_a_damaged_story_is_one_clear_error(make_run, story):
    log = make_run(told=True)
    line = json.loads((log.folder / "alerts.jsonl").read_text("utf-8"))
    (log.folder / "alerts.jsonl").write_text(json.dumps({**line, "story": story}) + "\n", "utf-8")
    with pytest.raises(ValueError, match="cannot be read as a run folder"):
        run_data(log)


def test_rules_that_were_quiet_are_named():
    settings = {"alerts": {"bad": {"enabled": True}, "calm": {}, "off": {"enabled": False}, "odd": 5}}
    assert rules_of(settings) == ("bad", "calm")
    assert rules_of({}) == rules_of({"alerts": None}) == ()
    page = Page(render(page_of([news("bad", 10)], rules=("bad", "calm<b>"))))
    assert "Rules that never fired: calm<b>." in page.text
    assert "No alert fired. Rules that never fired: calm." in Page(render(page_of([], rules=("calm",)))).text


def test_two_runs_have_a_timeline_each(make_run):
    first, second = run_data(make_run("a", told=True, end=40)), run_data(make_run("b"))
    page = Page(render(first, second))
    assert [text for text in page.texts["figcaption"] if text == "Alerts over the steps"] == [
        "Alerts over the steps"
    ] * 2
    assert "Forecast of the end: rows below cosine 0.95" in page.texts["figcaption"]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
