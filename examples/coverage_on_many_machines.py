"""Count what data asks for with the engine that holds it: `datasets`, or Ray Data on many machines.

    python examples/coverage_on_many_machines.py TOKENIZER DATA.jsonl [--engine datasets|ray] [--processes 2]

The same function, `vocabguard.data.mapped.CountBatch`, maps over batches in both; only its small counts come back. Ray
needs ``pip install "ray[data]"`` and uses the cluster of ``RAY_ADDRESS``, or this machine. Without an engine,
``vocabguard coverage --shard I/N --out part-I.safetensors`` on each machine and ``vocabguard coverage merge part-*`` do
the same.
"""

from __future__ import annotations

import argparse
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from vocabguard.data.mapped import CountBatch, total_counts
from vocabguard.vocabulary.table import build_table


def by_datasets(path: str, count: CountBatch, size: int, processes: int) -> tuple[Tensor, Tensor]:
    """Targets and inputs by id, counted in some processes of this machine."""
    from datasets import load_dataset

    data = load_dataset("json", data_files=path, split="train")
    counted = data.map(count, batched=True, batch_size=512, remove_columns=data.column_names, num_proc=processes)
    return total_counts(counted.with_format("numpy").iter(100_000), size)


def by_ray(path: str, count: CountBatch, size: int, processes: int) -> tuple[Tensor, Tensor]:
    """Targets and inputs by id, counted wherever Ray has room."""
    import ray

    data: Any = ray.data.read_json(path, lines=True)
    pool = ray.data.TaskPoolStrategy(size=processes)
    counted = data.map_batches(count, batch_size=512, batch_format="numpy", compute=pool)
    return total_counts(counted.iter_batches(batch_size=100_000), size)


def main() -> None:
    """Count and print the share of tokens that the data never asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer")
    parser.add_argument("data")
    parser.add_argument("--engine", choices=("datasets", "ray"), default="datasets")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    table = build_table(tokenizer, len(tokenizer))
    engine = by_datasets if given.engine == "datasets" else by_ray
    targets, inputs = engine(given.data, CountBatch(tokenizer), len(table), given.processes)
    never = int((table.live & (targets == 0)).sum()) / int(table.live.sum())
    share = f"{never:.1%} of live tokens are never a target"
    print(f"{int(targets.sum()):,} targets, {int(inputs.sum()):,} inputs; {share}")


if __name__ == "__main__":
    main()
