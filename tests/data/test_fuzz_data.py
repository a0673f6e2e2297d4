"""Damaged and wrong input: one clear line and exit code 2, never a traceback."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from vocabguard.cli import app
from vocabguard.data.coverage import measure_coverage
from vocabguard.data.readers import Text
from vocabguard.vocabulary.table import build_table

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
GOOD = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}) + "\n"
LINES: dict[str, str | bytes] = {
    "no rows": "",
    "blank": "\n \n\n",
    "not json": "hello\n",
    "cut": GOOD + GOOD[:-20],
    "cut at once": GOOD[:30],
    "a list": "[1, 2]\n",
    "a number": "17\n",
    "a text": '"x"\n',
    "null": "null\n",
    "no columns": "{}\n",
    "other columns": '{"foo": "a", "bar": "b"}\n',
    "half a completion": '{"prompt": "a"}\n',
    "messages is text": '{"messages": "Hi"}\n',
    "messages is null": '{"messages": null}\n',
    "messages is empty": '{"messages": []}\n',
    "messages is an object": '{"messages": {"role": "user"}}\n',
    "turn is text": '{"messages": ["Hi"]}\n',
    "turn is null": '{"messages": [null]}\n',
    "turn without role": '{"messages": [{"content": "Hi"}]}\n',
    "role is a number": '{"messages": [{"role": 3, "content": "Hi"}]}\n',
    "from is a list": '{"messages": [{"from": [], "value": "Hi"}]}\n',
    "content is a number": '{"messages": [{"role": "user", "content": 3}]}\n',
    "content is an object": '{"messages": [{"role": "user", "content": {"a": 1}}]}\n',
    "second row lacks it": GOOD + '{"text": "b"}\n',
    "second row is wrong": GOOD + '{"messages": 5}\n',
    "text is a number": '{"text": 1}\n',
    "text is null": '{"text": null}\n',
    "text is a list": '{"text": ["a"]}\n',
    "prompt is a number": '{"prompt": 1, "completion": "a"}\n',
    "mixed completion": '{"prompt": "a", "completion": [{"role": "assistant", "content": "x"}]}\n',
    "ambiguous": '{"text": "a", "messages": [{"role": "user", "content": "x"}]}\n',
    "lone surrogate": '{"text": "\\ud800"}\n',
    "lone surrogate in a chat": '{"messages": [{"role": "user", "content": "\\udfff"}]}\n',
    "deep": "[" * 100_000 + "\n",
    "deep object": '{"text": ' + "[" * 100_000 + "\n",
    "huge number": '{"text": ' + "9" * 5000 + "}\n",
    "tools is a number": GOOD[:-2] + ', "tools": 3}\n',
    "tools is broken": GOOD[:-2] + ', "tools": "[{"}\n',
    "options is a list": GOOD[:-2] + ', "chat_template_kwargs": []}\n',
    "unknown role": '{"messages": [{"role": "oracle", "content": "Hi"}]}\n',
    "ids are texts": '{"input_ids": ["a"]}\n',
    "ids are negative": '{"input_ids": [-1, 5]}\n',
    "ids are of another tokenizer": '{"input_ids": [5, 1000000]}\n',
    "ids are huge": '{"input_ids": [5, 99999999999999999999]}\n',
    "labels are shorter": '{"input_ids": [5, 6], "labels": [6]}\n',
    "labels are shifted": '{"input_ids": [5, 6, 7], "labels": [6, 7, -100]}\n',
    "pairs without a prompt": '{"chosen": "a", "rejected": "b"}\n',
    "pairs with nothing in common": '{"chosen": [{"role": "user", "content": "a"}], '
    '"rejected": [{"role": "user", "content": "b"}]}\n',
    "answer is a list": '{"question": "a", "answer": ["b"]}\n',
    "latin-1": '{"text": "Größe"}\n'.encode("latin-1"),
    "utf-16": GOOD.encode("utf-16"),
    "garbage": Random(0).randbytes(5000),
    "zeros": bytes(4096),
    "zip": b"PK\x03\x04" + Random(1).randbytes(300),
}
FILES: dict[str, tuple[str, str | bytes]] = {
    "cut list": ("a.json", "[" + GOOD.strip() + ", "),
    "cut value": ("a.json", "[" + GOOD[:20]),
    "empty list": ("a.json", "[]"),
    "empty json": ("a.json", ""),
    "json garbage": ("a.json", Random(2).randbytes(3000)),
    "json list of numbers": ("a.json", "[1, 2]"),
    "json deep": ("a.json", '{"text": ' * 60_000),
    "json object around": ("a.json", json.dumps({"data": [json.loads(GOOD)]})),
    "empty text": ("a.txt", ""),
    "latin-1 text": ("a.txt", "Größe".encode("latin-1")),
    "binary text": ("a.txt", b"\xff\xfe\x00"),
    "not gzip": ("a.jsonl.gz", GOOD),
    "cut gzip": ("a.jsonl.gz", gzip.compress(GOOD.encode() * 500)[:-12]),
    "garbled gzip": ("a.txt.gz", gzip.compress(b"abc\n" * 5000)[:20] + b"\x99" * 40),
    "empty gzip": ("a.jsonl.gz", b""),
    "empty parquet": ("a.parquet", b""),
    "parquet garbage": ("a.parquet", b"PAR1" + Random(3).randbytes(500) + b"PAR1"),
    "parquet text": ("a.parquet", GOOD),
    "parquet packed": ("a.parquet.gz", b""),
    "unknown ending": ("a.xlsx", "text\nhello\n"),
    "csv without a column": ("a.csv", "title,body\na,b\n"),
    "csv with too few values": ("a.csv", "text,more\nhello\n"),
    "csv with an open quote": ("a.csv", 'text\n"hello\n'),
    "csv latin-1": ("a.csv", "text\nGröße\n".encode("latin-1")),
    "empty csv": ("a.tsv", ""),
    "not zst": ("a.jsonl.zst", GOOD),
    "cut zst": ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04\x00\x00"),
    "not xz": ("a.jsonl.xz", GOOD),
    "not bz2": ("a.jsonl.bz2", GOOD),
    "arrow garbage": ("a.arrow", b"ARROW1" + Random(5).randbytes(300)),
    "empty arrow": ("a.arrow", b""),
    "no ending": ("data", GOOD),
}


@pytest.fixture(scope="module")
def shared() -> Iterator[Any]:
    """Load the tokenizer and build its table once: the cases are many."""
    loaded = transformers.AutoTokenizer.from_pretrained(ASSETS)
    table, load = build_table(loaded, len(loaded)), transformers.AutoTokenizer.from_pretrained

    def load_once(name: str, **options: Any) -> Any:
        return loaded if name == str(ASSETS) else load(name, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.AutoTokenizer, "from_pretrained", load_once)
        patch.setattr("vocabguard.vocabulary.table.build_table", lambda tokenizer, rows: table)
        yield loaded


def refused(arguments: list[str], monkeypatch: Any, capsys: Any) -> str:
    """Run the command; it must refuse with one line."""
    capsys.readouterr()  # libraries that made the input may have printed
    monkeypatch.setattr("sys.argv", ["vocabguard", *arguments])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    printed = capsys.readouterr()
    assert stopped.value.code == 2, printed
    assert printed.out == ""
    assert printed.err.startswith("vocabguard: ")
    assert printed.err.count("\n") == 1, printed.err
    assert "Traceback" not in printed.err
    return str(printed.err)


@pytest.mark.parametrize("case", LINES)
def test_lines(case: str, tmp_path: Path, shared: Any, monkeypatch: Any, capsys: Any) -> None:
    path = tmp_path / "data.jsonl"
    content = LINES[case]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    told = refused(["coverage", str(ASSETS), str(path)], monkeypatch, capsys)
    assert "data.jsonl" in told
    if case not in ("no rows", "blank"):
        assert "line " in told


@pytest.mark.parametrize("case", FILES)
def test_files(case: str, tmp_path: Path, shared: Any, monkeypatch: Any, capsys: Any) -> None:
    name, content = FILES[case]
    if "parquet" in name or "arrow" in name or "zst" in name:
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert name in refused(["coverage", str(ASSETS), str(path)], monkeypatch, capsys)


@pytest.mark.parametrize("case", [*LINES, *FILES])
def test_corpora(case: str, tmp_path: Path, shared: Any, monkeypatch: Any, capsys: Any) -> None:
    """The same for ``replay``, which leaves no half-written file behind."""
    name, content = FILES.get(case) or ("data.jsonl", LINES[case])
    if "parquet" in name or "arrow" in name or "zst" in name:
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    out = ["--tokenizer", str(ASSETS), "--out", str(tmp_path / "out.jsonl")]
    refused(["replay", str(path), *out], monkeypatch, capsys)
    assert [file.name for file in tmp_path.iterdir()] == [name]


NEEDS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "cut": lambda good: good[:-5],
    "header only": lambda good: good[:300],
    "huge header": lambda good: (2**60).to_bytes(8, "little") + good[8:],
    "garbage": lambda good: Random(4).randbytes(len(good)),
    "text": lambda good: GOOD.encode(),
    "a model": lambda good: (ASSETS / "model.safetensors").read_bytes(),
    "fewer rows": lambda good: safetensors.torch.save({"data_target": torch.zeros(5, dtype=torch.int64)}),
    "a matrix": lambda good: safetensors.torch.save({"data_target": torch.zeros(9000, 2)}),
    "a number": lambda good: safetensors.torch.save({"data_target": torch.zeros(())}),
}


@pytest.mark.parametrize("command", ["echo", "replay"])
@pytest.mark.parametrize("case", NEEDS)
def test_coverage_files(case: str, command: str, tmp_path: Path, shared: Any, monkeypatch: Any, capsys: Any) -> None:
    table = build_table(shared, len(shared))
    measure_coverage([Text("", "the data")], shared, table).save(tmp_path / "c.safetensors")
    (tmp_path / "c.safetensors").write_bytes(NEEDS[case]((tmp_path / "c.safetensors").read_bytes()))
    (tmp_path / "a.txt").write_text("the data", encoding="utf-8")
    arguments = {
        "echo": ["echo", str(ASSETS), "--ids", "e.jsonl", "--needs", "c.safetensors"],
        "replay": ["replay", "a.txt", "--tokenizer", str(ASSETS), "--out", "r.txt", "--coverage", "c.safetensors"],
    }
    monkeypatch.chdir(tmp_path)
    assert "c.safetensors" in refused(arguments[command], monkeypatch, capsys)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.txt", "c.safetensors"]


def saved_dataset(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": "a"}] * 3).save_to_disk(folder)
    return folder


def cut_arrow(folder: Path) -> None:
    arrow = next(saved_dataset(folder).glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:60])


def lost_arrow(folder: Path) -> None:
    next(saved_dataset(folder).glob("*.arrow")).unlink()


def broken_state(folder: Path) -> None:
    (saved_dataset(folder) / "state.json").write_text("{", encoding="utf-8")


@pytest.mark.parametrize("damage", [cut_arrow, lost_arrow, broken_state])
def test_saved_datasets(
    damage: Callable[[Path], None], tmp_path: Path, shared: Any, monkeypatch: Any, capsys: Any
) -> None:
    damage(tmp_path / "saved")
    assert "saved" in refused(["coverage", str(ASSETS), str(tmp_path / "saved")], monkeypatch, capsys)


TOKENIZERS: dict[str, dict[str, str]] = {
    "empty folder": {},
    "text only": {"readme.txt": "hello"},
    "broken json": {"tokenizer.json": "{", "tokenizer_config.json": "{}"},
    "empty object": {"tokenizer.json": "{}", "tokenizer_config.json": "{}"},
    "unknown class": {"tokenizer_config.json": '{"tokenizer_class": "NoSuchTokenizer"}'},
    "wrong config": {"config.json": "[]"},
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_folders_that_hold_no_tokenizer(case: str, tmp_path: Path, shared: Any, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name, content in TOKENIZERS[case].items():
        (folder / name).write_text(content, encoding="utf-8")
    data = tmp_path / "a.jsonl"
    data.write_text(GOOD, encoding="utf-8")
    assert "tokenizer" in refused(["coverage", str(folder), str(data)], monkeypatch, capsys)


OPTIONS = {
    "kind": ["--kind", "chat"],
    "loss": ["--loss", "none"],
    "length": ["--max-length", "0"],
    "epochs": ["--epochs", "0"],
    "threshold": ["--threshold", "1.5"],
    "threshold nan": ["--threshold", "nan"],
    "top": ["--top", "-1"],
    "workers": ["--workers", "-1"],
    "column": ["--column", "body"],
    "columns": ["--column", "a", "--column", "b", "--column", "c"],
    "template": ["--chat-template", "missing.jinja"],
    "watch": ["--watch", ""],
    "watch id": ["--watch", "99999999"],
    "out": ["--out", "no/such/folder/c.safetensors"],
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case: str, tmp_path: Path, shared: Any, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert "allowed" in refused(["coverage", str(ASSETS), "a.jsonl", *OPTIONS[case]], monkeypatch, capsys) or case in (
        "template",
        "watch",
        "out",
    )


def test_what_the_template_refuses(tmp_path: Path, shared: Any, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD + GOOD.replace("assistant", "robot"), encoding="utf-8")
    strict = (
        "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}{% endfor %}"
    )
    before = shared.chat_template
    for number, template in enumerate((strict, "{% for %}", "{{ messages.x.y.z }}", "{{ 1 / 0 }}")):
        path = tmp_path / f"{number}.jinja"
        path.write_text(template, encoding="utf-8")
        told = refused(
            ["coverage", str(ASSETS), str(tmp_path / "a.jsonl"), "--chat-template", str(path)], monkeypatch, capsys
        )
        assert f"line {1 if number else 2}: the chat template fails on roles user, " in told
    shared.chat_template = before
