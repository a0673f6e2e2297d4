"""What `LanguageConfusion` says of real answers in their own language, where the right verdict is known: no confusion.

``python tests/benchmarks/confusion_corpus.py`` judges the distinct answers of ``chatterbot-corpus`` in 25 languages. An
answer passes when it has no letter of a foreign script; then the published line and word pass rates.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from corpus import CODES, answers_by_language

from vocabguard import LanguageConfusion


def main() -> None:
    """Judge and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = {}
    for language, answers in answers_by_language().items():
        code, metric = CODES[language], LanguageConfusion([CODES[language]])
        metric.update(answers, code)
        shares = {key: float(value) for key, value in metric.compute().items()}
        found[language] = {
            "answers": len(answers),
            "script_pass": 1 - shares[code],
            "line_pass": shares[f"{code}/line_pass"],
            "word_pass": shares.get(f"{code}/word_pass"),
        }
    table = Table(title="Answers that pass in their own language, in %", title_justify="left")
    for column in ("language", "answers", "script", "lines", "words"):
        table.add_column(column, justify="left" if column == "language" else "right")
    for language, row in found.items():
        passed = (row[key] for key in ("script_pass", "line_pass", "word_pass"))
        table.add_row(
            language, f"{row['answers']:,}", *("-" if share is None else f"{100 * share:.1f}" for share in passed)
        )
    Console(highlight=False).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
