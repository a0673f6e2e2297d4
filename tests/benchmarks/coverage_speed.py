"""What counting coverage costs against the fastest tokenizer alone over the same texts.

``python tests/benchmarks/coverage_speed.py`` takes the interface messages of Django in 99 languages as texts, as
paragraphs of ten and as prompts with completions, the chats of chatterbot-corpus joined to conversations, with and
without ``{% generation %}`` in the template, and by one that looks into what is said, so that each is rendered; and the
same texts as token ids in a Parquet file. They are compared with one process and one thread of `fastokens` (the extra
``fast``) where it is installed, else of the tokenizer's own
``encode_batch_fast``, of texts that are there already; for conversations also their rendering by
``apply_chat_template(tokenize=False)`` and the tokenizer together; for token ids reading the file's two columns with
pyarrow. All are run in turns, in one process, and compared by CPU seconds, which other work on the machine changes
little; printed are the medians over the rounds and the ratios. No network.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from vocabguard.data.counting import CHUNK, chunks_of, count_rows
from vocabguard.data.coverage import measure_coverage
from vocabguard.data.encode import TargetEncoder
from vocabguard.data.readers import Chat, Completion, Example, Text, read_examples
from vocabguard.vocabulary.table import build_table

EXAMPLES = Path(__file__).parents[2] / "examples"
LOOKING = (
    "{% for m in messages %}<|{{ m.role }}|>{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def conversations(chats: Any, exchanges: int) -> list[list[dict[str, str]]]:
    """Chats joined to conversations of so many exchanges."""
    found = []
    for begin in range(0, len(chats) - exchanges, exchanges):
        part = chats[begin : begin + exchanges]
        found.append([
            {"role": role, "content": text}
            for chat in part
            for role, text in (("user", chat.user), ("assistant", chat.assistant))
        ])  # fmt: skip
    return found


def medians(works: list[Callable[[], object]], repeats: int) -> list[float]:
    """CPU seconds of each, run in turns, after a first round that warms up."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats + 1):
        for work, taken in zip(works, times, strict=True):
            began = time.process_time()
            work()
            taken.append(time.process_time() - began)
    return [statistics.median(taken[1:]) for taken in times]


def alone(tokenizer: Any) -> tuple[str, Callable[[list[str]], object]]:
    """The fastest tokenizer there is, and its name."""
    try:
        import fastokens

        quick = fastokens.Tokenizer.from_json_str(tokenizer.backend_tokenizer.to_str())
        return "fastokens", quick.encode_batch_flat
    except ImportError:
        return "encode_batch_fast", tokenizer.backend_tokenizer.encode_batch_fast


def counted(examples: list[Example], tokenizer: Any) -> Callable[[], int]:
    """Counting all of them, as `measure_coverage` does once it has begun."""
    encoder = TargetEncoder(tokenizer)
    count_rows(encoder, examples[:CHUNK])

    def count() -> int:
        total = np.zeros((2, len(tokenizer)), dtype=np.int64)
        for chunk in chunks_of(examples):
            count_rows(encoder, chunk).add_to(total)
        return int(total[1].sum())

    return count


def compare(name: str, examples: list[Example], texts: list[str], tokenizer: Any, repeats: int) -> None:
    """Print one line."""
    batches = [texts[begin : begin + CHUNK] for begin in range(0, len(texts), CHUNK)]
    fastest, encode = alone(tokenizer)
    count = counted(examples, tokenizer)
    works: list[Callable[[], object]] = [count, lambda: [encode(batch) for batch in batches]]
    told = [fastest]
    if isinstance(examples[0], Completion):
        prompts = [str(example.prompt) for example in examples if isinstance(example, Completion)]
        parts = [prompts[begin : begin + CHUNK] for begin in range(0, len(prompts), CHUNK)]
        works.append(lambda: [encode(batch) for batch in (*batches, *parts)])
        told.append(f"{fastest} of rows and prompts, both of which a trainer tokenizes")
    if isinstance(examples[0], Chat):
        turns = [example.turns for example in examples if isinstance(example, Chat)]
        works.append(lambda: encode([tokenizer.apply_chat_template(one, tokenize=False) for one in turns]))
        told.append(f"rendering and {fastest}")
    ours, *others = medians(works, repeats)
    shown = ", ".join(
        f"{ours / other:.2f} times {what} ({other:.3f} s)" for other, what in zip(others, told, strict=True)
    )
    print(f"{name:24} {len(examples):7,} rows {count():9,} tokens: coverage {ours:.3f} s, {shown}", flush=True)


def compare_tokens(texts: list[str], tokenizer: Any, repeats: int) -> None:
    """Print the line of token ids in a Parquet file."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = tokenizer(texts * 20)["input_ids"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.parquet"
        kind = pa.list_(pa.int32())
        table = pa.table({"input_ids": pa.array(rows, kind), "labels": pa.array(rows, kind)})
        parquet.write_table(table, path, row_group_size=50_000)
        encoder = TargetEncoder(tokenizer)

        def count() -> int:
            total = np.zeros((2, len(tokenizer)), dtype=np.int64)
            for block in read_examples([path], blocks=True):
                count_rows(encoder, [block]).add_to(total)
            return int(total[1].sum())

        def read() -> None:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(65_536, columns=["input_ids", "labels"]):
                    for column in batch.columns:
                        column.flatten().to_numpy()

        ours, other = medians([count, read], repeats)
        print(f"{'token ids in Parquet':24} {len(rows):7,} rows {count():9,} tokens: coverage {ours:.3f} s, "
              f"{ours / other:.2f} times reading ({other:.3f} s)")  # fmt: skip


PASSES = 4, 44
"""Passes over the rows in the smaller and in the larger file."""


def compare_processes(texts: list[str], chats: list[list[dict[str, str]]], tokenizer: Any) -> None:
    """Print what one process and two need beside their start, from files of two sizes, by both clocks."""
    table = build_table(tokenizer, len(tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in (("texts", [{"text": text} for text in texts]), ("chats", [{"messages": c} for c in chats])):
            spent: dict[tuple[int, int], tuple[float, float, float]] = {}
            for times in PASSES:
                path = Path(folder) / f"{name}-{times}.jsonl"
                with path.open("w", encoding="utf-8") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for _ in range(times) for row in rows)
                for workers in (1, 2):
                    before, began, wall = _children(), time.process_time(), time.perf_counter()
                    measure_coverage(read_examples([path], blocks=True), tokenizer, table, workers=workers)
                    clocks = time.process_time() - began, _children() - before, time.perf_counter() - wall
                    spent[workers, times] = clocks
            few, many = PASSES
            one, _, wall_one = (spent[1, many][clock] - spent[1, few][clock] for clock in range(3))
            here, there, wall_two = (spent[2, many][clock] - spent[2, few][clock] for clock in range(3))
            started = (spent[2, few][1] - there * few / (many - few)) / 2
            print(f"{name}, {(many - few) * len(rows):,} rows more: one process {one:.2f} s of CPU time; of two, each "
                  f"{there / 2:.2f} s and the first {max(0.0, here):.2f} s, {one / max(there / 2, here):.2f} times as "
                  f"fast; {started:.1f} s to start each. By the wall {wall_one:.2f} and {wall_two:.2f} s, "
                  f"{wall_one / wall_two:.2f} times as fast", flush=True)  # fmt: skip


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Read, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokenizer", default=str(EXAMPLES / "assets"))
    parser.add_argument("--processes", action="store_true", help="Compare two processes with one instead.")
    given = parser.parse_args()
    sys.path.insert(0, str(EXAMPLES))
    from corpus import load

    corpus = load("train")
    lines = [text for _, text in corpus.lines]
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    if given.processes:
        compare_processes(lines, conversations(corpus.chats, 1), tokenizer)
        return
    compare("texts", [Text("", line) for line in lines], lines, tokenizer, given.repeats)
    paragraphs = [" ".join(lines[begin : begin + 10]) for begin in range(0, len(lines), 10)]
    compare("paragraphs", [Text("", one) for one in paragraphs], paragraphs, tokenizer, given.repeats)
    halves = [(line[: len(line) // 2], line[len(line) // 2 :]) for line in lines]
    compare("prompts and completions", [Completion("", *half) for half in halves], lines, tokenizer, given.repeats)
    compare_tokens(lines, tokenizer, given.repeats)
    for exchanges in (1, 8):
        said = conversations(corpus.chats, exchanges)
        for marked, template in (
            ("marked", tokenizer.chat_template), ("unmarked", PLAIN), ("looked at", LOOKING)
        ):  # fmt: skip
            own = AutoTokenizer.from_pretrained(given.tokenizer)
            own.chat_template = template
            texts = own.apply_chat_template(said, tokenize=False)
            name = f"chats of {exchanges}, {marked}"
            compare(name, [Chat("", turns) for turns in said], texts, own, given.repeats)


if __name__ == "__main__":
    os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    main()
