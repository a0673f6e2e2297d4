"""What is looked at beside the checks: answers at evaluations, neighbours, and where forgotten tokens were lost.

Each part stands down by itself where it fails, on all processes together; the guard and the training go on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vocabguard import collective
from vocabguard.guard import summary
from vocabguard.guard.confusing import Confuser, choose_confuser
from vocabguard.matrices import VocabMatrix
from vocabguard.measure.body import End, head_or_body
from vocabguard.measure.neighbors import compare_neighbors
from vocabguard.measure.probe import said
from vocabguard.results import CheckResult, Finding, MatrixName, NotApplicable, RowDrift
from vocabguard.settings import GuardConfig
from vocabguard.views.findings import body_finding, confusion_finding, neighbors_finding

if TYPE_CHECKING:
    from vocabguard.guard.check import Checker

logger = logging.getLogger("vocabguard")

Drifts = Mapping[MatrixName, RowDrift | NotApplicable]

_SHARDED = NotApplicable("the rows are spread over processes")


class Extras:
    """The parts that a configuration asks for.

    Args:
        config: all settings.
        model: the model that is trained.
        tokenizer: its tokenizer, or None.

    Raises:
        ConfigError: for questions that cannot be asked.
    """

    def __init__(self, config: GuardConfig, model: nn.Module, tokenizer: object) -> None:
        self._config = config
        self._confuser = choose_confuser(model, config.confusion, tokenizer)
        self._raise = config.on_error == "raise"
        self._down: set[str] = set()
        self._checks = 0
        self._last_look: int | None = None

    def notes(self) -> tuple[str, ...]:
        """What was asked for and cannot be done, in words."""
        if self._config.confusion.enabled and isinstance(self._confuser, NotApplicable):
            return (f"no answers in many languages: {self._confuser.reason}",)
        return ()

    def at_evaluation(self, checker: Checker, step: int) -> tuple[Finding, ...]:
        """Answers in many languages, if asked for. For all processes to call.

        Args:
            checker: of the run.
            step: the optimizer step.
        """
        confuser = self._confuser
        if not isinstance(confuser, Confuser):
            return ()
        return self._part("confusion", lambda: confusion_finding(step, confuser.ask(checker.model)))

    def at_check(self, checker: Checker, step: int, drifts: Drifts) -> tuple[Finding, ...]:
        """Neighbours, at checks at which they are due. For all processes to call.

        Args:
            checker: of the run.
            step: the optimizer step; at the first check nothing has moved yet.
            drifts: of this check.
        """
        every, number = self._config.neighbors.every_n_checks, self._checks
        self._checks += 1
        return self._neighbors(checker, step, drifts) if every and number and number % every == 0 else ()

    def at_end(self, checker: Checker, last: CheckResult) -> tuple[Finding, ...]:
        """Neighbours, and where forgotten tokens were lost. For all processes to call.

        Args:
            checker: of the run.
            last: its last check; the weights are still those.
        """
        found: tuple[Finding, ...] = ()
        if self._last_look != last.step:
            found = self._neighbors(checker, last.step, {"head": last.head, "embedding": last.embedding})
        if self._config.probe.head_or_body and _forgotten(checker):
            found += self._part("head_or_body", lambda: _body(checker, last.step))
        return found

    def _neighbors(self, checker: Checker, step: int, drifts: Drifts) -> tuple[Finding, ...]:
        if not self._config.neighbors.k:
            return ()
        self._last_look = step
        return self._part("neighbors", lambda: _beside(checker, step, drifts, self._config))

    def _part(self, name: str, look: Callable[[], Finding | NotApplicable | None]) -> tuple[Finding, ...]:
        """One part's finding; none where it is not applicable, or stands down."""
        found: Finding | NotApplicable | None = None
        failed = name in self._down
        if not failed:
            try:
                found = look()
            except Exception as error:
                if self._raise:
                    raise
                failed = True
                logger.warning(
                    "vocabguard: %s stands down, the guard goes on: %s: %s", name, type(error).__name__, error
                )
        if bool(collective.any_of(torch.tensor(failed))):
            self._down.add(name)
            return ()
        if isinstance(found, NotApplicable):
            # Neighbours were asked for; head or body is looked at by itself.
            level = logging.WARNING if name == "neighbors" else logging.INFO
            logger.log(level, "vocabguard: no %s: %s", name, found.reason)
            self._down.add(name)
        return (found,) if isinstance(found, Finding) else ()


def _beside(checker: Checker, step: int, drifts: Drifts, config: GuardConfig) -> Finding | NotApplicable | None:
    """Neighbours of the worst and the watched tokens."""
    name: MatrixName = "head" if isinstance(drifts["head"], RowDrift) else "embedding"
    matrix, table = checker.watched.matrices[name], checker.watched.table
    if isinstance(matrix, NotApplicable):
        return matrix
    if matrix.shard is not None:
        return _SHARDED
    worst = summary.worst_ids(drifts[name], table.live, config.neighbors.rows)
    watched = checker.prober.watched if checker.prober else worst[:0]
    ids = torch.tensor(list(dict.fromkeys([*worst.tolist(), *watched.tolist()])), dtype=torch.int64)
    if not len(ids):
        return None
    baseline = checker.watched.baseline_of(name)
    found = compare_neighbors(matrix, baseline, ids, config.neighbors.k, _nowhere(table.padded, matrix.rows))
    return neighbors_finding(step, name, found, table)


def _nowhere(padded: Tensor, rows: int) -> Tensor:
    """(rows,) bool: rows that stand for no token; a matrix may have other rows than the table."""
    mask = torch.ones(rows, dtype=torch.bool)
    mask[: len(padded)] = padded[:rows]
    return mask


def _forgotten(checker: Checker) -> bool:
    """Whether the last probe found tokens that are forgotten."""
    prober = checker.prober
    if prober is None or prober.base is None or prober.last is None or prober.last is prober.base:
        return False
    return bool((said(prober.base) & ~said(prober.last)).any())


def _body(checker: Checker, step: int) -> Finding | NotApplicable | None:
    """Where the tokens were lost that the last probe no longer found."""
    prober, watched = checker.prober, checker.watched
    assert prober is not None
    assert prober.base is not None
    assert prober.last is not None
    ends: dict[str, End] = {}
    for name, matrix in watched.matrices.items():
        if isinstance(matrix, VocabMatrix) and matrix.shard is not None:
            return _SHARDED
        if isinstance(matrix, VocabMatrix):
            ends[name] = End(matrix.wrapped, watched.baseline_of(name), matrix)
    if "head" not in ends:
        return NotApplicable("the head does not move by itself, so there is no row to put back")
    with prober.timed():
        found = head_or_body(
            checker.model, prober.base, prober.last, prober.contexts, ends["head"], ends.get("embedding"),
            seed=prober.seed, batch_tokens=prober.batch_tokens,
        )  # fmt: skip
    if isinstance(found, NotApplicable):
        return found
    return body_finding(step, found) if len(found.ids) else None
