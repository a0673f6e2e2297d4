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


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Three parts of a corpus, as three machines write them."""
    corpus = tmp_path / "large.jsonl"
    lines = [f"{LINES[n % 6]} {chr(97 + n % 26)} {chr(0x430 + n % 32)} {n}" for n in range(400)]
    corpus.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    made = [tmp_path / f"part-{index}.jsonl" for index in (1, 2, 3)]
    for index, path in enumerate(made, start=1):
        result = run(corpus, "--out", path, "--targets", 3, "--shard", f"{index}/3", "--json")
        assert result.exit_code == 0, result.output
        told = json.loads(result.stdout)
        assert told["candidates"] == len(path.read_text(encoding="utf-8").splitlines())
    return made


def test_parts_together_cover_what_the_corpus_covers(parts: list[Path], tmp_path: Path) -> None:
    whole = json.loads(run(tmp_path / "large.jsonl", "--out", tmp_path / "w.jsonl", "--targets", 3, "--json").stdout)
    merged = run("merge", *parts, "--out", tmp_path / "m.jsonl", "--targets", 3, "--json")
    assert merged.exit_code == 0, merged.output
    told = json.loads(merged.stdout)
    for name in ("rows", "needed", "met", "in_no_row", "targets", "targets_needed"):
        assert told[name] == whole[name], name
    assert whole["met"] > 50
    assert told["chosen"] <= 1.2 * whole["chosen"]


def test_parts_that_do_not_belong_together_are_refused(parts: list[Path], tmp_path: Path) -> None:
    def merge(*given: Any, targets: int = 3) -> str:
        result = run("merge", *given, "--out", tmp_path / "m.jsonl", "--targets", targets)
        assert isinstance(result.exception, app.InputError)
        return str(result.exception)

    assert "missing: 3/3" in merge(*parts[:2])
    assert "has other needs" in merge(*parts, targets=4)
    again = tmp_path / "again.jsonl"
    for ending in ("", ".part.json"):
        Path(f"{again}{ending}").write_text(Path(f"{parts[0]}{ending}").read_text(encoding="utf-8"), encoding="utf-8")
    assert "1/3 comes twice" in merge(*parts, again)
    result = run(tmp_path / "large.jsonl", "--out", again, "--targets", 3, "--shard", "1/3", "--pool", 9)
    assert result.exit_code == 0, result.output
    assert "has another --pool" in merge(again, *parts[1:])
    Path(f"{again}.part.json").unlink()
    assert "not found" in merge(again, *parts[1:])
