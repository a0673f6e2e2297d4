import dataclasses
import itertools
import math
import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

from vocabguard.alerts.notify import transition_markdown
from vocabguard.results import (
    AlertStory,
    CheckResult,
    Finding,
    NotApplicable,
    Preflight,
    RowDrift,
    TokenReport,
    Transition,
    Watch,
    WatchedMatrix,
)
from vocabguard.text import large_groups, worst_markdown
from vocabguard.views.tensorboard import ALERTS_SHOWN, TensorBoardView, open_view
from vocabguard.vocabulary.table import VocabTable

ROWS = 1000
GONE = NotApplicable("the head is frozen")
SCALARS = {
    "vocabguard/head/below_0.95": 0.125,
    "vocabguard/head/ja/below_0.95": 0.5,
    "vocabguard/head/20+/below_0.95": 0.25,
    "vocabguard/probe/1-4/retained": 0.75,
    "vocabguard/alerts/firing": 1.0,
}
TOKEN = TokenReport(7, "嘉祺|", "zh", "1-4", 0.41234, 0.5, 3, 12, 40, 0.0321, "\n")
ALERT = Transition("slow", "firing", "warning", "vocabguard/overhead", 0.2, 40, "overhead is 0.2, over 0.1.")


@pytest.fixture
def table():
    """The last 100 rows are not live."""
    group = torch.zeros(ROWS, dtype=torch.uint8)
    every, none = torch.ones(ROWS, dtype=torch.bool), torch.zeros(ROWS, dtype=torch.bool)
    return VocabTable(group, none, every, torch.arange(ROWS) >= 900, every, ("",) * ROWS, ("latin",))


@pytest.fixture
def cosine():
    """Dense near 1 with NaN, exact bars, 1, and dead rows far below."""
    values = 1 - torch.rand(ROWS, generator=torch.Generator().manual_seed(3)) ** 6 * 1.5
    values[:5] = torch.tensor([float("nan"), 0.95, 0.90, 1.0, 1.0 + 1e-7])
    values[900:] = -0.9
    return values


def drift(cosine):
    rest, flags = torch.zeros_like(cosine), torch.zeros(len(cosine), dtype=torch.bool)
    return RowDrift(cosine, rest, rest, rest, flags, flags)


def check(step=40, head=GONE, embedding=GONE, **fields):
    classes = torch.zeros(ROWS, dtype=torch.uint8)
    fields = {"scalars": SCALARS} | fields
    return CheckResult(step, head, embedding, NotApplicable("off"), classes, None, **fields)


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0})
    return events.Reload()


def texts(events, tag):
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(f"{tag}/text_summary")]


def test_scalars_are_logged_under_exactly_their_keys(tmp_path, table):
    view = open_view(tmp_path / "new" / "folder", table=table)
    view.check(check())
    view.check(check(step=80, scalars={"vocabguard/head/below_0.95": 0.5}))
    view.close()
    events = read(tmp_path / "new" / "folder")
    assert set(events.Tags()["scalars"]) == set(SCALARS)
    for key, value in SCALARS.items():
        assert (events.Scalars(key)[0].step, events.Scalars(key)[0].value) == (40, value)
    assert [(e.step, e.value) for e in events.Scalars("vocabguard/head/below_0.95")] == [(40, 0.125), (80, 0.5)]


@pytest.mark.parametrize("name", ["head", "embedding"])
def test_histogram_counts_live_finite_rows(tmp_path, table, cosine, name):
    view = open_view(tmp_path, table=table)
    view.check(check(**{name: drift(cosine)}))
    view.close()
    events = read(tmp_path)
    assert events.Tags()["histograms"] == [f"vocabguard/{name}/cosine"]
    [event] = events.Histograms(f"vocabguard/{name}/cosine")
    shown = [min(value, 1.0) for value in cosine[:900].tolist() if not math.isnan(value)]
    histogram = event.histogram_value
    assert event.step == 40
    assert histogram.num == len(shown) == 899
    assert (histogram.min, histogram.max) == (min(shown), 1.0)
    assert histogram.sum == pytest.approx(sum(shown))
    assert histogram.sum_squares == pytest.approx(sum(value * value for value in shown))
    # Each bucket holds what lies from the limit before it up to its own; the last one holds 1 too.
    limits = [-1.0, *histogram.bucket_limit]
    naive = [sum(low <= value < high for value in shown) for low, high in itertools.pairwise(limits)]
    naive[-1] += shown.count(1.0)
    assert list(histogram.bucket) == naive
    assert sum(naive) == 899


def test_histogram_has_the_bars_among_its_limits(tmp_path, table, cosine):
    view = open_view(tmp_path, table=table)
    view.check(check(head=drift(cosine)))
    view.close()
    histogram = read(tmp_path).Histograms("vocabguard/head/cosine")[0].histogram_value
    for bar in (0.95, 0.90):
        place = next(i for i, limit in enumerate(histogram.bucket_limit) if abs(limit - bar) < 1e-7)
        below = int((cosine[:900] < bar).sum())
        assert sum(histogram.bucket[: place + 1]) == below


@pytest.mark.parametrize("case", ["switched off", "no live finite row", "not applicable"])
def test_no_histogram_where_there_is_nothing_to_show(tmp_path, table, cosine, case):
    if case == "no live finite row":
        cosine[:900] = float("nan")
    view = open_view(tmp_path, table=table, histogram=case != "switched off")
    view.check(check(head=GONE if case == "not applicable" else drift(cosine)))
    view.close()
    assert read(tmp_path).Tags()["histograms"] == []


def test_tokens_are_a_table_of_text_and_never_tags(tmp_path, table):
    watched = dataclasses.replace(TOKEN, id=8)
    view = open_view(tmp_path, table=table)
    view.check(check(worst=(TOKEN,) * 20, watched=(watched,)))
    view.check(check(step=80))
    view.close()
    events = read(tmp_path)
    assert texts(events, "vocabguard/worst") == [(40, worst_markdown((TOKEN,) * 20))]
    assert texts(events, "vocabguard/watched") == [(40, worst_markdown((watched,)))]
    assert len(events.Tags()["scalars"] + events.Tags()["tensors"]) == len(SCALARS) + 2


def test_last_text_of_the_alert_log_holds_the_story_newest_first(tmp_path, table):
    later = dataclasses.replace(ALERT, state="resolved", step=80, message="overhead is over.")
    also = dataclasses.replace(later, message="and this.")
    view = open_view(tmp_path, table=table)
    view.check(check(transitions=(ALERT,)))
    view.check(check(step=60))
    view.check(check(step=80, transitions=(later, also)))
    view.close()
    said = texts(read(tmp_path), "vocabguard/alert_log")
    assert [step for step, _ in said] == [40, 80]
    assert said[0][1] == transition_markdown(ALERT)
    assert said[1][1] == "\n\n".join(map(transition_markdown, (also, later, ALERT)))


def test_alert_log_is_bounded(tmp_path, table):
    view = open_view(tmp_path, table=table)
    many = [dataclasses.replace(ALERT, message=f"number {index}.") for index in range(ALERTS_SHOWN + 5)]
    view.check(check(transitions=tuple(many)))
    view.close()
    [(_, said)] = texts(read(tmp_path), "vocabguard/alert_log")
    assert said.count("number") == ALERTS_SHOWN
    assert f"number {ALERTS_SHOWN + 4}." in said
    assert "number 4." not in said


@pytest.fixture
def watch():
    head = WatchedMatrix("head", ROWS, 8, "float32", False, False, "a copy")
    counts = Preflight(torch.zeros(ROWS, dtype=torch.int64), 3, 12, True, 0.1)
    return Watch(head, GONE, None, counts, 900, 0, "runs/__a__")


def test_watch_is_text_of_step_0(tmp_path, table, watch):
    view = open_view(tmp_path, table=table)
    view.watch(watch)
    view.close()
    [(step, said)] = texts(read(tmp_path), "vocabguard/watch")
    assert step == 0
    assert "__a__" not in said  # it would be set in bold
    assert "900 &#40;100 &#37;&#41; are never a target in all 3 batches" in said
    assert len(said.splitlines()) == 6


def test_charts_take_in_groups_and_classes_apart(tmp_path, table, watch):
    view = open_view(tmp_path, table=table)
    view.watch(watch)
    view.close()
    [event] = read(tmp_path).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    keys = [*SCALARS, "vocabguard/head/never/below_0.95", "vocabguard/head/neverland/below_0.95"]
    keys += [
        "vocabguard/forecast/never/below_0.95",
        "vocabguard/forecast/ja/below_0.95",
        "vocabguard/forecast/below_0.95",
    ]
    charts = {
        chart.title: [key for key in keys if re.match(chart.multiline.tag[0], key)]
        for chart in layout.category[0].chart
    }
    assert charts == {
        "head rows below 0.95, by group": ["vocabguard/head/ja/below_0.95", "vocabguard/head/neverland/below_0.95"],
        "head rows below 0.95, by exposure class": [
            "vocabguard/head/20+/below_0.95",
            "vocabguard/head/never/below_0.95",
        ],
        "forecast of head rows below 0.95, by group": ["vocabguard/forecast/ja/below_0.95"],
        "retained, by group": [],
        "retained, by exposure class": ["vocabguard/probe/1-4/retained"],
    }
    ends = {chart.title.split(":")[0]: chart.margin.series[0] for chart in layout.category[1].chart}
    assert list(ends) == ["all", *large_groups(table)]
    for name, series in ends.items():
        inner = "" if name == "all" else f"{name}/"
        assert series.value == series.lower == f"vocabguard/head/{inner}below_0.95"
        assert series.upper == f"vocabguard/forecast/{inner}below_0.95"


def test_a_timeline_of_each_rule_and_the_story_of_its_alerts(tmp_path, table):
    story = AlertStory(what="412 rows <have> turned away.", tokens=("語",), advice=("echo.",))
    change = dataclasses.replace(ALERT, story=story)
    asked = dataclasses.replace(ALERT, rule="asked", state="resolved")
    view = open_view(tmp_path, table=table)
    slow, answers = ("vocabguard/alerts/slow", "vocabguard/alerts/asked")
    view.check(check(step=20, scalars={slow: 0.5}))
    view.check(check(step=40, scalars={slow: 1.0}, firing=("slow", "asked"), transitions=(change,)))
    view.finding(Finding("confusion", 50, (), "Answers.", scalars={answers: 0.0}, transitions=(asked,)))
    view.close()
    events = read(tmp_path)
    timeline = {rule: [(event.step, event.value) for event in events.Scalars(rule)] for rule in (slow, answers)}
    assert timeline == {slow: [(20, 0.5), (40, 1.0)], answers: [(50, 0.0)]}
    [(_, first), (step, last)] = texts(events, "vocabguard/alert_log")
    assert first.splitlines()[-3:] == ["- 412 rows &lt;have&gt; turned away.", "- Worst: 語", "- To do: echo."]
    assert step == 50
    assert last.startswith("**warning** resolved at step 40")


def test_a_trainers_writer_is_shared_and_left_open(tmp_path, table, watch):
    writer = SummaryWriter(str(tmp_path))
    view = TensorBoardView(writer, table=table)
    view.watch(watch)
    view.check(check())
    view.close()
    # A closed writer would open a second event file here.
    writer.add_scalar("train/loss", 1.0, 41)
    writer.close()
    assert len(list(tmp_path.iterdir())) == 1
    events = read(tmp_path)
    assert set(events.Tags()["scalars"]) == {*SCALARS, "train/loss"}
    assert "custom_scalars__config__" not in events.Tags()["tensors"]  # the trainer's own layout stands
