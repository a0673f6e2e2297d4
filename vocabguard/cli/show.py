"""``vocabguard show RUN``: a run in a terminal, over ssh too: verdict, lost tokens, sparklines by group."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from vocabguard.cli.app import InputError
from vocabguard.cli.common import Column, Grid, check_most, show_next
from vocabguard.cli.report import read, refusing_damage
from vocabguard.report.commands import newest_run
from vocabguard.report.limits import Limits
from vocabguard.text import percent
from vocabguard.vocabulary.labels import label_of

if TYPE_CHECKING:
    from vocabguard.report.data import PageData

_BARS = "▁▂▃▄▅▆▇█"
_ASCII = "_.-=*#%@"
_WIDE = 24  # characters of a sparkline
_STYLES = {"fine": "green", "drifted": "yellow", "lost": "bold red", "unknown": "yellow"}

Source = Annotated[
    Path, typer.Argument(help="Run folder, or a trainer's output folder; a file of `scan --out` or `probe --out`.")
]
Top = Annotated[int, typer.Option(min=0, help="Tokens in the list of the lost ones.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print verdict and key numbers as JSON and nothing else.")]


def show(source: Source, top: Top = 12, as_json_: AsJson = False) -> None:
    """Show a run folder in the terminal: verdict, lost tokens, what to do, and how each group went.

    Runs that still train can be shown too. Exit code 0: shown; 2: bad input.
    """
    from vocabguard.report.sentences import as_json

    check_most(("--top", top, 10**7))
    if not source.exists():
        raise InputError(f"{source} does not exist; allowed: a run folder, or a trainer's output folder")
    found = (newest_run(source) if source.is_dir() else source) or source
    with refusing_damage([found]):
        data = read(found)
        told, parts = as_json(data, Limits()), [] if as_json_ else _parts(data, top)
    if as_json_:
        print(json.dumps(told, ensure_ascii=False, allow_nan=False))
        return
    console = Console(highlight=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, Text))
    show_next(one for one in data.commands if not one.command.startswith("vocabguard show"))


def _parts(data: PageData, top: int) -> list[RenderableType]:
    from vocabguard.report.first import badge_of, firing_advice, first_tokens
    from vocabguard.report.sentences import decisive_numbers, verdict_of

    verdict = verdict_of(data, Limits())
    step = "" if data.step is None else f", step {data.step:,}" + (f" of {data.end:,}" if data.end else "")
    style = _STYLES[verdict.level]
    parts: list[RenderableType] = [Text(f"{badge_of(data, verdict)}  {data.name}{step}", style), Text(verdict.sentence)]
    parts += [Text(f"{name}: {value}", "dim") for name, value in decisive_numbers(data)]
    tokens = first_tokens(data)
    if tokens.rows and top:
        grid = Grid([Column(name, words=not numeric) for name, numeric in tokens.columns])
        for row in tokens.rows[:top]:
            grid.add(*(cell for _, cell in row))
        parts += [Text(f"\n{tokens.title}: {tokens.caption}", "bold"), grid]
    courses = _courses(data)
    if courses is not None:
        parts += [Text("\nCourse, first check to last", "bold"), courses]
    advice = firing_advice(data)
    if advice:
        parts += [Text("\nWhat to do", "bold"), *(Text(f"- {one}") for one in advice)]
    if data.firing:
        parts.append(Text(f"Firing: {', '.join(data.firing)}", "red"))
    return parts


def _courses(data: PageData) -> Grid | None:
    """A sparkline of what is retained and of what drifted: all, groups, exposure classes; None without a course."""
    from vocabguard.report.charts import key_of, thinned

    labels = [row.label for row in data.table]
    kinds = (("retained", "probe", "retained"), ("below 0.95", data.matrix or "head", "below_0.95"))
    columns = [kind for kind in kinds if any(_moves(data, key_of(kind[1], label, kind[2])) for label in labels)]
    if not columns:
        return None
    heads = [Column("tokens of", words=True)]
    for place, (name, _, _) in enumerate(columns):
        heads += [Column(f"{name}:", words=True, spare=place + 1), Column("now" + " " * place)]
    grid = Grid(heads)
    scales = [_scale(data, [key_of(prefix, label, key) for label in labels]) for _, prefix, key in columns]
    for row in data.table:
        curves = [data.curves.get(key_of(prefix, row.label, key), ([], [])) for _, prefix, key in columns]
        if not any(values for _, values in curves):
            continue
        cells = [label_of(row.label)]
        for (steps, values), scale in zip(curves, scales, strict=True):
            known = [value for value in values if math.isfinite(value)]
            cells += [sparkline(thinned(steps, values, _WIDE)[1], *scale), percent(known[-1]) if known else "-"]
        grid.add(*cells, style="bold" if row.kind == "all" else "")
    return grid


def _moves(data: PageData, key: str) -> bool:
    values = {value for value in data.curves.get(key, ([], []))[1] if math.isfinite(value)}
    return len(values) > 1


def _scale(data: PageData, keys: Sequence[str]) -> tuple[float, float]:
    """Lowest and highest value of several curves: all lines of a column share their axis."""
    values = [value for key in keys for value in data.curves.get(key, ([], []))[1] if math.isfinite(value)]
    return min(values), max(values)


def sparkline(values: Sequence[float], low: float, high: float, encoding: str | None = None) -> str:
    """A line of characters, higher ones for higher values; a space where a value is missing.

    Args:
        low: value of the lowest character.
        high: value of the highest one.
        encoding: of the output; None asks standard output.

    >>> sparkline([0.0, 0.5, float("nan"), 1.0], 0.0, 1.0, "utf-8"), sparkline([1.0, 0.0], 0.0, 1.0, "ascii")
    ('▁▅ █', '@_')
    """
    bars = _BARS if _can_print(_BARS, encoding or sys.stdout.encoding or "ascii") else _ASCII
    span = (high - low) or 1.0

    def bar(value: float) -> str:
        return bars[min(len(bars) - 1, max(0, int((value - low) / span * len(bars))))] if math.isfinite(value) else " "

    return "".join(map(bar, values))


def _can_print(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeError, LookupError):
        return False
    return True
