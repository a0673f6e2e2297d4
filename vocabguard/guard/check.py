"""One check: measure everything that is due, once, and put it into one `CheckResult`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from vocabguard import collective
from vocabguard.alerts.machine import AlertMachine
from vocabguard.forecasts import Forecast
from vocabguard.guard import summary
from vocabguard.guard.extras import Extras
from vocabguard.guard.forecasting import Forecaster
from vocabguard.guard.probing import Prober
from vocabguard.guard.protection import Protection
from vocabguard.guard.setup import Watched, vocabulary_rows
from vocabguard.guard.telling import Teller
from vocabguard.matrices import VocabMatrix
from vocabguard.measure.counter import ExposureCounter
from vocabguard.measure.drift import measure_drift
from vocabguard.measure.exposure import exposure_classes
from vocabguard.models import no_tokens
from vocabguard.results import CheckResult, Exposure, Finding, MatrixName, NotApplicable, ProbeResult, RowDrift
from vocabguard.sharded import reshard
from vocabguard.transitions import Transition

Moment = Literal["evaluation", "end"]
"""When more is looked at than a check does."""


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
        forecaster: says where the rows will end; None where that is off.
        total_steps: planned optimizer steps, if known.
        pending: what rules have asked of the trainer and nobody has taken yet.
        groups: (V,) bool masks by script group.
        group_rows: live rows of each.
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
    forecaster: Forecaster | None = None
    total_steps: int | None = None
    pending: list[str] = field(default_factory=list)
    groups: dict[str, Tensor] = field(init=False)
    group_rows: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self._regroup()

    def _regroup(self) -> None:
        self.groups = summary.group_masks(self.watched.table)
        self.group_rows = {name: int((mask & self.watched.table.live).sum()) for name, mask in self.groups.items()}

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
            drifts, exposure, classes, probes,
            live=self.watched.table.live, groups=self.groups, watched=self._watch_list,
        )  # fmt: skip
        scalars[summary.PREFIX + "overhead"] = overhead
        if self.protection is not None:
            scalars |= self.protection.scalars(exposure, self.watched.table.live)
        forecast = self._forecast(step, drifts["head"], exposure)
        if isinstance(forecast, Forecast):
            scalars |= summary.forecast_scalars(forecast, classes, self.watched.table.live, self.groups)
        base, now = probes or (None, None)
        result = CheckResult(
            step, drifts["head"], drifts["embedding"], exposure, classes, now,
            # Times differ between processes, and all must judge alike.
            collective.agree(scalars), base_probe=base, forecast=forecast,
        )  # fmt: skip
        result = self._told(self._judged(result))
        findings = self.extras.at_check(self, step, drifts) if self.extras is not None else ()
        seconds = time.perf_counter() - began
        self.check_seconds = seconds - (self.probe_seconds if probes else 0.0)
        return replace(result, findings=findings, seconds=seconds)

    def _forecast(
        self, step: int, drift: RowDrift | NotApplicable, exposure: Exposure | NotApplicable
    ) -> Forecast | NotApplicable:
        if self.forecaster is None:
            return NotApplicable("the forecast is off")
        return self.forecaster.at(step, drift, exposure)

    def _judged(self, found: CheckResult) -> CheckResult:
        """With what the rules say of it."""
        transitions = self._follow(found, found.scalars)
        scalars = {**found.scalars, **self.alerts.scalars()}
        requests = self.alerts.requests(transitions)
        return replace(found, scalars=scalars, transitions=transitions, firing=self.alerts.firing, requests=requests)

    def _follow(
        self, found: CheckResult, scalars: Mapping[str, float], *, evaluation: bool = False
    ) -> tuple[Transition, ...]:
        table = self.watched.table
        transitions = self.alerts.update(found.step, scalars, evaluation=evaluation, rows=self.group_rows)
        self.pending += self.alerts.requests(transitions)
        teller = Teller(found, table, self.groups, self.prober, self.protection, self.total_steps)
        return teller.tell(transitions)

    def _told(self, found: CheckResult) -> CheckResult:
        """With the tables of tokens, and what echo has done."""
        ranked = found.head if isinstance(found.head, RowDrift) else found.embedding
        worst = summary.worst_ids(ranked, self.watched.table.live, self.top_k)
        last_probe = self.prober.last if self.prober else None
        about = (ranked, found.exposure, found.classes, last_probe, self.watched.table, found.step)
        protection = self.protection
        return replace(
            found,
            worst=summary.token_reports(worst, *about),
            watched=summary.token_reports(self._watch_list, *about),
            echo=protection.report(found.exposure, found.classes, self.groups) if protection else None,
        )

    @property
    def _watch_list(self) -> Tensor:
        return self.prober.watched if self.prober else torch.empty(0, dtype=torch.int64)

    def beside(self, at: Moment | None, last: CheckResult) -> tuple[Finding, ...]:
        """What is looked at beside a check at some moment, with what the rules say of it.

        Args:
            at: an evaluation or the end; None looks at nothing.
            last: the check of this step.
        """
        if at is None or self.extras is None:
            return ()
        if at == "end":
            return self.extras.at_end(self, last)
        found = tuple(self._judged_beside(one, last) for one in self.extras.at_evaluation(self, last.step))
        if self.protection is not None:
            self.protection.decide(self.alerts.firing)
        return found

    def _judged_beside(self, found: Finding, last: CheckResult) -> Finding:
        scalars = collective.agree(dict(found.scalars))
        transitions = self._follow(last, scalars, evaluation=True)
        return replace(found, scalars=scalars | self.alerts.scalars(evaluation=True), transitions=transitions)

    def take_requests(self) -> tuple[str, ...]:
        """What rules have asked of the trainer, once. For all processes to call."""
        if not self.pending:
            return ()
        # Where a guard has failed meanwhile nobody asks: no process may stop without the others.
        collective.heed_faults()
        asked, self.pending = tuple(dict.fromkeys(self.pending)), []
        return asked

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
        self._regroup()
        if self.counter is not None and self.counter.rows != rows:
            self.counter.resize(rows)
        if self.forecaster is not None:
            self.forecaster.resize()

    def _drifts(self, unexposed: Tensor) -> dict[MatrixName, RowDrift | NotApplicable]:
        found: dict[MatrixName, RowDrift | NotApplicable] = {}
        reshard(self.model)
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
