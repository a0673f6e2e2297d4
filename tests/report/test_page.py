"""The report page from run folders: what it says, what it draws, and that nothing in a run can break out of it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import safetensors.torch
import torch
from parsed_page import Page

from vocabguard.report.charts import Plot, exposure_figure, histograms, polyline, thinned, ticks, timelines
from vocabguard.report.compare import compare
from vocabguard.report.data import PageData, run_data
from vocabguard.report.limits import Limits
from vocabguard.report.page import render, write_report
from vocabguard.report.sentences import as_json, key_numbers, verdict_of
from vocabguard.runlog import RunLog

HOSTILE = 12


@pytest.fixture
def data(make_run) -> PageData:
    return run_data(make_run())


def test_nothing_of_a_run_becomes_markup(make_run):
    page = render(run_data(make_run(echo=True)))
    clean = render(run_data(make_run("clean", echo=True), text=lambda token: f"plain {token}"))
    found, expected = Page(page), Page(clean)
    assert [tag for tag, _ in found.elements] == [tag for tag, _ in expected.elements]
    names = {name for _, attributes in found.elements for name in attributes}
    assert not {name for name in names if name.startswith("on")}
    assert "style" not in names
    assert len(found.of("script")) == len(found.of("style")) == 1
    assert "49" not in found.texts["bdi"]
    assert "<i>note</i>" in found.text
    assert "<u>lost</u>: 語." in found.text


def test_every_hostile_token_is_shown_as_it_reads(data):
    shown = Page(render(data)).texts["bdi"]
    for text in ("<script>alert(1)</script>", "{{7*7}}", "{%␣raw␣%}", "\\u202eevil\\u2066", "\\udc80", "\\x00", "<!--"):
        assert text in shown
    assert '"␣onmouseover="alert(1)' in shown


@pytest.mark.parametrize("name", ["\udcff", "\u202e", "\0"])
def test_unsafe_characters_anywhere_become_escapes(data, name):
    page = render(replace(data, name=f"run{name}", about=(f"about {name}",), firing=(name,)))
    page.encode("utf-8")
    assert name not in page
    assert name.encode("unicode_escape").decode() in page


def test_the_policy_allows_this_script_and_style_and_nothing_else(data):
    page = render(data)
    policy = next(one["content"] for one in Page(page).of("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ")
    for tag in ("script", "style"):
        (inner,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy


def test_the_page_refers_to_nothing_outside(data):
    elements = Page(render(data)).elements
    links = [value for _, attributes in elements for name, value in attributes.items() if name in ("href", "src")]
    assert [link for link in links if not link.startswith("#")] == ["data:,"]
    assert "http" not in re.sub(r'http-equiv="', "", render(data))


def test_headings_tables_and_figures_are_named(data):
    page = Page(render(data))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert len(page.of("caption")) == len(page.of("table"))
    assert len(page.of("figcaption")) == len(page.of("figure")) > 5
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = [attributes["aria-labelledby"] for _, attributes in page.elements if "aria-labelledby" in attributes]
    assert set(named) <= set(ids)
    assert page.of("html")[0]["lang"] == "en"
    assert any(one.get("name") == "viewport" for one in page.of("meta"))


def test_the_verdict_says_what_was_lost_and_where(data):
    verdict = verdict_of(data, Limits())
    assert verdict.level == "lost"
    assert verdict.sentence.startswith("30.0 % of the probed tokens that the base repeats are lost (a probe of 40")
    below = sum(value < 0.95 for value in np.linspace(0.5, 1, 90)[:86])  # the 87th is NaN
    assert f"{below:,} of 87 live head rows" in verdict.sentence
    assert "hit hardest Latin 50.0 %" in verdict.sentence
    assert len(verdict.findings) == 2


def test_broken_rows_are_a_finding(data):
    broken = replace(data, scalars=data.scalars | {"head/nonfinite_rows": 1.0})
    verdict = verdict_of(broken, Limits(1, 1))
    assert verdict.level == "lost"
    assert verdict.sentence.endswith("; 1 live row holds NaN or Inf.")


@pytest.mark.parametrize(
    ("limits", "level"),
    [(Limits(1, 0.29), "lost"), (Limits(0.5, 0.31), "drifted"), (Limits(1, 0.31), "fine"), (Limits(1, 1), "fine")],
)
def test_limits_decide_the_level(data, limits, level):
    assert verdict_of(data, limits).level == level


def test_a_run_that_lost_nothing_says_so(make_run):
    verdict = verdict_of(run_data(make_run(worst=0.96, missed=0)), Limits())
    assert verdict.level == "fine"
    assert verdict.sentence == (
        "No loss found: all probed tokens that the base repeats are still repeated (a probe of 40 tokens); "
        "no live head row is below cosine 0.95."
    )


def test_a_run_without_checks_is_no_error(make_run):
    log = make_run()
    for name in ("checks.jsonl", "alerts.jsonl", "rows-20.safetensors"):
        (log.folder / name).unlink()
    data = run_data(log)
    assert verdict_of(data, Limits()).level == "unknown"
    assert "No check was logged" in Page(render(data)).text


def test_a_run_without_rows_shows_what_its_checks_name(make_run):
    data = run_data(make_run(rows=False))
    page = Page(render(data))
    assert histograms(data) == ()
    assert exposure_figure(data) is None
    assert "<script>alert(1)</script>" in page.texts["bdi"]
    assert data.sizes == {}


def test_key_numbers_count_and_leave_out_what_is_unknown(data):
    numbers = dict(key_numbers(data))
    assert numbers["live tokens"] == "87"
    assert numbers["retained"] == "70.0 %"
    assert numbers["never a target"] == "4.6 % (4)"
    assert numbers["alerts firing"] == "1"
    bare = replace(data, table=(), scalars={}, kind="scan")
    assert dict(key_numbers(bare)) == {"live tokens": "87"}


def test_the_tokens_lost_come_first_then_the_lowest_then_the_watched(data):
    ids = [line.report.id for line in data.tokens]
    assert ids[:12] == list(range(12))
    assert ids[12:86] == list(range(12, 86))
    assert [line.report.id for line in data.tokens if line.watched] == [70]
    few = run_data(RunLog.open(data.name), top=6)
    assert [line.report.id for line in few.tokens] == [0, 1, 2, 3, 4, 5, 70]
    assert [line.said for line in few.tokens] == [False] * 6 + [None]


def test_where_the_base_is_logged_its_own_misses_are_not_lost(make_run):
    log = make_run()
    rows = log.rows()
    at_base = torch.ones(40, 2, dtype=torch.bool)
    at_base[:5] = False
    at_base[5:8, 1] = False  # one of two contexts is not most of them
    safetensors.torch.save_file(
        rows | {"probe/base_said": at_base}, log.folder / "rows-20.safetensors", {"attempt": "0"}
    )
    data = run_data(log)
    assert data.probed is not None
    assert data.probed.ids[data.probed.lost].tolist() == [8, 9, 10, 11]
    assert "4 of 32 probed tokens that the base repeats are lost" in verdict_of(data, Limits()).sentence
    assert "may be as old as the base" not in render(data)
    assert "may be as old as the base" in render(run_data(make_run("other")))


def test_what_is_known_of_a_token_comes_from_its_row(data):
    report = next(line.report for line in data.tokens if line.report.id == 20)
    assert (report.group, report.exposure_class, report.data_target, report.steps_since_target) == (
        "latin",
        "5-19",
        5,
        16,
    )
    assert report.cosine == pytest.approx(np.linspace(0.5, 1, 90)[20], abs=1e-6)
    lost = next(line.report for line in data.tokens if line.report.id == 2)
    assert lost.said_instead == "</script><img src=x onerror=alert(1)>"
    assert lost.probability == pytest.approx((4 / 79 + 5 / 79) / 2, abs=1e-6)


def test_the_last_probe_stands_where_the_last_check_had_none(make_run):
    log = make_run()
    lines = (log.folder / "checks.jsonl").read_text("utf-8").split("\n")
    (log.folder / "checks.jsonl").write_text("\n".join(lines[:2]) + "\n", "utf-8")
    data = run_data(log)
    assert (data.step, data.probe_step) == (10, 0)
    assert data.scalars["head/cosine_min"] == pytest.approx(0.75)


def test_histograms_hold_every_live_row_once_and_split_at_the_bar(data):
    cosine, live = np.linspace(0.5, 1, 90), np.arange(90) < 86
    figures = {figure.title: figure for figure in histograms(data)}
    assert set(figures) == {"all live tokens, 86", "Latin, 30", "ja, 30", "Thai, 26"} - {"ja, 30"} | {"Japanese, 30"}
    for name, mask in (("all live tokens, 86", live), ("Latin, 30", live & (np.arange(90) < 30))):
        bars = [mark for mark in figures[name].marks if mark.kind == "rect"]
        counts = [int(bar.title.split(": ")[1].split()[0]) for bar in bars]
        low = sum(count for count, bar in zip(counts, bars, strict=True) if "low" in bar.style)
        assert sum(counts) == mask.sum()
        assert low == (cosine[mask] < 0.95).sum()


def test_the_exposure_figure_gives_the_quantiles_of_each_bin(data):
    figure = exposure_figure(data)
    assert figure is not None
    cosine, targets = np.linspace(0.5, 1, 90)[:86], (np.arange(90) // 4)[:86]
    for low, high, label in ((0, 1, "0"), (2, 5, "2-4"), (10, 20, "10-19")):
        median = np.median(cosine[(targets >= low) & (targets < high)])
        assert f"{label} targets: median cosine {median:.4f}" in figure.text
    assert not [mark for mark in figure.marks if mark.x < 0 or mark.y < 0 or mark.x > figure.width]


def test_the_course_shows_what_was_logged(make_run):
    titles = [figure.title for figure in timelines(run_data(make_run("a")))]
    assert titles == [
        "Rows below cosine 0.95",
        "Retained, of what the base repeats",
        "Cosine to the base",
        "Live tokens by data targets so far",
    ]
    figures = {figure.title: figure for figure in timelines(run_data(make_run("b", echo=True)))}
    assert figures["Echo dose (echo targets a data target)"].text == "dose: 0 at step 0, 0.2 at step 20"
    assert "Training loss, nats a target" in figures
    alerts = [mark for mark in figures["Rows below cosine 0.95"].marks if "alert" in mark.style]
    assert [mark.title for mark in alerts] == ["step 20: <u>lost</u>: 語."]


def test_echo_is_shown_by_group(make_run):
    data = run_data(make_run(echo=True))
    assert dict(key_numbers(data))["answers that copy the question"] == "12.5 % of 16"
    assert as_json(data, Limits())["echo"]["copies"] == 0.125
    text = Page(render(data)).text
    assert "1,234 echo targets so far" in text
    assert re.search(r"Latin 1,000 33\.3", text)


def test_echo_of_a_run_without_rows_is_shown_without_shares(make_run):
    page = render(run_data(make_run(echo=True, rows=False)))
    assert "Echo targets by group" in page
    assert '<td class="n">-</td>' in page


def test_what_was_found_beside_the_checks_is_shown(make_run):
    data = run_data(make_run(beside=True))
    page = Page(render(data))
    assert [(one.kind, one.step) for one in data.beside] == [("confusion", 20), ("neighbors", 20), ("head_or_body", 20)]
    for sentence in (
        "Step 20: 8 answers in 2 languages: 25.0 % with foreign script (ja 50.0 % Cyrillic); lines pass 75.0 %.",
        "Step 20: 2 worst and watched tokens keep 50.0 % of their nearest rows; intruders among them: 2 then, 24 now.",
        "Step 20: of 12 lost tokens probed again, 9 (75.0 %) come back with the base's output row, "
        "3 (25.0 %) come back with no row (lost in the body)",
    ):
        assert sentence in page.text
    assert "ja 4 50.0 % Cyrillic 2 75.0 % - -" in page.text
    assert re.search(r"0 <script>alert\(1\)</script> Latin 50\.0 % .*\[Latin!\] 0\.50", page.text)
    assert page.texts["h3"][1:] == [  # the first is the alert's
        "Answers in many languages",
        "Nearest rows, then and now",
        "Where forgotten tokens were lost",
    ]
    assert dict(key_numbers(data))["answers with foreign script"] == "25.0 %"
    found = json.loads(json.dumps(as_json(data, Limits())))
    assert found["beside"].keys() == {"confusion", "neighbors", "head_or_body"}
    figures = {figure.title: figure for figure in timelines(data)}
    assert figures["Answers with foreign script"].text == (
        "mean of languages: 12.5 % at step 10, 25.0 % at step 20; ja: 25.0 % at step 10, 50.0 % at step 20"
    )
    assert "Beside the checks" not in render(run_data(make_run("none")))


def test_nothing_found_beside_becomes_markup(make_run):
    hostile = Page(render(run_data(make_run(beside=True))))
    plain = [f"plain {number}" for number in range(HOSTILE)]
    clean = Page(render(run_data(make_run("clean", beside=True, texts=plain), text=lambda token: f"plain {token}")))
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in clean.elements]
    assert not {name for _, attributes in hostile.elements for name in attributes if name.startswith("on")}
    # Each neighbour stands alone: a right-to-left text turns no other around.
    assert len([text for text in hostile.texts["bdi"] if text.endswith(" 0.50")]) == 2 + 2 * HOSTILE
    assert any(text.startswith("\\u202eevil\\u2066") for text in hostile.texts["bdi"])
    both = Page(render(run_data(make_run("a", beside=True)), run_data(make_run("b", beside=True))))
    assert "Beside the checks of A" in both.text
    assert "Beside the checks of B" in both.text


def test_two_runs_are_compared_token_by_token(make_run):
    first, second = run_data(make_run("a", worst=0.5, missed=12)), run_data(make_run("b", worst=0.9, missed=2))
    both = compare(first, second)
    a, b, live = np.linspace(0.5, 1, 90) < 0.95, np.linspace(0.9, 1, 90) < 0.95, np.arange(90) < 86
    every = both.splits[0]
    assert (every.only_first, every.only_second, every.both) == (
        (a & ~b & live).sum(), (b & ~a & live).sum(), (a & b & live).sum(),
    )  # fmt: skip
    assert [token.id for token in both.drifted[0]] == np.flatnonzero(a & ~b & live).tolist()
    assert both.drifted[1] == ()
    assert [token.id for token in both.unsaid[0]] == list(range(2, 12))
    assert both.settings == (("run.name", "<b>a</b>", "<b>b</b>"),)
    page = Page(render(first, second))
    assert "Two runs compared" in page.text
    assert f"{every.only_first} only in A, 0 only in B, {every.both} in both" in page.text
    assert "run A" in page.text


def test_runs_of_other_vocabularies_are_not_matched(make_run):
    first, second = run_data(make_run("a")), run_data(make_run("b"))
    assert second.rows is not None
    both = compare(first, replace(second, rows=replace(second.rows, group=second.rows.group[:-1])))
    assert "other vocabularies (90 and 89 rows)" in both.unmatched
    assert both.splits == ()
    assert compare(first, run_data(make_run("c", rows=False))).unmatched.startswith("Run B kept no rows")


@pytest.mark.parametrize(("what", "key"), [("base", "sha256"), ("tokenizer", "vocabulary")])
def test_files_about_another_base_or_tokenizer_are_not_matched(make_run, what, key):
    first, second = (run_data(make_run(name)) for name in "ab")
    told = [{what: {key: digest * 32}, "tuned": {"sha256": digest * 32}} for digest in ("ab", "cd")]
    both = compare(replace(first, evidence=told[0]), replace(second, evidence=told[1]))
    assert f"another {what} (abababababab and cdcdcdcdcdcd)" in both.unmatched
    assert both.splits == ()
    assert both.drifted == ((), ())
    # Other weights on the same base are what is compared, and what does not tell is not refused.
    for other in (told[0] | {"tuned": told[1]["tuned"]}, {}):
        assert compare(replace(first, evidence=told[0]), replace(second, evidence=other)).unmatched == ""


def test_json_holds_the_verdict_and_the_rows(data):
    found = json.loads(json.dumps(as_json(data, Limits()), allow_nan=False))
    assert found["level"] == "lost"
    assert found["live"] == 87
    assert found["groups"]["latin"]["tokens"] == 30
    assert found["groups"]["latin"]["below_0.95"] == 1.0
    assert found["retained"] == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("checks.jsonl", b"5\n{}\n"),
        ("checks.jsonl", b'{"step": 1}\n'),
        ("checks.jsonl", b"{torn\n{}\n"),
        ("rows-20.safetensors", b""),
        ("rows-20.safetensors", b"\xff" * 64),
        ("run.json", b'{"schema": 1}'),
        ("confusion.jsonl", b'{"attempt": 0, "step": 20}\n'),
        ("neighbors.jsonl", b'{"attempt": 0, "step": 20, "id": 1}\n'),
        ("head_or_body.jsonl", b'{"attempt": 0, "step": 20, "forgotten": 0, "head": 1}\n'),
        ("run.json", b'{"schema": 1, "groups": ["a"], "watch": 5, "config": {}}'),
    ],
)
def test_a_damaged_folder_is_one_clear_error(make_run, name, content):
    folder = make_run().folder
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a run folder"):
        run_data(RunLog.open(folder))


def test_a_last_line_that_is_being_written_is_left_out(make_run):
    log = make_run()
    with (log.folder / "checks.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"attempt": 0, "st')
    assert run_data(log).step == 20


def test_the_page_is_replaced_whole_and_leaves_no_litter(make_run, tmp_path):
    page = tmp_path / "deep" / "page.html"
    assert write_report(make_run().folder, page) == page
    first = page.read_bytes()
    write_report(make_run("second"), page, limits=Limits(1, 1))
    assert page.read_bytes() != first
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]


def test_axes_are_round_and_lines_part_where_a_value_is_missing():
    assert ticks(0.0, 0.1) == [0.0, 0.025, 0.05, 0.075, 0.1]
    assert all(0.83 <= tick <= 0.97 for tick in ticks(0.83, 0.97))
    plot = Plot(100, 50, (0, 3), (0, 1), left=0, right=0, top=0, bottom=0)
    assert polyline(plot, [0, 1, 2, 3], [0, 1, float("nan"), 0.5]) == "M0.0 50.0L33.3 0.0M100.0 25.0"
    steps, values = thinned(list(range(5000)), [float(step) for step in range(5000)])
    assert (steps[0], steps[-1]) == (0, 4999)
    assert len(steps) <= 240
    assert values == [float(step) for step in steps]
