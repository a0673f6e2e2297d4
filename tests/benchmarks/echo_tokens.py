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
SEEDS = 50


def padded(prompts: Sequence[EchoPrompt], lists: int, length: int, list_tokens: int, fill: float) -> float:
    """Tokens a target where a batch gets so many lists at a time; mean over `SEEDS`."""
    found, targets = 0.0, lists * list_tokens
    for seed in range(SEEDS):
        rows = echo_rows(range(targets), prompts, length=length, list_tokens=list_tokens, rng=Random(seed), fill=fill)
        found += len(rows) * max(length, *(len(row.input_ids) for row in rows)) / targets
    return found / SEEDS


def main() -> None:
    """Print tokens a target by length of the batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    asked = parser.parse_args()
    echo = load_config().echo
    tokenizer = AutoTokenizer.from_pretrained(asked.tokenizer)
    prompts = [render_echo(tokenizer, "echo.instructions", text) for text in echo.instructions]
    table = Table("rows of", "a list at a time", "four lists", f"as many as a row holds (fill {echo.fill:g})")
    for length in LENGTHS:
        full = lists_in_row(prompts, length=length, list_tokens=echo.list_tokens, fill=echo.fill)
        cells = [padded(prompts, lists, length, echo.list_tokens, echo.fill) for lists in (1, 4, full)]
        table.add_row(f"{length} tokens", *(f"{cell:.1f}" for cell in cells[:-1]), f"{cells[-1]:.1f} ({full} lists)")
    Console().print(table)


if __name__ == "__main__":
    main()
