"""``vocabguard scan BASE TUNED``: which rows drifted, from two checkpoints on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from torch import Tensor

from vocabguard.cli.app import InputError
from vocabguard.offline.checkpoint import Checkpoint, open_checkpoint
from vocabguard.offline.counts import read_counts
from vocabguard.offline.matching import load_tokenizer
from vocabguard.offline.scan import Scan
from vocabguard.offline.scan import scan as measure
from vocabguard.offline.scan_summary import save_scan, summary
from vocabguard.offline.scan_view import show_scan

Base = Annotated[str, typer.Argument(help="The model before training: a folder, .safetensors, .bin or .ckpt.")]
Tuned = Annotated[str, typer.Argument(help="The model after training: the same, or a PEFT adapter's folder.")]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="Folder of the tokenizer, where neither model's folder has one (or another is meant)."),
]
HeadKey = Annotated[str | None, typer.Option("--head", help="Name of the output rows' tensor, if it is unusual.")]
EmbeddingKey = Annotated[str | None, typer.Option("--embedding", help="Name of the input rows' tensor.")]
Coverage = Annotated[str | None, typer.Option(help="Targets of the training data, from `vocabguard coverage`.")]
Run = Annotated[str | None, typer.Option(help="Run folder of the guarded training: its counts of targets.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@dataclass(frozen=True)
class Pair:
    """Two checkpoints and what is known about their vocabulary.

    Attributes:
        base: before training.
        tuned: after it.
        base_tokenizer: the base's own; None where one tokenizer is taken for both.
        tokenizer: of the tuned vocabulary; None if there is none.
        data_target: (V,) int64, or None.
    """

    base: Checkpoint
    tuned: Checkpoint
    base_tokenizer: Any
    tokenizer: Any
    data_target: Tensor | None


def scan(
    base: Base,
    tuned: Tuned,
    tokenizer: Tokenizer = None,
    head: HeadKey = None,
    embedding: EmbeddingKey = None,
    coverage: Coverage = None,
    run: Run = None,
    threshold: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Share of live rows below cosine 0.95 from which the exit code is 1."),
    ] = 0.01,
    top: Annotated[int, typer.Option(min=0, help="Tokens in the list of the worst.")] = 20,
    out: Annotated[Path | None, typer.Option(help="Write every row's numbers to this .safetensors file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare every vocabulary row of TUNED with BASE.

    Exit code 0: fine; 1: more live rows below cosine 0.95 than the threshold allows; 2: bad input.

    \f
    Raises:
        InputError: for input that cannot be used; `main` prints it and ends with 2.
        typer.Exit: with 1, for findings.
    """
    if out is not None and not out.parent.is_dir():
        raise InputError(f"--out {out}: the folder {out.parent} does not exist")
    pair = open_pair(base, tuned, tokenizer, head, embedding, coverage, run)
    found = measured(pair)
    told = summary(found, top=top)
    numbers = told[found.judged] if found.judged else {}
    share = numbers.get("below_0.95") or 0.0
    told |= {"threshold": threshold, "findings": share > threshold}
    if out is not None:
        try:
            save_scan(found, out, told)
        except Exception as error:  # safetensors has an error of its own for a full disk
            raise InputError(f"--out {out}: cannot be written ({error})") from error
    if as_json:
        print(json.dumps(told, ensure_ascii=False, allow_nan=False))
    else:
        show_scan(Console(), told, top)
    if share > threshold:
        raise typer.Exit(1)


def open_pair(
    base: str,
    tuned: str,
    tokenizer: str | None = None,
    head: str | None = None,
    embedding: str | None = None,
    coverage: str | None = None,
    run: str | None = None,
) -> Pair:
    """Open what the commands about two checkpoints take.

    Raises:
        InputError: for anything that cannot be used.
    """
    if coverage is not None and run is not None:
        raise InputError("--coverage and --run are both given; allowed: one source of counts")
    asked = {"head": head, "embedding": embedding}
    keys: Any = {name: key for name, key in asked.items() if key is not None}
    try:
        before = open_checkpoint(base, keys=keys)
        after = open_checkpoint(tuned, keys=keys, base=before)
        if tokenizer is not None:
            own, other = load_tokenizer(tokenizer), None
            if own is None:
                raise InputError(f"--tokenizer {tokenizer}: no tokenizer in this folder")
        else:
            own, other = load_tokenizer(tuned), load_tokenizer(base)
        counts, rows = coverage or run, after.rows or before.rows
        return Pair(before, after, other, own or other, None if counts is None else read_counts(counts, rows))
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error


def measured(pair: Pair) -> Scan:
    """Scan a pair, with a progress bar on standard error.

    Raises:
        InputError: if the two do not fit each other.
    """
    try:
        with _bars() as progress:
            return measure(
                pair.base,
                pair.tuned,
                base_tokenizer=pair.base_tokenizer,
                tokenizer=pair.tokenizer,
                data_target=pair.data_target,
                progress=progress,
            )
    except ValueError as error:
        raise InputError(str(error)) from error


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar a matrix on standard error, where that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda *_: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def tell(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done)

        yield tell
