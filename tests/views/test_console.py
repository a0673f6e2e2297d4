import dataclasses
import io

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from tqdm import tqdm

from vocabguard.results import (
    AlertStory,
    CheckResult,
    Exposure,
    Finding,
    NotApplicable,
    Preflight,
    RowDrift,
    TokenReport,
    Transition,
    Watch,
    WatchedMatrix,
)
from vocabguard.text import nothing_found, preflight_sentences, verdict, watch_sentences
from vocabguard.views.console import ConsoleView
from vocabguard.vocabulary.table import VocabTable

NAMES = ("latin", "ja", "thai")
GONE = NotApplicable("the head is frozen")
KEYS = {
    "head/cosine_mean": 0.9741,
    "head/cosine_min": 0.6124,
    "head/below_0.95": 0.123,
    "head/below_0.90": 0.05,
    "head/ja/below_0.95": 0.41,
    "head/thai/below_0.95": 0.99,
    "head/never/cosine_mean": 0.8123,
    "exposure/never": 0.712,
}
SCALARS = {f"vocabguard/{key}": value for key, value in KEYS.items()}
TOKEN = TokenReport(190467, "嘉祺", "zh", "1-4", 0.41234, 0.5678, 3, 12, 40, 0.0321, " the")
ALERT = Transition("slow", "firing", "warning", "vocabguard/overhead", 0.2, 40, "slow: [red]overhead[/red] is 0.2.")


@pytest.fixture
def table():
    """30 latin, 25 ja, 5 thai tokens; the first latin one is not live."""
    group = torch.repeat_interleave(torch.arange(3), torch.tensor([30, 25, 5])).to(torch.uint8)
    every, none = torch.ones(60, dtype=torch.bool), torch.zeros(60, dtype=torch.bool)
    return VocabTable(group, torch.arange(60) == 0, every, none, every, ("",) * 60, NAMES)


@pytest.fixture
def watch():
    head = WatchedMatrix("head", 60, 8, "float32", False, False, "a copy in [bold]CPU[/bold] memory")
    counts = Preflight(torch.zeros(60, dtype=torch.int64), 3, 12, True, 0.1)
    return Watch(head, GONE, None, counts, 59, 0, "runs/a")


def check(scalars=SCALARS, head=None, exposed=False, **fields):
    values, flags = torch.zeros(60), torch.zeros(60, dtype=torch.bool)
    counts = torch.zeros(60, dtype=torch.int64)
    exposure = Exposure(counts, counts, counts, counts - 1, values, values, values, 0, float("nan"), 40)
    drift = head or RowDrift(values, values, values, values, flags, flags)
    classes = torch.zeros(60, dtype=torch.uint8)
    classes[-7:] = 3
    return CheckResult(40, drift, GONE, exposure if exposed else GONE, classes, None, scalars, **fields)


def console(width=120, **options):
    return Console(file=io.StringIO(), record=True, width=width, **options)


def printed(view, *calls, **options):
    """What a terminal would show, as plain lines without trailing spaces."""
    target = console(**options)
    for name, *arguments in calls:
        getattr(view(target), name)(*arguments)
    return [line.rstrip() for line in target.export_text().splitlines()]


def cells(lines, start):
    return next(line.split() for line in lines if line.strip().startswith(start))


def test_watch_prints_every_sentence_literally(table, watch):
    lines = printed(ConsoleView, ("watch", watch, table))
    text = " ".join(" ".join(lines).split())
    for sentence in (*watch_sentences(watch), *preflight_sentences(watch.preflight, table)):
        assert sentence in text
    assert lines[1].startswith("vocabguard  Head: 60 rows x 8")
    assert any(line.startswith("preflight   Of 59 live tokens 59 (100 %)") for line in lines)


def test_a_check_is_one_line_in_a_file_however_narrow(table):
    result = check(firing=("a", "b"))
    assert printed(ConsoleView, ("check", result), width=40) == [f"vocabguard {verdict(result)}"]


def test_small_groups_are_not_named_once_the_table_is_known(table, watch):
    target = console()
    view = ConsoleView(target)
    view.check(check())
    view.watch(watch, table)
    view.check(check())
    text = target.export_text()
    assert text.count("(Thai 99.0 %, Japanese 41.0 %)") == 1
    assert text.count("(Japanese 41.0 %)") == 1


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_in_a_terminal_a_line_wraps_beside_its_label_and_keeps_numbers_whole(width):
    lines = printed(ConsoleView, ("check", check()), width=width, force_terminal=True)
    assert lines[0].startswith("vocabguard  step 40: ")
    assert all(line.startswith(" " * 12) for line in lines[1:])
    assert not any(line.strip().startswith("%") for line in lines)
    assert " ".join(" ".join(lines).split()) == f"vocabguard {verdict(check())}"
    assert max(map(cell_len, lines)) <= width


@pytest.mark.parametrize(
    ("changes", "colour"),
    [
        ({"level": "info"}, "36"),
        ({"level": "warning"}, "33"),
        ({"level": "critical"}, "1;31"),
        ({"level": "critical", "state": "resolved"}, "32"),
    ],
)
def test_alerts_are_coloured_by_level_and_never_read_as_markup(changes, colour):
    target = console(force_terminal=True, color_system="standard")
    ConsoleView(target).check(check(transitions=(dataclasses.replace(ALERT, **changes),)))
    output = target.export_text(styles=True)
    assert f"\x1b[{colour}mslow: [red]overhead[/red] is 0.2.\x1b[0m" in output


def test_stories_are_told_and_what_they_share_only_once():
    story = AlertStory(what="412 rows [bold]turned[/bold].", tokens=("語",), outlook="All are lost.", advice=("echo.",))
    other = dataclasses.replace(story, what="80 rows turned.", advice=())
    alerts = [dataclasses.replace(ALERT, rule=str(number), story=one) for number, one in enumerate((story, other))]
    lines = printed(ConsoleView, ("check", check(transitions=(*alerts, dataclasses.replace(ALERT, state="resolved")))))
    told = [line.removeprefix("vocabguard ") for line in lines[1:]]
    assert [line.strip() for line in told] == [
        ALERT.message, "412 rows [bold]turned[/bold].", "Worst: 語", "All are lost.", "To do: echo.",
        ALERT.message, "80 rows turned.",
        ALERT.message,
    ]  # fmt: skip
    assert all(line.startswith("  ") for line in told if line.strip() != ALERT.message)
    asked = Finding("confusion", 40, (), "Answers.", transitions=(alerts[1],))
    assert [line.split()[1] for line in printed(ConsoleView, ("finding", asked))][:3] == ["step", "slow:", "80"]


def test_closing_table_in_the_reports_form(table):
    scalars = SCALARS | {"vocabguard/probe/retained": 0.831, "vocabguard/probe/ja/retained": 0.5}
    lines = printed(ConsoleView, ("finish", check(scalars, exposed=True), table))
    heading = next(line for line in lines if "tokens" in line)
    assert heading.split() == ["tokens", "mean", "min", "<", "0.95", "<", "0.90", "retained"]
    assert cells(lines, "all") == [
        "all",
        "live",
        "tokens",
        "59",
        "0.9741",
        "0.6124",
        "12.3",
        "%",
        "5.0",
        "%",
        "83.1",
        "%",
    ]
    assert cells(lines, "Japanese") == ["Japanese", "25", "-", "-", "41.0", "%", "-", "50.0", "%"]
    assert cells(lines, "Thai") == ["Thai", "5", "-", "-", "99.0", "%", "-", "-"]
    assert cells(lines, "never a target") == ["never", "a", "target", "52", "0.8123", "-", "-", "-", "-"]
    labels = [line.split()[0] for line in lines if line.startswith((" all", " Japanese", " Thai", " never"))]
    assert labels == ["all", "Thai", "Japanese", "never"]


def test_closing_table_without_a_probe_has_no_such_column(table):
    assert "retained" not in "\n".join(printed(ConsoleView, ("finish", check(), table)))


def test_closing_table_without_drift_says_why(table):
    lines = printed(ConsoleView, ("finish", check({"vocabguard/probe/retained": 0.5}, head=GONE), table))
    assert "row drift not applicable: the head is frozen" in "\n".join(lines)
    assert cells(lines, "all") == ["all", "live", "tokens", "59", "-", "-", "-", "-", "50.0", "%"]


def test_closing_tables_of_tokens_and_what_still_fires(table):
    watched = dataclasses.replace(TOKEN, id=5)
    lines = printed(ConsoleView, ("finish", check(worst=(TOKEN,), watched=(watched,), firing=("slow", "lost")), table))
    assert cells(lines, "190467") == ["190467", "嘉祺", "Chinese", "0.4123", "0.5678", "3", "12", "40", "0.032", "␣the"]
    titles = [line for line in lines if "tokens" in line and not line.startswith(" ")]
    assert titles == ["watched tokens", "worst tokens, by cosine"]
    assert lines[-2:] == ["vocabguard Still firing: slow, lost.", ""]


FINE = {
    "vocabguard/head/below_0.95": 0.0, "vocabguard/head/cosine_mean": 0.9998, "vocabguard/probe/retained": 1.0,
    "vocabguard/probe/known": 96.0, "vocabguard/probe/retained_low": 0.97,
}  # fmt: skip


def test_a_run_without_findings_ends_in_three_lines(table):
    lines = printed(ConsoleView, ("finish", check(FINE, worst=(TOKEN,)), table, ["Page: x/report.html", "Next: y"]))
    assert lines == [
        "vocabguard step 40: No loss found: all 96 sampled tokens that the base repeats are still repeated; up to "
        "3.0 % could be lost unseen. No live row of the head is below cosine 0.95 (mean 0.9998).",
        "vocabguard Page: x/report.html",
        "vocabguard Next: y",
    ]


@pytest.mark.parametrize(
    "more",
    [
        {"vocabguard/head/below_0.95": 0.001}, {"vocabguard/probe/retained": 0.99}, {"vocabguard/probe/watch": 0.5},
        {"vocabguard/head/nonfinite_rows": 1.0},
    ],
)  # fmt: skip
def test_one_finding_brings_the_tables(table, more):
    lines = printed(ConsoleView, ("finish", check(FINE | more, worst=(TOKEN,)), table))
    assert len(lines) > 6
    fires = check(FINE, worst=(TOKEN,), firing=("slow",))
    assert len(printed(ConsoleView, ("finish", fires, table))) > 6


def test_what_was_not_measured_is_not_called_fine():
    assert nothing_found(check({}, head=GONE)) == ""
    only_rows = {key: value for key, value in FINE.items() if "head" in key}
    assert nothing_found(check(only_rows)).startswith("step 40: No row drifted far; whether tokens are still repeated")


@pytest.mark.parametrize("text", ["[bold]", "[/]", "[link=x]a", "\\[", "\x1b[31m", "\n", ":warning:", "\ud800"])
def test_token_texts_are_never_markup_or_control(table, text):
    token = dataclasses.replace(TOKEN, text=text, said_instead=text)
    target = console(force_terminal=True)
    ConsoleView(target).finish(check(worst=(token,)), table)
    plain = target.export_text()
    row = next(line for line in plain.splitlines() if "190467" in line)
    shown = text if text.isprintable() else text.encode("unicode_escape").decode()
    assert row.count(shown) == 2


@pytest.mark.parametrize("width", [80, 100, 120])
def test_tables_of_tokens_fit_with_their_numbers_whole(table, width):
    wide = dataclasses.replace(TOKEN, text="東" * 60, said_instead="กรุงเทพ" * 9, data_target=12345, inputs=1234567)
    lines = printed(ConsoleView, ("finish", check(worst=(TOKEN, wide)), table), width=width)
    assert max(map(cell_len, lines)) <= width
    if width >= 100:
        assert {"0.4123", "12,345", "1,234,567", "0.032"} <= set(
            cells(lines[lines.index("") :], "190467") + lines[-2].split()
        )


def test_disabled_prints_nothing(table, watch):
    def quiet(target):
        return ConsoleView(target, enabled=False)

    result = check(transitions=(ALERT,), worst=(TOKEN,))
    assert printed(quiet, ("watch", watch, table), ("check", result), ("finish", result, table)) == []


def test_a_narrow_encoding_gets_escapes_instead_of_an_error(table, watch):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    view = ConsoleView(Console(file=stream, width=120))
    view.watch(watch, table)
    view.check(check())
    view.finish(check(worst=(TOKEN,)), table)
    stream.flush()
    assert rb"\u5609\u797a" in raw.getvalue()


def test_a_progress_bar_is_cleared_before_a_line_is_printed():
    screen = io.StringIO()
    with tqdm(total=3, file=screen, ncols=40, mininterval=0) as bar:
        bar.update(1)
        ConsoleView(Console(file=screen, width=400)).check(check())
        bar.update(1)
    line = next(line for line in screen.getvalue().split("\n") if "step 40" in line)
    assert line.rpartition("\r")[2] == f"vocabguard {verdict(check())}"


def test_standard_output_is_the_default_and_wide_in_a_file(capsys, monkeypatch, table):
    monkeypatch.delenv("COLUMNS", raising=False)
    ConsoleView().finish(check(worst=(dataclasses.replace(TOKEN, text="x" * 30),)), table)
    assert max(map(len, capsys.readouterr().out.splitlines())) > 80
