"""One check: measure everything that is due, once, and put it into one `CheckResult`."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from vocabguard import collective
from vocabguard.alerts.machine import AlertMachine
from vocabguard.guard import summary
from vocabguard.guard.extras import Extras
from vocabguard.guard.probing import Prober
from vocabguard.guard.protection import Protection
from vocabguard.guard.setup import Watched, vocabulary_rows
from vocabguard.matrices import VocabMatrix
from vocabguard.measure.counter import ExposureCounter
from vocabguard.measure.drift import measure_drift
from vocabguard.measure.exposure import exposure_classes
from vocabguard.models import no_tokens
from vocabguard.results import CheckResult, Exposure, Finding, MatrixName, NotApplicable, ProbeResult, RowDrift

logger = logging.getLogger("vocabguard")

Moment = Literal["evaluation", "end"]
"""When more is looked at than a check does."""

_NO_TARGETS = (
    "vocabguard: no target has been counted by step %d, so every token looks as if it never was one. The labels do not "
    "reach the model's forward pass (a custom loss takes them out); tell them by `targets=`, or in the Hugging Face "
    "trainer by `hidden_labels=True`"
)


@dataclass
class Checker:
    """Everything that a check measures.

    Attributes:
        model: the model that is trained.
        watched: matrices, baselines and the table.
        counter: counts and gradients; None where exposure is off.
        prober: None where the probe does not apply.
        alerts: the rules' states.
        chunk_rows: matrix rows read at a time.
        top_k: worst tokens in a result.
        check_seconds: cost of the last check without its probe.
        probe_seconds: cost of the last probe.
        protection: echo and hold; None where neither is configured.
        uncounted: why labels are no targets of the data here; None where they are.
        extras: what is looked at beside.
    """

    model: nn.Module
    watched: Watched
    counter: ExposureCounter | None
    prober: Prober | None
    alerts: AlertMachine
    chunk_rows: int
    top_k: int
    check_seconds: float = 0.0
    probe_seconds: float = 0.0
    protection: Protection | None = None
    uncounted: NotApplicable | None = None
    extras: Extras | None = None
    groups: dict[str, Tensor] = field(init=False)
    _warned: bool = False

    def __post_init__(self) -> None:
        self.groups = summary.group_masks(self.watched.table)

    def run(self, step: int, *, with_probe: bool, overhead: float) -> CheckResult:
        """Measure now.

        Args:
            step: the optimizer step that has just been done.
            with_probe: whether the probe is due.
            overhead: the guard's share of the time so far, in [0, 1].
        """
        began = time.perf_counter()
        # The model of a sharded run talks in its forward pass: no rank may be missing there.
        collective.heed_faults()
        self._follow_resize()
        probes = self._probe() if with_probe else None
        self.probe_seconds = time.perf_counter() - began if probes else self.probe_seconds
        exposure = self.exposure()
        classes = self.classes(exposure)
        drifts = self._drifts(self.watched.table.live & (classes == 0))
        scalars = summary.scalars_of(
            drifts,
            exposure,
            classes,
            probes,
            live=self.watched.table.live,
            groups=self.groups,
            watched=self.prober.watched if self.prober else torch.empty(0, dtype=torch.int64),
        )
        scalars[summary.PREFIX + "overhead"] = overhead
        protection = self.protection
        if protection is not None:
            scalars |= protection.scalars(exposure, self.watched.table.live)
        # Times differ between processes, and all must judge alike.
        scalars = collective.agree(scalars)
        transitions = self.alerts.update(step, scalars)
        scalars[summary.PREFIX + "alerts/firing"] = float(len(self.alerts.firing))
        ranked = drifts["head"] if isinstance(drifts["head"], RowDrift) else drifts["embedding"]
        last_probe = self.prober.last if self.prober else None
        worst = summary.worst_ids(ranked, self.watched.table.live, self.top_k)
        watch_list = self.prober.watched if self.prober else worst[:0]
        about = (ranked, exposure, classes, last_probe, self.watched.table, step)
        worst_reports, watch_reports = summary.token_reports(worst, *about), summary.token_reports(watch_list, *about)
        findings = self.extras.at_check(self, step, drifts) if self.extras is not None else ()
        self._warn_if_silent(step, exposure)
        seconds = time.perf_counter() - began
        self.check_seconds = seconds - (self.probe_seconds if probes else 0.0)
        return CheckResult(
            step=step,
            head=drifts["head"],
            embedding=drifts["embedding"],
            exposure=exposure,
            classes=classes,
            probe=probes[1] if probes else None,
            scalars=scalars,
            transitions=transitions,
            firing=self.alerts.firing,
            worst=worst_reports,
            watched=watch_reports,
            seconds=seconds,
            echo=protection.report(exposure, classes, self.groups) if protection else None,
            base_probe=probes[0] if probes else None,
            findings=findings,
        )

    def beside(self, at: Moment | None, last: CheckResult) -> tuple[Finding, ...]:
        """What is looked at beside a check at some moment.

        Args:
            at: an evaluation or the end; None looks at nothing.
            last: the check of this step.
        """
        if at is None or self.extras is None:
            return ()
        return self.extras.at_end(self, last) if at == "end" else self.extras.at_evaluation(self, last.step)

    def _warn_if_silent(self, step: int, exposure: Exposure | NotApplicable) -> None:
        """Say once that training goes on and no target was ever counted: the labels go another way."""
        if self._warned or isinstance(exposure, NotApplicable) or exposure.steps == 0:
            return
        if not bool((exposure.data_target + exposure.echo_target).any()):
            self._warned = True
            logger.warning(_NO_TARGETS, step)

    def exposure(self) -> Exposure | NotApplicable:
        """Counts so far, over all processes."""
        if self.counter is None:
            return self.uncounted or no_tokens(self.model) or NotApplicable("exposure is off")
        return collective.total_exposure(self.counter.exposure())

    def classes(self, exposure: Exposure | NotApplicable) -> Tensor:
        """(V,) uint8 exposure classes; all never where nothing is counted."""
        if isinstance(exposure, NotApplicable):
            return torch.zeros(self.watched.rows, dtype=torch.uint8)
        return exposure_classes(exposure.data_target)

    def _follow_resize(self) -> None:
        """A matrix resized in mid-run: rows in common go on, new ones start at nothing."""
        rows = vocabulary_rows(self.model, self.watched.matrices)
        if rows == self.watched.rows:
            return
        self.watched.resize(rows)
        self.groups = summary.group_masks(self.watched.table)
        if self.counter is not None and self.counter.rows != rows:
            self.counter.resize(rows)

    def _drifts(self, unexposed: Tensor) -> dict[MatrixName, RowDrift | NotApplicable]:
        found: dict[MatrixName, RowDrift | NotApplicable] = {}
        for name, matrix in self.watched.matrices.items():
            if isinstance(matrix, VocabMatrix):
                # A tied pair is one matrix, measured once.
                known = found.get("head") if matrix.tied else None
                baseline = self.watched.baseline_of(name)
                found[name] = known or measure_drift(matrix, baseline, unexposed, self.chunk_rows, shard=matrix.shard)
            else:
                found[name] = matrix
        return found

    def _probe(self) -> tuple[ProbeResult, ProbeResult] | None:
        if self.prober is None:
            return None
        now = self.prober.run(self.model)
        assert self.prober.base is not None
        return self.prober.base, now
