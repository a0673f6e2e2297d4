"""One check: measure everything that is due, once, and put it into one `CheckResult`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vocabguard import collective
from vocabguard.alerts.machine import AlertMachine
from vocabguard.alerts.text import About, Scene, Switch, about_of, alert_story
from vocabguard.guard import summary
from vocabguard.guard.evaluations import Evaluations
from vocabguard.guard.forecast import Forecaster
from vocabguard.guard.probe import Prober
from vocabguard.guard.protection import Protection
from vocabguard.guard.recall import RecallEstimator
from vocabguard.guard.reference import Reader
from vocabguard.guard.watched import Watched, vocabulary_rows
from vocabguard.measure.drift import measuring
from vocabguard.measure.exposure import ExposureCounter, exposure_classes
from vocabguard.measure.reference import RARE
from vocabguard.results import (
    CheckResult,
    Exposure,
    Finding,
    Forecast,
    MatrixName,
    NotApplicable,
    ProbeResult,
    Recall,
    RowDrift,
    Transition,
)
from vocabguard.rows.matrices import SomeRows, VocabMatrix
from vocabguard.rows.models import no_tokens
from vocabguard.rows.sharding import Shard, reshard
from vocabguard.text import visible
from vocabguard.vocabulary.table import VocabTable

WORST = 5
"""Tokens that a story names."""

MOST_SHARING = 16
"""Processes that share the reading of a matrix: four messages more take less time then than to read all of it.

A message takes about 0.1 ms a process, a matrix of 1 GiB 20 ms from pinned memory: `tests/README.md`, many hosts.
"""


@dataclass(frozen=True)
class Teller:
    """Tells the stories of one check's alerts.

    Attributes:
        groups: (V,) bool masks by script group.
        prober: of the run, if it is probed.
        protection: echo and hold, where they are part of the run.
    """

    found: CheckResult
    table: VocabTable
    groups: Mapping[str, Tensor]
    prober: Prober | None
    protection: Protection | None
    total: int | None

    def tell(self, changes: Iterable[Transition]) -> tuple[Transition, ...]:
        """The transitions, those that fire with their stories."""
        changes = tuple(changes)
        if not any(change.state == "firing" for change in changes):
            return changes
        scene = self._scene()
        return tuple(self._told(change, scene) if change.state == "firing" else change for change in changes)

    def _told(self, change: Transition, scene: Scene) -> Transition:
        about = about_of(change, scene)
        if about.last == "watch" and self.prober is not None:
            names = self.prober.words_of("lost")
        else:
            names = [self.table.text(token) for token in self._worst(about)]
        return replace(change, story=alert_story(change, scene, [visible(name) for name in names]))

    def _scene(self) -> Scene:
        live, exposure = self.table.live, self.found.exposure
        masks = self._masks
        counted = isinstance(exposure, Exposure)
        unasked = live & (exposure.data_target == 0) if isinstance(exposure, Exposure) else live
        return Scene(
            scalars=self.found.scalars,
            live=int(live.sum()),
            rows={name: int((mask & live).sum()) for name, mask in masks.items()},
            unasked={name: int((mask & unasked).sum()) for name, mask in masks.items()} if counted else {},
            targets=int(exposure.data_target.sum()) if isinstance(exposure, Exposure) else 0,
            total=self.total,
            echo=self._switch("echo"),
            hold=self._switch("hold"),
        )

    @cached_property
    def _masks(self) -> dict[str, Tensor]:
        return {**self.groups, **summary.class_masks(self.found.classes)}

    def _switch(self, kind: str) -> Switch:
        part = None if self.protection is None else getattr(self.protection, "echo" if kind == "echo" else "holder")
        return "absent" if part is None else "on" if part.on else "armed"

    def _worst(self, about: About) -> list[int]:
        """Ids of the worst live tokens concerned, worst first."""
        found = self.found
        mask = self._concerned(about)
        if about.kind == "forgotten":
            return self._forgotten(mask)
        if about.kind == "rare loss" and found.recall is not None and found.recall.ranks:
            rare = torch.stack([self._masks[name] for name in RARE]).any(0)
            return summary.lowest(found.recall.nats, mask & rare, WORST).tolist()
        drift = found.embedding if about.owner == "embedding" else found.head
        drift = found.embedding if isinstance(drift, NotApplicable) else drift
        if isinstance(drift, NotApplicable) or about.kind in ("targets", "confused", "rare loss", "other"):
            return []
        if about.kind == "broken":
            broken = drift.bad if about.last == "nonfinite_rows" else drift.zero
            return (mask & broken).nonzero().flatten()[:WORST].tolist()
        return summary.lowest(self._ranking(about, drift), mask, WORST).tolist()

    def _ranking(self, about: About, drift: RowDrift) -> Tensor:
        if about.owner == "forecast" and isinstance(self.found.forecast, Forecast):
            return self.found.forecast.cosine
        return drift.residual if about.last == "residual_p01" else drift.cosine

    def _concerned(self, about: About) -> Tensor:
        masks = self._masks
        names = (about.last,) if about.kind == "asked" else about.parts
        chosen = [masks[name] for name in names if name in masks]
        return self.table.live & torch.stack(chosen).any(0) if chosen else self.table.live

    def _forgotten(self, mask: Tensor) -> list[int]:
        """Of the lost tokens, those of lowest probability in the last probe."""
        prober = self.prober
        if prober is None or prober.last is None:
            return []
        lost, ids = prober.lost(), prober.last.ids
        lost &= mask[ids]
        return ids[summary.lowest(prober.last.probability.mean(1), lost, WORST)].tolist()


Moment = Literal["evaluation", "end"]
"""When more is looked at than a check does."""


@dataclass
class Checker:
    """Everything that a check measures.

    Attributes:
        counter: counts and gradients; None where exposure is off.
        prober: None where the probe does not apply.
        chunk_rows: matrix rows read at a time.
        protection: echo and hold; None where neither is configured.
        uncounted: why labels are no targets of the data here; None where they are.
        forecaster: says where the rows will end; None where that is off.
        reader: reads the reference text beside each probe; None where that is off or does not apply.
        called: what is asked in the model's place; None asks the model.
        pending: what rules have asked of the trainer and nobody has taken yet.
        recall: carries over what the probe measures to all tokens.
        groups: (V,) bool masks by script group.
    """

    model: nn.Module
    watched: Watched
    counter: ExposureCounter | None
    prober: Prober | None
    alerts: AlertMachine
    chunk_rows: int
    top_k: int
    evaluations: Evaluations
    protection: Protection | None = None
    uncounted: NotApplicable | None = None
    forecaster: Forecaster | None = None
    reader: Reader | None = None
    total_steps: int | None = None
    called: nn.Module | None = None
    pending: list[str] = field(default_factory=list)
    recall: RecallEstimator = field(default_factory=RecallEstimator)
    groups: dict[str, Tensor] = field(init=False)
    group_rows: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self._regroup()

    @property
    def _asked(self) -> nn.Module:
        return self.model if self.called is None else self.called

    def _regroup(self) -> None:
        self.groups = summary.group_masks(self.watched.table)
        self.group_rows = {name: int((mask & self.watched.table.live).sum()) for name, mask in self.groups.items()}

    def run(self, step: int, *, with_probe: bool, overhead: float) -> CheckResult:
        """Measure now. `overhead`: the guard's share of the time so far, in [0, 1]."""
        began = time.perf_counter()
        if with_probe and (self.prober is not None or self.reader is not None):
            # The model of a sharded run talks in its forward pass: no rank may be missing there.
            collective.raise_if_peer_failed()
        self._follow_resize()
        probes = self._probe() if with_probe else None
        read = self.reader.read(self._asked) if with_probe and self.reader is not None else None
        recall = self._recall(probes, read)
        probe_seconds = time.perf_counter() - began if probes or read is not None else 0.0
        exposure = self.exposure()
        classes = self.classes(exposure)
        drifts, exposure = self._measured(self.watched.table.live & (classes == 0), exposure)
        scalars = summary.scalars_of(
            drifts, exposure, classes, probes, live=self.watched.table.live, groups=self.groups,
            sample=self.prober.sample(classes) if self.prober and probes else None,
            look=max(1, self.prober.looks) if self.prober else 1,
        )  # fmt: skip
        if self.prober and probes and self.prober.words:
            scalars |= summary.word_scalars(*(len(self.prober.words_of(kind)) for kind in ("known", "lost")))
        if probes and self.protection is not None and self.protection.echo is not None:
            scalars |= self.evaluations.copies(sharded=self.watched.sharded)
        scalars[summary.PREFIX + "overhead"] = overhead
        if self.reader is not None and read is not None:
            counted = {} if isinstance(exposure, NotApplicable) else summary.class_masks(classes)
            found = self.reader.scalars(read, {**self.groups, **counted})
            scalars |= {summary.PREFIX + key: value for key, value in found.items()}
        if probes and recall is not None:
            counted = {} if isinstance(exposure, NotApplicable) else summary.class_masks(classes)
            scalars |= summary.recall_scalars(recall, self.watched.table.live, {**self.groups, **counted})
        if self.protection is not None:
            scalars |= self.protection.scalars(exposure, self.watched.table.live)
        forecast = self._forecast(step, drifts["head"], exposure)
        if isinstance(forecast, Forecast):
            scalars |= summary.forecast_scalars(forecast, classes, self.watched.table.live, self.groups)
        base, now = probes or (None, None)
        result = CheckResult(
            step, drifts["head"], drifts["embedding"], exposure, classes, now,
            # Times differ between processes, and all must judge alike.
            collective.agree(scalars), base_probe=base, forecast=forecast, recall=recall,
        )  # fmt: skip
        result = self._told(self._judged(result))
        findings = self.evaluations.at_check(step, drifts)
        return replace(result, findings=findings, seconds=time.perf_counter() - began, probe_seconds=probe_seconds)

    def _recall(self, probes: tuple[ProbeResult, ProbeResult] | None, read: Tensor | None) -> Recall | None:
        """The estimate of this check's probe, or of the latest one."""
        if probes is None or self.prober is None:
            return self.recall.last
        text = [self.reader.moments] if self.reader is not None and read is not None else []
        return self.recall.measure([self.prober.moments, *text], *probes, self.watched.rows)

    def _forecast(
        self, step: int, drift: RowDrift | NotApplicable, exposure: Exposure | NotApplicable
    ) -> Forecast | NotApplicable:
        if self.forecaster is None:
            return NotApplicable("the forecast is off")
        return self.forecaster.at(step, drift, exposure)

    def _judged(self, found: CheckResult) -> CheckResult:
        """With what the rules say of it."""
        transitions, requests = self._follow(found, found.scalars)
        scalars = {**found.scalars, **self.alerts.scalars()}
        return replace(found, scalars=scalars, transitions=transitions, firing=self.alerts.firing, requests=requests)

    def _follow(
        self, found: CheckResult, scalars: Mapping[str, float], *, evaluation: bool = False
    ) -> tuple[tuple[Transition, ...], tuple[str, ...]]:
        """What changed by the rules, with the stories, and what they ask of the trainer."""
        table = self.watched.table
        transitions = self.alerts.update(found.step, scalars, evaluation=evaluation, rows=self.group_rows)
        requests = self.alerts.requests(transitions)
        self.pending += requests
        teller = Teller(found, table, self.groups, self.prober, self.protection, self.total_steps)
        return teller.tell(transitions), requests

    def _told(self, found: CheckResult) -> CheckResult:
        """With the tables of tokens, and what echo has done."""
        ranked = found.head if isinstance(found.head, RowDrift) else found.embedding
        worst = summary.worst_ids(ranked, self.watched.table.live, self.top_k, found.recall)
        last_probe = self.prober.last if self.prober else None
        about = (ranked, found.exposure, found.classes, last_probe, self.watched.table, found.step, found.recall)
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
        """
        if at is None:
            return ()
        if at == "end":
            return self.evaluations.at_end(last)
        found = tuple(self._judged_beside(one, last) for one in self.evaluations.at_evaluation(last.step))
        if self.protection is not None:
            self.protection.decide(self.alerts.firing)
        return found

    def _judged_beside(self, found: Finding, last: CheckResult) -> Finding:
        scalars = collective.agree(dict(found.scalars))
        transitions, _ = self._follow(last, scalars, evaluation=True)
        return replace(found, scalars=scalars | self.alerts.scalars(evaluation=True), transitions=transitions)

    def take_requests(self) -> tuple[str, ...]:
        """What rules have asked of the trainer, once. For all processes to call."""
        if not self.pending:
            return ()
        # Where a guard has failed meanwhile nobody asks: no process may stop without the others.
        collective.raise_if_peer_failed()
        asked, self.pending = tuple(dict.fromkeys(self.pending)), []
        return asked

    def exposure(self) -> Exposure | NotApplicable:
        """Counts so far, over all processes."""
        if self.counter is None:
            return self.uncounted or no_tokens(self.model) or NotApplicable("exposure is off")
        return self.counter.exposure()

    @property
    def _gradient_shard(self) -> Shard | None:
        matrix = self.watched.gradient_matrix
        return None if matrix is None else matrix.shard

    def classes(self, exposure: Exposure | NotApplicable) -> Tensor:
        """(V,) uint8 exposure classes; all never where nothing is counted."""
        if isinstance(exposure, NotApplicable):
            return torch.zeros(self.watched.rows, dtype=torch.uint8)
        return exposure_classes(exposure.data_target)

    def state_dict(self) -> dict[str, Any]:
        """Of counts, probe, rules and forecast, by their names; what is off has an empty one."""
        return {
            "exposure": self._counts(),
            "probe": self.prober.state_dict() if self.prober is not None else {},
            "alerts": self.alerts.state_dict(),
            "forecast": self.forecaster.state_dict() if self.forecaster is not None else {},
            "reference": self.reader.state_dict() if self.reader is not None else {},
            "recall": self.recall.state_dict(),
        }

    def _counts(self) -> dict[str, Any]:
        return {} if self.counter is None else self.counter.state_dict(spread=self._gradient_shard is not None)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; call it before the optimizers are hooked."""
        if self.counter is not None and state["exposure"]:
            self.counter.load_state_dict(state["exposure"])
        if self.prober is not None:
            self.prober.load_state_dict(state["probe"])
        self.alerts.load_state_dict(state["alerts"])
        # Where rows were before is told against a baseline that is gone.
        if self.forecaster is not None and state.get("forecast") and "head" not in self.watched.lost:
            self.forecaster.load_state_dict(state["forecast"])
        if self.reader is not None:
            self.reader.load_state_dict(state.get("reference", {}))
        self.recall.load_state_dict(state.get("recall", {}))

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

    def _measured(
        self, unexposed: Tensor, exposure: Exposure | NotApplicable
    ) -> tuple[dict[MatrixName, RowDrift | NotApplicable], Exposure | NotApplicable]:
        """The drift of both matrices, and the exposure with the gradients of all rows, in the same pieces of talk."""
        reshard(self.model)
        works: dict[str, collective.Talk[Any]] = {}
        for name, matrix in self.watched.matrices.items():
            # A tied pair is one matrix, measured once.
            if isinstance(matrix, VocabMatrix) and not (matrix.tied and "head" in works):
                works[name] = self._drift(matrix, unexposed)
        shard = self._gradient_shard
        if self.counter is not None and shard is not None and isinstance(exposure, Exposure):
            works["exposure"] = self.counter.with_gradients(exposure, shard)
        found: dict[str, Any] = dict(zip(works, collective.together(list(works.values())), strict=True))
        drifts = {name: found.get(name) or (matrix if isinstance(matrix, NotApplicable) else found["head"])
                  for name, matrix in self.watched.matrices.items()}  # fmt: skip
        return drifts, found.get("exposure", exposure)

    def _drift(self, matrix: VocabMatrix, unexposed: Tensor) -> collective.Talk[RowDrift]:
        """One matrix; where all processes have the same rows, and are not too many, each reads a share of them."""
        baseline, many = self.watched.baseline_of(matrix.name), collective.world_size() > MOST_SHARING
        if many or matrix.name not in self.watched.alike or matrix.shard is not None:
            return measuring(matrix.at_rest(), baseline, unexposed, self.chunk_rows, shard=matrix.shard)
        mine = SomeRows.share(matrix, collective.rank(), collective.world_size())
        return measuring(mine, baseline, unexposed, self.chunk_rows, shard=mine.shard)

    def _probe(self) -> tuple[ProbeResult, ProbeResult] | None:
        if self.prober is None:
            return None
        now = self.prober.run(self._asked)
        assert self.prober.base is not None
        return self.prober.base, now
