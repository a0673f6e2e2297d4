from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vocabguard.cli.app import InputError, build
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
    for part in ("3 rows", "are never a target", "Cyrillic", "watched tokens", "tokens at risk"):
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
    assert "3 rows have no target." in result.stdout


def test_one_row_is_always_shown_and_the_kind_is_said(data: Path) -> None:
    printed = run(data).stdout
    assert "Read as messages (column messages)." in printed
    assert "⟦the [red] the<|end|>⟧" in printed
    told = json.loads(run(data, "--json").stdout)
    assert [part["text"] for part in told["example"] if part["target"]] == ["the [red] the<|end|>"]
    assert told["source"]["kinds"] == ["messages (column messages)"]


def test_merge_equals_the_whole(data: Path, tmp_path: Path) -> None:
    parts = [tmp_path / f"{index}.safetensors" for index in (1, 2)]
    for index, part in enumerate(parts, start=1):
        assert run(data, "--shard", f"{index}/2", "--out", part).exit_code == 0
    whole = json.loads(run(data, "--json").stdout)
    merged = CliRunner().invoke(build(("coverage",)), ["coverage", "merge", *map(str, parts), "--json"])
    assert merged.exit_code == 0, merged.output
    told = json.loads(merged.stdout)
    for name in ("targets", "inputs", "classes", "rows", "at_risk"):
        assert told[name] == whole[name]
    refused = CliRunner().invoke(build(("coverage",)), ["coverage", "merge", str(parts[0]), str(parts[0])])
    assert "counted twice" in str(refused.exception)


def test_words_a_table_a_reference_and_commands_to_copy(data: Path, tmp_path: Path) -> None:
    text = tmp_path / "reference.txt"
    text.write_text("the data and the rest of the data\n" * 9, encoding="utf-8")
    table = tmp_path / "t.csv"
    result = run(data, "--watch", "the [red]", "--table", table, "--reference", text, "--rank", "reference", "--top", 3)
    assert result.exit_code == 0, result.output
    assert "watched word 'the [red]': 3 times a target" in result.stdout
    assert "as many tokens of the reference would leave out" in result.stdout
    assert "commonest in the reference" in result.stdout
    assert f"vocabguard echo {ASSETS} --needs coverage.safetensors" in result.stdout
    assert len(table.read_text(encoding="utf-8").splitlines()) > 8000
    assert "usual for English chat data: 85 to 97 %" in run(data).stdout
    assert "reference with --reference only" in str(run(data, "--rank", "reference").exception)


def test_words_by_language(data: Path) -> None:
    pytest.importorskip("lingua")
    told = json.loads(run(data, "--languages", "en,de,fr", "--json").stdout)
    latin = told["languages"]["latin"]
    assert list(told["languages"]) == ["latin"]
    assert latin["en"]["never"] > 10
    assert list(latin)[-1] == "unclear"
    shown = run(data, "--languages", "en,de,fr").stdout
    assert "- words, English" in shown
    assert "- words, language unclear" in shown


def test_unknown_language(data: Path) -> None:
    pytest.importorskip("lingua")
    error = run(data, "--languages", "en,klingon").exception
    assert isinstance(error, InputError)
    assert str(error).startswith("--languages is 'klingon'; allowed: two or more of af, ar,")
