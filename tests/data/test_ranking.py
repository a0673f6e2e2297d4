"""What is common, what the template writes, words of several tokens, tables of all tokens."""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from vocabguard.data.coverage import Coverage, at_risk, measure_coverage
from vocabguard.data.ranking import (
    COLUMNS,
    KINDS,
    expected_never,
    kind_rows,
    kinds_of,
    merge_ranks,
    template_ids,
    word_sequences,
    write_tokens,
)
from vocabguard.data.readers import Chat, Text
from vocabguard.vocabulary.table import VocabTable, build_table


@pytest.fixture(scope="module")
def table(tokenizer: Any) -> VocabTable:
    return build_table(tokenizer, len(tokenizer))


@pytest.fixture(scope="module")
def found(tokenizer: Any, table: VocabTable) -> Coverage:
    said = [{"role": "user", "content": "Say the data"}, {"role": "assistant", "content": "the data there the"}]
    return measure_coverage([Chat("a", said), Text("b", "Hello there")], tokenizer, table)


def test_what_the_template_writes_is_left_out(tokenizer: Any, table: VocabTable) -> None:
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{% for m in messages %}{{ m.role }} there: {{ m.content }}<|end|>{% endfor %}"
    ids = template_ids(own)
    assert set(tokenizer.encode(" there", add_special_tokens=False)) <= set(ids.tolist())
    counted = measure_coverage([Text("a", "Hello")], own, table)
    everyone, rest = (at_risk(counted, len(table), without=without) for without in (None, ids))
    assert set(everyone) - set(rest) == set(everyone) & set(ids.tolist()) != set()
    own.chat_template = None
    assert template_ids(own).numel() == 0


def test_merges_tell_what_is_common(tokenizer: Any, table: VocabTable, found: Coverage) -> None:
    """Independently: a token that is a part of another's merge was made before it."""
    ranks = merge_ranks(tokenizer, len(table))
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    assert model["type"] == "BPE"
    vocabulary = tokenizer.get_vocab()
    made = {"".join(merge) for merge in model["merges"]}
    for left, right in model["merges"][:2000]:
        for part in (left, right):
            if part in made:
                assert ranks[vocabulary[part]] < ranks[vocabulary[left + right]]
    order = at_risk(found, 500, ranks=ranks)
    assert [int(ranks[i]) for i in order] == sorted(int(ranks[i]) for i in order)


def test_expected_share_equals_draws(table: VocabTable) -> None:
    rng = Random(0)
    counts = torch.tensor([int(rng.paretovariate(0.6)) % 500 for _ in range(300)])
    live = torch.arange(300) % 7 != 0
    draws = 400
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(300):
        drawn = torch.multinomial(counts.double(), draws, replacement=True, generator=generator)
        seen = torch.zeros(300, dtype=torch.bool)
        seen[drawn] = True
        shares.append(float((~seen[live]).double().mean()))
    assert expected_never(counts, live, draws) == pytest.approx(sum(shares) / len(shares), abs=0.005)


def test_kinds_of_tokens(table: VocabTable, found: Coverage) -> None:
    kinds = kinds_of(table)
    for index, kind in enumerate(kinds.tolist()):
        text = table.texts[index]
        letters = text[1:] if text.startswith(" ") else text
        is_word = bool(letters) and all(one.isalpha() or one in "'’-" or ord(one) > 0x2FF for one in letters)
        if not is_word:
            assert KINDS[kind] == "other", text
    for text, kind in ((" the", "word"), ("ing", "piece"), (";", "other")):
        index = next(i for i, one in enumerate(table.texts) if one == text)
        assert KINDS[kinds[index]] == kind
    rows = kind_rows(found, table)
    assert sum(sum(counts) for _, counts in rows) == int((table.live & table.mask("latin")).sum())


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_words_are_counted_whole(tokenizer: Any, table: VocabTable, workers: int) -> None:
    ways = word_sequences(tokenizer, "data there")
    assert all(len(way) > 1 for way in ways)
    assert len(ways) == 2
    said = [
        {"role": "user", "content": "data there"},
        {"role": "assistant", "content": "ok data there data there data"},
    ]
    examples = [Chat("a", said), Text("b", "x data"), Text("c", " there data there")]
    counted = measure_coverage(examples, tokenizer, table, words={"data there": ways}, epochs=2, workers=workers)
    (word,) = counted.words
    assert (word.targets, word.inputs) == (2 * 3, 2 * 4)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_table_of_all_tokens(tmp_path: Path, table: VocabTable, found: Coverage, suffix: str) -> None:
    path = tmp_path / f"t{suffix}"
    if suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        write_tokens(path, found, table)
        rows = [list(row.values()) for row in parquet.read_table(path).to_pylist()]
    else:
        write_tokens(path, found, table)
        with path.open(newline="", encoding="utf-8") as file:
            head, *rows = csv.reader(file)
        assert tuple(head) == COLUMNS
    assert len(rows) == len(table)
    place = COLUMNS.index("data_target")
    assert [int(row[place]) for row in rows] == found.data_target.tolist()
    with pytest.raises(ValueError, match="--table is"):
        write_tokens(tmp_path / "t.xlsx", found, table)
