"""How ``vocabguard coverage`` tells its result, to people and to programs."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from vocabguard.cli.common import Column, Grid
from vocabguard.results import EXPOSURE_CLASSES
from vocabguard.text import percent, visible
from vocabguard.vocabulary.labels import label_of

if TYPE_CHECKING:
    from vocabguard.data.counting import RowTally
    from vocabguard.data.coverage import Coverage
    from vocabguard.vocabulary.table import VocabTable

_FILES = 3  # named in a command to copy
_PIECES, _PIECE = 12, 400  # parts of the row that is shown, and characters of each
_ORDERS = {
    "inputs": "the most read, then low ids",
    "reference": "the commonest in the reference",
    "merges": "the earliest merges of the tokenizer",
}


@dataclass(frozen=True)
class Shown:
    """What is told beside the counts.

    Attributes:
        watched: ids that were asked about.
        at_risk: ids with few targets, the worst first.
        rank: what they are ordered by.
        named: sentences about tokens that matter by name.
        left_out: tokens at risk that are not listed, since the chat template writes them.
        out: where the counts were written.
        expected: share that as many tokens of a reference would leave out.
        languages: of each token, where they were asked for.
    """

    table: VocabTable
    watched: tuple[int, ...]
    at_risk: tuple[int, ...]
    rank: str
    named: tuple[str, ...]
    left_out: int
    out: Path | None
    expected: float | None
    languages: Sequence[str] | None = None


def tell(result: Coverage, shown: Shown, as_json: bool) -> None:
    """Print the result, as one JSON object or as a table."""
    if as_json:
        sys.stdout.write(json.dumps(_as_json(result, shown), ensure_ascii=True) + "\n")
    else:
        _print(result, shown)


def _as_json(result: Coverage, shown: Shown) -> dict[str, Any]:
    from vocabguard.data.coverage import coverage_totals, group_rows
    from vocabguard.data.ranking import kind_rows

    groups = {row.group: {"live": row.live, **dict(zip(EXPOSURE_CLASSES, row.classes, strict=True))}
              for row in group_rows(result)}  # fmt: skip
    kinds = {kind: dict(zip(EXPOSURE_CLASSES, counts, strict=True)) for kind, counts in kind_rows(result, shown.table)}
    return {
        "schema": 1,
        **coverage_totals(result),
        "groups": groups,
        "latin": kinds,
        **_languages_json(result, shown),
        "rows": asdict(result.tally),
        "source": {name: told for name, told in asdict(result.source).items() if name != "example"},
        "example": [{"text": text, "target": asked} for text, asked in result.source.example],
        "watched": _tokens(result, shown.table, shown.watched),
        "words": [asdict(word) for word in result.words],
        "at_risk": _tokens(result, shown.table, shown.at_risk),
        "rank": shown.rank,
        "template_tokens_left_out": shown.left_out,
        "reference_never_share": shown.expected,
        "named": shown.named,
    }


def _languages_json(result: Coverage, shown: Shown) -> dict[str, Any]:
    from vocabguard.data.token_languages import SCRIPTS_OF_MANY, language_rows

    if shown.languages is None:
        return {}
    rows = {group: language_rows(result, shown.table, shown.languages, group) for group in SCRIPTS_OF_MANY}
    return {
        "languages": {
            group: {code: dict(zip(EXPOSURE_CLASSES, counts, strict=True)) for code, counts in found}
            for group, found in rows.items()
            if found
        }
    }


def _tokens(result: Coverage, table: VocabTable, ids: Iterable[int]) -> list[dict[str, Any]]:
    return [
        {
            "id": i,
            "text": table.text(i),
            "group": table.group_of(i),
            "data_target": int(result.data_target[i]),
            "inputs": int(result.inputs[i]),
        }
        for i in ids
    ]


def _print(result: Coverage, shown: Shown) -> None:
    from vocabguard.data.coverage import coverage_totals

    console = Console(soft_wrap=True, highlight=False)
    numbers = coverage_totals(result)
    passes = f", {result.source.epochs} epochs" if result.source.epochs > 1 else ""
    console.print(f"{result.tally.rows:,} rows{passes}: {numbers['targets']:,} targets, {numbers['inputs']:,} inputs.")
    never = f"{numbers['classes']['never']:,} ({percent(result.never_share)})"
    console.print(f"Of {numbers['live']:,} live tokens {never} are never a target{_yardstick(shown)}.")
    for note in (*_notes(result), *shown.named):
        console.print(note, markup=False)
    if result.source.example:
        console.print("A row as it is counted; targets stand between ⟦ and ⟧:", style="bold")
        console.print(_marked(result.source.example), markup=False)
    console.print(_group_table(result, shown))
    if shown.watched:
        console.print("watched tokens", style="bold")
        console.print(_token_table(result, shown.table, shown.watched))
    for word in result.words:
        console.print(
            f"watched word {word.word!r}: {word.targets:,} times a target, whole; read {word.inputs:,} times.",
            markup=False,
        )
    if shown.at_risk:
        console.print(f"tokens at risk: fewest targets first, of these {_ORDERS[shown.rank]}", style="bold")
        console.print(_token_table(result, shown.table, shown.at_risk))
    if shown.left_out:
        console.print(f"Left out of this list: {shown.left_out:,} tokens that the chat template itself writes.")
    if shown.out is not None:
        console.print(f"Written: {shown.out}", markup=False)
    for line in _next_commands(result, shown):
        console.print(line, markup=False)


def _yardstick(shown: Shown) -> str:
    from vocabguard.data.ranking import USUAL_NEVER

    if shown.expected is not None:
        return f"; as many tokens of the reference would leave out {percent(shown.expected)}"
    low, high = USUAL_NEVER
    return f" (usual for English chat data: {low * 100:.0f} to {high * 100:.0f} %)"


def _next_commands(result: Coverage, shown: Shown) -> list[str]:
    """Commands to copy, that make up for what the data lacks."""
    if not result.never_share:
        return []
    tokenizer, out = shlex.quote(result.source.tokenizer), shown.out or "coverage.safetensors"
    needs = shlex.quote(str(out))
    files = shlex.join(result.source.files[:_FILES]) + " ..." * (len(result.source.files) > _FILES)
    first = [] if shown.out else [f"  vocabguard coverage {tokenizer} {files} --out {needs}"]
    return [
        "To make them targets, choose rows of other data, or write lists to repeat:",
        *first,
        f"  vocabguard replay CORPUS --tokenizer {tokenizer} --coverage {needs} --out replay.jsonl",
        f"  vocabguard echo {tokenizer} --needs {needs} --ids echo.jsonl",
    ]


def _notes(result: Coverage) -> list[str]:
    tally = result.tally
    notes = [f"Read as {kind}." for kind in result.source.kinds]
    notes += [f"{note[:1].upper()}{note[1:]}." for note in result.source.notes]
    notes += _template_notes(tally)
    if tally.turns_silent:
        notes.append(
            f"{tally.turns_silent:,} turns with weight 0 or train false count as no target, as at OpenAI and in "
            "axolotl; TRL does not know these keys and trains on them."
        )
    if tally.calls_lost:
        notes.append(
            f"{tally.calls_lost:,} turns have tool calls that the chat template does not write: they count as no "
            "target. --chat-template takes one that writes them."
        )
    if tally.cut:
        notes.append(f"{tally.cut:,} rows are cut off at {result.source.max_length:,} tokens.")
    if tally.without_targets:
        notes.append(f"{tally.without_targets:,} rows have no target.")
    return notes


def _template_notes(tally: RowTally) -> list[str]:
    """How the assistant's words were found: exactly as a trainer does, or not."""
    notes = []
    if tally.chats_marked:
        notes.append(
            f"The chat template marks the assistant's tokens ({tally.chats_marked:,} conversations): exact, as TRL and "
            "transformers mask them."
        )
    if tally.chats_trl:
        notes.append(
            f"TRL's training template stands in for the tokenizer's own ({tally.chats_trl:,} conversations), as in "
            "SFTTrainer(assistant_only_loss=True): exact for TRL. --trainer transformers takes the own one."
        )
    if tally.turns_exact + tally.turns_by_text + tally.turns_missing:
        notes.append(
            "The chat template does not mark the assistant's tokens; the turns were found by rendering. TRL may mask "
            "this template differently: check the row below."
        )
    if tally.turns_by_text or tally.turns_missing:
        notes.append(
            f"It does not show where turns begin: {tally.turns_by_text:,} turns were found by their text, "
            f"{tally.turns_missing:,} not at all and count as no target."
        )
    return notes


def _marked(example: Sequence[tuple[str, bool]]) -> Text:
    """A row with its targets marked, shortened in the middle of long pieces."""
    text = Text()
    for piece, asked in example[:_PIECES]:
        short = piece if len(piece) <= _PIECE else f"{piece[: _PIECE // 2]} [...] {piece[-_PIECE // 2 :]}"
        shown = _printable(short)
        text.append(f"\u27e6{shown}\u27e7" if asked else shown, style="bold" if asked else "dim")
    if len(example) > _PIECES:
        text.append(f" [... {len(example) - _PIECES:,} more parts]", style="dim")
    return text


def _printable(text: str) -> str:
    """A text without control characters but line ends."""
    return "".join(one if one == "\n" or one.isprintable() else f"\\x{ord(one):02x}" for one in text)


def _group_table(result: Coverage, shown: Shown) -> Grid:
    from vocabguard.data.coverage import group_rows

    names = ("never", "", "1-4", "5-19", "20+")
    grid = Grid([Column("", words=True), Column("tokens", spare=1), *map(Column, names)])
    for row in group_rows(result):
        grid.add(label_of(row.group), *_class_cells(row.classes), style="bold" if row.group == "all" else "")
        for name, counts in _parts_of(row.group, result, shown):
            grid.add(f"- {name}", *_class_cells(counts), style="dim")
    return grid


def _class_cells(counts: Sequence[int]) -> tuple[str, ...]:
    """Tokens in all, those that are never a target and their share, and those of the other classes."""
    (never, *others), live = counts, sum(counts)
    return (f"{live:,}", f"{never:,}", percent(never / live), *(f"{count:,}" for count in others))


def _parts_of(group: str, result: Coverage, shown: Shown) -> list[tuple[str, tuple[int, ...]]]:
    """What a group is made of, finer: kinds of Latin tokens, and languages where they were asked for."""
    from vocabguard.data.ranking import kind_rows
    from vocabguard.data.token_languages import SCRIPTS_OF_MANY, language_names, language_rows

    parts = kind_rows(result, shown.table) if group == "latin" else []
    if shown.languages is not None and group in SCRIPTS_OF_MANY:
        rows = language_rows(result, shown.table, shown.languages, group)
        names = language_names([code for code, _ in rows])
        parts += [(f"words, {names[code]}", counts) for code, counts in rows]
    return parts


def _token_table(result: Coverage, table: VocabTable, shown: tuple[int, ...]) -> Grid:
    words = (Column("token", words=True), Column("group", words=True, spare=1))
    grid = Grid([Column("id"), *words, Column("targets"), Column("inputs", spare=2)])
    encoding = sys.stdout.encoding or "utf-8"
    for i in shown:
        text = visible(table.text(i), 24).encode(encoding, "backslashreplace").decode(encoding)
        counts = f"{int(result.data_target[i]):,}", f"{int(result.inputs[i]):,}"
        grid.add(str(i), text, label_of(table.group_of(i)), *counts)
    return grid
