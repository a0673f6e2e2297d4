"""Counts over batches equal those of one run, in `datasets` and, where it is installed, in Ray Data."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from by_path import module_of

from vocabguard.data.coverage import measure_coverage
from vocabguard.data.mapped import CountBatch, total_counts
from vocabguard.data.readers import read_examples
from vocabguard.vocabulary.table import build_table

RECIPE = Path(__file__).parents[2] / "examples" / "coverage_on_many_machines.py"


@pytest.fixture
def recipe() -> ModuleType:
    return module_of(RECIPE)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"data {n} there"}]}
        for n in range(1200)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def whole(data: Path, tokenizer: Any) -> Any:
    return measure_coverage(read_examples([data]), tokenizer, build_table(tokenizer, len(tokenizer)))


def test_batches_add_up(data: Path, tokenizer: Any, whole: Any) -> None:
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    count = CountBatch(tokenizer)
    parts = [count({"messages": [row["messages"] for row in rows[begin : begin + 77]]}) for begin in range(0, 1200, 77)]
    targets, inputs = total_counts(parts, len(tokenizer))
    assert torch.equal(targets, whole.data_target)
    assert torch.equal(inputs, whole.inputs)
    assert sum(sum(part["rows"]) for part in parts) == 1200
    again = pickle.loads(pickle.dumps(count))({"text": ["the data"]})
    assert again == count({"text": ["the data"]})
    assert count({"text": []})["id"] == []


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_recipe_with_datasets(
    recipe: ModuleType, data: Path, tokenizer: Any, whole: Any, processes: int, tmp_path: Path, monkeypatch: Any
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    targets, inputs = recipe.by_datasets(str(data), CountBatch(tokenizer), len(tokenizer), processes)
    assert torch.equal(targets, whole.data_target)
    assert torch.equal(inputs, whole.inputs)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_recipe_with_ray(recipe: ModuleType, data: Path, tokenizer: Any, whole: Any) -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        targets, inputs = recipe.by_ray(str(data), CountBatch(tokenizer), len(tokenizer), 2)
    finally:
        ray.shutdown()
    assert torch.equal(targets, whole.data_target)
    assert torch.equal(inputs, whole.inputs)
