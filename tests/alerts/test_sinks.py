import logging
import warnings

import pytest

from vocabguard.alerts.notify import dispatch, log_transition, run_actions, transition_markdown
from vocabguard.alerts.rules import AlertRule
from vocabguard.results import Transition


def transition(name="head_degraded", state="firing", level="warning", message="It is bad."):
    return Transition(name, state, level, "vocabguard/head/below_0.95", 0.034, 120, message)


def rule(*actions, name="head_degraded"):
    return AlertRule(name, "head/below_0.95", ">", 0.01, actions=actions)


@pytest.mark.parametrize(
    ("level", "state", "expected"),
    [
        ("info", "firing", logging.INFO),
        ("warning", "firing", logging.WARNING),
        ("critical", "firing", logging.CRITICAL),
        ("critical", "resolved", logging.INFO),
    ],
)
def test_the_level_becomes_the_loggers(caplog, level, state, expected):
    with caplog.at_level(logging.DEBUG, logger="vocabguard.alerts"):
        log_transition(transition(level=level, state=state, message="100 % of %s"))
    assert caplog.record_tuples == [("vocabguard.alerts", expected, "100 % of %s")]


def test_dispatch_runs_each_rules_own_actions_in_order(caplog):
    seen = []
    rules = [
        rule("log", lambda alert: seen.append(("a", alert.rule)), lambda alert: seen.append(("b", alert.rule))),
        rule(lambda alert: seen.append(("c", alert.rule)), name="other"),
        rule(name="silent"),
    ]
    dispatch(rules, [transition("other"), transition(), transition("silent"), transition("unknown")])
    assert seen == [("c", "other"), ("a", "head_degraded"), ("b", "head_degraded")]
    assert len(caplog.records) == 1


def test_what_fails_is_raised_after_all_others_ran(caplog):
    seen = []

    def fail(alert):
        raise KeyError(alert.rule)

    def also_fail(alert):
        raise OSError("no route")

    rules = [rule(fail, "log", also_fail, seen.append), rule(fail, seen.append, name="other")]
    first, second = transition(), transition("other")
    with pytest.raises(ExceptionGroup) as caught:
        dispatch(rules, [first, second])
    assert [type(error) for error in caught.value.exceptions] == [KeyError, OSError, KeyError]
    assert "alert rule 'other' at step 120" in caught.value.exceptions[2].__notes__[0]
    assert seen == [first, second]
    assert len(caplog.records) == 1


def test_one_rules_actions_alone():
    seen = []

    def fail(alert):
        raise OSError("no route")

    with pytest.raises(ExceptionGroup, match="actions of alert rule 'head_degraded' failed") as caught:
        run_actions(rule(fail, seen.append), transition())
    assert [str(error) for error in caught.value.exceptions] == ["no route"]
    run_actions(rule(seen.append), transition())
    assert seen == [transition(), transition()]


def test_an_interrupt_is_not_collected():
    def interrupt(alert):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dispatch([rule(interrupt)], [transition()])


@pytest.mark.parametrize("message", ["head/below_0.95 is 0.034", "a_b_c *x* | `y` [z](w)", "<b>1 > 0 & 2</b>"])
def test_tensorboard_shows_the_message_as_it_is(message):
    with warnings.catch_warnings():
        # TensorBoard's own vendored html5lib warns on import.
        warnings.simplefilter("ignore", DeprecationWarning)
        from tensorboard.plugin_util import markdown_to_safe_html
    html = markdown_to_safe_html(transition_markdown(transition(message=message, level="critical")))
    escaped = message.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert html.splitlines() == [
        "<p><strong>critical</strong> firing at step 120</p>",
        f"<p>{escaped}</p>",
    ]
