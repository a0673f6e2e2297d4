"""Where results go: run folder, TensorBoard, console, the rules' actions. Main process only."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from vocabguard import collective
from vocabguard.alerts.notify import Courier, Receiver, TrackioAlerts, WandbAlerts, Webhook, dispatch
from vocabguard.alerts.rules import AlertRule
from vocabguard.compare.evidence import unequal
from vocabguard.config import GuardConfig, SinksConfig, webhook_url
from vocabguard.files import why_unwritable, write_file
from vocabguard.installation import missing
from vocabguard.results import CheckResult, Finding, Transition, Watch
from vocabguard.runlog import RunLog, RunWriter, evidence_in, row_vectors, why_unusable
from vocabguard.text import nothing_found
from vocabguard.views.console import ConsoleView
from vocabguard.views.keys import ChosenKeys
from vocabguard.views.tensorboard import TensorBoardView, open_view
from vocabguard.vocabulary.table import GROUPS, VocabTable

logger = logging.getLogger("vocabguard")

_NO_PRINT = logging.NullHandler()


_RUN_FOLDER = "vocabguard"

NEWEST_PAGE = "vocabguard-newest.html"
"""In an output folder with several runs, a copy of the newest one's page."""


def free_folder(folder: Path) -> Path:
    """`folder`, or the first of ``folder-2``, ``folder-3``, ... that holds no run yet."""
    candidate, number = folder, 2
    while (candidate / "run.json").exists():
        candidate = folder.with_name(f"{folder.name}-{number}")
        number += 1
    return candidate


def earlier_run(folder: Path) -> Path | None:
    """The folder of an earlier run because of which `free_folder` chose this one; None where it was free."""
    stem, dash, number = folder.name.rpartition("-")
    if not dash or not number.isdecimal() or (folder / "run.json").exists():
        return None
    earlier = folder.with_name(stem)
    return earlier if (earlier / "run.json").exists() else None


def choose_folder(resumed: str | None, suggested: str | Path | None) -> Path | None:
    """The folder of the run that goes on, else a free one by the suggested name; None where nothing can be written."""
    folder = Path(resumed) if resumed else None if suggested is None else free_folder(Path(suggested))
    if resumed and folder is not None and collective.is_main() and (reason := why_unusable(folder, GROUPS)) is not None:
        damaged, folder = folder, free_folder(folder)
        logger.warning("vocabguard: %s: the run log goes on in %s, the old one stays in %s", reason, folder, damaged)
    if folder is not None and collective.is_main() and (reason := why_unwritable(folder)) is not None:
        logger.warning("vocabguard: no run log is kept, the console alone reports: %s", reason)
        folder = None
    return collective.agree(folder)


def choose_courier(sinks: SinksConfig, folder: Path | None) -> Courier:
    """What carries news of alerts beyond this machine; without a receiver it does nothing."""
    hook, url = sinks.webhook, webhook_url(sinks.webhook)
    receivers: list[Receiver] = [WandbAlerts()] if sinks.wandb else []
    receivers += [TrackioAlerts()] if sinks.trackio else []
    if url is not None:
        run = "" if folder is None else str(folder)
        receivers.append(
            Webhook(url, run, timeout=hook.timeout, retries=hook.retries, backoff=hook.backoff, form=hook.format)
        )
    return Courier(receivers, least_level=sinks.least_level, waiting=sinks.waiting, finish_seconds=sinks.finish_seconds)


def without_secrets(config: GuardConfig) -> dict[str, Any]:
    """The settings as a mapping that may be written down: of a webhook's address, only its host."""
    plain = asdict(config)
    if config.sinks.webhook.url is not None:
        plain["sinks"]["webhook"]["url"] = f"{urlsplit(config.sinks.webhook.url).hostname}/..."
    return plain


T = TypeVar("T")
_NO_MORE = "vocabguard: nothing more is written to %s (%s); the guard works on"


def _note(log: RunWriter, found: Finding) -> None:
    for line in found.lines:
        log.note(found.kind, found.step, line)
    log.alerts(found.transitions)


def _show(board: TensorBoardView, found: Finding) -> None:
    board.finding(found)


class Reporter:
    """Hands each result to every view.

    Args:
        rules: whose actions are run.
        folder: of the run log; None writes none.
        writer: a TensorBoard ``SummaryWriter`` of the trainer's; None opens one in the folder.
    """

    def __init__(
        self, config: GuardConfig, table: VocabTable, rules: Iterable[AlertRule], folder: Path | None,
        writer: Any = None,
    ) -> None:  # fmt: skip
        main = collective.is_main()
        self._config, self._writer, self._table, self._rules, self._main = config, writer, table, tuple(rules), main
        self._courier = choose_courier(config.sinks, folder) if main else None
        self._console = ConsoleView(enabled=main and config.log.console)
        if main and config.log.console:
            # Without handlers of the user's, logging would print to the terminal what the console view shows there.
            logging.getLogger("vocabguard.alerts").addHandler(_NO_PRINT)
        self._log = RunWriter(folder) if main and folder is not None else None
        self._earlier = None if folder is None else earlier_run(folder)
        self._folder = folder
        self._board = self._open_board()
        self._checks = 0
        self._rows_written: int | None = None

    def watch(
        self, watch: Watch, origin: Mapping[str, Any] | None = None, evidence: Mapping[str, Any] | None = None
    ) -> None:
        """Say what is watched, before step 1.

        Args:
            origin: of the run, see `vocabguard.guard.origin.origin_of`.
            evidence: of the run, see `vocabguard.compare.evidence.evidence_of_run`.
        """
        if self._log is not None:
            self._tell_other(self._log.folder, evidence or {})
            self._log.start(without_secrets(self._config), watch, self._table.names, origin, evidence)
            self._log.texts(self._table.texts)
        if self._board is not None:
            self._board.watch(watch)
        self._console.watch(watch, self._table)
        if self._earlier is not None:
            self._console.say(
                f"{self._earlier} holds an earlier run, so this one is logged in {self._folder}. To continue the "
                "earlier one, resume the training from its checkpoint."
            )

    @staticmethod
    def _tell_other(folder: Path, evidence: Mapping[str, Any]) -> None:
        """Warn where the run that goes on in a folder was begun with another tokenizer or base."""
        before = evidence_in(folder) or {}
        for why in (unequal(before, evidence, what) for what in ("tokenizer", "base")):
            if why:
                logger.warning("vocabguard: the run in %s was begun with %s than it goes on with", folder, why)

    def say(self, sentence: str) -> None:
        """Print a line."""
        self._console.say(sentence)

    def check(self, result: CheckResult, table: VocabTable) -> None:
        """Pass one check on, and run the actions of its alerts. `table`: of as many rows as the result has now."""
        if not self._main:
            return
        if table is not self._table:
            self._take(table)
        every = self._config.log.rows_every_n_checks
        self._write(lambda log: log.check(result))
        if every and self._checks % every == 0:
            self._rows(result)
        self._draw(lambda board: board.check(result))
        self._console.check(result)
        self.findings(result.findings)
        self._checks += 1
        self._act(result.transitions)

    def _act(self, transitions: Sequence[Transition]) -> None:
        """Send news of alerts on their way, and run actions; one of a user's that fails is told, the guard goes on."""
        if self._courier is not None:
            for change in transitions:
                self._courier.send(change)
        try:
            dispatch(self._rules, transitions)
        except ExceptionGroup as group:
            if self._config.on_error == "raise":
                raise
            for error in group.exceptions:
                note = " ".join(getattr(error, "__notes__", ()))
                logger.warning("vocabguard: %s: %s, %s; the guard goes on", type(error).__name__, error, note)

    def findings(self, found: Iterable[Finding]) -> dict[str, float]:
        """Pass on what was found beside the checks; gives the logged keys of all of it."""
        scalars: dict[str, float] = {}
        for one in found:
            scalars |= one.scalars
            if not self._main:
                continue
            self._write(partial(_note, found=one))
            self._draw(partial(_show, found=one))
            self._console.finding(one)
            self._act(one.transitions)
        return scalars

    def finish(self, last: CheckResult | None) -> RunLog | None:
        """Write the last rows, show the closing tables, close what is ours.

        Returns:
            The run log, opened for reading; None where none was written.
        """
        if last is not None and self._main and self._log is not None and self._rows_written != last.step:
            self._rows(last)
        if self._courier is not None:
            self._courier.close()
        if self._board is not None:
            self._board.close()
        log = None if self._log is None else RunLog.open(self._log.folder)
        page = self._page(log) if log is not None and last is not None and self._config.log.report else None
        if last is not None and self._main:
            self._console.finish(last, self._table, [] if log is None else self._ends(log, page, last))
        return log

    def _ends(self, log: RunLog, page: Path | None, last: CheckResult) -> list[str]:
        """Where to look now, and the next commands."""
        from vocabguard.report.commands import after_run

        lost = last.scalars.get("vocabguard/probe/retained", 1.0) < 1
        lines = [] if page is None else [f"Page: {page}"]
        found = after_run(log.folder, log.meta.get("origin"), lost=lost)
        return [*lines, *(one.line for one in (found[:1] if nothing_found(last) else found))]

    def _write(self, write: Callable[[RunWriter], object]) -> None:
        """Write to the run folder; where that fails, as on a full disk, the rest of the run is not logged there."""
        if self._log is not None and not self._done(self._log.folder, write, self._log):
            self._log = None

    def _draw(self, draw: Callable[[TensorBoardView], object]) -> None:
        """Write to TensorBoard; where that fails, the rest of the run is not shown there."""
        if self._board is not None and not self._done("TensorBoard's files", draw, self._board):
            self._board = None

    def _done(self, where: object, write: Callable[[T], object], to: T) -> bool:
        """Whether something could be written; where not, it is told."""
        try:
            write(to)
        except OSError as error:
            if self._config.on_error == "raise":
                raise
            logger.warning(_NO_MORE, where, error)
            return False
        return True

    def _page(self, log: RunLog) -> Path | None:
        """The report page; a run is not blamed for it."""
        # Imported here: a run without the page need not wait for the templates.
        from vocabguard.report.page import write_report

        try:
            page = write_report(log, log.folder / "report.html", text=self._table.text)
            if log.folder.name.startswith(f"{_RUN_FOLDER}-"):
                # A rerun: who opens the page at the usual place sees the newest run, too.
                write_file(log.folder.with_name(NEWEST_PAGE), page.read_bytes())
            return page
        except Exception as error:
            logger.warning("vocabguard: no report.html could be written: %s: %s", type(error).__name__, error)
            return None

    def _open_board(self) -> TensorBoardView | None:
        if not (self._main and self._config.log.tensorboard):
            return None
        log = self._config.log
        options: dict[str, Any] = {
            "table": self._table, "histogram": log.histogram, "chosen": ChosenKeys(log.keys),
        }  # fmt: skip
        if self._writer is not None:
            return TensorBoardView(self._writer, **options)
        if self._folder is None:
            return None
        try:
            return open_view(self._folder, **options)
        except ModuleNotFoundError as error:
            need = missing("tensorboard", "vocabguard's TensorBoard view")
            logger.warning('vocabguard: %s (or log={"tensorboard": False}); the run goes on without it', need)
            logger.debug("tensorboard could not be imported", exc_info=error)
            return None

    def _take(self, table: VocabTable) -> None:
        """Go on with a table of other rows; TensorBoard's view holds the one it was made with."""
        self._table = table
        if self._board is not None:
            self._board.close()
            self._board = self._open_board()

    def _rows(self, result: CheckResult) -> None:
        self._write(lambda log: log.rows(result.step, row_vectors(result, self._table.group, self._table.live)))
        self._rows_written = result.step
