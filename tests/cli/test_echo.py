from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from vocabguard.cli import app
from vocabguard.data.coverage import measure_coverage
from vocabguard.data.readers import Text
from vocabguard.vocabulary.table import build_table

ASSETS = Path(__file__).parents[2] / "examples" / "assets"


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app.build(("echo",)), ["echo", str(ASSETS), *map(str, arguments)])


def targets_in(path: Path) -> Counter[int]:
    return Counter(
        label for line in path.read_text().splitlines() for label in json.loads(line)["labels"] if label != -100
    )


def test_full_vocabulary_without_the_excluded(tmp_path: Path) -> None:
    out = tmp_path / "e.jsonl"
    result = run(
        "--ids", out, "--targets", 2, "--exclude", " the", "--exclude", "re:^[0-9]$", "--exclude", 3000, "--json"
    )
    assert result.exit_code == 0, result.output
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    table = build_table(tokenizer, len(tokenizer))
    dropped = {tokenizer.encode(" the")[0], 3000}
    expected = {
        i for i in range(len(table)) if table.live[i] and i not in dropped and table.text(i) not in set("0123456789")
    }
    assert targets_in(out) == dict.fromkeys(expected, 2)
    told = json.loads(result.stdout)
    assert (told["tokens"], told["files"][str(out)]["survived"]) == (len(expected), 1.0)


def test_targeted_by_a_coverage_file(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    table = build_table(tokenizer, len(tokenizer))
    found = measure_coverage([Text("", "the data and the rest")] * 6, tokenizer, table)
    found.save(tmp_path / "c.safetensors")
    result = run("--ids", tmp_path / "e.jsonl", "--chats", tmp_path / "t.jsonl", "--targets", 3, "--needs",
                 tmp_path / "c.safetensors", "--below", 5)  # fmt: skip
    assert result.exit_code == 0, result.output
    needy = (found.live & (found.data_target < 5)).nonzero().flatten().tolist()
    assert len(needy) < int(torch.sum(found.live))
    assert targets_in(tmp_path / "e.jsonl") == dict.fromkeys(needy, 3)
    assert "every token exactly as asked" in result.stdout
    assert "survive" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--ids", "e.jsonl", "--targets", "0"],
        ["--ids", "e.jsonl", "--list-tokens", "0"],
        ["--ids", "no/such/e.jsonl"],
        ["--ids", "e.jsonl", "--below", "5"],
        ["--ids", "e.jsonl", "--needs", "missing.safetensors"],
        ["--ids", "e.jsonl", "--exclude", "re:("],
        ["--ids", "e.jsonl", "--exclude", "several words here"],
        ["--ids", "e.jsonl", "--exclude", "re:."],
        ["--ids", "e.jsonl", "--instruction", "no place"],
        ["--chats", "e.jsonl", "--instruction", "{tokens} twice {tokens}"],
    ],
)
def test_refusals(arguments: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["vocabguard", "echo", str(ASSETS), *arguments])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.err.startswith("vocabguard: ")
    assert printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
