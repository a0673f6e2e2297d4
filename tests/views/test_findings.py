"""What is found beside the checks, in the run log, on the console and in TensorBoard."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vocabguard.files import plain
from vocabguard.measure.languages import count_answers
from vocabguard.measure.localize import HeadOrBody
from vocabguard.measure.neighbors import NearestRows, Neighborhoods
from vocabguard.results import Finding
from vocabguard.text import escape_markdown
from vocabguard.views.console import ConsoleView
from vocabguard.views.findings import body_finding, confusion_finding, neighbors_finding
from vocabguard.views.tensorboard import open_view
from vocabguard.vocabulary.table import GROUPS, VocabTable, plain_table

ANSWERS = [
    ("ja", "今日は хорошо ですね。"),
    ("ja", "今日はとても良い天気ですね。"),
    ("ja", "これは да と ok です。"),
    ("ja", "はい。"),
    ("ko", "오늘은 날씨가 정말 좋네요 그렇죠"),
    ("en", "I am fine, thank you very much."),
]


@pytest.fixture
def confusion() -> Finding:
    return confusion_finding(30, count_answers(ANSWERS, ("ja", "ko", "en", "de")))


@pytest.fixture
def table() -> VocabTable:
    groups = ("zh", "zh", "latin", "control", "code", "ja")
    group = torch.tensor([GROUPS.index(name) for name in groups], dtype=torch.uint8)
    return replace(plain_table(6), group=group, texts=("嘉祺", "易烊", "|<b>", "<|tool|>", "\n{", ""))


@pytest.fixture
def neighbors(table: VocabTable) -> Finding:
    nan = float("nan")
    then = NearestRows(torch.tensor([[1, 4], [2, -1]]), torch.tensor([[0.5, 0.25], [0.125, nan]]))
    now = NearestRows(torch.tensor([[3, 1], [4, 2]]), torch.tensor([[0.75, 0.5], [0.5, 0.25]]))
    return neighbors_finding(30, "head", Neighborhoods(torch.tensor([0, 5]), then, now), table)


def body() -> Finding:
    head, rows, every = torch.ones(3, 4).tril().bool()
    return body_finding(30, HeadOrBody(torch.arange(4), head, rows, every))


def cells(found: Finding) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found.table.splitlines()]


def test_confusion_in_every_form(confusion: Finding) -> None:
    assert confusion.sentence == (
        "6 answers in 3 languages: 33.3 % with foreign script (ja 50.0 % Cyrillic); lines pass 100 %; words pass 100 %"
    )
    assert confusion.scalars["vocabguard/confusion/ja"] == 0.5
    assert confusion.scalars["vocabguard/confusion/line_pass"] == 1.0
    assert "vocabguard/confusion/de" not in confusion.scalars
    [line] = confusion.lines
    assert line["answers"] == {"ja": 4, "ko": 1, "en": 1, "de": 0}
    assert line["into"] == {"ja": {"cyrillic": 2}}
    rows = {row[0]: row[1:] for row in cells(confusion)[2:]}
    assert list(rows) == ["ja", "ko", "en", "de"]
    assert rows["ja"][0] == "4"
    assert rows["ja"][2] == "Cyrillic 2"
    assert rows["ja"][-1] == escape_markdown("25.0 %")
    assert rows["en"][-1] == escape_markdown("-"), "no share of Latin where it is the language's own"


def test_no_language_is_confused() -> None:
    found = confusion_finding(3, count_answers([("ko", "네.")], ("ko",)))
    assert found.sentence == "1 answer in 1 language: 0 % with foreign script"


def test_neighbors_in_every_form(neighbors: Finding) -> None:
    assert neighbors.sentence == (
        "2 worst and watched tokens keep 75.0 % of their nearest rows; intruders among them: 1 then, 2 now"
    )
    first, second = neighbors.lines
    assert (first["matrix"], first["id"], first["text"], first["group"]) == ("head", 0, "嘉祺", "zh")
    assert first["overlap"] == 0.5
    assert [(one["id"], one["intruder"]) for one in first["then"]] == [(1, False), (4, False)]
    assert [(one["id"], one["intruder"]) for one in first["now"]] == [(3, True), (1, False)]
    assert [one["id"] for one in second["then"]] == [2]
    assert second["overlap"] == 1.0
    rows = cells(neighbors)
    assert all(len(row) == 6 for row in rows), "hostile texts break no cell"
    assert rows[2][5].startswith(escape_markdown("<|tool|> [control!] 0.75"))
    assert "<b>" not in neighbors.table


def test_forgotten_tokens_in_words() -> None:
    found = body()
    assert found.sentence == (
        "of 4 lost tokens probed again, 1 (25.0 %) comes back with the base's output row, "
        "1 (25.0 %) comes back with its input row too, "
        "1 (25.0 %) comes back only with the rows of all tokens (other rows drown them), "
        "1 (25.0 %) comes back with no row (lost in the body)"
    )
    assert found.lines[0]["head"] == 1
    assert found.lines[0]["ids"] == [0, 1, 2, 3]
    alone = body_finding(1, HeadOrBody(torch.tensor([7]), *torch.ones(3, 1).bool()))
    assert alone.sentence == "of 1 lost token probed again, 1 (100 %) comes back with the base's output row"


def test_lines_are_strict_json(confusion: Finding, neighbors: Finding) -> None:
    for found in (confusion, neighbors, body()):
        for line in found.lines:
            assert json.loads(json.dumps(plain(line), allow_nan=False))


def test_the_console_prints_one_line(confusion: Finding, neighbors: Finding) -> None:
    out = io.StringIO()
    view = ConsoleView(Console(file=out, width=400))
    for found in (confusion, neighbors, body()):
        view.finding(found)
    assert out.getvalue().splitlines() == [
        f"vocabguard step 30: {found.sentence}" for found in (confusion, neighbors, body())
    ]
    ConsoleView(Console(file=out), enabled=False).finding(confusion)
    assert len(out.getvalue().splitlines()) == 3


def test_tensorboard_gets_scalars_and_texts(
    tmp_path: Path, confusion: Finding, neighbors: Finding, table: VocabTable
) -> None:
    view = open_view(tmp_path, table=table)
    for found in (confusion, neighbors, body()):
        view.finding(found)
    view.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(confusion.scalars)
    [scalar] = events.Scalars("vocabguard/confusion/ja")
    assert (scalar.step, scalar.value) == (30, 0.5)
    for found in (confusion, neighbors, body()):
        [text] = events.Tensors(f"vocabguard/{found.kind}/text_summary")
        shown = text.tensor_proto.string_val[0].decode()
        assert text.step == 30
        assert escape_markdown(found.sentence) in shown
        assert found.table in shown
