from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vocabguard.cli.app import build
from vocabguard.data.coverage import load_coverage

ASSETS = Path(__file__).parents[2] / "examples" / "assets"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    said = [{"role": "user", "content": "Say the data"}, {"role": "assistant", "content": "the [red] the"}]
    path.write_text((json.dumps({"messages": said}) + "\n") * 3, encoding="utf-8")
    return path


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(build(("coverage",)), ["coverage", str(ASSETS), *map(str, arguments)])


def test_json_and_file_agree(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.safetensors"
    result = run(data, "--json", "--out", out, "--epochs", 2, "--watch", " the", "--top", 3)
    assert result.exit_code == 0, result.output
    told, saved = json.loads(result.stdout), load_coverage(out)
    assert told["targets"] == int(saved.data_target.sum())
    assert told["inputs"] == int(saved.inputs.sum())
    assert told["rows"]["rows"] == 3
    assert told["source"]["epochs"] == saved.source.epochs == 2
    (the,) = told["watched"]
    assert (the["text"], the["data_target"], the["inputs"]) == (" the", 6, 12)
    assert len(told["at_risk"]) == 3
    assert told["at_risk"][0]["data_target"] == 0
    assert sum(told["classes"].values()) == told["live"] == told["groups"]["all"]["live"]


def test_table_names_groups_and_tokens_literally(data: Path) -> None:
    result = run(data, "--watch", "the")
    assert result.exit_code == 0
    for part in ("3 rows", "are never a target", "cyrillic", "watched tokens", "tokens at risk"):
        assert part in result.stdout


@pytest.mark.parametrize(("threshold", "code"), [(None, 0), (1.0, 0), (0.5, 1)])
def test_exit_code_follows_the_threshold_only(data: Path, threshold: float | None, code: int) -> None:
    assert run(data, *(() if threshold is None else ("--threshold", threshold))).exit_code == code


def test_notes_tell_what_was_done(data: Path, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(
        "{{ messages | length }}{{ messages | map(attribute='content') | join('<|end|>') }}",
        encoding="utf-8",
    )
    result = run(data, "--chat-template", template, "--max-length", 4)
    assert "does not mark the assistant's tokens" in result.stdout
    assert "does not show where turns begin: 3 turns were found by their text" in result.stdout
    assert "3 rows are cut off at 4 tokens." in result.stdout
    assert "3 rows ask for nothing." in result.stdout
