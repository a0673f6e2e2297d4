from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from vocabguard.cli import app
from vocabguard.data.coverage import measure_coverage
from vocabguard.data.readers import Text
from vocabguard.vocabulary.table import build_table

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
LINES = ["the data", "the file", "the data and the file", "保存", "the data", "and"]


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app.build(("replay",)), ["replay", "--tokenizer", str(ASSETS), *map(str, arguments)])


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("form", ["r.jsonl", "r.txt"])
def test_rows_are_chosen_written_and_counted(corpus: Path, tmp_path: Path, form: str) -> None:
    out = tmp_path / form
    result = run(corpus, "--out", out, "--targets", 1, "--json")
    assert result.exit_code == 0, result.output
    text = out.read_text(encoding="utf-8")
    kept = text.splitlines() if form == "r.txt" else [json.loads(line)["text"] for line in text.splitlines()]
    assert set(kept) <= set(LINES)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    table = build_table(tokenizer, len(tokenizer))

    def targets(lines: list[str]) -> Counter[int]:
        return Counter(i for line in lines for i in tokenizer.encode(line + "<|end|>")[1:] if bool(table.live[i]))

    assert set(targets(kept)) == set(targets(LINES))
    told = json.loads(result.stdout)
    assert (told["rows"], told["chosen"]) == (6, len(kept))
    assert told["met"] == len(targets(LINES))
    assert told["in_no_row"] == told["needed"] - told["met"]
    assert sum(part["needed"] for part in told["groups"].values()) == told["needed"]


def test_only_what_a_coverage_file_lacks(corpus: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    table = build_table(tokenizer, len(tokenizer))
    measure_coverage([Text("", line) for line in LINES if line != "保存"], tokenizer, table).save(tmp_path / "c")
    result = run(corpus, "--out", tmp_path / "r.txt", "--targets", 1, "--coverage", tmp_path / "c")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "r.txt").read_text(encoding="utf-8") == "保存\n"
    assert "1 of 6 rows are enough" in result.stdout


def test_exit_code_follows_the_threshold(corpus: Path, tmp_path: Path) -> None:
    assert run(corpus, "--out", tmp_path / "r.txt", "--threshold", 0.5).exit_code == 1


def test_chats_keep_their_form(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "the data"}],
           "tools": [{"name": "x"}]}  # fmt: skip
    (tmp_path / "c.jsonl").write_text((json.dumps(row) + "\n") * 3, encoding="utf-8")
    assert run(tmp_path / "c.jsonl", "--out", tmp_path / "r.jsonl", "--targets", 1).exit_code == 0
    assert json.loads((tmp_path / "r.jsonl").read_text()) == row


@pytest.mark.parametrize(
    "arguments",
    [
        ["corpus.txt", "--out", "r.csv"],
        ["corpus.txt", "--out", "no/such/r.txt"],
        ["corpus.txt", "--out", "r.txt", "--targets", "0"],
        ["corpus.txt", "--out", "r.txt", "--pool", "0"],
        ["corpus.txt", "--out", "r.txt", "--threshold", "2"],
        ["corpus.txt", "--out", "r.txt", "--coverage", "corpus.txt"],
        ["missing.txt", "--out", "r.txt"],
        ["chat.jsonl", "--out", "r.txt"],
        ["empty.txt", "--out", "r.txt"],
    ],
)
def test_refusals(arguments: list[str], corpus: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the data"}]
    Path("chat.jsonl").write_text(json.dumps({"messages": said}), encoding="utf-8")
    Path("empty.txt").touch()
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("sys.argv", ["vocabguard", "replay", "--tokenizer", str(ASSETS), *arguments])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.err.startswith("vocabguard: ")
    assert printed.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
