import math
import re

import pytest

from vocabguard.alerts.rules import AlertRule, metric_range, require_parts

COSINE, SHARE, COUNT, NATS = (-1.0, 1.0), (0.0, 1.0), (0.0, math.inf), (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("head/cosine_mean", COSINE),
        ("vocabguard/head/cosine_min", COSINE),
        ("embedding/residual_p01", COSINE),
        ("head/ja/cosine_p01", COSINE),
        ("head/below_0.95", SHARE),
        ("vocabguard/embedding/1-4/below_0.90", SHARE),
        ("head/nonfinite_rows", COUNT),
        ("embedding/20+/zero_rows", COUNT),
        ("exposure/never", SHARE),
        ("exposure/20+", SHARE),
        ("exposure/push_share", SHARE),
        ("probe/retained", SHARE),
        ("probe/never/retained", SHARE),
        ("probe/watch", SHARE),
        ("probe/probability_mean", SHARE),
        ("recall/nats", (-math.inf, 0.0)),
        ("recall/never/nats", (-math.inf, 0.0)),
        ("recall/agreement", COSINE),
        ("reference/nll", COUNT),
        ("reference/nll_rise_high", NATS),
        ("reference/rare_rise_low", NATS),
        ("reference/1-4/nll_rise", NATS),
        ("reference/ja/nll_rise_low", NATS),
        ("reference/watch/nll_rise", NATS),
        ("reference/never/targets", COUNT),
        ("overhead", SHARE),
        ("vocabguard/alerts/firing", COUNT),
    ],
)
def test_every_logged_key_has_its_own_range(metric, expected):
    assert metric_range(metric) == expected


@pytest.mark.parametrize(
    ("metric", "close"),
    [
        ("head/below_95", "head/below_0.95"),
        ("head/ja/below_.95", "head/ja/below_0.95"),
        ("heads/cosine_min", "head/cosine_min"),
        ("vocabguard/probe/retaine", "probe/retained"),
        ("exposure/20", "exposure/20+"),
        ("probe/ja/watch", "probe/watch"),
        ("overheads", "overhead"),
        ("reference/rare_rise_lo", "reference/rare_rise_low"),
        ("recall/ja/nat", "recall/ja/nats"),
        ("reference/ja/nll_rises", "reference/ja/nll_rise"),
    ],
)
def test_a_typo_is_refused_with_the_closest_key(metric, close):
    with pytest.raises(ValueError, match=rf"'{re.escape(metric)}'.*did you mean '{re.escape(close)}'\?"):
        metric_range(metric)


@pytest.mark.parametrize(
    "metric", ["", "head", "head/", "/below_0.95", "head//below_0.95", "head/a/b/below_0.95", "loss"]
)
def test_what_is_no_key_is_refused(metric):
    with pytest.raises(ValueError, match="never logged"):
        AlertRule("rule", metric, ">", 0.5)


@pytest.mark.parametrize("op", [">", ">=", "<", "<="])
@pytest.mark.parametrize("metric", ["head/cosine_min", "head/below_0.95", "head/nonfinite_rows"])
@pytest.mark.parametrize("threshold", [-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
def test_a_threshold_is_taken_only_where_it_can_fire_and_can_be_quiet(op, metric, threshold):
    low, high = metric_range(metric)
    values = [low, low + 1e-3, 0.0, 0.5, 0.5 + 1e-3, 1.0 - 1e-3, min(high, 1e9)]
    compare = {">": float.__gt__, ">=": float.__ge__, "<": float.__lt__, "<=": float.__le__}[op]
    useful = low <= threshold <= high and len({compare(value, threshold) for value in values}) == 2
    if useful:
        assert AlertRule("rule", metric, op, threshold).threshold == threshold
    else:
        with pytest.raises(ValueError, match=rf"'rule': threshold is {threshold}; allowed: "):
            AlertRule("rule", metric, op, threshold)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"op": "=>"}, r"op is '=>'; allowed: one of \['>', '>=', '<', '<=', 'absent', 'unchanged'\]"),
        ({"level": "fatal"}, r"level is 'fatal'; allowed: one of \['info', 'warning', 'critical'\]"),
        ({"for_checks": 0}, "for_checks is 0; allowed: at least 1"),
        ({"cooldown_steps": -1}, "cooldown_steps is -1; allowed: at least 0"),
        ({"name": " "}, "name is ' '; allowed: any text"),
        ({"threshold": math.nan}, r"threshold is nan; allowed: \[0, 1\], the range of head/below_0.95"),
        ({"threshold": math.inf}, "threshold is inf"),
        ({"threshold": 1.0}, "one that can fire"),
        ({"op": ">=", "threshold": 0.0}, "one that does not always fire"),
        ({"resolve_at": 0.02}, r"resolve_at is 0.02; allowed: \[0, 0.01\], the safe side of > 0.01"),
        ({"resolve_at": -0.1}, "resolve_at is -0.1"),
        ({"resolve_at": math.nan}, "resolve_at is nan"),
        ({"op": "<", "resolve_at": 0.005}, r"resolve_at is 0.005; allowed: \[0.01, 1\]"),
        ({"actions": ("mail",)}, "actions is .*'mail'"),
        ({"actions": "log"}, "actions is 'log'"),
        ({"metric": "head/below_95"}, "alert rule 'rule': metric is 'head/below_95'"),
    ],
)
def test_a_wrong_field_is_refused_by_name_value_and_what_is_allowed(wrong, message):
    with pytest.raises(ValueError, match=message):
        AlertRule(**({"name": "rule", "metric": "head/below_0.95", "op": ">", "threshold": 0.01} | wrong))


def test_both_spellings_of_a_metric_are_one_key():
    short = AlertRule("rule", "head/below_0.95", ">", 0.01, actions=("log", print))
    full = AlertRule("rule", "vocabguard/head/below_0.95", ">", 0.01)
    assert short.key == full.key == "vocabguard/head/below_0.95"
    assert short.short == full.short == "head/below_0.95"


@pytest.mark.parametrize(
    ("op", "resolve_at", "safe", "unsafe"),
    [
        (">", None, [0.0, 0.5], [0.51]),
        (">=", None, [0.49], [0.5, 0.51]),
        ("<", None, [0.5, 1.0], [0.49]),
        ("<=", None, [0.51], [0.5, 0.49]),
        (">", 0.4, [0.4, 0.0], [0.41, 0.5, 0.51]),
        (">=", 0.0, [0.0], [0.001, 0.5]),
        (">=", 0.5, [0.49], [0.5]),
        ("<", 0.6, [0.6, 1.0], [0.59, 0.5, 0.49]),
        ("<=", 1.0, [1.0], [0.99]),
    ],
)
def test_a_value_is_safe_at_resolve_at_and_beyond_but_never_while_over(op, resolve_at, safe, unsafe):
    rule = AlertRule("rule", "probe/retained", op, 0.5, resolve_at=resolve_at)
    assert all(rule.safe(value) for value in safe)
    assert not any(rule.safe(value) for value in unsafe)


def test_parts_must_be_the_tokenizers():
    fine = [AlertRule(f"rule_{part}", f"head/{part}/below_0.95", ">", 0.1) for part in ("ja", "never", "20+")]
    require_parts([*fine, AlertRule("whole", "head/below_0.95", ">", 0.1)], ["ja", "latin"])
    with pytest.raises(
        ValueError, match=r"'greek': metric is 'probe/latn/retained'; no part 'latn'; did you mean 'latin'\?"
    ):
        require_parts([*fine, AlertRule("greek", "probe/latn/retained", "<", 0.9)], ["ja", "latin"])
