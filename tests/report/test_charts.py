"""Early warning on the report page: past and forecast of each group, and what the first sentence makes of them."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from parsed_page import Page

from vocabguard.files import read_lines
from vocabguard.report.charts import SHOWN, forecast_figures
from vocabguard.report.data import PageData, run_data
from vocabguard.report.limits import Limits
from vocabguard.report.page import render
from vocabguard.report.sentences import as_json, at_end, key_numbers, verdict_of
from vocabguard.results import Transition
from vocabguard.text import percent


def points(figure):
    """Series -> step -> what its point says."""
    found: dict[str, dict[int, str]] = {}
    for mark in figure.marks:
        if said := re.fullmatch(r"(.*), step (\d+): (.*)", mark.title):
            found.setdefault(said[1], {})[int(said[2])] = said[3]
    return found


def test_each_figure_has_the_past_and_what_was_forecast_at_each_check(make_run):
    log = make_run(end=40)
    figures = forecast_figures(run_data(log))
    # 0.6, 0.4 and 0.2 less a fifth: the worst forecast first.
    assert [figure.title for figure in figures] == ["all live tokens, 87", "Thai, 27", "Japanese, 30", "Latin, 30"]
    for figure, name in zip(figures, ("", "thai/", "ja/", "latin/"), strict=True):
        expected: dict[str, dict[int, str]] = {"head": {}, "forecast": {}}
        for check in log.checks():
            for owner, of_one in expected.items():
                of_one[check["step"]] = percent(check["scalars"][f"vocabguard/{owner}/{name}below_0.95"])
        found = points(figure)
        assert found["so far"] == expected["head"]
        assert found["forecast of the end, check by check"] == expected["forecast"]
        assert found["forecast for the end"] == {40: expected["forecast"][20]}
        assert (
            figure.note == f"{expected['head'][20]} so far; {expected['forecast'][20]} at the end, if nothing changes."
        )


def test_the_axis_goes_on_to_the_planned_end(make_run):
    (figure, *_) = forecast_figures(run_data(make_run(end=40)))
    (ahead,) = (mark for mark in figure.marks if mark.style == "line ahead")
    last = next(mark for mark in figure.marks if mark.title.startswith("so far, step 20"))
    assert (ahead.x, ahead.y) == (last.x, last.y)
    assert ahead.x2 == figure.width - 12
    assert ahead.x == pytest.approx((52 + ahead.x2) / 2, abs=0.1)


def test_a_run_at_its_end_says_how_early_it_was_told(make_run):
    data = run_data(make_run(end=20))
    (figure, *_) = forecast_figures(data)
    assert "forecast for the end" not in points(figure)
    assert not [mark for mark in figure.marks if "ahead" in mark.style]
    # A tenth of 20 steps is step 2; the first check from there on is that of step 10.
    end, early = (percent(data.curves["head/below_0.95"][1][place]) for place in (2, 1))
    assert figure.note == f"{end} in the end; at step 10 of 20: {early} so far, 40.0 % forecast."
    assert at_end(data) is None
    assert "at the end" not in verdict_of(data, Limits()).sentence


def test_groups_that_are_small_or_never_lose_a_row_have_no_figure(make_run):
    data = run_data(make_run(end=40))
    none = {f"{owner}/ja/below_0.95": ([0, 20], [0.0, 0.0]) for owner in ("head", "forecast")}
    calm = replace(data, curves=data.curves | none, sizes=data.sizes | {"thai": 19})
    assert [figure.title for figure in forecast_figures(calm)] == ["all live tokens, 87", "Latin, 30"]


def test_no_more_than_the_worst_groups():
    names = tuple(f"g{place:02}" for place in range(30))
    curves = {"forecast/below_0.95": ([0, 10], [0.1, 0.1])}
    for place, name in enumerate(names):
        # The later check counts, NaN says nothing.
        curves[f"forecast/{name}/below_0.95"] = ([0, 5, 10], [0.9 - place / 100, place / 100, float("nan")])
    data = PageData("run", "run", 10, (), names, "head", 10, (), curves=curves)
    titles = [figure.title for figure in forecast_figures(data)]
    assert titles == ["all live tokens", *(f"g{place:02}" for place in range(29, 29 - SHOWN, -1))]


def test_alerts_stand_in_the_figures_that_they_are_about(make_run):
    log = make_run(end=40)

    def news(rule, metric, step, state="firing", again=False, parts=()):
        return Transition(
            rule,
            state,
            "warning",
            f"vocabguard/{metric}",
            0.1,
            step,
            f"{rule} {step}",
            0,
            again,
            dict.fromkeys(parts, 0.5),
        )

    groups = "head/*/below_0.95"
    alerts = (
        news("whole", "forecast/below_0.95", 0), news("whole", "forecast/below_0.95", 10, again=True),
        news("groups", groups, 0, parts=["ja"]), news("groups", groups, 10, again=True, parts=["ja", "thai"]),
        news("groups", groups, 15, "resolved"), news("groups", groups, 20, parts=["ja"]),
        news("one", "head/latin/below_0.95", 10), news("other", "head/below_0.90", 10),
    )  # fmt: skip
    figures = forecast_figures(replace(run_data(log), alerts=alerts))
    lines = {f.title.split(",")[0]: [m.title.split(": ")[1] for m in f.marks if "alert" in m.style] for f in figures}
    assert lines == {
        "all live tokens": ["whole 0"], "Thai": ["groups 10"], "Japanese": ["groups 0", "groups 20"],
        "Latin": ["one 10"],
    }  # fmt: skip


def test_the_first_sentence_says_what_the_end_will_bring(make_run):
    data = run_data(make_run(end=40))
    verdict = verdict_of(data, Limits())
    rows = round(0.3 * 87)
    assert verdict.sentence.endswith(
        f"; by the forecast, {rows} of 87 live head rows (30.0 %) may be below 0.95 at the end (step 40), "
        "hit hardest Thai 60.0 %, Japanese 40.0 %."
    )
    assert dict(key_numbers(data))["below 0.95, forecast"] == f"30.0 % ({rows})"
    assert json.loads(json.dumps(as_json(data, Limits())))["forecast"] == {"below_0.95": pytest.approx(0.3), "step": 40}
    assert "tokens lost so far" in Page(render(data)).text
    # What is only forecast is no finding: exit codes are about what has happened.
    assert verdict.findings == verdict_of(run_data(make_run("none")), Limits()).findings


def test_nothing_lost_so_far_is_not_nothing_lost(make_run):
    verdict = verdict_of(run_data(make_run(worst=0.96, missed=0, end=40)), Limits())
    assert verdict.level == "fine"
    assert verdict.sentence.startswith("No loss found: all probed tokens that the base repeats are still repeated")
    assert "; by the forecast, 26 of 87 live head rows (30.0 %) may be" in verdict.sentence


def _as_before(log) -> None:
    """Checks as earlier versions wrote them, which did not say where the end is."""
    path = log.folder / "checks.jsonl"
    lines = read_lines(path)
    path.write_text(
        "".join(json.dumps({k: line[k] for k in line if k != "forecast"}) + "\n" for line in lines), "utf-8"
    )


@pytest.mark.parametrize(("end", "known"), [(20, 20), (40, None)])
def test_earlier_versions_did_not_say_where_the_end_is(make_run, end, known):
    log = make_run(end=end)
    _as_before(log)
    data = run_data(log)
    assert data.end == known
    assert (at_end(data) is None) == (end == 20)
    (figure, *_) = forecast_figures(data)
    assert not [mark for mark in figure.marks if "ahead" in mark.style]
    assert verdict_of(data, Limits()).sentence.count("may be below 0.95 at the end, hit hardest Thai") == (end == 40)
    render(data)


def test_a_run_without_a_forecast_says_why_and_shows_none(make_run):
    data = run_data(make_run())
    assert forecast_figures(data) == ()
    assert at_end(data) is None
    assert data.end is None
    page = Page(render(data))
    assert "Early warning" not in page.text
    assert "No forecast of the end: no <i>schedule</i> is known." in page.text
    assert "at the end, if" not in page.text
    assert as_json(data, Limits())["forecast"] is None


def test_a_run_whose_last_check_forecasts_no_more_says_so(make_run):
    log = make_run(end=40)
    path = log.folder / "checks.jsonl"
    lines = read_lines(path)
    lines[-1]["scalars"] = {key: value for key, value in lines[-1]["scalars"].items() if "forecast" not in key}
    lines[-1]["forecast"] = {"not_applicable": "the schedule was left"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    data = run_data(log)
    (figure, *groups) = forecast_figures(data)
    assert figure.note == "The last check made no forecast."
    assert len(groups) == 3
    assert "No forecast of the end: the schedule was left." in Page(render(data)).text
    assert "if nothing changes" not in verdict_of(data, Limits()).sentence


def test_a_scan_forecasts_nothing(make_run):
    data = replace(run_data(make_run(end=40)), kind="scan", step=None)
    assert at_end(data) is None
