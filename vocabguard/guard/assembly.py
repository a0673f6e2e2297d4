"""The parts of one guarded run, put together before anything is hooked or written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vocabguard import collective
from vocabguard.alerts.machine import AlertMachine
from vocabguard.alerts.rules import AlertRule
from vocabguard.guard.arming import Run, arm
from vocabguard.guard.check import Checker
from vocabguard.guard.echoing import EchoSource
from vocabguard.guard.extras import Extras
from vocabguard.guard.faults import Faults
from vocabguard.guard.forecasting import Forecaster
from vocabguard.guard.observe import Observer, Targets
from vocabguard.guard.preflight import wanted_preflight
from vocabguard.guard.probing import Prober, choose_prober
from vocabguard.guard.protection import Protection
from vocabguard.guard.setup import Watched, describe, watch_model
from vocabguard.measure.counter import ExposureCounter
from vocabguard.models import predicts_next
from vocabguard.results import NotApplicable, Preflight, Watch
from vocabguard.settings import GuardConfig


@dataclass(frozen=True)
class Parts:
    """What works while training runs.

    Attributes:
        observer: counts; None where exposure is off.
        checker: measures.
        protection: echo and hold; None where neither is configured.
        flight: what preflight found.
        prober: what probes, or why nothing does.
    """

    observer: Observer | None
    checker: Checker
    protection: Protection | None
    flight: Preflight | NotApplicable
    prober: Prober | NotApplicable

    def describe(self, run_dir: Path | None) -> Watch:
        """What a user is told before step 1."""
        return describe(self.checker.watched, self.flight, self.prober, run_dir, self.notes())

    def notes(self) -> tuple[str, ...]:
        """What a user should know of the parts before step 1."""
        told = self.protection.notes() if self.protection is not None else ()
        return told + (self.checker.extras.notes() if self.checker.extras is not None else ())

    def hook(self, optimizer: Any, faults: Faults, *, hook_model: bool, steps_done: int) -> None:
        """Set all hooks.

        Args:
            optimizer: one, several, or None.
            faults: contains exceptions.
            hook_model: whether batches are counted in the model's forward pass.
            steps_done: optimizer steps that the trainer has behind it.
        """
        if self.observer is None:
            return
        if optimizer is not None:
            optimizers = [optimizer] if hasattr(optimizer, "param_groups") else list(optimizer)
            self.observer.hook_optimizers(optimizers)
            if self.checker.forecaster is not None:
                self.observer.meter = self.checker.forecaster.hook(optimizers, steps_done)
        if self.protection is not None:
            # First, so that the echo mask is out of the batch before anything else sees it.
            self.protection.hook_model(self.checker.model, faults)
        if hook_model:
            self.observer.hook_model(self.checker.model)


def put_together(
    config: GuardConfig,
    rules: Iterable[AlertRule],
    run: Run,
    tokenizer: Any,
    resumed: Mapping[str, Any],
    *,
    hook_model: bool,
    faults: Faults,
    targets: Targets | NotApplicable | None,
    source: EchoSource | None,
) -> Parts:
    """Find what is watched, count targets of the data to come, choose what probes, and build the parts.

    Args:
        config: all settings.
        rules: of alerts.
        run: what is known of the run, without its ``shift`` and ``flight``.
        tokenizer: the model's, or None.
        resumed: the state of an earlier run that goes on, or empty.
        hook_model: whether batches are counted in the model's forward pass.
        faults: contains exceptions.
        targets: the user's extractor, if any, or why labels are no targets of the data here.
        source: of echo rows, where `VocabGuard.collator` was called.

    Raises:
        ConfigError: for settings that do not fit the model, the tokenizer or the data; where echo or hold would be
            wrong, or questions cannot be asked.
    """
    rules = tuple(rules)
    watched = watch_model(run.model, tokenizer, config, resumed)
    shift = config.exposure.shift_labels
    shift = predicts_next(run.model) if shift is None else shift
    flight = wanted_preflight(config, run.dataloader, watched.rows, shift, targets, hook_model, tokenizer)
    prober = choose_prober(run.model, config, tokenizer, watched.table, flight)
    run = replace(run, shift=shift, flight=flight)
    uncounted = targets if isinstance(targets, NotApplicable) else None
    observer = _observer(config, run, watched, faults, targets)
    counter = observer.counter if observer else None
    protection = arm(config, rules, run, watched, counter, source, uncounted)
    if observer is not None:
        observer.protection = protection
    checker = Checker(
        run.model,
        watched,
        counter,
        prober if isinstance(prober, Prober) else None,
        AlertMachine(rules),
        config.drift.chunk_rows,
        config.log.top_k,
        protection=protection,
        uncounted=uncounted,
        extras=Extras(config, run.model, watched.tokenizer),
        total_steps=run.total_steps,
        forecaster=_forecaster(config, run, watched),
    )
    return Parts(observer, checker, protection, flight, prober)


def _forecaster(config: GuardConfig, run: Run, watched: Watched) -> Forecaster | None:
    if not config.forecast.enabled:
        return None
    batches = run.batches_per_step * collective.world_size()
    return Forecaster(watched, run.flight, run.total_steps, batches, run.schedule)


def _observer(
    config: GuardConfig, run: Run, watched: Watched, faults: Faults, targets: Targets | NotApplicable | None
) -> Observer | None:
    """What counts; None where exposure is off, or labels are no targets."""
    if not config.exposure.enabled or isinstance(targets, NotApplicable) or (run.shift is None and targets is None):
        return None
    return Observer(
        ExposureCounter(watched.rows, next(run.model.parameters()).device, watched.tied),
        watched.gradient_matrix,
        shift=bool(run.shift),
        push_every=config.exposure.push_every_n_steps,
        faults=faults,
        targets=targets,
    )
