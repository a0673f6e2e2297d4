"""Run the contract and write what is supported as JSON and as a Markdown table.

``python tests/contract/support.py [--json support.json] [--markdown support.md]``; without either, print the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from adapter_cases import ADAPTERS
from model_cases import MODELS, Case, MissingError
from model_contract import COLUMNS, YES, outcomes
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

ASSETS = Path(__file__).parents[2] / "examples" / "assets"


def support(cases: tuple[Case, ...], tokenizer: Any) -> dict[str, Any]:
    """The table: ``columns``, and ``rows`` with a ``name`` and a value by column.

    A value is ``yes``, ``not applicable: <reason>``, or ``no: <what is wrong>``. A row is a family; of several cases
    the one that says least counts.
    """
    rows: dict[str, dict[str, str]] = {}
    for case in cases:
        try:
            found = outcomes(case, tokenizer)
        except MissingError:
            continue
        except Exception as error:
            found = dict.fromkeys(COLUMNS, f"no: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        row = rows.setdefault(case.family, found)
        rows[case.family] = {name: min(row[name], found[name], key=_rank) for name in COLUMNS}
    return {"columns": list(COLUMNS), "rows": [{"name": name, **row} for name, row in rows.items()]}


def markdown(table: dict[str, Any]) -> str:
    """The table in Markdown; reasons are footnotes."""
    reasons: list[str] = []
    lines = ["| | " + " | ".join(table["columns"]) + " |", "|---" * (1 + len(table["columns"])) + "|"]
    for row in table["rows"]:
        cells = [row["name"]]
        for name in table["columns"]:
            kind, _, reason = row[name].partition(": ")
            if reason and reason not in reasons:
                reasons.append(reason)
            mark = "-" if kind == "not applicable" else kind
            cells.append(f"{mark} [{reasons.index(reason) + 1}]" if reason else mark)
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"{place}. {reason[0].upper()}{reason[1:].rstrip('.')}." for place, reason in enumerate(reasons, start=1)]
    return "\n".join([*lines, "", *notes]) + "\n"


def _rank(value: str) -> int:
    return 0 if value.startswith("no:") else 2 if value == YES else 1


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    table = support((*MODELS, *ADAPTERS), AutoTokenizer.from_pretrained(ASSETS))
    if asked.json:
        asked.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    if asked.markdown:
        asked.markdown.write_text(markdown(table), encoding="utf-8")
    if not (asked.json or asked.markdown):
        print(markdown(table), end="")
    return int(any(value.startswith("no:") for row in table["rows"] for value in row.values()))


if __name__ == "__main__":
    sys.exit(main())
