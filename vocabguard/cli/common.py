"""What several commands share: options, tokenizers, pairs of checkpoints, progress bars, tables."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, JustifyMethod
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from vocabguard.cli.app import InputError
from vocabguard.cli.models import model_path, tokenizer_path
from vocabguard.compare.options import Loading
from vocabguard.compare.trial import require_readable, try_tokenizer
from vocabguard.config import ProbeConfig
from vocabguard.data.choices import KINDS as DATA_KINDS
from vocabguard.data.tables import RowShard
from vocabguard.files import kind_of, one_line, read_text
from vocabguard.report.commands import Next

if TYPE_CHECKING:
    from torch import Tensor

    from vocabguard.compare.scan import Scan
    from vocabguard.measure.probe import PromptContext
    from vocabguard.rows.checkpoints import Checkpoint

Base = Annotated[
    str,
    typer.Argument(help="The model before training: a folder, .safetensors, .bin or .ckpt, or a name on the hub."),
]
Tuned = Annotated[
    str,
    typer.Argument(help="The model after training: the same, a PEFT adapter, or a trainer's output folder (its newest "
                   "checkpoint)."),
]  # fmt: skip
Tokenizer = Annotated[
    str | None,
    typer.Option(help="Folder or hub name of the tokenizer, where neither model has one (or another is meant)."),
]
HeadKey = Annotated[str | None, typer.Option("--head", help="Name of the output rows' tensor, if it is unusual.")]
EmbeddingKey = Annotated[str | None, typer.Option("--embedding", help="Name of the input rows' tensor.")]
Coverage = Annotated[str | None, typer.Option(help="Targets of the training data, from `vocabguard coverage`.")]
Run = Annotated[str | None, typer.Option(help="Run folder of the guarded training: its counts of targets.")]


_ROOM = 24  # characters of the column of values in a help page; more would break within words


def one_of(names: Sequence[str], help: str, *flags: str) -> Any:
    """An option of a few values, shown as choices and completed by a shell; what else comes the command refuses."""
    choices = "|".join(names)
    short = len(choices) <= _ROOM

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    told = help if short else f"{help} One of: {', '.join(names)}."
    return typer.Option(*flags, help=told, metavar=choices if short else "CHOICE", autocompletion=complete)


DataKind = Annotated[
    str | None, one_of(DATA_KINDS, "Format of the rows, if it cannot be told from the column names.", "--kind")
]
Roles = Annotated[
    list[str] | None, typer.Option("--role", help="NAME=ROLE: a role of the data and what it is, e.g. bot=assistant.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]

# Blank cells that come with each column, and the one that closes the table.
_GAP, _EDGE = 2, 1


MOST_TOKENS = 2**31 - 1
"""Of a row: longer ones no library counts."""

MOST_TARGETS = 10_000
"""Times that a token is a target: more would be another training."""


def check_most(*asked: tuple[str, float | None, float]) -> None:
    """Refuse numbers that are too large to count with, and those that are none, which pass every other limit.

    Args:
        *asked: option, value (None was not given) and the largest that is allowed.

    Raises:
        InputError: with the first of them.
    """
    for option, value, most in asked:
        if value is not None and not value <= most:
            raise InputError(f"{option} is {value}; allowed: at most {most:,}")


def loading(device: str | None, device_map: str | None, dtype: str) -> Loading:
    """Where models go.

    Raises:
        InputError: for a device that is not there, or a type that is none.
    """
    try:
        return Loading(device, device_map, dtype)
    except ValueError as error:
        raise InputError(str(error)) from error


def check_threshold(threshold: float | None) -> None:
    """Refuse what is no share.

    Raises:
        InputError: with the value.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise InputError(f"--threshold is {threshold}; allowed: a share from 0 to 1")


def check_new_file(option: str, path: Path, inputs: Iterable[str | Path] = ()) -> None:
    """Refuse a file to write before the work is done.

    Args:
        inputs: files and folders that are read; a checkpoint or data file among them is not written over.

    Raises:
        InputError: where nothing can be written, or a file that is read would be lost.
    """
    try:
        found = kind_of(path)
        if found not in (None, "file"):
            raise InputError(f"{option} {path}: is a {found}; allowed: a new or a regular file")
        if not path.parent.is_dir():
            raise InputError(f"{option} {path}: the folder {path.parent} does not exist")
        lost = found is not None and any(os.path.samefile(path, one) for one in inputs if os.path.exists(one))
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be written ({error.strerror or error})") from error
    except ValueError as error:  # a null byte
        raise InputError(f"{option} {str(path)!r}: cannot be written ({error})") from error
    if lost:
        raise InputError(f"{option} {path}: is read here, and would be lost; allowed: another file")


def read_roles(given: Sequence[str] | None) -> dict[str, str]:
    """The roles of ``--role NAME=ROLE``, by name.

    Raises:
        InputError: for another form.
    """
    found = {}
    for item in given or ():
        name, sign, role = item.partition("=")
        if not (name and sign and role):
            raise InputError(f"--role is {item!r}; allowed: NAME=ROLE, e.g. bot=assistant")
        found[name] = role
    return found


def checkpoint_files(*paths: str) -> list[Path]:
    """The files that hold checkpoints' tensors, or may: what ``--out`` must not replace."""
    found = map(Path, paths)
    return [file for one in found for file in (one.glob("*.*") if one.is_dir() else (one,)) if _is_weights(file)]


def _is_weights(file: Path) -> bool:
    """Whether a file is of a checkpoint, and not of an earlier scan or probe."""
    from safetensors import SafetensorError, safe_open

    from vocabguard.compare.summary import KINDS
    from vocabguard.rows.tensors import TORCH_SUFFIXES

    if file.suffix != ".safetensors" or not file.is_file():
        return file.suffix in (*TORCH_SUFFIXES, ".json")
    try:
        with safe_open(str(file), framework="pt") as opened:
            return (opened.metadata() or {}).get("kind") not in KINDS
    except (OSError, SafetensorError):
        return True


def load_tokenizer(name: str, chat_template: Path | None = None) -> Any:
    """A tokenizer for a command.

    Args:
        name: a folder, or a name on the hub.
        chat_template: file of a template to use instead of its own.

    Raises:
        InputError: if either cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        with _quiet("huggingface_hub", "transformers"):  # they tell of each try to reach the hub
            require_readable(Path(name))
            loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        usable = bool(loaded.get_vocab())
    except Exception as error:  # by kind of damage, of many types
        raise InputError(f"{name}: cannot be loaded as a tokenizer ({one_line(error, 400)})") from error
    if not usable:
        raise InputError(f"{name}: a tokenizer without any token")
    if chat_template is not None:
        try:
            loaded.chat_template = read_text(chat_template)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{chat_template}: cannot be read as a chat template ({one_line(error, 400)})") from error
    try:
        try_tokenizer(loaded)
    except Exception as error:
        raise InputError(f"{name}: cannot be used as a tokenizer ({one_line(error, 400)})") from error
    return loaded


@dataclass(frozen=True)
class Pair:
    """Two checkpoints and what is known about their vocabulary.

    Attributes:
        base_tokenizer: the base's own; None where one tokenizer is taken for both.
        tokenizer: of the tuned vocabulary; None if there is none.
        data_target: (V,) int64, or None.
    """

    base: Checkpoint
    tuned: Checkpoint
    base_tokenizer: Any
    tokenizer: Any
    data_target: Tensor | None


def open_pair(
    base: str, tuned: str, tokenizer: str | None = None, head: str | None = None, embedding: str | None = None,
    coverage: str | None = None, run: str | None = None,
) -> Pair:  # fmt: skip
    """Open what the commands about two checkpoints take.

    Raises:
        InputError: for anything that cannot be used.
    """
    from vocabguard.compare.matching import folder_tokenizer
    from vocabguard.data.counts import read_counts
    from vocabguard.rows.checkpoints import open_checkpoint

    if coverage is not None and run is not None:
        raise InputError("--coverage and --run are both given; allowed: one source of counts")
    for option, given in (("--tokenizer", tokenizer), ("--coverage", coverage), ("--run", run)):
        if given == "":
            raise InputError(f"{option} is empty; allowed: a path")
    base, tuned = model_path(base), model_path(tuned)
    tokenizer = None if tokenizer is None else tokenizer_path(tokenizer)
    asked = {"head": head, "embedding": embedding}
    keys: Any = {name: key for name, key in asked.items() if key is not None}
    try:
        with working("opening checkpoints and tokenizers"):
            before = open_checkpoint(base, keys=keys)
            after = open_checkpoint(tuned, keys=keys, base=before)
            if tokenizer is not None:
                own, other = folder_tokenizer(tokenizer), None
                if own is None:
                    raise InputError(f"--tokenizer {tokenizer}: no tokenizer in this folder")
            else:
                own, other = folder_tokenizer(tuned), folder_tokenizer(base)
        counts, rows = coverage or run, after.rows or before.rows
        if counts is not None:
            _check_counted("--run" if coverage is None else "--coverage", counts, own, other)
            _tell_other_base(counts, before, after)
        return Pair(before, after, other, own or other, None if counts is None else read_counts(counts, rows))
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error


def _check_counted(option: str, counts: str, *tokenizers: Any) -> None:
    """Refuse counts of a tokenizer that neither side has; of a file or of a run folder.

    Raises:
        ValueError: where their vocabularies differ.
    """
    from vocabguard.data.counts import vocabulary_in
    from vocabguard.data.coverage import vocabulary_hash

    counted, known = vocabulary_in(counts), [one for one in tokenizers if one is not None]
    if counted is not None and known and counted not in map(vocabulary_hash, known):
        raise ValueError(f"{option} {counts}: was counted with another tokenizer than the models'")


def _tell_other_base(counts: str, base: Checkpoint, tuned: Checkpoint) -> None:
    """Say so where counts are of a run that began at another base. They may still be wanted: of an earlier stage."""
    from vocabguard.compare.evidence import rows_sample, unequal
    from vocabguard.runlog import evidence_in

    kept = evidence_in(counts)
    # A model without a base stands on both sides.
    if kept is None or base.path == tuned.path:
        return
    why = unequal(kept, {"base": {"rows_sample": rows_sample(base)}}, "base")
    if why:
        note(f"{counts} is a run that began at another model than {base.path}, so its counts are of another training")


def note(sentence: str) -> None:
    """Print a line on standard error, for what a user should know and no result holds."""
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(
        f"vocabguard: {' '.join(sentence.split())}"
    )


def measured(pair: Pair) -> Scan:
    """Scan a pair, with a progress bar on standard error.

    Raises:
        InputError: if the two do not fit each other.
    """
    from vocabguard.compare.scan import scan

    try:
        with progress_bars() as progress:
            return scan(
                pair.base, pair.tuned, base_tokenizer=pair.base_tokenizer, tokenizer=pair.tokenizer,
                data_target=pair.data_target, progress=progress,
            )  # fmt: skip
    except ValueError as error:
        raise InputError(str(error)) from error


def show_next(commands: Iterable[Next]) -> None:
    """Print the next commands, each with its purpose; nothing where there is none."""
    found = list(commands)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if found:
        console.print("\nNext:", style="bold")
    for one in found:
        # As a shell reads it, so that all of it can be copied.
        console.print(f"# {one.why}", style="dim")
        console.print(one.command)


@contextmanager
def progress_bars(*more: ProgressColumn) -> Iterator[Callable[[str, int, int], None]]:
    """A bar a name on standard error, where that is a terminal; gives what to call with name, done and total."""
    with _progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *more) as bars:
        tasks: dict[str, TaskID] = {}

        def tell(name: str, done: int, total: int) -> None:
            if bars is not None:
                if name not in tasks:
                    tasks[name] = bars.add_task(name, total=total)
                bars.update(tasks[name], completed=done)

        yield tell


@contextmanager
def working(what: str) -> Iterator[None]:
    """What is done and for how long, on standard error, where that is a terminal; for work of unknown length.

    No bar of another may run at the same time.
    """
    with _progress(SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()) as bars:
        if bars is not None:
            bars.add_task(what, total=None)
        yield


@contextmanager
def row_progress() -> Iterator[Callable[[int], None]]:
    """A count on standard error, where that is a terminal; gives what to call with the number of rows done."""
    with _progress(SpinnerColumn(), TextColumn("{task.completed:,.0f} rows"), TimeElapsedColumn()) as bars:
        task = None if bars is None else bars.add_task("", total=None)
        yield lambda rows: None if bars is None or task is None else bars.advance(task, rows)


@contextmanager
def _progress(*columns: ProgressColumn) -> Iterator[Progress | None]:
    console = Console(stderr=True)
    if not console.is_terminal:
        # Not a disabled bar: older versions of rich end that one with an empty line.
        yield None
        return
    with Progress(*columns, console=console, transient=True) as bars:
        yield bars


@contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """Let these loggers tell of errors only."""
    found = [(logging.getLogger(name), logging.getLogger(name).level) for name in loggers]
    for logger, _ in found:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in found:
            logger.setLevel(level)


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        words: whether it holds words, which go to the left and wrap between them, instead of numbers.
        spare: columns with the highest are left out first where all do not fit; 0 is always there.
    """

    name: str
    words: bool = False
    spare: int = 0


@dataclass
class Grid:
    """A table whose columns are chosen by the width that there is.

    Attributes:
        rows: their cells; texts are taken as they are, without markup.
        ends: rows with a line below them.
    """

    columns: Sequence[Column]
    rows: list[list[Text]] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)
    ends: set[int] = field(default_factory=set)

    def add(self, *cells: str | Text, style: str = "", end: bool = False) -> None:
        """Add a row."""
        if end:
            self.ends.add(len(self.rows))
        self.rows.append([cell if isinstance(cell, Text) else Text(cell) for cell in cells])
        self.styles.append(style)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        """The table for this width."""
        shown = list(range(len(self.columns)))
        while sum(self._width(i, whole=False) + _GAP for i in shown) + _EDGE > options.max_width:
            spare = max(shown, key=lambda i: self.columns[i].spare)
            if not self.columns[spare].spare:
                break
            shown.remove(spare)
        # Padding on one side of every column: rich's versions count the width of collapsed padding differently.
        table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1, 0, 0))
        room = options.max_width - _EDGE - sum(self._width(i, whole=False) + _GAP for i in shown)
        for i in shown:
            words, least = self.columns[i].words, self._width(i, whole=False)
            # rich would take room from any column of words, and cut off what is left over.
            more = max(0, min(room, self._width(i, whole=True) - least))
            room -= more
            justify: JustifyMethod = "left" if words else "right"
            name = self.columns[i].name
            table.add_column(name, justify=justify, no_wrap=not words, overflow="fold", width=least + more)
        for place, (cells, style) in enumerate(zip(self.rows, self.styles, strict=True)):
            chosen = [cells[i] if i < len(cells) else Text("") for i in shown]
            table.add_row(*chosen, style=style, end_section=place in self.ends)
        yield table

    def _width(self, index: int, *, whole: bool) -> int:
        """Cells of the terminal that a column needs for its longest text, or for the longest word of a text."""
        column = self.columns[index]
        texts = [column.name, *(row[index].plain for row in self.rows if index < len(row))]
        if column.words and not whole:
            texts = [word for text in texts for word in text.split(" ")]
        return max(map(cell_len, texts), default=1)


def ways_of_asking(tokenizer: Any) -> tuple[PromptContext, ...]:
    """The guard's pool of contexts, for models to be asked as it asks them.

    Raises:
        ValueError: if the tokenizer's chat template renders none of them.
    """
    from vocabguard.protect.prompts import render_pool

    return render_pool(tokenizer, ProbeConfig().contexts)


def read_shard(text: str) -> RowShard:
    """``I/N`` of ``--shard``."""
    index, _, count = text.partition("/")
    try:
        return RowShard(int(index), int(count))
    except ValueError as error:
        raise InputError(f"--shard is {text!r}; allowed: I/N, 1/N to N/N") from error
