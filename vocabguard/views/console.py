"""What the terminal shows: a few lines at the start, one a check, two tables at the end."""

from __future__ import annotations

import logging
import os
import textwrap
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from rich import box
from rich.console import Console, OverflowMethod, RenderableType
from rich.table import Table
from rich.text import Text
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from vocabguard.files import one_line
from vocabguard.results import EXPOSURE_CLASSES, CheckResult, Finding, NotApplicable, TokenReport, Transition, Watch
from vocabguard.text import (
    WORST_COLUMNS,
    ReportRow,
    large_groups,
    measured_matrix,
    nothing_found,
    number,
    percent,
    preflight_sentences,
    report_rows,
    token_cells,
    verdict,
    watch_sentences,
)
from vocabguard.vocabulary.labels import label_of

if TYPE_CHECKING:
    from vocabguard.vocabulary.table import VocabTable

logger = logging.getLogger("vocabguard")

_LABEL = "vocabguard"
_GAP = 2
_FILE_WIDTH = 120
_LEVEL_STYLES = {"info": "cyan", "warning": "yellow", "critical": "bold red"}
# A count says more than its class, and terminals are narrow.
_HIDDEN_COLUMNS = frozenset({"class"})
_HIDDEN_IF_NARROW = frozenset({"class", "residual"})
_NARROW = 112
_TEXT_COLUMNS = frozenset({"token", "group", "says instead"})


class ConsoleView:
    """Prints what a run finds, on standard output unless told otherwise; token texts are never read as markup.

    Not enabled, as on processes other than the main one, it prints nothing.
    """

    def __init__(self, console: Console | None = None, enabled: bool = True) -> None:
        self._console = _standard_console() if console is None else console
        self._enabled = enabled
        self._groups: Collection[str] | None = None

    def watch(self, watch: Watch, table: VocabTable) -> None:
        """Say what is watched, and which tokens are never a target of the training data."""
        if not self._enabled:
            return
        self._groups = large_groups(table)
        lines = _labelled()
        for sentence in watch_sentences(watch):
            lines.add_row("" if lines.row_count else _LABEL, self._wrapped(sentence))
        for place, sentence in enumerate(preflight_sentences(watch.preflight, table)):
            lines.add_row("" if place else "preflight", self._wrapped(sentence, "" if place else "bold"))
        self._print("", lines, "")

    def say(self, sentence: str) -> None:
        """Print a line."""
        if self._enabled:
            self._print(self._line(sentence))

    def check(self, result: CheckResult) -> None:
        """Print the verdict, then each alert that has news, with its story."""
        if not self._enabled:
            return
        line = verdict(result, self._groups)
        self._print(self._line(line, bold=line.index(":")), *self._alerts(result.transitions))

    def finding(self, found: Finding) -> None:
        """Print what was found beside the checks."""
        if self._enabled:
            self._print(self._line(f"step {found.step:,}: {found.sentence}"), *self._alerts(found.transitions))

    def _alerts(self, changes: Sequence[Transition]) -> list[RenderableType]:
        """Messages and stories; what several alerts of a check have in common is said once."""
        lines: list[RenderableType] = []
        told: set[str] = set()
        for change in changes:
            lines.append(self._line(change.message, _alert_style(change)))
            # The message says since when.
            known = told if change.story is None else {*told, change.story.since}
            story = [line for line in (change.story.lines if change.story is not None else ()) if line not in known]
            lines += [self._line(f"  {line}") for line in story]
            told.update(story)
        return lines

    def finish(self, result: CheckResult, table: VocabTable, ends: Sequence[str] = ()) -> None:
        """Print the closing tables: all, groups and exposure classes; then the watched and the worst tokens.

        Where nothing was found, one line instead of the tables.

        Args:
            ends: lines below it: where to look, what to do next.
        """
        if not self._enabled:
            return
        if fine := nothing_found(result):
            self._print(self._line(fine, "green"), *map(self._line, ends))
            return
        title = f"{_LABEL}, step {result.step:,}: {_subject(result)}"
        parts: list[RenderableType] = ["", self._text(title, "bold"), self._report(result, table)]
        if result.watched:
            parts += [Text("watched tokens", "bold"), self._tokens(result.watched)]
        if result.worst:
            by = "estimated recall" if result.recall is not None and result.recall.ranks else "cosine"
            parts += [Text(f"worst tokens, by {by}", "bold"), self._tokens(result.worst)]
        if result.firing:
            parts += [self._line(f"Still firing: {', '.join(result.firing)}.", "yellow"), ""]
        self._print(*parts, *map(self._line, ends))

    def _report(self, result: CheckResult, table: VocabTable) -> Table:
        matrix = measured_matrix(result)
        rows = report_rows(result, table.names, matrix)
        sizes = _sizes(result, table)
        probed = any(row.retained is not None for row in rows)
        report = _plain_table()
        report.add_column("")
        for name in ("tokens", "mean", "min", "< 0.95", "< 0.90") + (("retained",) if probed else ()):
            report.add_column(name, justify="right", overflow=self._overflow, no_wrap=True)
        for row, following in zip(rows, (*rows[1:], None), strict=True):
            ends = following is None or following.kind != row.kind
            report.add_row(*self._report_cells(row, sizes, probed), end_section=ends)
        return report

    def _report_cells(self, row: ReportRow, sizes: dict[str, int], probed: bool) -> list[Text]:
        cells = [
            self._text(label_of(row.label), "bold" if row.kind == "all" else ""),
            Text(f"{sizes[row.label]:,}" if row.label in sizes else "", "dim"),
            Text(number(row.mean)),
            Text(number(row.minimum)),
            Text(percent(row.below_95), _lost_style(row.below_95)),
            Text(percent(row.below_90), _lost_style(row.below_90)),
        ]
        lost = None if row.retained is None else 1.0 - row.retained
        return cells + ([Text(percent(row.retained), _lost_style(lost, 0.05, 0.20))] if probed else [])

    def _tokens(self, reports: Sequence[TokenReport]) -> Table:
        narrow = self._console.width < _NARROW
        hidden = _HIDDEN_IF_NARROW if narrow else _HIDDEN_COLUMNS
        shown = [place for place, name in enumerate(WORST_COLUMNS) if name not in hidden]
        tokens = _plain_table()
        for place in shown:
            name = WORST_COLUMNS[place]
            is_text = name in _TEXT_COLUMNS
            tokens.add_column(
                name.replace(" ", "\n"), justify="left" if is_text else "right", overflow=self._overflow, no_wrap=True,
                vertical="bottom", max_width=(14 if narrow else 18) if is_text else None,
            )  # fmt: skip
        for report in reports:
            cells = token_cells(report)
            tokens.add_row(*(self._text(cells[place]) for place in shown))
        return tokens

    def _line(self, sentence: str, style: str = "", bold: int = 0) -> RenderableType:
        """A line with the label before it; in a terminal it wraps beside the label, in a file it stays one line."""
        terminal = self._console.is_terminal
        text = self._wrapped(sentence, style) if terminal else self._text(sentence, style)
        text.stylize("bold", 0, bold)
        if not terminal:
            return Text.assemble(f"{_LABEL} ", text)
        lines = _labelled()
        lines.add_row(_LABEL, text)
        return lines

    def _wrapped(self, sentence: str, style: str = "") -> Text:
        """A sentence broken to the room beside the label; Rich itself would part a number from its % sign."""
        room = max(self._console.width - len(_LABEL) - _GAP, 20)
        joined = sentence.replace(" %", "\xa0%")
        lines = textwrap.fill(joined, room, break_long_words=False, break_on_hyphens=False)
        return self._text(lines.replace("\xa0%", " %"), style)

    @property
    def _overflow(self) -> OverflowMethod:
        """What becomes of a cell without room: Rich ends it by a character that not every encoding has."""
        return "ellipsis" if "…".encode(self._console.encoding, "ignore") else "crop"

    def _text(self, text: str, style: str = "") -> Text:
        """Literal text, with characters that the console's encoding lacks as escapes."""
        encoding = self._console.encoding
        return Text(text.encode(encoding, "backslashreplace").decode(encoding), style)

    def _print(self, *parts: RenderableType) -> None:
        try:
            # A trainer's progress bar on the same terminal is cleared first and drawn again afterwards.
            with tqdm.external_write_mode(file=self._console.file):
                for part in parts:
                    self._console.print(part, highlight=False, soft_wrap=isinstance(part, Text))
        except (OSError, ValueError) as error:
            # Closed, a broken pipe, a full disk, an encoding that lacks a character: the run log has it all.
            self._enabled = False
            logger.warning("vocabguard: the console view is off from now on: %s", one_line(error))


class _PatientConsole(Console):
    """Raises what rich would end the process for: a training goes on without a reader."""

    def on_broken_pipe(self) -> None:
        """Raise the `BrokenPipeError` that rich has just caught."""
        raise  # noqa: PLE0704


def _standard_console() -> Console:
    console = _PatientConsole()
    if console.is_terminal or console.is_jupyter or "COLUMNS" in os.environ:
        return console
    # Rich assumes 80 columns where there is no terminal, which a log file does not need.
    return _PatientConsole(width=_FILE_WIDTH)


def _labelled() -> Table:
    lines = Table.grid(padding=(0, _GAP, 0, 0))
    lines.add_column(style="cyan", no_wrap=True, min_width=len(_LABEL))
    lines.add_column(overflow="fold")
    return lines


def _plain_table() -> Table:
    return Table(box=box.SIMPLE_HEAD, header_style="dim", collapse_padding=True, pad_edge=False)


def _subject(result: CheckResult) -> str:
    """What the rows of the closing table are about."""
    matrix = measured_matrix(result)
    if matrix is not None:
        return f"live {'rows of the head' if matrix == 'head' else 'input embedding rows'} against the baseline"
    reason = result.head.reason if isinstance(result.head, NotApplicable) else ""
    return f"row drift not applicable: {reason}"


def _alert_style(change: Transition) -> str:
    return "green" if change.state == "resolved" else _LEVEL_STYLES.get(change.level, "yellow")


def _sizes(result: CheckResult, table: VocabTable) -> dict[str, int]:
    """Live tokens of all, of each group and of each exposure class."""
    live = table.live
    groups = torch.bincount(table.group[live].long(), minlength=len(table.names)).tolist()
    sizes = {"all": int(live.sum()), **dict(zip(table.names, groups, strict=True))}
    if isinstance(result.exposure, NotApplicable):
        return sizes
    classes = torch.bincount(result.classes[live].long(), minlength=len(EXPOSURE_CLASSES)).tolist()
    return sizes | dict(zip(EXPOSURE_CLASSES, classes, strict=True))


def _lost_style(share: float | None, notable: float = 0.01, bad: float = 0.10) -> str:
    """Quiet where little is lost, yellow and red where it is more."""
    if share is None or share == 0.0:
        return "dim"
    return "red" if share > bad else "yellow" if share > notable else ""
