"""What alerts tell a person: sentences against numbers counted by hand."""

import dataclasses
import json

import pytest

from vocabguard.alerts.text import ECHO_DOSE, Scene, alert_story
from vocabguard.config import load_config
from vocabguard.files import plain
from vocabguard.results import Transition

SCALARS = {
    "head/below_0.95": 0.05,
    "head/ja/below_0.95": 0.4,
    "head/ko/below_0.95": 0.125,
    "head/tiny/below_0.95": 1.0,
    "head/never/below_0.95": 0.9,
    "head/ja/cosine_mean": 0.91,
    "head/latin/cosine_mean": 0.99,
    "probe/retained": 0.8,
    "probe/ja/retained": 0.25,
    "probe/latin/retained": 1.0,
    "forecast/below_0.95": 0.2,
    "forecast/ja/below_0.95": 0.9,
    "forecast/ko/below_0.95": 0.25,
    "echo/targets_per_live_token": 0.4,
}
SCENE = Scene(
    scalars={f"vocabguard/{key}": value for key, value in SCALARS.items()},
    live=2000,
    rows={"ja": 100, "ko": 80, "latin": 1815, "tiny": 5, "never": 600, "1-4": 400, "5-19": 500, "20+": 500},
    unasked={"ja": 90, "ko": 40, "latin": 470, "tiny": 0, "never": 600, "1-4": 0, "5-19": 0, "20+": 0},
    targets=10_000,
    total=1000,
)
NO_FORECAST = dataclasses.replace(SCENE, scalars={k: v for k, v in SCENE.scalars.items() if "forecast" not in k})


def change(metric, value=0.05, parts=None, step=200, since=120):
    parts = parts or {}
    return Transition(
        "rule", "firing", "warning", f"vocabguard/{metric}", value, step, "It is bad.", since, parts=parts
    )


def test_degraded_rows():
    story = alert_story(change("head/below_0.95"), SCENE, ["語", "␣그"])
    assert story.what == (
        "100 of 2,000 live output rows (5.0 %) have turned away from the base model's: cosine below 0.95."
    )
    # Too few rows are no group to be named; exposure classes are none.
    assert story.where == "Most in Japanese 40 of 100 rows (40.0 %), Korean 10 of 80 rows (12.5 %)."
    assert (story.rows, story.share, story.tokens) == (100, 0.05, ("語", "␣그"))
    assert story.since == "Since step 120, 80 steps ago."
    assert story.outlook == (
        "If nothing is done, 400 of 2,000 live output rows (20.0 %) may be below 0.95 at the end (step 1,000); "
        "Japanese 90 of 100 rows (90.0 %), Korean 20 of 80 rows (25.0 %)."
    )
    # The data will have 10,000 / 200 x 1,000 targets.
    assert story.advice == (
        'turn protection on: VocabGuardCallback("protect") (about 5,000 extra target tokens, 10 % of your data).',
        "add data that contains Japanese and Korean tokens: 130 of 180 have never been a target.",
    )
    assert story.lines == (
        story.what, story.where, "Worst: 語  ␣그", story.since, story.outlook,
        *(f"To do: {one}" for one in story.advice),
    )  # fmt: skip


def test_what_echo_costs_is_that_of_the_preset():
    assert load_config("protect").echo.dose == ECHO_DOSE


def test_groups():
    parts = {"ja": 0.4, "ko": 0.125}
    story = alert_story(change("head/*/below_0.95", 0.4, parts), SCENE)
    assert story.what.startswith("50 of 180 live output rows in Japanese, Korean (27.8 %) have turned away")
    assert story.where == "In Japanese 40 of 100 rows (40.0 %), Korean 10 of 80 rows (12.5 %)."
    assert (story.rows, story.share) == (50, 50 / 180)
    assert story.outlook.endswith("; Japanese 90 of 100 rows (90.0 %), Korean 20 of 80 rows (25.0 %).")
    one = alert_story(change("embedding/ja/below_0.90", 0.4), SCENE)
    assert one.what == (
        "40 of 100 live input embedding rows in Japanese (40.0 %) have turned away from the base model's: "
        "cosine below 0.90."
    )
    assert one.where == alert_story(change("head/*/below_0.95", 0.4, {"ja": 0.4}), SCENE).where == ""


@pytest.mark.parametrize(("step", "said"), [(0, "before step 1"), (99, "after step 99"), (100, "")])
def test_a_forecast_before_a_tenth_of_the_run_is_an_early_estimate(step, said):
    what = alert_story(change("forecast/below_0.95", 0.2, step=step, since=step), SCENE).what
    assert what.startswith(f"Early estimate ({said}): 400 of 2,000" if said else "400 of 2,000")
    assert ("reliable from about 10 % of the run" in what) == bool(said)


def test_a_forecast():
    story = alert_story(change("forecast/below_0.95", 0.2), SCENE)
    assert story.what == (
        "400 of 2,000 live output rows (20.0 %) may be below cosine 0.95 to the base model's at the end (step 1,000), "
        "by the forecast."
    )
    assert story.where == "Most in Japanese 90 of 100 rows (90.0 %), Korean 20 of 80 rows (25.0 %)."
    assert story.outlook == ""
    assert story.advice[-1].startswith("add data that contains Japanese and Korean tokens: 130 of 180")
    assert alert_story(change("forecast/cosine_mean", 0.97), SCENE).what == (
        "The live output rows may end on average at cosine 0.9700 to the base model's."
    )


OTHER = [
    ("head/cosine_mean", 0.94, {}, "The live output rows are on average at cosine 0.9400 to the base model's.",
     "Lowest in Japanese 0.9100, Latin 0.9900."),
    ("head/*/residual_p01", 0.8, {"ja": 0.8}, "The live output rows in Japanese are beyond the shift that all "
     "rows share, in "
     "their worst hundredth at cosine 0.8000 to the base model's.", "Lowest in Japanese 0.8000."),
    ("head/nonfinite_rows", 3.0, {}, "3 live output rows hold NaN or infinity.", ""),
    ("exposure/never", 0.3, {}, "600 of 2,000 live tokens (30.0 %): never a target so far.", ""),
    ("exposure/targets", 0.0, {}, "No target has been counted in 200 steps: the guard sees no labels, and what it says "
     "of tokens that are never a target is not to be relied on.", ""),
    ("exposure/targets", 900.0, {}, "The data's targets counted so far stay at 900 from check to check: the guard sees "
     "no labels.", ""),
    ("probe/retained", 0.8, {}, "20.0 % of the probed tokens that the base repeats are lost.",
     "Lost most in Japanese 75.0 %."),
    ("probe/*/retained", 0.25, {"ja": 0.25}, "75.0 % of the probed tokens in Japanese that the base repeats are "
     "lost.", "Lost most in Japanese 75.0 %."),
    ("probe/watch", 0.5, {}, "50.0 % of the watched words that the base repeats are lost.",
     "Lost most in Japanese 75.0 %."),
    ("confusion/*", 0.47, {"ja": 0.47, "ko": 0.1}, "47.0 % of answers have letters of a script that is foreign to "
     "their language, worst in ja.", "In ja 47.0 %, ko 10.0 %."),
    ("confusion/foreign", 0.2, {}, "20.0 % of answers have letters of a script that is foreign to their language.", ""),
    ("confusion/line_pass", 0.6, {}, "60.0 % of answers keep to their language in every line.", ""),
    ("loss/data", 4.0, {}, "", ""),
    ("overhead", 0.2, {}, "", ""),
]  # fmt: skip


@pytest.mark.parametrize(("metric", "value", "parts", "what", "where"), OTHER)
def test_other_kinds(metric, value, parts, what, where):
    story = alert_story(change(metric, value, parts), SCENE)
    assert (story.what, story.where) == (what, where)
    assert (story.rows is None) == (not metric.startswith(("head/nonfinite", "exposure/never")))


def test_a_loss_of_rare_tokens_is_told_with_its_interval_and_its_size():
    scalars = {
        "rare_rise": 1.138, "rare_rise_low": 0.81, "rare_rise_high": 1.462, "ja/nll_rise": 2.5, "ko/nll_rise": -0.2,
        "latin/nll_rise": 0.4, "never/nll_rise": 3.0, "rare/targets": 1291.0, "frequent/targets": 363.0,
    }  # fmt: skip
    scene = dataclasses.replace(SCENE, scalars={f"vocabguard/reference/{key}": value for key, value in scalars.items()})
    story = alert_story(change("reference/rare_rise_low", 0.81), scene)
    assert story.what == (
        "Of the tokens that the base predicted in the reference text, those seen fewer than 5 times as a training "
        "target lost more than the others: their mean loss rose by 1.14 nats more (95 % interval over all checks so "
        "far: 0.81 to 1.46; 1,291 and 363 targets)."
    )
    assert story.where == "Mean loss rose most in Japanese +2.50, Latin +0.40 nats."
    assert (story.rows, story.share, story.outlook) == (None, None, "")
    assert story.advice == (
        "lower the learning rate, or train with LoRA: both change the body of the model less.",
        'turn protection on: VocabGuardCallback("protect") (about 5,000 extra target tokens, 10 % of your data).',
        "add data that contains Japanese and Latin tokens: 560 of 1,915 have never been a target.",
    )


def test_what_to_do_where_it_is_not_about_drift():
    [broken] = alert_story(change("head/nonfinite_rows", 3.0), SCENE).advice
    assert "go on from a checkpoint before step 120" in broken
    silent, loop, masked = alert_story(change("exposure/targets", 0.0), SCENE).advice
    assert "guard.observe_batch(batch) before each batch" in loop
    assert 'targets=lambda batch: (batch["input_ids"], batch["labels"])' in silent
    assert "VocabGuardCallback(hidden_labels=True)" in silent
    assert masked.startswith("otherwise all labels may be -100")
    [answers] = alert_story(change("confusion/*", 0.47, {"ja": 0.47}), SCENE).advice
    assert answers == "see in confusion.jsonl which scripts get in, and clean the data in ja of such mixtures."
    assert alert_story(change("loss/data", 3.0), SCENE).advice == ()


@pytest.mark.parametrize(
    ("echo", "hold", "said", "unsaid"),
    [
        ("absent", "absent", ["turn protection on"], ["stops the drift"]),
        (
            "armed",
            "armed",
            ['guard.switch("echo", True)', 'guard.switch("hold", True) stops the drift of 600 rows'],
            [],
        ),
        ("on", "absent", ["echo is on, 0.40 targets a live token", 'hold={"enabled": True} stops'], ["extra"]),
        ("on", "on", ["echo is on"], ["hold"]),
        ("absent", "on", ["turn protection on"], ["hold"]),
    ],
)
def test_what_to_do_goes_by_what_is_on(echo, hold, said, unsaid):
    story = alert_story(change("head/below_0.95"), dataclasses.replace(SCENE, echo=echo, hold=hold))
    advice = " ".join(story.advice)
    assert all(one in advice for one in said)
    assert not any(one in advice for one in unsaid)
    assert ("If nothing more is done" in story.outlook) == ("on" in (echo, hold))


def test_data_is_named_for_the_groups_that_were_forgotten():
    assert alert_story(change("probe/retained", 0.8), SCENE).advice[-1] == (
        "add data that contains Japanese tokens: 90 of 100 have never been a target."
    )


def test_what_is_not_known_is_not_said():
    assert alert_story(change("head/below_0.95"), NO_FORECAST).outlook == ""
    assert alert_story(change("head/below_0.95", step=1000), SCENE).outlook == ""
    bare = Scene({}, 2000)
    story = alert_story(change("head/below_0.95", step=0, since=0), bare)
    assert (story.where, story.outlook, story.since) == ("", "", "Since this check, at step 0.")
    assert story.advice == (
        'turn protection on: VocabGuardCallback("protect") (extra target tokens: 10 % of your data).',
    )
    assert alert_story(change("head/below_0.95", float("nan")), SCENE).rows == 0
    json.dumps(plain(story), allow_nan=False)
