"""Whether coverage's memory stays flat, over ten million simulated rows of each kind.

``python tests/benchmarks/coverage_memory.py [--rows 10000000]`` streams texts, conversations (a tenth as many, of ten
times the tokens) and token ids of a Parquet file, read again and again, and prints the resident memory while they pass.
The highest after the first tenth is compared with the highest before. No network.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import psutil
from transformers import AutoTokenizer

from vocabguard.data.coverage import measure_coverage
from vocabguard.data.readers import Chat, Example, Text, read_examples
from vocabguard.vocabulary.table import build_table

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
WORDS = ["the", "data", "there", "hello", "данные", "保存", "x = 1;", "unbelievable", "ok."]
ALLOWED = 24.0  # MiB that may be added after the first tenth


def texts(rows: int) -> Iterator[Example]:
    for row in range(rows):
        yield Text("", f"{WORDS[row % 9]} {WORDS[row // 9 % 9]} {row}")


def chats(rows: int) -> Iterator[Example]:
    for row in range(rows // 10):
        said = [
            {"role": role, "content": f"{WORDS[row % 9]} {row} {n}"} for n in range(4) for role in ("user", "assistant")
        ]
        yield Chat("", said)


def tokens(rows: int, folder: str) -> Iterable[Example]:
    import pyarrow as pa
    from pyarrow import parquet

    part = min(rows, 500_000)
    rng = np.random.default_rng(0)
    offsets = np.arange(0, 16 * part + 1, 16, dtype=np.int32)
    ids = rng.integers(8, 8000, 16 * part, dtype=np.int32)
    labels = np.where(rng.random(16 * part) < 0.5, ids, -100).astype(np.int32)
    table = {
        name: pa.ListArray.from_arrays(offsets, values) for name, values in (("input_ids", ids), ("labels", labels))
    }
    path = Path(folder) / "tokens.parquet"
    parquet.write_table(pa.table(table), path, row_group_size=50_000)
    return read_examples([path] * (rows // part), blocks=True)


def watched(examples: Iterable[Example], rows: int) -> tuple[list[float], float]:
    """MiB at each of a hundred points, and CPU seconds."""
    process, seen, found = psutil.Process(), 0, list[float]()

    def progress(more: int) -> None:
        nonlocal seen
        seen += more
        while seen * 100 >= rows * len(found):
            found.append(process.memory_info().rss / 2**20)

    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    began = time.process_time()
    measure_coverage(examples, tokenizer, build_table(tokenizer, len(tokenizer)), progress=progress)
    return found, time.process_time() - began


def main() -> None:
    """Stream, print, exit with 1 where memory grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        kinds: dict[str, tuple[Callable[[], Iterable[Example]], int]] = {
            "token ids": (lambda: tokens(rows, folder), rows),
            "texts": (lambda: texts(rows), rows),
            "conversations": (lambda: chats(rows), rows // 10),
        }
        grown = {}
        for name, (make, count) in kinds.items():
            found, seconds = watched(make(), count)
            tenth = len(found) // 10
            before, after = max(found[: tenth + 1]), max(itertools.islice(found, tenth + 1, None))
            grown[name] = after - before
            print(f"{name:14} {count:11,} rows, {seconds:6.1f} CPU s: {before:.0f} MiB in the first tenth, {after:.0f} "
                  f"after it ({after - before:+.1f})", flush=True)  # fmt: skip
    if any(more > ALLOWED for more in grown.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
