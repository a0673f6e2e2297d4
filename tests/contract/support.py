"""Run the contracts and write what is supported, as JSON, as a Markdown table, or into the README.

``python tests/contract/support.py [--json F] [--markdown F] [--readme F] [--only SECTION ...]``, with
``--readme integrations/README.md`` to write the published table; without an output, print it.
Every cell is what ran: ``yes``, ``no`` with its reason below the table, or ``not run``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from adapter_cases import ADAPTERS
from model_cases import MODELS, Case, MissingError
from model_contract import YES
from model_protection import ALL_COLUMNS, all_outcomes
from trainer_cases import TOKENIZER, TRAINERS
from trainer_contract import outcomes as trainer_outcomes
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"
NOT_RUN = "not run"
Row = dict[str, str]

SPREAD, STRATEGIES = "tests/guard/test_spread.py::test_", "tests/guard/test_strategies.py::test_"


def _by_hand(kind: str) -> dict[str, str]:
    counted = f"{SPREAD}two_processes_find_what_one_finds[{kind}:512]"
    parts = {name: f"{STRATEGIES}{name}[{kind}]" for name in ("probe", "echo", "hold")}
    return {"drift": counted, "exposure": counted, "push/pull": counted, **parts} | {
        "resume": f"{STRATEGIES}counts_drift_and_resume[{kind}]"
    }


SHARDED_BY_LIGHTNING = f"{SPREAD}lightning_shards_a_model"
IN_TWO_PROCESSES: dict[str, dict[str, str]] = {
    "DDP": _by_hand("ddp"),
    "FSDP2": _by_hand("fsdp"),
    "Lightning `ModelParallelStrategy`": {"drift": SHARDED_BY_LIGHTNING, "exposure": SHARDED_BY_LIGHTNING},
}
"""The test behind each cell; a test that is skipped says why not."""


def of_cases(cases: Iterable[Any], run: Callable[[Any], Row], name: Callable[[Any], str]) -> dict[str, Row]:
    """Rows of a section; of several cases with one name the one that says least counts."""
    rows: dict[str, Row] = {}
    for case in cases:
        try:
            found = run(case)
        except MissingError:
            found = dict.fromkeys(ALL_COLUMNS, NOT_RUN)
        except Exception as error:
            found = dict.fromkeys(ALL_COLUMNS, f"no: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        row = rows.setdefault(name(case), found)
        rows[name(case)] = {column: min(row[column], found[column], key=_rank) for column in ALL_COLUMNS}
    return rows


def trainers() -> dict[str, Row]:
    """One process, each trainer."""

    def run(case: Any) -> Row:
        with tempfile.TemporaryDirectory() as folder:
            return trainer_outcomes(case, Path(folder))

    return of_cases(TRAINERS, run, lambda case: case.name)


def strategies() -> dict[str, Row]:
    """Two processes, as their tests end."""
    nodes = sorted({node for row in IN_TWO_PROCESSES.values() for node in row.values()})
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += ["-m", "slow or not slow", *nodes]
        told = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.DEVNULL, env=told)
        ended = {case.get("name"): _ended(case) for case in ET.parse(report).iter("testcase")}
    return {
        name: {column: ended.get(row[column].partition("::")[2], "no: did not run") if column in row else NOT_RUN
               for column in ALL_COLUMNS}
        for name, row in IN_TWO_PROCESSES.items()
    }  # fmt: skip


def _ended(case: ET.Element) -> str:
    skipped = case.find("skipped")
    if skipped is not None:
        return f"not applicable: {skipped.get('message')}"
    return "no: the test fails" if case.find("failure") is not None or case.find("error") is not None else YES


def of_models(cases: tuple[Case, ...]) -> dict[str, Row]:
    """Models or adapters, in a hand-written loop."""
    return of_cases(cases, lambda case: all_outcomes(case, TOKENIZER), lambda case: case.family)


SECTIONS: dict[str, Callable[[], dict[str, Row]]] = {
    "Trainers": trainers,
    "Two processes": strategies,
    "Adapters (PEFT)": lambda: of_models(ADAPTERS),
    "Models": lambda: of_models(MODELS),
}


def support(only: Iterable[str] = SECTIONS) -> dict[str, dict[str, Row]]:
    """Rows by section and name."""
    return {section: SECTIONS[section]() for section in only}


# -- Markdown ----------------------------------------------------------------------------------------------------------


def markdown(table: dict[str, dict[str, Row]]) -> str:
    """The table in Markdown; models with equal cells share a row, reasons stand below."""
    reasons: list[str] = []
    lines = ["| | " + " | ".join(ALL_COLUMNS) + " |", "|---" * (1 + len(ALL_COLUMNS)) + "|"]
    for section, rows in table.items():
        lines.append(f"| **{section}** |" + " |" * len(ALL_COLUMNS))
        for name, row in _grouped(rows).items():
            cells = [_cell(row[column], reasons) for column in ALL_COLUMNS]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    notes = [f"<sup>{place}</sup> {reason}" for place, reason in enumerate(reasons, start=1)]
    return "\n".join([*lines, "", ".\n".join(notes) + "." if notes else ""]).rstrip() + "\n"


def _grouped(rows: dict[str, Row]) -> dict[str, Row]:
    """Rows with equal cells in one, under all their names; a trainer's variants stay apart."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, row in rows.items():
        cells = tuple(mark(row[column]) + plain_reason(row[column]) for column in ALL_COLUMNS)
        alone = name if "Trainer" in name or name.startswith("- ") else ""
        groups.setdefault((alone, *cells), []).append(name)
    return {", ".join(names): rows[names[0]] for names in groups.values()}


def mark(value: str) -> str:
    """``yes``, ``no``, ``not run``, or ``fails``."""
    if value in {YES, NOT_RUN}:
        return value
    return "no" if value.startswith("not applicable: ") else "fails"


def plain_reason(value: str) -> str:
    """Why not, in short: without what is allowed instead, and without names of classes."""
    reason = value.partition(": ")[2].partition("; ")[0].partition(", but")[0].partition(": pull and push")[0]
    reason = re.sub(r"^(echo|hold): | \([^)]*\)", "", reason.rstrip(". "))
    reason = re.sub(r"^(LoRA|DoRA) makes the (head|output) rows", "the adapter makes the rows", reason)
    reason = re.sub(r"\b(\w+For[A-Z]\w+)", "the model", re.sub(r"\b(\w+Trainer)\b", r"`\1`", reason))
    return reason[:1].upper() + reason[1:]


def _cell(value: str, reasons: list[str]) -> str:
    reason = plain_reason(value) if value not in {YES, NOT_RUN} else ""
    if reason and reason not in reasons:
        reasons.append(reason)
    return mark(value) + (f" <sup>{reasons.index(reason) + 1}</sup>" if reason else "")


def published(readme: str) -> dict[str, dict[str, dict[str, str]]]:
    """Marks of the README's table, by section, name and column.

    Args:
        readme: its text.
    """
    table: dict[str, dict[str, dict[str, str]]] = {}
    rows: dict[str, dict[str, str]] = {}
    for line in readme.partition(BEGIN)[2].partition(END)[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" |")]
        if not line.startswith("| ") or len(cells) < len(ALL_COLUMNS) or not cells[0]:
            continue
        if cells[0].startswith("**"):
            rows = table.setdefault(cells[0].strip("*"), {})
            continue
        marks = [cell.partition(" <sup>")[0] for cell in cells[1:]]
        for name in cells[0].split(", "):
            rows[name] = dict(zip(ALL_COLUMNS, marks, strict=True))
    return table


def into(readme: str, table: str) -> str:
    """The README with the table between its two marks."""
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n{END}{rest.partition(END)[2]}"


def _rank(value: str) -> int:
    return {"fails": 0, NOT_RUN: 1, "no": 2, YES: 3}[mark(value)]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("json", "markdown", "readme"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    table = support(asked.only)
    if asked.json:
        asked.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    if asked.markdown:
        asked.markdown.write_text(markdown(table), encoding="utf-8")
    if asked.readme:
        asked.readme.write_text(into(asked.readme.read_text(encoding="utf-8"), markdown(table)), encoding="utf-8")
    if not (asked.json or asked.markdown or asked.readme):
        print(markdown(table), end="")
    values = [value for rows in table.values() for row in rows.values() for value in row.values()]
    return int(any(mark(value) == "fails" for value in values))


if __name__ == "__main__":
    sys.exit(main())
