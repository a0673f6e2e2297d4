"""How long counting coverage takes against the bare tokenizer over the same texts.

``python tests/benchmarks/coverage_speed.py`` takes the interface messages of Django in 99 languages as texts and as
prompts with completions, and the chats of chatterbot-corpus joined to conversations, with and without
``{% generation %}`` in the template. The bare tokenizer is ``tokenizer(batch)`` in batches of as many, of texts that
are there already; of chats also ``tokenizer.apply_chat_template(batch)``, which has to render them as coverage does.
All are run in turns, in one process; printed are the median times and the ratio to them. No network.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from vocabguard.data.coverage import CHUNK, measure_coverage
from vocabguard.data.readers import Chat, Completion, Example, Text
from vocabguard.vocabulary.table import build_table

EXAMPLES = Path(__file__).parents[2] / "examples"
PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


WHAT = ("tokenizer(batch)", "apply_chat_template")


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
    """Seconds of each, run in turns."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, taken in zip(works, times, strict=True):
            began = time.perf_counter()
            work()
            taken.append(time.perf_counter() - began)
    return [statistics.median(taken) for taken in times]


def compare(name: str, examples: list[Example], texts: list[str], tokenizer: Any, repeats: int) -> None:
    """Print one line."""
    table = build_table(tokenizer, len(tokenizer))
    batches = [texts[begin : begin + CHUNK] for begin in range(0, len(texts), CHUNK)]
    works: list[Callable[[], object]] = [
        lambda: measure_coverage(examples, tokenizer, table),
        lambda: [tokenizer(batch) for batch in batches],
    ]
    if isinstance(examples[0], Chat):
        said = [[chat.turns for chat in examples[begin : begin + CHUNK]] for begin in range(0, len(examples), CHUNK)]
        works.append(lambda: [tokenizer.apply_chat_template(batch) for batch in said])
    counted, *others = medians(works, repeats)
    tokens = int(measure_coverage(examples, tokenizer, table).inputs.sum())
    told = [f"{counted / other:.2f} times {what} ({other:.3f} s)" for other, what in zip(others, WHAT, strict=False)]
    print(f"{name:24} {len(examples):7,} rows {tokens:8,} tokens: coverage {counted:.3f} s, {', '.join(told)}")


def main() -> None:
    """Read, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    sys.path.insert(0, str(EXAMPLES))
    from corpus import load

    corpus = load("train")
    lines = [text for _, text in corpus.lines]
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "assets")
    compare("texts", [Text("", line) for line in lines], lines, tokenizer, repeats)
    halves = [(line[: len(line) // 2], line[len(line) // 2 :]) for line in lines]
    compare("prompts and completions", [Completion("", *half) for half in halves], lines, tokenizer, repeats)
    for exchanges in (1, 8):
        said = conversations(corpus.chats, exchanges)
        texts = tokenizer.apply_chat_template(said, tokenize=False)
        for marked, template in (("marked", tokenizer.chat_template), ("unmarked", PLAIN)):
            own = AutoTokenizer.from_pretrained(EXAMPLES / "assets")
            own.chat_template = template
            name = f"chats of {exchanges}, {marked}"
            compare(name, [Chat("", turns) for turns in said], texts, own, repeats)


if __name__ == "__main__":
    main()
