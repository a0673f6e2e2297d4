"""Every format that data comes in, from a file of it."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vocabguard.data.encode import TargetEncoder
from vocabguard.data.readers import Chat, Completion, DataError, Example, Preference, Text, TokenRows, read_examples
from vocabguard.data.tables import RemoteFile, RowShard, data_files

USER, ANSWER, OTHER = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b"))
)


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def read(path: Path | str, content: bytes | None = None, **options: Any) -> list[Example]:
    if content is not None:
        Path(path).write_bytes(content)
    return list(read_examples(data_files([path]), **options))


def told(path: Path, **options: Any) -> list[str]:
    examples = read_examples(data_files([path]), **options)
    list(examples)
    return [*examples.kinds, *examples.notes]


def test_alpaca_becomes_conversations_or_texts(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Translate.", "input": "dog", "output": "Hund"},
        {"instruction": "Name a fruit.", "input": "", "output": "Apple.", "system": "Be short.",
         "history": [["x", "y"]]},
    ]  # fmt: skip
    first, second = read(tmp_path / "a.jsonl", lines(rows))
    assert isinstance(first, Chat)
    assert isinstance(second, Chat)
    assert [turn["content"] for turn in first.turns] == ["Translate.\ndog", "Hund"]
    assert [(turn["role"], turn["content"]) for turn in second.turns] == [
        ("system", "Be short."), ("user", "x"), ("assistant", "y"), ("user", "Name a fruit."), ("assistant", "Apple.")
    ]  # fmt: skip
    (text, _) = read(tmp_path / "a.jsonl", chats=False)
    assert isinstance(text, Completion)
    assert (text.prompt, text.completion) == ("Translate.\ndog\n", "Hund")
    assert told(tmp_path / "a.jsonl") == [
        "alpaca rows (columns instruction, output), as conversations by the chat template"
    ]


@pytest.mark.parametrize(
    "names", [("question", "answer"), ("prompt", "response"), ("problem", "solution"), ("input", "output")]
)
def test_questions_with_answers(tmp_path: Path, names: tuple[str, str]) -> None:
    (chat,) = read(tmp_path / "a.jsonl", lines([dict(zip(names, "qa", strict=True))]))
    assert isinstance(chat, Chat)
    assert chat.turns == [USER, ANSWER]


def test_what_can_be_read_in_several_ways_is_refused(tmp_path: Path) -> None:
    row = {"instruction": "i", "input": "", "output": "o", "text": "t"}
    with pytest.raises(DataError, match="say --kind text or --kind alpaca"):
        read(tmp_path / "a.jsonl", lines([row]))
    assert read(tmp_path / "a.jsonl", kind="text") == [Text(f"{tmp_path}/a.jsonl, line 1", "t")]


@pytest.mark.parametrize(("suffix", "between"), [(".csv", ","), (".tsv", "\t")])
def test_tables_of_text(tmp_path: Path, suffix: str, between: str) -> None:
    path = tmp_path / f"a{suffix}"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file, delimiter=between)
        table.writerows([["prompt", "id", "completion"], ['say "x",\nplease', "7", "\tx, y"], ["b", "8", "c"]])
    assert [(row.prompt, row.completion) for row in read(path)] == [('say "x",\nplease', "\tx, y"), ("b", "c")]  # type: ignore[union-attr]


def test_messages_as_json_in_a_table(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps([USER, ANSWER])]])
    (chat,) = read(tmp_path / "a.csv")
    assert isinstance(chat, Chat)
    assert chat.turns == [USER, ANSWER]


def packed_by_zst(content: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    stream = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(stream, "zstd") as file:
        file.write(content)
    return bytes(stream.getvalue())


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", packed_by_zst)],
)
def test_packed_files_of_two_parts(tmp_path: Path, suffix: str, pack: Any) -> None:
    """Parts that were joined as files, as tools that write in parallel leave them."""
    parts = [lines([{"text": f"{n} ünd so weiter"} for n in range(begin, begin + 700)]) for begin in (0, 700)]
    found = read(tmp_path / f"a.jsonl{suffix}", b"".join(map(pack, parts)))
    assert [row.text for row in found] == [f"{n} ünd so weiter" for n in range(1400)]  # type: ignore[union-attr]


def test_nested_parquet_and_arrow(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import feather, parquet

    call = {"function": {"name": "w", "arguments": {"city": "Oslo", "zip": None}}}
    turns = [{**USER, "tool_calls": None}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    table = pyarrow.table({"messages": [turns, [{**ANSWER, "tool_calls": None}]], "more": [1, 2]})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    feather.write_feather(table, tmp_path / "a.feather")
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    for name in ("a.parquet", "a.feather", "a.arrow"):
        first, second = read(tmp_path / name)
        assert isinstance(first, Chat)
        assert isinstance(second, Chat)
        assert first.turns == [USER, {"role": "assistant", "tool_calls": [call]}]
        assert second.turns == [ANSWER]


def test_preference_pairs(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
    ]
    text, turns = (read(tmp_path / "a.jsonl", lines([row]))[0] for row in rows)
    assert text == Preference(f"{tmp_path}/a.jsonl, line 1", "p", "good", "bad")
    assert turns == Preference(f"{tmp_path}/a.jsonl, line 1", [USER], [ANSWER], [OTHER])
    # A prompt as a text beside whole conversations, as UltraFeedback has it.
    joined = [{"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}]
    assert read(tmp_path / "a.jsonl", lines(joined)) == [turns]


TOKENS = [
    {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]},
    {"input_ids": [9, 10], "labels": [-100, 10]},
]
MASKED = [
    {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 0], "completion_mask": [0, 1, 0], "assistant_masks": [0, 1, 1]}
]


def by_token(rows: list[Example]) -> list[tuple[list[int], list[bool]]]:
    assert all(isinstance(row, TokenRows) for row in rows)
    return [(row.ids.tolist(), row.target.tolist()) for row in rows]  # type: ignore[union-attr]


def test_tokenised_rows(tmp_path: Path) -> None:
    expected = [([5, 6, 7, 8], [False, True, False, True]), ([9, 10], [False, True])]
    assert by_token(read(tmp_path / "a.jsonl", lines(TOKENS))) == expected
    assert by_token(read(tmp_path / "b.jsonl", lines(MASKED))) == [([5, 6], [False, True])]
    assert by_token(read(tmp_path / "c.jsonl", lines([{"input_ids": [5, 6], "text": "x"}]))) == [([5, 6], [True, True])]
    assert told(tmp_path / "b.jsonl") == [
        "tokens (column input_ids; targets by assistant_masks, completion_mask, attention_mask)"
    ]


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed"])
def test_tokenised_tables_are_read_in_blocks(tmp_path: Path, kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rng = np.random.default_rng(0)
    lengths = [4] * 3000 if kind == "fixed" else rng.integers(0, 9, 3000).tolist()
    ids = [rng.integers(0, 50, n).tolist() for n in lengths]
    labels = [[x if rng.random() < 0.5 else -100 for x in row] for row in ids]
    of = {"list": pyarrow.list_(pyarrow.int32()), "large_list": pyarrow.large_list(pyarrow.int64()),
          "fixed": pyarrow.list_(pyarrow.int32(), 4)}[kind]  # fmt: skip
    table = pyarrow.table({"input_ids": pyarrow.array(ids, of), "labels": pyarrow.array(labels, of)})
    parquet.write_table(table, tmp_path / "a.parquet")
    blocks = read(tmp_path / "a.parquet", blocks=True)
    assert len(blocks) < 10
    assert [x for block in blocks for x in block.ids.tolist()] == [x for row in ids for x in row]  # type: ignore[union-attr]
    assert [x for block in blocks for x in block.target.tolist()] == [x != -100 for row in labels for x in row]  # type: ignore[union-attr]
    assert [x for block in blocks for x in block.lengths.tolist()] == lengths  # type: ignore[union-attr]
    assert by_token(read(tmp_path / "a.parquet")) == [
        (row, [x != -100 for x in asked]) for row, asked in zip(ids, labels, strict=True)
    ]


def test_tokens_as_targets(tokenizer: Any, tmp_path: Path) -> None:
    """The first token of each row is never a target: nothing comes before it."""
    block = TokenRows("here", np.array([5, 6, 7, 8, 9]), np.ones(5, dtype=bool), np.array([2, 0, 3]))
    encoder = TargetEncoder(tokenizer, max_length=2)
    (batch,) = encoder.batches(encoder.render([block]))
    assert (batch.ids.tolist(), batch.target.tolist()) == ([5, 6, 7, 8], [False, True, False, True])
    assert (batch.count, batch.without_targets, batch.cut.tolist()) == (3, 1, [False, False, True])


def test_addresses_of_fsspec(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for name, content in {"a.jsonl": lines([{"text": "one"}]), "b.jsonl.gz": gzip.compress(lines([{"text": "two"}])),
                          "c.pdf": b""}.items():  # fmt: skip
        memory.pipe(f"/vocabguard/{name}", content)
    try:
        files = data_files(["memory://vocabguard"])
        assert [file.name for file in files] == ["a.jsonl", "b.jsonl.gz"]
        assert all(isinstance(file, RemoteFile) for file in files)
        for pattern in ("memory://vocabguard", "memory://vocabguard/*.jsonl*"):
            assert [row.text for row in read(pattern)] == ["one", "two"]  # type: ignore[union-attr]
        assert [row.text for row in read("memory://vocabguard/a.jsonl")] == ["one"]  # type: ignore[union-attr]
    finally:
        memory.rm("/vocabguard", recursive=True)
    for address in ("memory://nothing", "nosuchprotocol://x/y.jsonl"):
        with pytest.raises(DataError, match=f"{address}: "):
            data_files([address])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet"])
def test_shards_have_each_row_once(tmp_path: Path, name: str) -> None:
    texts = [f"row {n}" for n in range(2500)]
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=100)
    elif name == "a.csv":
        path.write_text("text\n" + "\n".join(texts), encoding="utf-8")
    elif name == "a.txt":
        path.write_text("\n".join(texts), encoding="utf-8")
    else:
        path.write_bytes(lines([{"text": text} for text in texts]))
    parts = [[row.text for row in read(path, shard=RowShard(index, 3))] for index in (1, 2, 3)]  # type: ignore[union-attr]
    assert sorted(text for part in parts for text in part) == sorted(texts)
    assert min(map(len, parts)) > 400
