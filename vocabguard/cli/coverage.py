"""``vocabguard coverage``: what training data asks for, and what it never does, before any training."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from vocabguard.cli.app import InputError
from vocabguard.cli.common import (
    MOST_TOKENS,
    Column,
    DataKind,
    Grid,
    Roles,
    check_most,
    check_new_file,
    check_threshold,
    load_tokenizer,
    read_roles,
    row_progress,
)
from vocabguard.data.coverage import Coverage, RowTally, at_risk, coverage_totals, group_rows, measure_coverage
from vocabguard.data.named import added_tokens, end_tokens, named_sentences, shared_padding
from vocabguard.data.readers import data_files, read_examples
from vocabguard.data.tables import DataFile, RowShard
from vocabguard.files import one_line
from vocabguard.results import EXPOSURE_CLASSES
from vocabguard.text import percent, visible
from vocabguard.vocabulary.table import VocabTable, build_table, resolve_token

_PARALLEL_FROM = 2**26  # bytes of data from which starting processes, some seconds each, pays
_MOST_WORKERS = 8
_PIECES, _PIECE = 12, 400  # parts of the row that is shown, and characters of each
# What may be asked for.
_WORKERS, _EPOCHS = 256, 1_000_000


Trainers = Annotated[
    str,
    typer.Option(
        help="Whose rules where the chat template marks no targets: trl (its training template, where TRL is "
        "installed) or transformers (always the tokenizer's own)."
    ),
]


def coverage(
    tokenizer: Annotated[str, typer.Argument(help="Tokenizer: a folder, or a name on the Hugging Face hub.")],
    data: Annotated[
        list[str], typer.Argument(help="Data files, folders of them, glob patterns, addresses that fsspec knows.")
    ],
    kind: DataKind = None,
    column: Annotated[
        list[str] | None, typer.Option(help="Name of the column; give it twice for prompt and completion.")
    ] = None,
    role: Roles = None,
    loss: Annotated[str, typer.Option(help="Targets: assistant, completion or all.")] = "assistant",
    trainer: Trainers = "trl",
    eos: Annotated[bool, typer.Option(help="Texts and text completions end with the EOS token.")] = True,
    shard: Annotated[
        str, typer.Option(help="I/N: count the I-th of N parts of the rows; see `coverage merge`.")
    ] = "1/1",
    max_length: Annotated[int | None, typer.Option(help="Tokens of a row; the rest is cut off.")] = None,
    chat_template: Annotated[Path | None, typer.Option(help="File with another chat template.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data; multiplies the counts.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the counts of all tokens (.safetensors).")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Exit with 1 if more than this share of live tokens is never a target.")
    ] = None,
    watch: Annotated[list[str] | None, typer.Option(help="A token (id or text) whose counts to show.")] = None,
    top: Annotated[int, typer.Option(help="Tokens at risk to name.")] = 20,
    workers: Annotated[int, typer.Option(help="Processes; 0 chooses by the size of the data.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable result on standard output.")] = False,
) -> None:
    """Count how often training data asks for each token, as a trainer would mask it.

    Tokens that the loss never asks for are only ever pushed down. Without --threshold the exit code is 0 whatever is
    found: every data set leaves most of a vocabulary out, and only you know what share is too much.

    Exit code 0: fine; 1: a larger share than the threshold allows; 2: bad input.
    """
    _check_ranges(threshold, top, workers, epochs, max_length)
    roles, part = read_roles(role), _shard(shard)
    loaded = load_tokenizer(tokenizer, chat_template)
    try:
        table = build_table(loaded, 1 + max(loaded.get_vocab().values(), default=-1))
        watched = [resolve_token(loaded, int(item) if item.isdigit() else item, len(table)) for item in watch or ()]
        files = data_files(data)
        if out is not None:
            check_new_file("--out", out, [file for file in files if isinstance(file, Path)])
        examples = read_examples(
            files, kind=kind, columns=column or (), roles=roles, chats=bool(loaded.chat_template), shard=part,  # type: ignore[arg-type]
            blocks=True,
        )  # fmt: skip
        with row_progress() as advance:
            result = measure_coverage(
                examples,
                loaded,
                table,
                name=tokenizer,
                files=[str(file) for file in files],
                loss=loss,  # type: ignore[arg-type]
                eos=eos,
                max_length=max_length,
                trainer=trainer,  # type: ignore[arg-type]
                epochs=epochs,
                workers=workers or _workers_for(files),
                progress=advance,
            )
        if out is not None:
            result.save(out)
    except (ValueError, OSError) as error:
        raise InputError(one_line(error, 2000)) from error
    _tell(result, table, watched, top, out, as_json, _named(tokenizer, loaded, result, table, watched))
    if threshold is not None and result.never_share > threshold:
        raise typer.Exit(1)


def _check_ranges(threshold: float | None, top: int, workers: int, epochs: int, max_length: int | None) -> None:
    check_threshold(threshold)
    check_most(
        ("--workers", workers, _WORKERS), ("--epochs", epochs, _EPOCHS), ("--max-length", max_length, MOST_TOKENS)
    )
    for name, value in (("--top", top), ("--workers", workers)):
        if value < 0:
            raise InputError(f"{name} is {value}; allowed: 0 or more")


def _shard(text: str) -> RowShard:
    index, _, count = text.partition("/")
    try:
        return RowShard(int(index), int(count))
    except ValueError as error:
        raise InputError(f"--shard is {text!r}; allowed: I/N, 1/N to N/N") from error


def _workers_for(files: Sequence[DataFile]) -> int:
    local = [file for file in files if isinstance(file, Path)]
    size = sum(part.stat().st_size for file in local for part in ([file] if file.is_file() else file.rglob("*.arrow")))
    return min(_MOST_WORKERS, os.cpu_count() or 1) if size >= _PARALLEL_FROM else 1


def _named(name: str, tokenizer: Any, result: Coverage, table: VocabTable, watched: Sequence[int]) -> tuple[str, ...]:
    """What the data never asks for among the tokens that matter."""
    ends = end_tokens(tokenizer, _generation_ends(Path(name)))
    words = {table.text(one): (one,) for one in watched}
    said = named_sentences(result.data_target, tokenizer, ends, "the data", added=added_tokens(tokenizer), words=words)
    padding = shared_padding(tokenizer, ends)
    return said if not padding or any(padding in one for one in said) else (*said, padding)


def _generation_ends(folder: Path) -> Any:
    """The EOS ids of the generation configuration beside a tokenizer, if there is one."""
    try:
        told = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    ids = told if isinstance(told, list) else [told]
    return [one for one in ids if isinstance(one, int)]


def _tell(
    result: Coverage, table: VocabTable, watched: list[int], top: int, out: Path | None, as_json: bool,
    named: tuple[str, ...],
) -> None:  # fmt: skip
    shown = (*watched, *(i for i in at_risk(result, top) if i not in watched))
    if as_json:
        sys.stdout.write(
            json.dumps({**_as_json(result, table, shown, len(watched)), "named": named}, ensure_ascii=True) + "\n"
        )
    else:
        _print(result, table, shown, len(watched), out, named)


def _as_json(result: Coverage, table: VocabTable, shown: tuple[int, ...], watched: int) -> dict[str, Any]:
    tokens = [
        {
            "id": i,
            "text": table.text(i),
            "group": table.group_of(i),
            "data_target": int(result.data_target[i]),
            "inputs": int(result.inputs[i]),
        }
        for i in shown
    ]
    groups = {row.group: {"live": row.live, **dict(zip(EXPOSURE_CLASSES, row.classes, strict=True))}
              for row in group_rows(result)}  # fmt: skip
    return {
        "schema": 1,
        **coverage_totals(result),
        "groups": groups,
        "rows": asdict(result.tally),
        "source": {name: told for name, told in asdict(result.source).items() if name != "example"},
        "example": [{"text": text, "target": asked} for text, asked in result.source.example],
        "watched": tokens[:watched],
        "at_risk": tokens[watched:],
    }


def _print(
    result: Coverage, table: VocabTable, shown: tuple[int, ...], watched: int, out: Path | None,
    named: tuple[str, ...],
) -> None:  # fmt: skip
    console = Console(soft_wrap=True, highlight=False)
    numbers = coverage_totals(result)
    passes = f", {result.source.epochs} epochs" if result.source.epochs > 1 else ""
    console.print(f"{result.tally.rows:,} rows{passes}: {numbers['targets']:,} targets, {numbers['inputs']:,} inputs.")
    never = f"{numbers['classes']['never']:,} ({percent(result.never_share)})"
    console.print(f"Of {numbers['live']:,} live tokens {never} are never a target.")
    for note in (*_notes(result), *named):
        console.print(note, markup=False)
    if result.source.example:
        console.print("A row as it is counted; targets stand between ⟦ and ⟧:", style="bold")
        console.print(_marked(result.source.example), markup=False)
    console.print(_group_table(result))
    if watched:
        console.print("watched tokens", style="bold")
        console.print(_token_table(result, table, shown[:watched]))
    if shown[watched:]:
        console.print("tokens at risk: fewest targets first, of these the most read, then low ids", style="bold")
        console.print(_token_table(result, table, shown[watched:]))
    if out is not None:
        console.print(f"Written: {out}", markup=False)


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
        notes.append(f"{tally.without_targets:,} rows ask for nothing.")
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
            "The chat template does not mark the assistant's tokens; its turns were found by rendering. TRL knows no "
            "training template for it or was not asked, so that its targets may differ: compare the row below."
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


def _group_table(result: Coverage) -> Grid:
    names = ("never", "", "1-4", "5-19", "20+")
    grid = Grid([Column("", words=True), Column("tokens", spare=1), *map(Column, names)])
    for row in group_rows(result):
        never, *others = row.classes
        counts = (f"{row.live:,}", f"{never:,}", percent(never / row.live), *(f"{count:,}" for count in others))
        grid.add(row.group.replace("_", " "), *counts, style="bold" if row.group == "all" else "")
    return grid


def _token_table(result: Coverage, table: VocabTable, shown: tuple[int, ...]) -> Grid:
    words = (Column("token", words=True), Column("group", words=True, spare=1))
    grid = Grid([Column("id"), *words, Column("targets"), Column("inputs", spare=2)])
    encoding = sys.stdout.encoding or "utf-8"
    for i in shown:
        text = visible(table.text(i), 24).encode(encoding, "backslashreplace").decode(encoding)
        counts = f"{int(result.data_target[i]):,}", f"{int(result.inputs[i]):,}"
        grid.add(str(i), text, table.group_of(i).replace("_", " "), *counts)
    return grid
