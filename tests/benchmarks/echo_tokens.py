"""What an echo target costs in tokens, padding included: ``python tests/benchmarks/echo_tokens.py FOLDER``

FOLDER holds a tokenizer. Echo rows are padded to the length of their batch, so a row that holds one short list costs as
much as a full one. No model is trained: the seconds of a step follow its tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from random import Random

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from vocabguard import load_config
from vocabguard.protect.prompts import render_echo
from vocabguard.protect.rows import EchoPrompt, echo_rows, lists_in_row

LENGTHS = (48, 64, 128, 512, 2048)
FILLS = (0.4, 0.7, 1.0)
SEEDS = 50


def padded(prompts: Sequence[EchoPrompt], lists: int, length: int, list_tokens: int, fill: float) -> float:
    """Tokens a target where a batch gets so many lists at a time; mean over `SEEDS`."""
    found, targets = 0.0, lists * list_tokens
    for seed in range(SEEDS):
        rows = echo_rows(range(targets), prompts, length=length, list_tokens=list_tokens, rng=Random(seed), fill=fill)
        found += len(rows) * max(length, *(len(row.input_ids) for row in rows)) / targets
    return found / SEEDS


def main() -> None:
    """Print tokens a target by length of the batch, and the lists of such a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    asked = parser.parse_args()
    echo = load_config().echo
    tokenizer = AutoTokenizer.from_pretrained(asked.tokenizer)
    prompts = [render_echo(tokenizer, "echo.instructions", text) for text in echo.instructions]
    table = Table("rows of", "a list at a time", *(f"a row at a time, fill {fill:g}" for fill in FILLS))
    for length in LENGTHS:
        cells = [f"{padded(prompts, 1, length, echo.list_tokens, echo.fill):.1f}"]
        for fill in FILLS:
            lists = lists_in_row(prompts, length=length, list_tokens=echo.list_tokens, fill=fill)
            cells.append(f"{padded(prompts, lists, length, echo.list_tokens, fill):.1f} ({lists})")
        table.add_row(f"{length} tokens", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
