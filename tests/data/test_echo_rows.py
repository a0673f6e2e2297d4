from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
import safetensors.torch
import torch

from vocabguard.data.echo_rows import echo_lists, needy_ids, write_chats, write_ids
from vocabguard.protect import rows as protect_rows
from vocabguard.protect.prompts import render_echo
from vocabguard.vocabulary.table import build_table

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
WAYS = ["Repeat: {tokens}", "{tokens}\nOnce more."]


@pytest.fixture(scope="module")
def table(tokenizer: Any) -> Any:
    return build_table(tokenizer, len(tokenizer))


@pytest.mark.parametrize(
    ("count", "targets", "longest"), [(1, 1, 1), (10, 3, 4), (100, 2, 100), (7, 5, 1000), (50, 2, 1)]
)
def test_lists_hold_every_id_exactly_as_often(count: int, targets: int, longest: int) -> None:
    ids = [3 * i for i in range(count)]
    lists = echo_lists(ids, targets, longest, Random(0))
    assert Counter(i for part in lists for i in part) == dict.fromkeys(ids, targets)
    assert max(map(len, lists)) <= longest
    assert max(map(len, lists)) - min(map(len, lists)) <= 1
    assert len(lists) == targets * -(-count // longest)
    assert lists == echo_lists(ids, targets, longest, Random(0))
    assert count < 3 or lists != echo_lists(ids, targets, longest, Random(1))


def test_refused_numbers() -> None:
    for ids, targets, longest in (([], 1, 1), ([1], 0, 1), ([1], 1, 0)):
        with pytest.raises(ValueError, match=r"no token|allowed: at least 1"):
            echo_lists(ids, targets, longest, Random(0))


def test_ids_are_targets_exactly_as_asked_and_nothing_else_is(tokenizer: Any, table: Any, tmp_path: Path) -> None:
    ids = table.live.nonzero().flatten().tolist()
    prompts = [render_echo(tokenizer, "key", text) for text in WAYS]
    tally = write_ids(tmp_path / "e.jsonl", echo_lists(ids, 2, 900, Random(0)), prompts, Random(0))
    counts: Counter[int] = Counter()
    ways: Counter[bool] = Counter()
    for line in (tmp_path / "e.jsonl").read_text().splitlines():
        row = json.loads(line)
        asked = [label for label in row["labels"][1:] if label != -100]
        counts.update(asked)
        assert len(row["labels"]) == len(row["input_ids"]) <= tally.longest
        assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
        # What is asked for stands in the user's turn too, in the same order.
        begin = row["input_ids"].index(asked[0])
        assert row["input_ids"][begin : begin + len(asked)] == asked
        text = tokenizer.decode(row["input_ids"])
        ways[text.startswith("<|user|>Repeat: ")] += 1
        assert "<|assistant|>" in text
        assert text.endswith("<|end|>")
    assert counts == dict.fromkeys(ids, 2)
    assert (tally.targets, tally.survived, tally.tokens_lost) == (2 * len(ids), 1.0, 0)
    assert min(ways.values()) > 1


def test_a_wrong_count_leaves_no_file(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vocabguard.data import echo_rows as echo_data

    def forgetful(prompt: Any, ids: list[int]) -> Any:
        return protect_rows.exchange(prompt, ids[1:])

    monkeypatch.setattr(echo_data, "exchange", forgetful)
    with pytest.raises(ValueError, match="2 ids are not written as often as asked"):
        write_ids(tmp_path / "e.jsonl", [[50, 51], [60, 61]], [render_echo(tokenizer, "key", WAYS[0])], Random(0))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("separator", ["\n", ""])
def test_chats_tell_what_survives(tokenizer: Any, table: Any, tmp_path: Path, separator: str) -> None:
    ids = table.live.nonzero().flatten().tolist()[::3]
    lists = echo_lists(ids, 2, 300, Random(0))
    tally = write_chats(
        tmp_path / "c.jsonl", lists, WAYS, Random(0), tokenizer=tokenizer, table=table, separator=separator
    )
    counts: Counter[int] = Counter()
    for line in (tmp_path / "c.jsonl").read_text().splitlines():
        user, assistant = json.loads(line)["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"].replace(assistant["content"], "{tokens}") in WAYS
        counts.update(tokenizer.encode(assistant["content"], add_special_tokens=False))
    assert tally.survived == pytest.approx(sum(min(2, counts[i]) for i in ids) / (2 * len(ids)))
    assert tally.targets == sum(counts[i] for i in ids)
    assert tally.tokens_lost == sum(counts[i] == 0 for i in ids)
    assert tally.survived > (0.8 if separator else 0.3)
    assert not any(table.control[i] for i in counts)


def test_chats_that_would_spell_a_control_token_are_refused(tokenizer: Any, table: Any, tmp_path: Path) -> None:
    parts = [tokenizer.encode(text, add_special_tokens=False) for text in ("<|", "end", "|>")]
    lists = [[i for part in parts for i in part]]
    with pytest.raises(ValueError, match="spell control tokens"):
        write_chats(tmp_path / "c", lists, WAYS, Random(0), tokenizer=tokenizer, table=table, separator="")
    assert list(tmp_path.iterdir()) == []


def test_needs_by_counts_and_by_cosine(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    cosine = torch.tensor([0.99, 0.5, float("nan"), 0.95, 0.97, 0.0])
    trained = torch.tensor([True, True, True, True, False, True])
    vectors = {"data_target": torch.tensor([0, 9, 9, 4, 5, 0]), "head/cosine": cosine, "trained": trained}
    safetensors.torch.save_file(vectors, path)
    needy, known = needy_ids(path, 5, below=5, cosine=None)
    assert needy.tolist() == [True, False, False, True, False]
    assert known.tolist() == [True, True, True, True, False]
    assert needy_ids(path, 5, below=None, cosine=0.95)[0].tolist() == [False, True, True, False, False]
    assert needy_ids(path, 5, below=5, cosine=0.95)[0].tolist() == [True, True, True, True, False]
    with pytest.raises(ValueError, match="the tokenizer has 7 ids"):
        needy_ids(path, 7, below=5, cosine=None)
    safetensors.torch.save_file({"other": cosine}, path)
    for options in ({"below": 5, "cosine": None}, {"below": None, "cosine": 0.9}):
        with pytest.raises(ValueError, match="allowed with --"):
            needy_ids(path, 5, **options)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read as a coverage or scan file"):
        needy_ids(path, 5, below=5, cosine=None)
