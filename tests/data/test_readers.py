from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from vocabguard.data.readers import Chat, Completion, DataError, Example, Text, data_files, read_examples, rows_of
from vocabguard.data.tables import _JSON_CHUNK

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Grüß dich\u2028!"}]
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": TURNS, "id": 1}, {"messages": TURNS[:1], "id": 2}],
    "completion": [{"prompt": "a", "completion": "b"}, {"prompt": TURNS[:1], "completion": TURNS[1:]}],
    "text": [{"text": "one"}, {"text": "zwei\nZeilen"}],
}


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path, **options: Any) -> list[Example]:
    return list(read_examples(data_files([path]), **options))


def values(examples: list[Example]) -> list[Any]:
    """The rows that they came from."""
    found: list[Any] = []
    for example in examples:
        if isinstance(example, Text):
            found.append({"text": example.text})
        elif isinstance(example, Chat):
            found.append({"messages": example.turns})
        else:
            found.append({"prompt": example.prompt, "completion": example.completion})
    return found


def without_id(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "id"} for row in rows]


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("form", ["a.jsonl", "a.ndjson", "a.json", "list.json", "a.jsonl.gz", "list.json.gz"])
def test_json_in_every_form(tmp_path: Path, form: str, kind: str) -> None:
    text = json.dumps(ROWS[kind], indent=2) if "list" in form else lines(ROWS[kind])
    content = gzip.compress(text.encode()) if form.endswith("gz") else text.encode()
    assert values(read(write(tmp_path / form, content))) == without_id(ROWS[kind])


def test_lines_are_counted_with_blank_ones_and_a_mark_is_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\n   \n{"text": "two"}')
    assert [(place.removeprefix(f"{path}, "), row["text"]) for place, row in rows_of(path)] == [
        ("line 1", "one"),
        ("line 4", "two"),
    ]


@pytest.mark.parametrize("end", [0, 1, -1, 7])
def test_json_values_that_straddle_what_is_read_at_once(tmp_path: Path, end: int) -> None:
    texts = ["é" * (_JSON_CHUNK + end), "b" * (3 * _JSON_CHUNK), "", "c" * (_JSON_CHUNK // 2)] * 2
    for content in (json.dumps([{"text": t} for t in texts]), lines([{"text": t} for t in texts])):
        assert [example.text for example in read(write(tmp_path / "a.json", content))] == texts


def test_plain_text_is_a_document_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one \n\n zwei\u2028Zeilen\r\n\t\nthree")
    assert [example.text for example in read(path)] == ["one ", " zwei\u2028Zeilen", "three"]
    packed = write(tmp_path / "b.txt.gz", gzip.compress(path.read_bytes()))
    assert values(read(packed)) == values(read(path))


@pytest.mark.parametrize("kind", ["messages", "text"])
def test_tables(tmp_path: Path, kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{**row, "vector": [0.0] * 4} for row in ROWS[kind]] * 700
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=100)
    assert values(read(tmp_path / "a.parquet")) == [{kind: row[kind]} for row in ROWS[kind]] * 700
    assert "vector" not in next(rows_of(tmp_path / "a.parquet", {kind}))[1]


def test_saved_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list([{"messages": TURNS, "other": 1}, {"messages": TURNS, "other": 2}])
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "test": whole.select([0])}).save_to_disk(tmp_path / "two")
    datasets.DatasetDict({"test": whole}).save_to_disk(tmp_path / "three")
    for folder, count in (("one", 2), ("two", 2), ("two/test", 1)):
        assert values(read(tmp_path / folder)) == [{"messages": TURNS}] * count
    with pytest.raises(DataError, match=r"has the splits \['test'\]"):
        read(tmp_path / "three")


def test_files_by_folder_and_pattern_each_once(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.txt", "deep/er/c.json", "notes.pdf"):
        write(tmp_path / name, "{}")
    found = data_files([tmp_path / "b.jsonl", tmp_path, tmp_path / "*.txt", str(tmp_path / "**" / "*.json")])
    assert [path.name for path in found] == ["b.jsonl", "a.txt", "c.json"]
    for wrong in ("none*.txt", "missing.jsonl"):
        with pytest.raises(DataError, match="not found; allowed"):
            data_files([tmp_path / wrong])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data file in it; allowed"):
        data_files([tmp_path / "empty"])


def test_named_columns_and_kinds(tmp_path: Path) -> None:
    both = write(tmp_path / "both.jsonl", lines([{"text": "t", "prompt": "p", "completion": "c", "body": "b"}]))
    with pytest.raises(DataError, match=r"both.jsonl, line 1: .*say --kind completion or --kind text"):
        read(both)
    assert values(read(both, kind="text")) == [{"text": "t"}]
    assert values(read(both, kind="completion")) == [{"prompt": "p", "completion": "c"}]
    assert values(read(both, columns=["body"])) == [{"text": "b"}]
    assert values(read(both, columns=["text", "body"])) == [{"prompt": "t", "completion": "b"}]
    chat = write(tmp_path / "chat.jsonl", lines([{"dialogue": TURNS}]))
    assert values(read(chat, columns=["dialogue"])) == [{"messages": TURNS}]
    for options in ({"columns": ["a", "b", "c"]}, {"kind": "text", "columns": ["a", "b"]}, {"kind": "completion",
                     "columns": ["a"]}):  # fmt: skip
        with pytest.raises(DataError, match="columns are named"):
            read(both, **options)
    with pytest.raises(DataError, match="line 1: no column 'absent'; allowed"):
        read(both, kind="text", columns=["absent"])


def test_shared_chats_nulls_and_tools(tmp_path: Path) -> None:
    said = [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Ho"},
        {"role": "tool", "content": None, "x": None},
    ]
    row = {"conversations": said, "tools": '[{"name": "search"}]', "chat_template_kwargs": {"mode": "quick"}}
    (chat,) = read(write(tmp_path / "a.jsonl", lines([row])))
    assert isinstance(chat, Chat)
    assert chat.turns == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "tool"},
    ]
    assert chat.options == {"tools": [{"name": "search"}], "mode": "quick"}


def test_completion_keeps_its_type(tmp_path: Path) -> None:
    (mixed,) = ROWS["completion"][1:]
    (example,) = read(write(tmp_path / "a.jsonl", lines([mixed])))
    assert isinstance(example, Completion)
    with pytest.raises(DataError, match="allowed: two texts, or two lists of messages"):
        read(write(tmp_path / "b.jsonl", lines([{"prompt": "a", "completion": TURNS}])))


@pytest.mark.parametrize("lead", ["", "\ufeff", " \n\t" * 100_000])
def test_json_after_a_mark_or_much_space(tmp_path: Path, lead: str) -> None:
    for content in ('[{"text": "a"},\n {"text": "b"} ]\n', '{"text": "a"}\n{"text": "b"}'):
        assert [example.text for example in read(write(tmp_path / "a.json", lead + content))] == ["a", "b"]
