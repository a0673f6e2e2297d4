"""Shards counted apart and put together are the whole."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vocabguard.data.coverage import Coverage, load_coverage, measure_coverage
from vocabguard.data.merge import merge_coverages
from vocabguard.data.ranking import word_sequences
from vocabguard.data.readers import read_examples
from vocabguard.data.tables import RowShard
from vocabguard.vocabulary.table import build_table


@pytest.fixture
def parts(tokenizer: Any, tmp_path: Path) -> tuple[Coverage, list[Coverage]]:
    """All rows of two files, and three shards of them, saved and read again."""
    files = [tmp_path / f"{name}.jsonl" for name in "ab"]
    for file in files:
        rows = [
            [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"{file.stem} data {n}"}]
            for n in range(40)
        ]
        file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    table, words = build_table(tokenizer, len(tokenizer)), {"a data": word_sequences(tokenizer, "a data")}

    def counted(shard: RowShard) -> Coverage:
        names, examples = [str(file) for file in files], read_examples(files, shard=shard)
        return measure_coverage(examples, tokenizer, table, files=names, words=words, max_length=9)

    shards = []
    for index in (1, 2, 3):
        counted(RowShard(index, 3)).save(tmp_path / f"{index}.safetensors")
        shards.append(load_coverage(tmp_path / f"{index}.safetensors"))
    return counted(RowShard()), shards


def test_merged_is_the_whole(parts: tuple[Coverage, list[Coverage]]) -> None:
    whole, shards = parts
    merged = merge_coverages(shards, "abc")
    assert torch.equal(merged.data_target, whole.data_target)
    assert torch.equal(merged.inputs, whole.inputs)
    assert (merged.tally, merged.words) == (whole.tally, whole.words)
    assert merged.words[0].targets > 0
    assert merged.source.files == whole.source.files
    assert merged.source.shard == "1/3, 2/3, 3/3"
    by_steps = merge_coverages([merge_coverages(shards[:2], "ab"), shards[2]], "ac")
    assert torch.equal(by_steps.data_target, whole.data_target)


def test_unequal_parts_are_refused(parts: tuple[Coverage, list[Coverage]]) -> None:
    _, (first, second, _) = parts
    for change in ({"vocabulary": "x"}, {"loss": "all"}, {"max_length": None}, {"eos": False}, {"epochs": 2},
                   {"trainer": "transformers"}, {"template": "other"}):  # fmt: skip
        other = dataclasses.replace(second, source=dataclasses.replace(second.source, **change))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"b: was counted with"):
            merge_coverages([first, other], "ab")
    with pytest.raises(ValueError, match="counted twice"):
        merge_coverages([first, copy.deepcopy(first)], "ab")
    with pytest.raises(ValueError, match="counted twice"):
        merge_coverages([merge_coverages([first, second], "ab"), second], "cb")
    with pytest.raises(ValueError, match="other words"):
        merge_coverages([first, dataclasses.replace(second, words=())], "ab")
    with pytest.raises(ValueError, match="no coverage to merge"):
        merge_coverages([], [])
